"""Joint refinement of residual stages: codes by beam search, all centroids re-estimated, again and again.

Axes: N frames, B frames of a block, E dimensions, C centroids, Q stages, W paths of a beam.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from .kmeans import Frames, Workers
from .quantize import ResidualQuantizer

_WIDTH = 5  # of the beam
_ROUNDS = 5
_BEAM_SCORES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """The mean squared error of codes chosen stage by stage, as streams are written, before and after.

    Errors and cluster sizes are those of each refined stage. `after` is the best of the rounds.
    """

    before: float
    after: float
    errors: list[float] = field(repr=False)
    cluster_sizes: list[list[int]] = field(repr=False)

    @property
    def kept(self) -> bool:
        return self.after < self.before


def refine_stages(
    frames: Frames, centroids_QCE: Tensor, codes_NQ: NDArray[np.int32], *, error: float
) -> tuple[Tensor, Refinement]:
    """The best of a few rounds of refinement, `[Q, C, E]`, and what it brought; `codes_NQ` is written to.

    A round finds codes with a beam of five paths, then moves each stage's centroids, given all others', to the mean
    of what those leave. Beam search: Chen et al. 2010; re-estimation: Babenko and Lempitsky 2014. A round that
    does not lower the error of greedy codes from `error` or that of the round before is the last.
    """
    best_QCE, best = centroids_QCE, None
    current_QCE = centroids_QCE.clone()
    with Workers() as workers:
        for _ in range(_ROUNDS):
            _beam_encode(frames, current_QCE, codes_NQ, workers)
            for stage in range(len(current_QCE)):
                current_QCE[stage] = _re_estimate(frames, current_QCE, codes_NQ, stage, workers)
            told = _greedy(frames, current_QCE, workers, before=error)
            if best is not None and told.after >= best.after:
                break
            best_QCE, best = current_QCE.clone(), told
    assert best is not None
    return best_QCE, best


def _beam_encode(frames: Frames, centroids_QCE: Tensor, codes_NQ: NDArray[np.int32], workers: Workers) -> None:
    squares_QC = centroids_QCE.square().sum(dim=2)
    step = max(16, _BEAM_SCORES // (_WIDTH * centroids_QCE.shape[1]))

    def of_block(rows: slice) -> None:
        codes = [beam_search(part_BE, centroids_QCE, squares_QC, _WIDTH) for part_BE in frames.read(rows).split(step)]
        codes_NQ[rows] = torch.cat(codes).numpy()

    for _ in workers.each(of_block, frames.blocks()):
        pass


def beam_search(frames_BE: Tensor, centroids_QCE: Tensor, squares_QC: Tensor, width: int) -> Tensor:
    """Codes `[B, Q]` of the best of `width` paths; with one path those of the greedy search, but for rounding."""
    num, dim = frames_BE.shape
    size = centroids_QCE.shape[1]
    left_BWE = frames_BE[:, None]
    paths_BWQ = torch.empty(num, 1, 0, dtype=torch.int64)
    for centroids_CE, squares_C in zip(centroids_QCE, squares_QC, strict=True):
        errors_BWC = left_BWE.square().sum(dim=2, keepdim=True) - 2 * left_BWE @ centroids_CE.t() + squares_C
        kept = min(width, errors_BWC.shape[1] * size)
        best_BW = errors_BWC.flatten(1).topk(kept, dim=1, largest=False).indices
        parents_BW, codes_BW = best_BW // size, best_BW % size
        left_BWE = left_BWE.gather(1, parents_BW[:, :, None].expand(-1, -1, dim)) - centroids_CE[codes_BW]
        parents_BWQ = paths_BWQ.gather(1, parents_BW[:, :, None].expand(-1, -1, paths_BWQ.shape[2]))
        paths_BWQ = torch.cat([parents_BWQ, codes_BW[:, :, None]], dim=2)
    best_B = left_BWE.square().sum(dim=2).argmin(dim=1)
    return paths_BWQ[torch.arange(num), best_B]


def _re_estimate(
    frames: Frames, centroids_QCE: Tensor, codes_NQ: NDArray[np.int32], stage: int, workers: Workers
) -> Tensor:
    """The means of what the other stages leave, `[C, E]`; centroids without frames stay."""
    others = [other for other in range(len(centroids_QCE)) if other != stage]
    size = centroids_QCE.shape[1]

    def of_block(rows: slice) -> tuple[Tensor, Tensor]:
        block_BE = frames.read(rows)
        codes_BQ = torch.from_numpy(codes_NQ[rows].astype(np.int64))
        for other in others:
            block_BE -= centroids_QCE[other][codes_BQ[:, other]]
        counts_C = codes_BQ[:, stage].bincount(minlength=size)
        order_B = codes_BQ[:, stage].argsort(stable=True)
        return embedding_bag(order_B, block_BE, counts_C.cumsum(dim=0) - counts_C, mode="sum"), counts_C

    total_CE = torch.zeros(centroids_QCE.shape[1:], dtype=torch.float64)
    total_C = torch.zeros(size, dtype=torch.int64)
    for sums_CE, counts_C in workers.each(of_block, frames.blocks()):
        total_CE += sums_CE
        total_C += counts_C
    means_CE = (total_CE / total_C.clamp(min=1)[:, None]).float()
    return torch.where(total_C[:, None] > 0, means_CE, centroids_QCE[stage])


def _greedy(frames: Frames, centroids_QCE: Tensor, workers: Workers, *, before: float) -> Refinement:
    quantizer = ResidualQuantizer(centroids_QCE)
    num_stages, size, _ = centroids_QCE.shape

    def of_block(rows: slice) -> tuple[Tensor, Tensor]:
        block_BE = frames.read(rows)
        codes_QB = quantizer.encode(block_BE)
        errors = []
        for stage, codes_B in enumerate(codes_QB):
            block_BE = block_BE - centroids_QCE[stage][codes_B]
            errors.append(block_BE.square().sum(dim=1).sum(dtype=torch.float64))
        return torch.stack(errors), torch.stack([codes_B.bincount(minlength=size) for codes_B in codes_QB])

    errors_Q = torch.zeros(num_stages, dtype=torch.float64)
    sizes_QC = torch.zeros(num_stages, size, dtype=torch.int64)
    for block_errors_Q, block_sizes_QC in workers.each(of_block, frames.blocks()):
        errors_Q += block_errors_Q
        sizes_QC += block_sizes_QC
    errors_Q /= len(frames)
    return Refinement(
        before=before, after=float(errors_Q[-1]), errors=errors_Q.tolist(), cluster_sizes=sizes_QC.tolist()
    )
