"""HiggsAudio v2's tokenizer (Boson AI 2025): X-Codec at 24 kHz and 25 frames/s, its codes compared in few dimensions.

The HuBERT sees 16 kHz and gives 50 frames a second, of which every second one is taken.

Axes: T frames, D dimensions, E dimensions that codes are compared in, Q stages (codebooks), S codes of one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .latents import with_latents
from .quantize import ResidualQuantizer, relative_gaps
from .spec import FrameRule, StreamSpec
from .tokenizer import Description, TokenizerConfig, TokenizerEntry
from .xcodec_model import (
    LAST_FRAME,
    LONG_AUDIO,
    SEMANTIC_RATE,
    JointCodec,
    Published,
    describe_joint,
    joint_dim,
    open_joint,
)

PUBLISHED = Published(
    spec=StreamSpec(
        tokenizer="higgs-audio-v2",
        sample_rate=24_000,
        decode_sample_rate=24_000,
        hop_length=960,
        window_length=1,
        frame_rule=FrameRule.CEIL,
        num_codebooks=8,  # 2 kbit/s
        codebook_size=1024,
    ),
    weights="eustlb/higgs-audio-v2-tokenizer",
    architecture="higgs_audio_v2_tokenizer",
    model="HiggsAudioV2TokenizerModel",
    codec="higgs-audio-v2/1",
    settings={"sample_rate": 24_000, "semantic_sample_rate": SEMANTIC_RATE, "downsample_factor": 320},
)


class ProjectedQuantizer:
    """Residual quantization: each stage projects what is left to a few dimensions, takes the nearest code there, and
    takes that code, projected back, from what is left.

    As `ResidualQuantizer` compares, of equal ones the first; what is left is kept in float32. Frames are taken in
    blocks counted from the first.
    """

    def __init__(self, stages: Sequence[Any], *, device: str = "cpu") -> None:
        centroids_QSE = torch.stack([stage.codebook.embed for stage in stages])
        self._quantizer = ResidualQuantizer(centroids_QSE, device=device)
        self._into = [(stage.project_in.weight.to(device), stage.project_in.bias.to(device)) for stage in stages]
        vectors = [stage.project_out(codes_SE) for stage, codes_SE in zip(stages, centroids_QSE, strict=True)]
        self._vectors_QSD = torch.stack(vectors).detach().to(device)

    @torch.no_grad()
    def encode(self, frames_TD: Tensor) -> Tensor:
        """Codes `[Q, T]`, int64."""
        codes_QT = torch.empty(len(self._into), frames_TD.shape[0], dtype=torch.int64, device=frames_TD.device)
        block = self._quantizer.block_frames
        for begin in range(0, frames_TD.shape[0], block):
            # a copy of its own: BLAS results may depend on the alignment of what it is given
            left_TD = frames_TD[begin : begin + block].clone(memory_format=torch.contiguous_format)
            for stage, into in enumerate(self._into):
                codes_T = self._quantizer.nearest(functional.linear(left_TD, *into), stage)
                codes_QT[stage, begin : begin + block] = codes_T
                left_TD -= self._vectors_QSD[stage].index_select(0, codes_T)
        return codes_QT

    def gaps(self, frames_TD: Tensor) -> Tensor:
        """How sure each code is, `[Q, T]` float64: see `ResidualQuantizer.gaps`."""
        left_TD = frames_TD.to(torch.float64, copy=True)
        gaps = []
        for stage, codes_T in enumerate(self.encode(frames_TD)):
            weight_ED, bias_E = (each.double() for each in self._into[stage])
            centroids_SE = self._quantizer.centroids_QCD[stage].double()
            gaps.append(relative_gaps(functional.linear(left_TD, weight_ED, bias_E), centroids_SE))
            left_TD -= self._vectors_QSD[stage][codes_T].double()
        return torch.stack(gaps)

    @torch.no_grad()
    def decode(self, codes_KT: Tensor) -> Tensor:
        """Latents `[T, D]` of the first `len(codes)` stages. Fewer stages, lower fidelity."""
        latents_TD = self._vectors_QSD[0][codes_KT[0]]
        for stage, codes_T in enumerate(codes_KT[1:], start=1):
            latents_TD += self._vectors_QSD[stage][codes_T]
        return latents_TD


def describe_higgs(config: TokenizerConfig) -> Description:
    return describe_joint(config, PUBLISHED)


def open_higgs(description: Description, device: str, *, chunk_frames: int = 0) -> JointCodec:
    """The tokenizer that is described; `chunk_frames` other than 0 are for tests."""

    def quantizer(stages: Any) -> ProjectedQuantizer:
        return ProjectedQuantizer(stages, device=device)

    return open_joint(description, PUBLISHED, quantizer, device, chunk_frames=chunk_frames)


ENTRIES = with_latents(
    TokenizerEntry(
        spec=PUBLISHED.spec,
        kind="acoustic",
        about="HiggsAudio v2's tokenizer (Boson AI 2025): X-Codec at 25 frames/s, codes compared in 64 dimensions",
        needs_codebook=False,
        last_frame=LAST_FRAME,
        long_audio=LONG_AUDIO,
        weights=PUBLISHED.weights,
        licence="Boson Higgs Audio 2 Community License",
        describe=describe_higgs,
        open=open_higgs,
    ),
    joint_dim,
)
