"""Pocket TTS's codec (Rouard et al. 2025, "Continuous Audio Language Models"): Mimi's networks, 32 numbers a frame.

A variational autoencoder: there is no quantizer, a frame is the mean of its latents, at 12.5 Hz. The waveform is
followed by zeros to a whole frame, as the published feature extractor has it.

Axes: B segments, N positions, T frames, D dimensions of a latent.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from .causal import CausalLatents, Walk
from .codec import find_codec, product, require_published
from .hub import fingerprint_of, load_model, remove_weight_norm
from .latents import CodecLatents
from .mimi import transform
from .spec import FrameRule, StreamSpec, UserError
from .tokenizer import Description, Output, TokenizerConfig, TokenizerEntry

_WEIGHTS = "eustlb/pocket-tts-audio-tokenizer"
_PUBLISHED = {
    "sampling_rate": 24_000,
    "audio_channels": 1,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
}
_SPEC = StreamSpec(
    tokenizer="pocket-tts-latents",
    sample_rate=24_000,
    decode_sample_rate=24_000,
    hop_length=1_920,
    window_length=1,
    frame_rule=FrameRule.CEIL,
    num_codebooks=8,
    codebook_size=1024,
)


class PocketTts:
    """The halves of a transformers `PocketTTSAudioTokenizerModel`."""

    def __init__(self, model: Any, *, hop_length: int, device: str) -> None:
        remove_weight_norm(model)
        self._hop = hop_length
        self._encoder = model.encoder.to(device)
        self._decoder = model.decoder.to(device)
        self._unproject = model.latent_proj.weight[..., 0].to(device)

    def latents(self, walk: Walk, waveforms_B1N: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
        whole = [-(-num // self._hop) * self._hop for num in valid]  # what follows the samples is zero
        x_BDN, whole = walk.through(self._encoder.encoder_seanet.layers, waveforms_B1N, whole)
        x_BDN = transform(walk, self._encoder.encoder_transformer, x_BDN)
        return walk.convolve(self._encoder.downsample, x_BDN, whole)

    def sound(self, walk: Walk, latents_BDT: Tensor) -> Tensor:
        x_BDT = functional.linear(latents_BDT.transpose(1, 2), self._unproject).transpose(1, 2)
        valid = [x_BDT.shape[2]] * x_BDT.shape[0]
        x_BDN, valid = walk.through([self._decoder.upsample], x_BDT, valid)
        x_BDN = transform(walk, self._decoder.decoder_transformer, x_BDN)
        return walk.through(self._decoder.decoder_seanet.layers, x_BDN, valid)[0]


def _describe(config: TokenizerConfig) -> Description:
    weights = find_codec(config, default=_WEIGHTS, architecture="pocket_tts_audio_tokenizer")
    require_published(weights, config.tokenizer, _PUBLISHED)
    for half in ("encoder_config", "decoder_config"):
        if half in weights.config and weights.config[half] is None:
            raise UserError(
                f"{weights.name} is half a codec: its config.json says {half}: null. Name weights that have the "
                "encoder and the decoder."
            )
    hop = product(weights.config["upsampling_ratios"]) * weights.config["latent_stride"]
    fingerprint = {"features": "pocket-tts/1", **fingerprint_of(weights)}
    spec = replace(_SPEC, hop_length=hop)
    return Description(config, spec, fingerprint, dim=weights.config["latent_dim"], weights=weights)


def open_pocket_tts(description: Description, device: str, *, chunk_frames: int = 0) -> CodecLatents:
    """The features that are described; `chunk_frames` other than 0 are for tests."""
    model = load_model("PocketTTSAudioTokenizerModel", description.weights)
    halves = PocketTts(model, hop_length=description.spec.hop_length, device=device)
    chunk_frames = chunk_frames or (_CHUNK_FRAMES if device == "cpu" else _CHUNK_FRAMES_ON_GPU)
    codec = CausalLatents(halves, description.spec, chunk_frames=chunk_frames, device=device)
    return CodecLatents(codec, description)


_CHUNK_FRAMES = 25  # 2 s
_CHUNK_FRAMES_ON_GPU = 250  # 20 s

ENTRIES = (
    TokenizerEntry(
        spec=_SPEC,
        kind="acoustic",
        about="Pocket TTS's codec (Rouard et al. 2025): causal SEANet and transformers, means of continuous latents",
        needs_codebook=True,
        output=Output.FEATURES,
        last_frame="zeros after the end",
        long_audio="in chunks, all state carried over, attention over 1.25 s as published; exact, decode too",
        weights=_WEIGHTS,
        licence="CC-BY-4.0",
        describe=_describe,
        open=open_pocket_tts,
    ),
)
