"""Residual codebooks that follow a codec while it is trained: moving averages, dead codes replaced.

Axes: B recordings, T frames, N frames of a batch, D dimensions, C centroids, Q stages.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .kmeans import Frames, lloyd
from .quantize import ResidualQuantizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaPlan:
    """The shape of the codebooks and how they move; the defaults are SoundStream's."""

    dim: int  # D
    size: int = 1024  # C
    num_stages: int = 8  # Q
    decay: float = 0.99
    epsilon: float = 1e-5  # of the Laplace smoothing
    replace_below: float = 2.0  # frames per batch, as a moving average, under which a code is dead
    drawn_from: tuple[int, ...] = ()  # quantizer dropout: numbers of stages, of which each batch draws one; () is all
    seed: int = 0


class Quantized(NamedTuple):
    """Of frames `[..., D]`: quantized `[..., D]`, codes `[Q', ...]` int64, and the commitment loss, a scalar."""

    quantized: Tensor
    codes: Tensor
    commitment: Tensor


class EmaCodebooks(nn.Module):
    """Residual vector quantization for training: gradients pass straight through, centroids follow moving averages.

    In training a call updates each stage that it uses: n_i <- decay n_i + (1 - decay) |frames of i| and likewise the
    sums m_i; centroid i is m_i over the smoothed n_i, (n_i + epsilon) / (n + C epsilon) n. Codes with n_i under
    `replace_below` become random residuals of the batch. The first batch that reaches a stage starts it by k-means.
    Counts and sums are added over the processes of torch.distributed, and rank 0's random frames are all ranks', so
    codebooks stay the same everywhere. Random draws follow from the seed and the number of calls, both in the state
    that `state_dict` saves: a run that is resumed goes on as if it had not stopped. SoundStream, Zeghidour et al. 2021,
    section III-C; VQ-VAE-2, Razavi et al. 2019; smoothing: van den Oord et al. 2017, appendix A.1.
    """

    centroids: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor
    calls: Tensor

    def __init__(self, plan: EmaPlan) -> None:
        super().__init__()
        self.plan = plan
        shape = (plan.num_stages, plan.size, plan.dim)
        self.register_buffer("centroids", torch.zeros(shape))
        self.register_buffer("counts", torch.zeros(shape[:2]))
        self.register_buffer("sums", torch.zeros(shape))
        self.register_buffer("started", torch.zeros(plan.num_stages, dtype=torch.bool))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, frames: Tensor, *, num_stages: int | None = None, valid: Tensor | None = None) -> Quantized:
        """Quantize frames `[..., D]` with the first `num_stages` stages; in training, learn from them.

        `valid` `[...]` says which frames are none of padding: only those count for the averages and the loss. The loss
        is the mean over stages of the mean squared difference of residual and centroid, whose gradient is the
        residual's. Without `num_stages` training draws one of `plan.drawn_from`, else all are used.
        """
        frames_ND = frames.reshape(-1, self.plan.dim).float()
        used_N = torch.ones(len(frames_ND), device=frames.device) if valid is None else valid.reshape(-1).float()
        drawn = np.random.SeedSequence([self.plan.seed, int(self.calls)]).generate_state(1)
        generator = torch.Generator().manual_seed(int(drawn[0]))
        num_stages = self._num_stages(num_stages, generator)
        known_QN = None if self.training else self._quantizer(num_stages).encode(frames_ND.detach())
        residual_ND, quantized_ND = frames_ND, torch.zeros_like(frames_ND)
        codes, losses = [], []
        for stage in range(num_stages):
            if self.training and not self.started[stage]:
                self._start(stage, residual_ND.detach()[used_N > 0])
            codes_N = self._nearest(stage, residual_ND.detach()) if known_QN is None else known_QN[stage]
            chosen_ND = self.centroids[stage][codes_N]
            if self.training and self.started[stage]:
                self._follow(stage, residual_ND.detach(), codes_N, used_N, generator)
            residual_ND = residual_ND - chosen_ND
            quantized_ND = quantized_ND + chosen_ND
            losses.append((residual_ND.square().mean(dim=1) * used_N).sum() / used_N.sum().clamp(min=1))
            codes.append(codes_N)
        if self.training:
            self.calls += 1
        quantized = (frames_ND + (quantized_ND - frames_ND).detach()).view(frames.shape).to(frames.dtype)
        codes_Q = torch.stack(codes).view(num_stages, *frames.shape[:-1])
        return Quantized(quantized, codes_Q, torch.stack(losses).mean())

    def encode(self, frames: Tensor, *, num_stages: int | None = None) -> Tensor:
        """Codes `[Q', ...]` of frames `[..., D]`, those that a stream of these codebooks gets."""
        codes_QN = self._quantizer(num_stages or self.plan.num_stages).encode(frames.reshape(-1, self.plan.dim).float())
        return codes_QN.view(-1, *frames.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """Frames `[..., D]` of codes `[Q', ...]`."""
        return self._quantizer(len(codes)).decode(codes.reshape(len(codes), -1)).view(*codes.shape[1:], self.plan.dim)

    def to_codebook_tensor(self) -> Tensor:
        """Centroids `[Q, C, D]` float32 on the CPU, a copy."""
        return self.centroids.detach().to("cpu", torch.float32, copy=True)

    def _quantizer(self, num_stages: int) -> ResidualQuantizer:
        return ResidualQuantizer(self.centroids[:num_stages], device=str(self.centroids.device))

    def _num_stages(self, asked: int | None, generator: torch.Generator) -> int:
        if asked is not None or not (self.training and self.plan.drawn_from):
            return asked or self.plan.num_stages
        drawn = torch.randint(len(self.plan.drawn_from), (), generator=generator)
        return self.plan.drawn_from[int(drawn)]

    def _nearest(self, stage: int, frames_ND: Tensor) -> Tensor:
        centroids_CD = self.centroids[stage]
        return torch.addmm(-0.5 * centroids_CD.square().sum(dim=1), frames_ND, centroids_CD.t()).argmax(dim=1)

    def _start(self, stage: int, frames_ND: Tensor) -> None:
        """The centroids of rank 0's frames by k-means, for all ranks; without frames there the next batch starts."""
        centroids_CD = torch.zeros_like(self.centroids[stage])
        if len(frames_ND) and _rank() == 0:
            rng = np.random.default_rng([self.plan.seed, stage])
            centroids_CD = lloyd(Frames(frames_ND.cpu().numpy()), self.plan.size, rng=rng).centroids_CE
        ready = torch.tensor([float(len(frames_ND))])
        sent = _from_rank_0(torch.cat([centroids_CD.cpu().flatten(), ready]).to(self.centroids.device))
        if sent[-1] > 0:
            self.centroids[stage] = sent[:-1].view_as(self.centroids[stage])
            codes_N = self._nearest(stage, frames_ND)
            counts_C = _over_ranks(codes_N.bincount(minlength=self.plan.size).to(self.counts.dtype))
            self.counts[stage] = counts_C
            self.sums[stage] = counts_C[:, None] * self.centroids[stage]
            self.started[stage] = True

    def _follow(
        self, stage: int, frames_ND: Tensor, codes_N: Tensor, used_N: Tensor, generator: torch.Generator
    ) -> None:
        """Move the averages of a stage towards a batch, the centroids with them, and replace dead codes."""
        plan, size = self.plan, self.plan.size
        batch_CD1 = frames_ND.new_zeros(size, plan.dim + 1)
        weighted_ND1 = torch.cat([frames_ND, torch.ones_like(frames_ND[:, :1])], dim=1) * used_N[:, None]
        batch_CD1.index_add_(0, codes_N, weighted_ND1)
        _over_ranks(batch_CD1)
        self.counts[stage].lerp_(batch_CD1[:, -1], 1 - plan.decay)
        self.sums[stage].lerp_(batch_CD1[:, :-1], 1 - plan.decay)
        total = self.counts[stage].sum()
        smoothed_C = (self.counts[stage] + plan.epsilon) / (total + size * plan.epsilon) * total
        self.centroids[stage] = self.sums[stage] / smoothed_C[:, None]
        self._replace_dead(stage, frames_ND[used_N > 0], generator)

    def _replace_dead(self, stage: int, frames_ND: Tensor, generator: torch.Generator) -> None:
        size, least = self.plan.size, self.plan.replace_below
        dead_C = self.counts[stage] < least
        if not dead_C.any():
            return
        offered_CD1 = torch.zeros(size, self.plan.dim + 1, device=frames_ND.device)  # the last column: is it a frame
        if len(frames_ND) and _rank() == 0:
            drawn_C = torch.randperm(len(frames_ND), generator=generator)[:size]
            offered_CD1[: len(drawn_C), :-1] = frames_ND[drawn_C.to(frames_ND.device)]
            offered_CD1[: len(drawn_C), -1] = 1
        offered_CD1 = _from_rank_0(offered_CD1)
        place_C = (dead_C.cumsum(dim=0) - 1).clamp(min=0)  # the n-th dead code takes the n-th frame
        replaced_C = dead_C & (offered_CD1[place_C, -1] > 0)
        frames_CD = offered_CD1[place_C, :-1]
        self.centroids[stage] = torch.where(replaced_C[:, None], frames_CD, self.centroids[stage])
        self.counts[stage] = torch.where(replaced_C, least, self.counts[stage])
        self.sums[stage] = torch.where(replaced_C[:, None], least * frames_CD, self.sums[stage])


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _num_ranks() > 1 else 0


def _over_ranks(values: Tensor) -> Tensor:
    if _num_ranks() > 1:
        dist.all_reduce(values)
    return values


def _from_rank_0(values: Tensor) -> Tensor:
    if _num_ranks() > 1:
        dist.broadcast(values, src=0)
    return values
