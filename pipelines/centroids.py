"""Centroids from elsewhere, as published units come: `.npy` files, pickled k-means, FAISS indexes; and back.

Axes: Q stages, C centroids, D dimensions.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..tokenizers.codebook import Codebook
from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import Description
from .faiss_file import flat_index_bytes, is_faiss, read_flat_index
from .pickled_kmeans import COMPRESSED, PICKLED, read_pickled_kmeans

_NPY = b"\x93NUMPY"
_MAX_STAGES, _MAX_SIZE = 64, 1 << 20
_SAVE = "Save the centroids as numbers: numpy.save('centroids.npy', kmeans.cluster_centers_.astype('float32'))."


def read_centroids(path: str, described: Description) -> tuple[Tensor, str]:
    """Centroids `[Q, C, D]` float32 of a file, and its SHA-256.

    The file is one of `numpy.save`, `[C, D]` or `[Q, C, D]`; a KMeans or MiniBatchKMeans of scikit-learn that pickle or
    joblib wrote; a flat index of FAISS. Raises `UserError` unless it holds finite numbers that fit the features that
    are described. Nothing in it is executed.
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
        if begin.startswith((PICKLED, *COMPRESSED)):
            return read_pickled_kmeans(path)
        if is_faiss(begin):
            return read_flat_index(path)
        if begin != _NPY:
            raise UserError(
                f"{path} is neither an array of numpy.save, a pickled k-means of scikit-learn nor a flat FAISS index. "
                f"{_SAVE}"
            )
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


def export_bytes(codebook: Codebook, path: str, *, name: str) -> bytes:
    """The content of a `.npy` file `[Q, C, D]`, or `[C, D]` of one codebook; or of a flat FAISS index, of one only.

    A spherical codebook becomes an index of inner products, which orders directions as its codes do. Raises `UserError`
    for a path of another kind, and for several codebooks as an index.
    """
    centroids_QCD = codebook.centroids_QCD.numpy()
    stages, suffix = len(centroids_QCD), Path(path).suffix.lower()
    if suffix == ".npy":
        content = io.BytesIO()
        np.save(content, centroids_QCD if stages > 1 else centroids_QCD[0])
        return content.getvalue()
    if suffix not in (".index", ".faiss"):
        raise UserError(f"--to {path!r}: expected SOMETHING.npy, or SOMETHING.index for FAISS.")
    if stages > 1:
        raise UserError(
            f"--to {path!r}: a flat index of FAISS holds one codebook, and {name} has {stages}. Write a .npy file."
        )
    return flat_index_bytes(centroids_QCD[0], inner_product=codebook.spherical)
