"""Frames and codebooks for the benches of quantizers: log-mel speech, fitted codebooks, flips against float64.

Axes: N frames, D dimensions, C centroids, Q stages, M bands, S samples.
"""

from pathlib import Path

import torch
import torchaudio
from speech import read_speech
from torch import Tensor
from wavemill.tokenizers.quantize import ResidualQuantizer

RATE, HOP, STACKED = 16_000, 80, 8
_ROUNDS, _BLOCK = 3, 1_024


def speech_frames(num: int, dim: int, corpus: Path | None = None) -> Tensor:
    """`num` frames of 8 neighbouring log-mel spectra each, every 5 ms, about their mean and of deviation 1 `[N, D]`.

    What repeats, where there is too little speech, has other noise under it.
    """
    samples_S = read_speech(corpus, RATE, duration_s=(num + STACKED + 16) * HOP / RATE)
    samples_S += 1e-3 * torch.randn(samples_S.shape, generator=torch.Generator().manual_seed(0))
    spectra = torchaudio.transforms.MelSpectrogram(RATE, n_fft=1_024, hop_length=HOP, n_mels=dim // STACKED)
    log_mel_NM = spectra(samples_S).clamp_min(1e-6).log().t()
    log_mel_NM = (log_mel_NM - log_mel_NM.mean(dim=0)) / log_mel_NM.std(dim=0)
    return log_mel_NM.unfold(0, STACKED, 1).flatten(1)[:num].contiguous()


def fitted_codebooks(frames_ND: Tensor, *, num_stages: int, size: int) -> Tensor:
    """Centroids `[Q, C, D]` by a few rounds of k-means, each stage of what those before it leave."""
    generator = torch.Generator().manual_seed(1)
    residual_ND, stages = frames_ND.clone(), []
    for _ in range(num_stages):
        centroids_CD = residual_ND[torch.randperm(len(residual_ND), generator=generator)[:size]].clone()
        for _ in range(_ROUNDS):
            codes_N = ResidualQuantizer(centroids_CD[None]).encode(residual_ND)[0]
            counts_C = torch.bincount(codes_N, minlength=size)
            sums_CD = torch.zeros_like(centroids_CD).index_add_(0, codes_N, residual_ND)
            centroids_CD = torch.where(counts_C[:, None] > 0, sums_CD / counts_C[:, None].clamp_min(1), centroids_CD)
        residual_ND -= centroids_CD[ResidualQuantizer(centroids_CD[None]).encode(residual_ND)[0]]
        stages.append(centroids_CD)
    return torch.stack(stages)


def flips(frames_ND: Tensor, centroids_QCD: Tensor, codes_QN: Tensor) -> tuple[int, float]:
    """Frames whose codes are not those of a search in float64 throughout, and the widest gap at a first flip.

    A gap is how much farther the chosen centroid is than the nearest, squared and relative.
    """
    num_flipped, widest = 0, 0.0
    for begin in range(0, len(frames_ND), _BLOCK):
        residual_ND = frames_ND[begin : begin + _BLOCK].double()
        alike_N = torch.ones(len(residual_ND), dtype=torch.bool)
        for centroids_CD, codes_N in zip(centroids_QCD.double(), codes_QN[:, begin : begin + _BLOCK], strict=True):
            distances_NC = residual_ND.square().sum(dim=1, keepdim=True) - 2 * residual_ND @ centroids_CD.t()
            distances_NC += centroids_CD.square().sum(dim=1)
            nearest_N = distances_NC.argmin(dim=1)
            flipped_M = (alike_N & (nearest_N != codes_N)).nonzero()[:, 0]
            for frame in flipped_M.tolist():
                nearest, chosen = distances_NC[frame, nearest_N[frame]], distances_NC[frame, codes_N[frame]]
                widest = max(widest, float((chosen - nearest) / nearest))
            num_flipped += len(flipped_M)
            alike_N[flipped_M] = False
            residual_ND -= centroids_CD[nearest_N]
    return num_flipped, widest
