"""Nearest-centroid, residual and product quantization in float32, exact to what float64 says.

Axes: N frames, D dimensions, C centroids, Q stages (codebooks), K codebooks of a stream, E dimensions of a group.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .spec import UserError

_EPSILON = torch.finfo(torch.float32).eps
_COMPARED = 65_536  # numbers of rivals that are compared at a time, in float64: half a megabyte, in a core's cache
BLOCK_FRAMES = 512  # scores of a block, 512 x 1024 float32, stay in a cache
_BLOCK_FRAMES_ON_GPU = 16_384


class ResidualQuantizer:
    """Residual vector quantization: x_1 = x; i_q = argmin_i |x_q - C_q[i]|^2; x_{q+1} = x_q - C_q[i_q].

    One stage is plain k-means assignment. What is left after a stage is kept in float32. Of that, each code is the
    nearest centroid by distances in float64, the first of equal ones, on every machine and whatever else is in flight:
    float32 scores rule out all centroids but those that their rounding could hide, and if more than one is left, their
    distances are compared in float64. A search in float64 throughout differs only where two distances are as good as
    equal, by the roundings of what is left. SoundStream, Zeghidour et al. 2021, section III-C.
    """

    def __init__(self, centroids_QCD: Tensor, *, device: str | torch.device = "cpu") -> None:
        self.centroids_QCD = centroids_QCD.detach().to(device=device, dtype=torch.float32).contiguous()
        self._mean_Q1D = self.centroids_QCD.mean(dim=1, keepdim=True)
        self._centred_QCD = self.centroids_QCD - self._mean_Q1D
        squares_QC = self._centred_QCD.square().sum(dim=2)
        self._bias_QC = -0.5 * squares_QC
        self._longest_Q = squares_QC.amax(dim=1).sqrt()
        self.block_frames = BLOCK_FRAMES if self.centroids_QCD.device.type == "cpu" else _BLOCK_FRAMES_ON_GPU

    @torch.no_grad()
    def encode(self, frames_ND: Tensor) -> Tensor:
        """Codes `[Q, N]`, int64."""
        if frames_ND.device.type == "cuda":
            from . import quantize_triton

            if quantize_triton.is_available(frames_ND.device):
                codes_QN, unsure_N = quantize_triton.encode_residual(frames_ND, self)
                unsure_M = unsure_N.nonzero()[:, 0]
                codes_QN[:, unsure_M] = self._encode(frames_ND[unsure_M])
                return codes_QN
        return self._encode(frames_ND)

    def _encode(self, frames_ND: Tensor) -> Tensor:
        num_stages, size, _ = self.centroids_QCD.shape
        codes_QN = torch.empty(num_stages, frames_ND.shape[0], dtype=torch.int64, device=frames_ND.device)
        room_NC = torch.empty(min(self.block_frames, frames_ND.shape[0]), size, device=frames_ND.device)
        for begin in range(0, frames_ND.shape[0], self.block_frames):
            residual_ND = frames_ND[begin : begin + self.block_frames]
            for stage in range(num_stages):
                codes_N = self.nearest(residual_ND, stage, room_NC)
                codes_QN[stage, begin : begin + self.block_frames] = codes_N
                if stage + 1 < num_stages:
                    taken_ND = self.centroids_QCD[stage].index_select(0, codes_N)
                    residual_ND = torch.sub(residual_ND, taken_ND, out=taken_ND)
        return codes_QN

    def nearest(self, residual_ND: Tensor, stage: int, room_NC: Tensor | None = None) -> Tensor:
        """The nearest centroid of one stage to each of some frames, `[N]`; all are compared at once.

        `room_NC`, of as many rows or more, is overwritten with scores x.c - |c|^2 / 2, of which the highest is nearest.
        They are taken about the centroids' mean: the lengths of x and c are all that rounding depends on.
        """
        num, dim = residual_ND.shape
        centred_ND = residual_ND - self._mean_Q1D[stage]
        scores_NC = None if room_NC is None else room_NC[:num]
        scores_NC = torch.addmm(self._bias_QC[stage], centred_ND, self._centred_QCD[stage].t(), out=scores_NC)
        codes_N, best_N, second_N = _best_two(scores_NC)
        # A sum of n products is off by n u |x| |c| at most, in any order, u being half of epsilon (Higham 2002, section
        # 3.1); that is twice, for two scores, and some more for the roundings of x, c and |c|^2 / 2 before.
        longest = self._longest_Q[stage]
        slack_N = torch.linalg.vector_norm(centred_ND, dim=1).add_(longest).mul_((dim + 8) * _EPSILON * longest)
        bar_N = best_N - slack_N
        unsure_M = (second_N >= bar_N).nonzero()[:, 0]
        if unsure_M.numel():
            rivals_MC = scores_NC[unsure_M] >= bar_N[unsure_M, None]
            rivals_MC.scatter_(1, codes_N[unsure_M, None], True)
            codes_N[unsure_M] = _settle(residual_ND[unsure_M], self.centroids_QCD[stage], rivals_MC)
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

    @torch.no_grad()
    def decode(self, codes_QN: Tensor) -> Tensor:
        """Sum of the centroids of the first `len(codes)` stages, `[N, D]`. Fewer stages, lower fidelity.

        Stage by stage in float32, whatever the machine. Raises `ValueError` for codes that the codebook has not.
        """
        num_stages, size, dim = self.centroids_QCD.shape
        _require_codes(codes_QN, num_stages, size)
        if not codes_QN.shape[0]:
            return self.centroids_QCD.new_zeros(codes_QN.shape[1], dim)
        if codes_QN.device.type == "cuda":
            from . import quantize_triton

            if quantize_triton.is_available(codes_QN.device):
                return quantize_triton.decode_sum(codes_QN, self)
        begins_Q1 = size * torch.arange(codes_QN.shape[0], device=codes_QN.device)[:, None]
        return functional.embedding_bag((codes_QN + begins_Q1).t(), self.centroids_QCD.view(-1, dim), mode="sum")


class GroupedQuantizer:
    """Product quantization: frames are cut into equal parts, and each has a residual quantizer of its own.

    Codes are those of all stages of the first part, then of the second, and so on. Jegou et al. 2011; with two parts of
    one stage each vq-wav2vec (Baevski et al. 2020), with several stages the GRVQ of HiFi-Codec (Yang et al. 2023).
    """

    def __init__(self, centroids_KCE: Tensor, *, groups: int, device: str | torch.device = "cpu") -> None:
        self._parts = [ResidualQuantizer(part_QCE, device=device) for part_QCE in centroids_KCE.chunk(groups)]
        self.num_stages = len(centroids_KCE) // groups

    def encode(self, frames_ND: Tensor) -> Tensor:
        """Codes `[K, N]`, int64."""
        return self._by_part(frames_ND, lambda quantizer, frames_NE: quantizer.encode(frames_NE))

    def gaps(self, frames_ND: Tensor) -> Tensor:
        """`ResidualQuantizer.gaps` of each part, `[K, N]` float64."""
        return self._by_part(frames_ND, lambda quantizer, frames_NE: quantizer.gaps(frames_NE))

    def decode(self, codes_KN: Tensor) -> Tensor:
        """Frames `[N, D]` of the first `len(codes)` codes; a part that none is of is zero."""
        given = list(codes_KN.split(self.num_stages))
        given += [codes_KN[:0]] * (len(self._parts) - len(given))
        parts = [quantizer.decode(codes_QN) for quantizer, codes_QN in zip(self._parts, given, strict=True)]
        return torch.cat(parts, dim=1)

    def _by_part(self, frames_ND: Tensor, of: Callable[[ResidualQuantizer, Tensor], Tensor]) -> Tensor:
        frames_NGE = frames_ND.unflatten(1, (len(self._parts), -1))
        return torch.cat([of(quantizer, frames_NGE[:, group]) for group, quantizer in enumerate(self._parts)])


def open_quantizer(
    centroids_KCE: Tensor, *, groups: int = 1, device: str | torch.device = "cpu"
) -> ResidualQuantizer | GroupedQuantizer:
    """The quantizer of a codebook. Raises `UserError` if its stages cannot be shared out among so many groups."""
    num_codebooks = centroids_KCE.shape[0]
    if groups < 1 or num_codebooks % groups:
        raise UserError(
            f"{num_codebooks} codebooks cannot be shared out among {groups} groups: each group has as many. "
            "Name a number of groups that divides the number of codebooks."
        )
    if groups == 1:
        return ResidualQuantizer(centroids_KCE, device=device)
    return GroupedQuantizer(centroids_KCE, groups=groups, device=device)


def _require_codes(codes_QN: Tensor, num_stages: int, size: int) -> None:
    if codes_QN.shape[0] > num_stages:
        raise ValueError(f"{codes_QN.shape[0]} codes a frame, of a codebook of {num_stages} stages")
    if codes_QN.numel():
        least, most = (int(bound) for bound in codes_QN.aminmax())
        if least < 0 or most >= size:
            raise ValueError(f"codes from {least} to {most}, of a codebook of {size:,}")


def _best_two(scores_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the highest score of each row is, the first of equal ones; the highest; the second highest: `[N]` each.

    The highest are overwritten with minus infinity.
    """
    if scores_NC.device.type == "cpu":  # torch's own takes ten times as long
        codes_N = torch.from_numpy(np.argmax(scores_NC.numpy(), axis=1))
    else:
        codes_N = scores_NC.argmax(dim=1)
    best_N1 = scores_NC.gather(1, codes_N[:, None])
    scores_NC.scatter_(1, codes_N[:, None], -torch.inf)
    return codes_N, best_N1[:, 0], scores_NC.amax(dim=1)


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
    num_pairs = max(1, _COMPARED // frames_MD.shape[1])
    distances = []
    for frames, centroids in zip(frames_P.split(num_pairs), centroids_P.split(num_pairs), strict=True):
        apart_PD = frames_MD.index_select(0, frames).double() - centroids_CD.index_select(0, centroids)
        distances.append(apart_PD.square_().sum(dim=1))  # of equal centroids equal, as a BLAS need not give
    distances_P = torch.cat(distances)
    nearest_M = torch.full((frames_MD.shape[0],), torch.inf, dtype=torch.float64, device=frames_MD.device)
    nearest_M.scatter_reduce_(0, frames_P, distances_P, "amin")
    winners_P = distances_P == nearest_M[frames_P]
    first_M = torch.full_like(nearest_M, centroids_CD.shape[0], dtype=torch.int64)
    return first_M.scatter_reduce(0, frames_P[winners_P], centroids_P[winners_P], "amin")
