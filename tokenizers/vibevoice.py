"""VibeVoice's acoustic tokenizer (Peng et al. 2025, "VibeVoice Technical Report"): causal ConvNeXt blocks, 7.5 Hz.

A variational autoencoder of fixed deviation: a frame is the mean of its latents. The waveform is brought to -25 dB as
the published feature extractor does, and followed by zeros to a whole frame; so sound comes back at that loudness.

Axes: B segments, N positions, C channels, T frames, D dimensions of a latent.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .causal import CausalLatents, Walk
from .codec import find_codec, product
from .hub import Weights, fingerprint_of, load_model
from .latents import CodecLatents
from .log_mel import require_extractor
from .spec import FrameRule, StreamSpec, UserError
from .tokenizer import Description, Output, TokenizerConfig, TokenizerEntry

_WEIGHTS = "microsoft/VibeVoice-AcousticTokenizer"
_EXTRACTOR = {"normalize_audio": True, "target_dB_FS": -25, "eps": 1e-6}  # VibeVoiceAcousticTokenizerFeatureExtractor's
_BLOCK = 1 << 20  # samples that are summed at a time
_SPEC = StreamSpec(
    tokenizer="vibevoice-latents",
    sample_rate=24_000,
    decode_sample_rate=24_000,
    hop_length=3_200,
    window_length=1,
    frame_rule=FrameRule.CEIL,
    num_codebooks=8,
    codebook_size=1024,
)


class VibeVoice:
    """The halves of a transformers `VibeVoiceAcousticTokenizerModel`."""

    def __init__(self, model: Any, *, hop_length: int, device: str) -> None:
        self._hop = hop_length
        for module in model.modules():
            if hasattr(module, "causal_padding"):
                module.pad_mode = "constant"  # which Walk asks for
        self._encoder = model.encoder.to(device)
        self._decoder = model.decoder.to(device)

    def latents(self, walk: Walk, waveforms_B1N: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
        whole = [-(-num // self._hop) * self._hop for num in valid]  # what follows the samples is zero
        x_BCN = waveforms_B1N
        for stage in (self._encoder.stem, *self._encoder.conv_layers):
            x_BCN, whole = walk.convolve(stage.conv, x_BCN, whole)
            x_BCN = _blocks(walk, stage.stage, x_BCN, whole)
        return walk.convolve(self._encoder.head, x_BCN, whole)

    def sound(self, walk: Walk, latents_BDT: Tensor) -> Tensor:
        valid = [latents_BDT.shape[2]] * latents_BDT.shape[0]
        x_BCN, _ = walk.convolve(self._decoder.stem.conv, latents_BDT, valid)
        x_BCN = _blocks(walk, self._decoder.stem.stage, x_BCN, valid)
        for layer in self._decoder.conv_layers:
            x_BCN = walk.upsample(layer.convtr.convtr, x_BCN)
            valid = [x_BCN.shape[2]] * x_BCN.shape[0]
            x_BCN = _blocks(walk, layer.stage, x_BCN, valid)
        return walk.convolve(self._decoder.head, x_BCN, valid)[0]


def _blocks(walk: Walk, blocks: Iterable[Any], x_BCN: Tensor, valid: list[int]) -> Tensor:
    """Through transformers' `VibeVoiceAcousticTokenizerConvNext1dLayer`s."""
    for block in blocks:
        mixed_BCN, _ = walk.convolve(block.mixer, block.norm(x_BCN.transpose(1, 2)).transpose(1, 2), valid)
        x_BCN = x_BCN + mixed_BCN * block.gamma[:, None]
        made_BNC = block.ffn(block.ffn_norm(x_BCN.transpose(1, 2))) * block.ffn_gamma
        x_BCN = x_BCN + made_BNC.transpose(1, 2)
    return x_BCN


def _gain(waveform_N: Tensor, *, target_dB_FS: float, eps: float) -> float:
    """What brings a waveform to the target's root mean square, or only to its peak at 1 if that is less."""
    blocks = waveform_N.split(_BLOCK) if waveform_N.shape[0] else ()
    squares = math.fsum(float(block_N.double().square().sum()) for block_N in blocks)
    gain = 10 ** (target_dB_FS / 20) / (math.sqrt(squares / max(1, waveform_N.shape[0])) + eps)
    peak = gain * max((float(block_N.abs().max()) for block_N in blocks), default=0.0)
    return gain / (peak + eps) if peak > 1.0 else gain


def _describe(config: TokenizerConfig) -> Description:
    weights = find_codec(config, default=_WEIGHTS, architecture="vibevoice_acoustic_tokenizer")
    rate, channels = weights.preprocessor.get("sampling_rate", _SPEC.sample_rate), weights.config["channels"]
    if (rate, channels) != (_SPEC.sample_rate, 1):
        raise UserError(
            f"{weights.name} takes {channels} channel(s) at {rate} Hz; {config.tokenizer} takes 1 at "
            f"{_SPEC.sample_rate} Hz. Name other weights."
        )
    spec = replace(_SPEC, hop_length=product(weights.config["downsampling_ratios"]))
    require_extractor(weights, config.tokenizer, {"pad_to_multiple_of": spec.hop_length})
    fingerprint = {"features": "vibevoice/1", **fingerprint_of(weights), "normalize": "no"}
    loudness = _loudness(weights)
    if loudness is not None:
        fingerprint["normalize"] = f"{loudness['target_dB_FS']:g} dB, {loudness['eps']:g}"
    return Description(config, spec, fingerprint, dim=weights.config["hidden_size"], weights=weights)


def _loudness(weights: Weights) -> dict[str, float] | None:
    """What `_gain` is given; None where the feature extractor leaves the loudness as it is.

    Raises `UserError` for what is no number.
    """
    extractor = {name: weights.preprocessor.get(name, default) for name, default in _EXTRACTOR.items()}
    if not extractor.pop("normalize_audio"):
        return None
    for name, value in extractor.items():
        if not isinstance(value, (int, float)):
            raise UserError(
                f"{weights.name} has a feature extractor with {name} {value!r} (its preprocessor_config.json says so): "
                "expected a number. Fetch it again."
            )
    return extractor


def open_vibevoice(description: Description, device: str, *, chunk_frames: int = 0) -> CodecLatents:
    """The features that are described; `chunk_frames` other than 0 are for tests."""
    weights: Weights = description.weights
    model = load_model("VibeVoiceAcousticTokenizerModel", weights)
    halves = VibeVoice(model, hop_length=description.spec.hop_length, device=device)
    loudness = _loudness(weights)
    codec = CausalLatents(
        halves,
        description.spec,
        chunk_frames=chunk_frames or (_CHUNK_FRAMES if device == "cpu" else _CHUNK_FRAMES_ON_GPU),
        device=device,
        gain=None if loudness is None else partial(_gain, **loudness),
    )
    return CodecLatents(codec, description)


_CHUNK_FRAMES = 15  # 2 s
_CHUNK_FRAMES_ON_GPU = 150  # 20 s

ENTRIES = (
    TokenizerEntry(
        spec=_SPEC,
        kind="acoustic",
        about="VibeVoice's acoustic tokenizer (Peng et al. 2025): causal ConvNeXt, means of continuous latents",
        needs_codebook=True,
        output=Output.FEATURES,
        last_frame="zeros after the end",
        long_audio="in chunks, all state carried over, loudness of the whole; exact, decode too",
        weights=_WEIGHTS,
        licence="MIT",
        describe=_describe,
        open=open_vibevoice,
    ),
)
