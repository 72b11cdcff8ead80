"""Fits the codebooks of a stream: one, residual stages, groups. The only file that knows FAISS.

Axes: N frames, D dimensions, E dimensions of a group, C centroids, Q stages of a group, K codebooks, group by group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .kmeans import Clusters, Frames, Workers, distinct_frames, first_centroids, lloyd, num_cores
from .quantize import ResidualQuantizer
from .refine import Refinement, refine_stages
from .spec import UserError
from .spill import reserved

MIN_FRAMES_PER_CENTROID = 39  # FAISS's own advice: fewer, and centroids follow single frames
_ROUNDS_OF_FAISS = 25
_BACKENDS = ("auto", "faiss", "torch")
_LARGEST = 1e18  # of a frame's length: squares of longer ones are past float32


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPlan:
    """What is fitted, and how."""

    size: int  # C
    num_stages: int = 1  # residual stages of each group
    groups: int = 1  # product quantization: D is cut into equal parts
    seed: int = 0
    spherical: bool = False  # directions: frames are divided by their length, and centroids have length one
    refine: bool = False  # fit the stages of a group jointly, where that lowers the error
    backend: str = "auto"  # "torch" or "faiss"; auto is FAISS on GPUs that its build knows, else torch
    device: str = "cpu"


@dataclass(slots=True, kw_only=True)
class Fitted:
    """Codebooks `[K, C, E]` float32, K = groups * num_stages, group by group, and how they came about.

    Of each codebook: the error that it and those before it in its group leave, the mean squared distance of all frames
    (of directions 1 - cos); the inertia of the k-means rounds over all frames; the number of frames of each centroid.
    They are those of the codebooks that are returned, but for curves, which end before the refinement.
    """

    centroids_KCE: Tensor
    errors: list[float] = field(default_factory=list)
    curves: list[list[float]] = field(default_factory=list)
    cluster_sizes: list[list[int]] = field(default_factory=list)
    refinements: list[Refinement] = field(default_factory=list)  # of each group, if it was asked for
    backend: str


def fit(
    frames_ND: NDArray[Any], plan: FitPlan, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Fitted:
    """Codebooks for frames, the same for the same seed on any number of cores.

    Frames may be a memory map: beside the centroids 64 MiB of them and a few blocks are held, and residuals lie in a
    file beside the map. `on_progress` is told how many of the K codebooks are done. Product quantization: Jégou et al.
    2011; residual stages: Zeghidour et al. 2021, section III-C. Raises `UserError` for a plan that nothing fits, fewer
    (distinct) frames than centroids, frames that are not numbers, a backend that is not installed; `RunFailed` without
    room for residuals.
    """
    _require_plan(frames_ND, plan)
    backend = _choose_backend(plan)
    dim = frames_ND.shape[1] // plan.groups
    parts = [
        Frames(frames_ND, slice(group * dim, (group + 1) * dim), directions=plan.spherical)
        for group in range(plan.groups)
    ]
    _require_numbers(Frames(frames_ND))
    for group, part in enumerate(parts):
        _require_distinct(part, plan, group)
    fitted = Fitted(centroids_KCE=torch.empty(plan.groups * plan.num_stages, plan.size, dim), backend=backend)
    for group, part in enumerate(parts):
        first = group * plan.num_stages
        stages_QCE = fitted.centroids_KCE[first : first + plan.num_stages]
        with _room(frames_ND, (len(frames_ND), dim), "float32", wanted=plan.num_stages > 1) as residuals_NE:
            left = part
            for stage in range(plan.num_stages):
                rng = np.random.default_rng([plan.seed, group, stage])
                clusters = _cluster(left, plan, rng, backend)
                stages_QCE[stage] = clusters.centroids_CE
                error, sizes = _subtract(left, clusters.centroids_CE, residuals_NE)
                left = left if residuals_NE is None else Frames(residuals_NE)
                fitted.errors.append(error)
                fitted.curves.append(clusters.curve)
                fitted.cluster_sizes.append(sizes)
                on_progress(first + stage + 1, len(fitted.centroids_KCE))
        if plan.refine:
            _refine(part, plan, first, fitted)
    return fitted


def _cluster(frames: Frames, plan: FitPlan, rng: np.random.Generator, backend: str) -> Clusters:
    if backend == "torch":
        return lloyd(frames, plan.size, rng=rng, device=plan.device)
    return _cluster_with_faiss(frames, plan, rng)


def _cluster_with_faiss(frames: Frames, plan: FitPlan, rng: np.random.Generator) -> Clusters:
    """k-means by FAISS from our first centroids. It takes one array: what is not one yet is written as one."""
    faiss = _faiss()
    array = frames.array_ND
    plain = array.dtype == np.float32 and array.flags.c_contiguous and array.shape[1] == frames.dim
    whole = plain and not frames.directions
    with _room(array, (len(frames), frames.dim), "float32", wanted=not whole) as copy_NE:
        if copy_NE is not None:
            for rows in frames.blocks():
                copy_NE[rows] = frames.read(rows).numpy()
        kmeans = faiss.Kmeans(
            frames.dim,
            plan.size,
            niter=_ROUNDS_OF_FAISS,
            seed=plan.seed,
            spherical=plan.spherical,
            min_points_per_centroid=1,
            max_points_per_centroid=len(frames),  # every frame counts
            gpu=plan.device != "cpu" and faiss.get_num_gpus() > 0,
        )
        with Workers():
            first_CE = first_centroids(frames, plan.size, rng)
        faiss.omp_set_num_threads(num_cores())  # the centroids are the same with any number
        kmeans.train(array if copy_NE is None else copy_NE, init_centroids=first_CE.numpy())
        faiss.omp_set_num_threads(1)  # the OpenMP that encoding runs on is shared
    inertia = np.asarray(kmeans.obj, dtype=np.float64) / len(frames)
    curve = 1 - inertia if plan.spherical else inertia
    return Clusters(torch.from_numpy(np.array(kmeans.centroids)), curve.tolist())


def _subtract(frames: Frames, centroids_CE: Tensor, into_NE: NDArray[np.float32] | None) -> tuple[float, list[int]]:
    """The error that a codebook leaves and the frames of each centroid; what is left of each frame is written."""
    quantizer = ResidualQuantizer(centroids_CE[None])

    def of_block(rows: slice) -> tuple[float, Tensor]:
        block_BE = frames.read(rows)
        codes_1B = quantizer.encode(block_BE)
        block_BE -= quantizer.decode(codes_1B)
        if into_NE is not None:
            into_NE[rows] = block_BE.numpy()
        error = float(block_BE.square().sum(dim=1).sum(dtype=torch.float64))
        return error, codes_1B[0].bincount(minlength=len(centroids_CE))

    error, sizes_C = 0.0, torch.zeros(len(centroids_CE), dtype=torch.int64)
    with Workers() as workers:
        for block_error, block_sizes_C in workers.each(of_block, frames.blocks()):
            error += block_error
            sizes_C += block_sizes_C
    return error / len(frames) / (2 if frames.directions else 1), sizes_C.tolist()


def _refine(frames: Frames, plan: FitPlan, first: int, fitted: Fitted) -> None:
    """Put the refined stages of a group in the place of those from `first` on, if they are better."""
    stages_QCE = fitted.centroids_KCE[first : first + plan.num_stages]
    with _room(frames.array_ND, (len(frames), plan.num_stages), "int32", wanted=True) as codes_NQ:
        assert codes_NQ is not None
        refined_QCE, refinement = refine_stages(frames, stages_QCE, codes_NQ, error=fitted.errors[-1])
    fitted.refinements.append(refinement)
    if refinement.kept:
        stages_QCE.copy_(refined_QCE)
        errors, sizes = refinement.errors, refinement.cluster_sizes
        fitted.errors[first:], fitted.cluster_sizes[first:] = errors, sizes


@contextmanager
def _room(
    frames_ND: NDArray[Any], shape: tuple[int, int], dtype: str, *, wanted: bool
) -> Iterator[NDArray[Any] | None]:
    """An array to write to: in memory, or, if the frames are a memory map, a file beside theirs; None if not wanted."""
    filename = getattr(frames_ND, "filename", None)
    if not wanted:
        yield None
    elif filename is None:
        yield np.empty(shape, dtype)
    else:
        with TemporaryDirectory(dir=Path(filename).parent, prefix="fit-") as folder:
            yield reserved(Path(folder) / "array", shape, dtype)


def _require_plan(frames_ND: NDArray[Any], plan: FitPlan) -> None:
    num, dim = frames_ND.shape
    for value, flag in ((plan.size, "--size"), (plan.num_stages, "--num-codebooks"), (plan.groups, "--groups")):
        if value < 1:
            raise UserError(f"{flag} is {value}; it must be 1 or more.")
    if dim % plan.groups:
        raise UserError(
            f"Frames of {dim:,} dimensions cannot be cut into {plan.groups:,} equal groups. Give --groups that divide "
            f"{dim:,}."
        )
    if plan.spherical and plan.num_stages * plan.groups > 1:
        raise UserError(
            f"A spherical codebook stands alone, but {plan.num_stages} stages of {plan.groups} groups are asked for: "
            "what it leaves of a direction is none. Give --spherical, or --num-codebooks and --groups."
        )
    if num < plan.size:
        raise UserError(
            f"There are {num:,} frames to fit {plan.size:,} centroids on; there must be at least as many frames as "
            "centroids. Give more audio, a larger --budget, or a smaller --size."
        )


def _require_numbers(frames: Frames) -> None:
    def broken(rows: slice) -> tuple[int, int | None]:
        broken_B = ~(frames.read(rows).norm(dim=1) < _LARGEST)
        number = int(broken_B.sum())
        return number, rows.start + int(broken_B.nonzero()[0]) if number else None

    with Workers() as workers:
        found = list(workers.each(broken, frames.blocks()))
    total = sum(number for number, _ in found)
    if total:
        first = next(place for _, place in found if place is not None)
        raise UserError(
            f"{total:,} of {len(frames):,} frames hold NaN, infinity or numbers past {_LARGEST:.0e} (frame {first:,} "
            "first), so the features are broken. Look at the weights of the tokenizer; nothing was fitted."
        )


def _require_distinct(frames: Frames, plan: FitPlan, group: int) -> None:
    found = len(distinct_frames(frames, plan.size))
    if found < plan.size:
        where = f" in group {group + 1} of {plan.groups}" if plan.groups > 1 else ""
        what = "directions" if plan.spherical else "frames"
        raise UserError(
            f"Only {found:,} distinct {what} were found{where} among {len(frames):,}, too few for {plan.size:,} "
            "centroids. Look whether the recordings are silent, give more audio, or a smaller --size."
        )


def require_backend(name: str) -> None:
    """Raise `UserError` for a backend that there is not, or that is not installed."""
    if name not in _BACKENDS:
        raise UserError(f"--backend {name!r} is unknown; there are: {', '.join(_BACKENDS)}.")
    if name == "faiss":
        _faiss()


def _choose_backend(plan: FitPlan) -> str:
    require_backend(plan.backend)
    if plan.backend != "auto":
        return plan.backend
    if plan.device == "cpu":
        return "torch"  # the same centroids whether FAISS is installed or not
    try:
        return "faiss" if _faiss().get_num_gpus() > 0 else "torch"
    except UserError:
        return "torch"


def faiss_version() -> str:
    return _faiss().__version__


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "Fitting a codebook with FAISS needs FAISS, which is not installed: pip install 'wavemill[cpu]' "
            "(or 'wavemill[gpu]' on a machine with a CUDA GPU, never both)."
        ) from error
    return faiss
