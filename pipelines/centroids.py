"""Centroids from elsewhere: the `.npy` files that published units were made with.

Axes: Q stages, C centroids, D dimensions.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import Description

_NPY = b"\x93NUMPY"
_PICKLE = b"\x80"  # of protocol 2 and above
_MAX_STAGES, _MAX_SIZE = 64, 1 << 20
_SAVE = "Save the centroids as numbers: numpy.save('centroids.npy', kmeans.cluster_centers_.astype('float32'))."


def read_centroids(path: str, described: Description) -> tuple[Tensor, str]:
    """Centroids `[Q, C, D]` float32 of a `.npy` file of shape `[C, D]` or `[Q, C, D]`, and the file's SHA-256.

    Raises `UserError` unless they are finite numbers that fit the features that are described. Nothing is unpickled.
    """
    array = _open(path)
    name, dim = described.config.tokenizer, described.dim or 0
    shape = list(array.shape)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise UserError(f"{path} holds {array.dtype.name}; centroids are float16, float32 or float64. {_SAVE}")
    if array.ndim not in (2, 3):
        raise UserError(
            f"{path} holds an array of shape {shape}; expected [centroids, {dim}], or [stages, centroids, {dim}]."
        )
    if array.shape[-1] != dim:
        told = (
            f"{path} has centroids of {array.shape[-1]} dimensions (its shape is {shape}), the features of {name} have"
        )
        raise UserError(f"{told} {dim}. Name the tokenizer and the layer that they were fitted on.")
    size, stages = array.shape[-2], array.shape[0] if array.ndim == 3 else 1
    if not (2 <= size <= _MAX_SIZE and 1 <= stages <= _MAX_STAGES):
        raise UserError(
            f"{path} holds {stages} x {size} centroids (its shape is {shape}); accepted are 2 to {_MAX_SIZE:,} in each "
            f"of 1 to {_MAX_STAGES} stages."
        )
    with np.errstate(over="ignore"):  # beyond float32: infinite, and told below
        centroids_QCD = np.array(array, dtype=np.float32, order="C").reshape(stages, size, dim)
    if not np.isfinite(centroids_QCD).all():
        raise UserError(f"{path} holds centroids that are NaN or infinite in float32. Fit them again.")
    with Path(path).open("rb") as file:
        return torch.from_numpy(centroids_QCD), hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: str) -> np.ndarray:
    """The array of a `.npy` file, not yet read. Raises `UserError` for files that hold none."""
    try:
        with Path(path).open("rb") as file:
            begin = file.read(len(_NPY))
        if begin != _NPY:
            pickled = begin.startswith(_PICKLE)
            what = (
                "is pickled (scikit-learn and joblib do that), which can run code when it is opened" if pickled else ""
            )
            raise UserError(f"{path} {what or 'is no .npy file'}; expected an array that numpy.save wrote. {_SAVE}")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"Cannot read the centroids {path}: {error.strerror or error}.") from error
    except (ValueError, EOFError) as error:
        if "object" in str(error).lower():
            told = (
                f"{path} holds Python objects, which can run code when they are opened; expected an array of numbers."
            )
            raise UserError(f"{told} {_SAVE}") from error
        raise UserError(
            f"{path} cannot be read as a .npy file ({error}). Write it again, or fetch it again."
        ) from error
