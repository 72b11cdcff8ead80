"""X-Codec (Ye et al. 2024, "Codec Does Matter"): DAC's convolutions and a HuBERT or WavLM, joined before a residual VQ.

Axes: see xcodec_model.py.
"""

from typing import Any

import torch

from .latents import with_latents
from .quantize import ResidualQuantizer
from .spec import FrameRule, StreamSpec
from .tokenizer import Description, TokenizerConfig, TokenizerEntry
from .xcodec_model import LAST_FRAME, LONG_AUDIO, JointCodec, Published, describe_joint, joint_dim, open_joint

PUBLISHED = Published(
    spec=StreamSpec(
        tokenizer="xcodec",
        sample_rate=16_000,
        decode_sample_rate=16_000,
        hop_length=320,
        window_length=1,
        frame_rule=FrameRule.CEIL,
        num_codebooks=8,  # 4 kbit/s
        codebook_size=1024,
    ),
    weights="hf-audio/xcodec-hubert-librispeech",
    architecture="xcodec",
    model="XcodecModel",
    codec="xcodec/1",
    settings={"sample_rate": 16_000},
)


def describe_xcodec(config: TokenizerConfig) -> Description:
    return describe_joint(config, PUBLISHED)


def open_xcodec(description: Description, device: str, *, chunk_frames: int = 0) -> JointCodec:
    """The tokenizer that is described; `chunk_frames` other than 0 are for tests."""

    def quantizer(stages: Any) -> ResidualQuantizer:
        return ResidualQuantizer(torch.stack([stage.codebook.embed for stage in stages]), device=device)

    return open_joint(description, PUBLISHED, quantizer, device, chunk_frames=chunk_frames)


ENTRIES = with_latents(
    TokenizerEntry(
        spec=PUBLISHED.spec,
        kind="acoustic",
        about="X-Codec (Ye et al. 2024): DAC's convolutions and a HuBERT's mean layer, joined before a residual VQ",
        needs_codebook=False,
        last_frame=LAST_FRAME,
        long_audio=LONG_AUDIO,
        weights=PUBLISHED.weights,
        licence="MIT",
        describe=describe_xcodec,
        open=open_xcodec,
    ),
    joint_dim,
)
