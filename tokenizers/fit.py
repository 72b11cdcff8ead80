"""Fits codebooks with FAISS: the only file that knows it."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .quantize import ResidualQuantizer
from .spec import UserError

MIN_FRAMES_PER_CENTROID = 39  # FAISS's own advice: fewer, and centroids follow single frames
_ROUNDS = 25


def fit_residual(
    frames_ND: NDArray[np.float32],
    *,
    num_codebooks: int,
    size: int,
    seed: int,
    on_stage: Callable[[int], None] = lambda stage: None,
) -> tuple[torch.Tensor, list[float]]:
    """Residual k-means: centroids `[Q, C, D]` and the mean squared error left after each stage.

    One stage is plain k-means. Raises `UserError` for fewer frames than centroids or when FAISS is not installed.
    """
    faiss = _faiss()
    num, dim = frames_ND.shape
    if num < size:
        raise UserError(
            f"There are {num:,} frames to fit {size:,} centroids on; there must be at least as many frames as "
            "centroids. Give more audio, a larger --budget, or a smaller --size."
        )
    residual_ND = np.ascontiguousarray(frames_ND, dtype=np.float32).copy()
    centroids_QCD = np.zeros((num_codebooks, size, dim), dtype=np.float32)
    errors = []
    for stage in range(num_codebooks):
        kmeans = faiss.Kmeans(
            dim,
            size,
            niter=_ROUNDS,
            seed=seed + stage,
            min_points_per_centroid=1,
            max_points_per_centroid=num,  # every sampled frame counts
            gpu=faiss.get_num_gpus() > 0,
        )
        faiss.omp_set_num_threads(os.cpu_count() or 1)  # the centroids are the same with any number
        kmeans.train(residual_ND)
        faiss.omp_set_num_threads(1)  # the OpenMP that encoding runs on is shared
        centroids_QCD[stage] = kmeans.centroids
        quantizer = ResidualQuantizer(torch.from_numpy(centroids_QCD[stage : stage + 1]))
        frames = torch.from_numpy(residual_ND)
        residual_ND = (frames - quantizer.decode(quantizer.encode(frames))).numpy()
        errors.append(float(np.square(residual_ND).sum(axis=1).mean()))
        on_stage(stage + 1)
    return torch.from_numpy(centroids_QCD), errors


def faiss_version() -> str:
    return _faiss().__version__


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "Fitting a codebook needs FAISS, which is not installed: pip install 'wavemill[cpu]' "
            "(or 'wavemill[gpu]' on a machine with a CUDA GPU, never both)."
        ) from error
    return faiss
