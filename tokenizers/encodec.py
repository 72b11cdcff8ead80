"""EnCodec 24 kHz (Defossez et al. 2022, "High Fidelity Neural Audio Compression"): SEANet with an LSTM, residual VQ.

Axes: B segments, N samples, T frames, D dimensions, Q codebooks there are, C codes of one, K codebooks of a stream.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .causal import CausalCodec, Walk
from .codec import codec_fingerprint, find_codec, num_codebooks_of, num_quantizers, product, require_published
from .hub import load_model, remove_weight_norm
from .latents import with_latents
from .quantize import ResidualQuantizer
from .spec import FrameRule, StreamSpec
from .tokenizer import Description, Mode, TokenizerConfig, TokenizerEntry

_WEIGHTS = "facebook/encodec_24khz"
_PUBLISHED = {
    "sampling_rate": 24_000,
    "audio_channels": 1,
    "use_causal_conv": True,
    "pad_mode": "reflect",
    "normalize": False,
    "chunk_length_s": None,
    "norm_type": "weight_norm",
    "trim_right_ratio": 1.0,
}
_SPEC = StreamSpec(
    tokenizer="encodec-24khz",
    sample_rate=24_000,
    decode_sample_rate=24_000,
    hop_length=320,
    window_length=1,
    frame_rule=FrameRule.CEIL,
    num_codebooks=8,  # 6 kbit/s
    codebook_size=1024,
)


class Encodec:
    """The quarters of a transformers `EncodecModel`."""

    def __init__(self, model: Any, *, num_codebooks: int, device: str, mode: Mode = Mode.EXACT) -> None:
        remove_weight_norm(model)
        stages = model.quantizer.layers[:num_codebooks]
        self._quantizer = ResidualQuantizer(torch.stack([stage.codebook.embed for stage in stages]), device=device)
        self._encoder = model.encoder.layers.to(device)
        self._decoder = model.decoder.layers.to(device)
        self._dtype = torch.bfloat16 if mode is Mode.FAST else torch.float32
        for layer in self._encoder:
            if not any(isinstance(module, nn.LSTM) for module in layer.modules()):
                layer.to(self._dtype)

    def latents(self, walk: Walk, waveforms_B1N: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
        return walk.through(self._encoder, waveforms_B1N.to(self._dtype), valid)

    def quantize(self, frames_TD: Tensor) -> Tensor:
        return self._quantizer.encode(frames_TD)

    def gaps(self, frames_TD: Tensor) -> Tensor:
        return self._quantizer.gaps(frames_TD)

    def dequantize(self, codes_KT: Tensor) -> Tensor:
        return self._quantizer.decode(codes_KT)

    def sound(self, walk: Walk, latents_BDT: Tensor) -> Tensor:
        return walk.through(self._decoder, latents_BDT, [latents_BDT.shape[2]] * latents_BDT.shape[0])[0]


def _describe(config: TokenizerConfig) -> Description:
    weights = find_codec(config, default=_WEIGHTS, architecture="encodec")
    require_published(weights, config.tokenizer, _PUBLISHED)
    spec = replace(_SPEC, hop_length=product(weights.config["upsampling_ratios"]))
    num_codebooks = num_codebooks_of(config, num_quantizers(weights, spec), spec.num_codebooks)
    fingerprint = codec_fingerprint(config, "encodec-24khz/1", weights, num_codebooks)
    spec = replace(spec, num_codebooks=num_codebooks, codebook_size=weights.config["codebook_size"])
    return Description(config, spec, fingerprint, weights=weights)


def open_encodec(description: Description, device: str, *, chunk_frames: int = 0) -> CausalCodec:
    """The tokenizer that is described; `chunk_frames` other than 0 are for tests."""
    spec = description.spec
    model = Encodec(
        load_model("EncodecModel", description.weights),
        num_codebooks=spec.num_codebooks,
        device=device,
        mode=description.config.mode,
    )
    chunk_frames = chunk_frames or (_CHUNK_FRAMES if device == "cpu" else _CHUNK_FRAMES_ON_GPU)
    return CausalCodec(model, spec, description.fingerprint, chunk_frames=chunk_frames, device=device)


_CHUNK_FRAMES = 75  # a chunk of the first layers, 32 x 24,000 float32, stays in a core's cache
_CHUNK_FRAMES_ON_GPU = 1_500  # 20 s

ENTRIES = with_latents(
    TokenizerEntry(
        spec=_SPEC,
        kind="acoustic",
        about="EnCodec 24 kHz (Defossez et al. 2022): causal SEANet with an LSTM, residual VQ",
        needs_codebook=False,
        last_frame="each strided layer pads its own input to a whole stride by reflection",
        long_audio="in chunks, all state carried over; exact",
        weights=_WEIGHTS,
        licence="MIT; CC-BY-NC-4.0 up to release 0.1.1",
        modes=(Mode.EXACT, Mode.FAST),
        fast_change="44 % of ids, random weights",
        describe=_describe,
        open=open_encodec,
    )
)
