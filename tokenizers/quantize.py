"""Nearest-centroid and residual quantization in float32.

Axes: N frames, D dimensions, C centroids, Q stages (codebooks), K codebooks of a stream, T frames of a segment.
"""

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float32).eps
_PAIRS = 4_096  # rivals compared at a time
BLOCK_FRAMES = 256  # scores of a block, 256 x 1024 float32, stay in a core's cache
_BLOCK_FRAMES_ON_GPU = 16_384


class ResidualQuantizer:
    """Residual vector quantization: x_1 = x; i_q = argmin_i |x_q - C_q[i]|^2; x_{q+1} = x_q - C_q[i_q].

    One stage is plain k-means assignment. Candidates are scored in float32 as x.c - |c|^2 / 2 about the centroids'
    mean; where that cannot tell the best ones apart, their distances are compared in float64. Ties go to the lowest
    index. Frames are taken in blocks counted from the first frame of the segment, so a segment's
    codes never depend on what else is in flight. SoundStream, Zeghidour et al. 2021, section III-C.
    """

    def __init__(self, centroids_QCD: Tensor, *, device: str = "cpu") -> None:
        self.centroids_QCD = centroids_QCD.to(device=device, dtype=torch.float32).contiguous()
        self._mean_Q1D = self.centroids_QCD.mean(dim=1, keepdim=True)
        self._centred_QCD = self.centroids_QCD - self._mean_Q1D
        squares_QC = self._centred_QCD.square().sum(dim=2)
        self._bias_QC = -0.5 * squares_QC
        self.block_frames = BLOCK_FRAMES if torch.device(device).type == "cpu" else _BLOCK_FRAMES_ON_GPU
        self._longest_Q = squares_QC.amax(dim=1).sqrt()

    def encode(self, frames_ND: Tensor) -> Tensor:
        """Codes `[Q, N]`, int64."""
        num_stages = self.centroids_QCD.shape[0]
        codes_QN = torch.empty(num_stages, frames_ND.shape[0], dtype=torch.int64, device=frames_ND.device)
        for begin in range(0, frames_ND.shape[0], self.block_frames):
            # a copy of its own: BLAS results may depend on the alignment of what it is given
            residual_ND = frames_ND[begin : begin + self.block_frames].clone(memory_format=torch.contiguous_format)
            for stage in range(num_stages):
                codes_N = self.nearest(residual_ND, stage)
                codes_QN[stage, begin : begin + self.block_frames] = codes_N
                residual_ND -= self.centroids_QCD[stage][codes_N]
        return codes_QN

    def nearest(self, residual_ND: Tensor, stage: int) -> Tensor:
        """The nearest centroid of one stage to each of some frames, `[N]`; all are compared at once."""
        centred_ND = residual_ND - self._mean_Q1D[stage]
        scores_NC = torch.addmm(self._bias_QC[stage], centred_ND, self._centred_QCD[stage].t())
        best_N, codes_N = scores_NC.max(dim=1)
        # more than the rounding of a dot product: what lies closer than this to the best may be better
        longest = self._longest_Q[stage]
        slack_N = 16 * _EPSILON * longest * (centred_ND.square().sum(dim=1).sqrt() + longest)
        bar_N = best_N - slack_N
        above_NC = scores_NC.sub_(bar_N[:, None]).clamp_(min=0.0)  # zero but for the best and its rivals
        unsure_M = (above_NC.sum(dim=1) != best_N - bar_N).nonzero()[:, 0]
        if unsure_M.numel():
            codes_N[unsure_M] = _settle(residual_ND[unsure_M], self.centroids_QCD[stage], above_NC[unsure_M] > 0)
        return codes_N

    def gaps(self, frames_ND: Tensor) -> Tensor:
        """How much farther the second nearest centroid is than the nearest, `[Q, N]` float64.

        Distances in float64, relative to the second nearest, along the path of our own codes. Where a gap is
        under 1e-5, rounding that came before the quantizer may let the code fall either way: a near-tie.
        """
        codes_QN = self.encode(frames_ND)
        gaps_QN = torch.empty(codes_QN.shape, dtype=torch.float64, device=frames_ND.device)
        residual_ND = frames_ND.double()
        for stage, codes_N in enumerate(codes_QN):
            centroids_CD = self.centroids_QCD[stage].double()
            gaps_QN[stage] = relative_gaps(residual_ND, centroids_CD)
            residual_ND = residual_ND - centroids_CD[codes_N]
        return gaps_QN

    def decode(self, codes_QN: Tensor) -> Tensor:
        """Sum of the centroids of the first `len(codes)` stages, `[N, D]`. Fewer stages, lower fidelity."""
        frames_ND = torch.zeros(codes_QN.shape[1], self.centroids_QCD.shape[2], device=self.centroids_QCD.device)
        for stage, codes_N in enumerate(codes_QN):
            frames_ND += self.centroids_QCD[stage][codes_N]
        return frames_ND


def relative_gaps(frames_ND: Tensor, centroids_CD: Tensor, *, power: int = 1, least: float = 1e-300) -> Tensor:
    """How much farther the second nearest centroid is, `[N]`, relative to how far it is.

    Of distances, or of their squares with `power` 2; a second nearest that is nearer than `least` counts as that far.
    """
    gaps_N = frames_ND.new_empty(frames_ND.shape[0])
    for begin in range(0, frames_ND.shape[0], BLOCK_FRAMES):
        block_ND = frames_ND[begin : begin + BLOCK_FRAMES]
        distances_NC = torch.cdist(block_ND, centroids_CD, compute_mode="donot_use_mm_for_euclid_dist")
        nearest_N2 = distances_NC.topk(2, dim=1, largest=False).values.pow(power)
        spread_N = nearest_N2[:, 1] - nearest_N2[:, 0]
        gaps_N[begin : begin + BLOCK_FRAMES] = spread_N / nearest_N2[:, 1].clamp_min(least)
    return gaps_N


def _settle(frames_MD: Tensor, centroids_CD: Tensor, rivals_MC: Tensor) -> Tensor:
    """The nearest of each frame's rivals by float64 distances, `[M]`; of equal ones the first."""
    frames_P, centroids_P = rivals_MC.nonzero(as_tuple=True)
    distances_P = torch.cat(
        [
            (frames_MD[frames].double() - centroids_CD[centroids].double()).square().sum(dim=1)
            for frames, centroids in zip(frames_P.split(_PAIRS), centroids_P.split(_PAIRS), strict=True)
        ]
    )
    nearest_M = torch.full((frames_MD.shape[0],), torch.inf, dtype=torch.float64, device=frames_MD.device)
    nearest_M.scatter_reduce_(0, frames_P, distances_P, "amin")
    winners_P = distances_P == nearest_M[frames_P]
    first_M = torch.full_like(nearest_M, centroids_CD.shape[0], dtype=torch.int64)
    return first_M.scatter_reduce(0, frames_P[winners_P], centroids_P[winners_P], "amin")
