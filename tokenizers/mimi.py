"""Mimi (Defossez et al. 2024, "Moshi"): causal SEANet, a transformer on either side, a split residual VQ.

The first codebook is semantic (distilled from WavLM), the others are acoustic and quantize the same latents, not what
the first leaves of them.

Axes: B segments, N positions at the transformers' 25 Hz (or samples), T frames at 12.5 Hz, D dimensions, H heads,
P positions that attention sees, K codebooks of a stream.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .causal import CausalCodec, Walk
from .codec import codec_fingerprint, find_codec, num_codebooks_of, product, require_published
from .hub import load_model, remove_weight_norm
from .latents import with_latents
from .quantize import ResidualQuantizer
from .spec import FrameRule, StreamSpec, UserError
from .tokenizer import Description, Mode, TokenizerConfig, TokenizerEntry

_WEIGHTS = "kyutai/mimi"
_LATENT_STRIDE = 2  # from the SEANet's 25 Hz to 12.5 Hz
_PUBLISHED = {
    "sampling_rate": 24_000,
    "audio_channels": 1,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
    "num_semantic_quantizers": 1,
}
_SPEC = StreamSpec(
    tokenizer="mimi",
    sample_rate=24_000,
    decode_sample_rate=24_000,
    hop_length=1_920,
    window_length=1,
    frame_rule=FrameRule.CEIL,
    num_codebooks=8,  # 1.1 kbit/s, what Moshi speaks
    codebook_size=2048,
)


class Mimi:
    """The quarters of a transformers `MimiModel`."""

    def __init__(self, model: Any, *, num_codebooks: int, device: str, mode: Mode = Mode.EXACT) -> None:
        remove_weight_norm(model)
        self._dtype = torch.bfloat16 if mode is Mode.FAST else torch.float32
        rotary = model.encoder.encoder_transformer.rotary_emb
        frequencies = rotary.inv_freq.to(device)
        self._encoder = model.encoder.to(device=device, dtype=self._dtype)
        rotary.inv_freq = frequencies  # in float32 in every mode: positions are large
        self._decoder = model.decoder.to(device)
        self._semantic = _Split(model.quantizer.semantic_residual_vector_quantizer, 1, device)
        self._acoustic = (
            _Split(model.quantizer.acoustic_residual_vector_quantizer, num_codebooks - 1, device)
            if num_codebooks > 1
            else None
        )

    def latents(self, walk: Walk, waveforms_B1N: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
        x_BDN, valid = walk.through(self._encoder.encoder_seanet.layers, waveforms_B1N.to(self._dtype), valid)
        x_BDN = transform(walk, self._encoder.encoder_transformer, x_BDN)
        return walk.convolve(self._encoder.downsample, x_BDN, valid)

    def quantize(self, frames_TD: Tensor) -> Tensor:
        codes_1T = self._semantic.encode(frames_TD)
        return codes_1T if self._acoustic is None else torch.cat([codes_1T, self._acoustic.encode(frames_TD)])

    def gaps(self, frames_TD: Tensor) -> Tensor:
        gaps_1T = self._semantic.gaps(frames_TD)
        return gaps_1T if self._acoustic is None else torch.cat([gaps_1T, self._acoustic.gaps(frames_TD)])

    def dequantize(self, codes_KT: Tensor) -> Tensor:
        latents_TD = self._semantic.decode(codes_KT[:1])
        if codes_KT.shape[0] == 1 or self._acoustic is None:
            return latents_TD
        return latents_TD + self._acoustic.decode(codes_KT[1:])

    def sound(self, walk: Walk, latents_BDT: Tensor) -> Tensor:
        valid = [latents_BDT.shape[2]] * latents_BDT.shape[0]
        x_BDN, valid = walk.through([self._decoder.upsample], latents_BDT, valid)
        x_BDN = transform(walk, self._decoder.decoder_transformer, x_BDN)
        return walk.through(self._decoder.decoder_seanet.layers, x_BDN, valid)[0]


class _Split:
    """The first so many stages of a transformers `MimiResidualVectorQuantizer`, with its projections."""

    def __init__(self, split: Any, num_stages: int, device: str) -> None:
        self._project = None if split.input_proj is None else split.input_proj.weight[..., 0].to(device)
        self._unproject = None if split.output_proj is None else split.output_proj.weight[..., 0].to(device)
        centroids = [stage.codebook.embed for stage in split.layers[:num_stages]]
        self._quantizer = ResidualQuantizer(torch.stack(centroids), device=device)

    def encode(self, frames_TD: Tensor) -> Tensor:
        return self._quantizer.encode(self._projected(frames_TD))

    def gaps(self, frames_TD: Tensor) -> Tensor:
        return self._quantizer.gaps(self._projected(frames_TD))

    def _projected(self, frames_TD: Tensor) -> Tensor:
        return frames_TD if self._project is None else functional.linear(frames_TD, self._project)

    def decode(self, codes_KT: Tensor) -> Tensor:
        frames_TD = self._quantizer.decode(codes_KT)
        return frames_TD if self._unproject is None else functional.linear(frames_TD, self._unproject)


def transform(walk: Walk, transformer: Any, x_BDN: Tensor) -> Tensor:
    """The next positions through a transformers `MimiTransformerModel`, `[B, D, N]`.

    Each position sees itself and the `sliding_window - 1` before it; their keys and values are kept from chunk to
    chunk, turned by their absolute positions (RoPE).
    """
    x_BND = x_BDN.transpose(1, 2)
    seen = walk.kept.get(transformer, 0)
    walk.kept[transformer] = seen + x_BND.shape[1]
    position_ids = torch.arange(seen, seen + x_BND.shape[1], device=x_BND.device)[None]
    cos_1ND, sin_1ND = transformer.rotary_emb(x_BND, position_ids)
    window = transformer.config.sliding_window
    past = min(seen, window - 1)
    behind_NP = torch.arange(past, past + x_BND.shape[1], device=x_BND.device)[:, None] - torch.arange(
        past + x_BND.shape[1], device=x_BND.device
    )
    visible_NP = (behind_NP >= 0) & (behind_NP < window)
    for layer in transformer.layers:
        attended_BND = _attend(walk, layer.self_attn, layer.input_layernorm(x_BND), (cos_1ND, sin_1ND), visible_NP)
        x_BND = x_BND + layer.self_attn_layer_scale(attended_BND)
        x_BND = x_BND + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(x_BND)))
    return x_BND.transpose(1, 2)


def _attend(walk: Walk, attention: Any, x_BND: Tensor, rotary: tuple[Tensor, Tensor], visible_NP: Tensor) -> Tensor:
    shape = (*x_BND.shape[:2], -1, attention.head_dim)
    query_BHND = _turn(attention.q_proj(x_BND).view(shape).transpose(1, 2), rotary)
    key_BHPD = _turn(attention.k_proj(x_BND).view(shape).transpose(1, 2), rotary)
    value_BHPD = attention.v_proj(x_BND).view(shape).transpose(1, 2)
    if attention in walk.kept:
        past_keys, past_values = walk.kept[attention]
        key_BHPD = torch.cat([past_keys, key_BHPD], dim=2)
        value_BHPD = torch.cat([past_values, value_BHPD], dim=2)
    first = max(0, key_BHPD.shape[2] - (attention.sliding_window - 1))
    walk.kept[attention] = key_BHPD[:, :, first:].clone(), value_BHPD[:, :, first:].clone()
    out_BHND = functional.scaled_dot_product_attention(
        query_BHND,
        key_BHPD,
        value_BHPD,
        attn_mask=visible_NP,
        scale=attention.scaling,
        enable_gqa=attention.num_key_value_groups > 1,
    )
    return attention.o_proj(out_BHND.transpose(1, 2).flatten(2))


def _turn(x_BHND: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos_BHND, sin_BHND = rotary[0][:, None], rotary[1][:, None]
    first, second = x_BHND.chunk(2, dim=3)
    return x_BHND * cos_BHND + torch.cat([-second, first], dim=3) * sin_BHND


def _describe(config: TokenizerConfig) -> Description:
    weights = find_codec(config, default=_WEIGHTS, architecture="mimi")
    require_published(weights, config.tokenizer, _PUBLISHED)
    hop = product(weights.config["upsampling_ratios"]) * _LATENT_STRIDE
    rate = weights.config.get("frame_rate", weights.config.get("_frame_rate"))  # transformers moves it
    if rate is not None and rate * hop != _SPEC.sample_rate:
        raise UserError(
            f"{weights.name} holds another codec than {config.tokenizer}: its config.json says {rate} frames/s, its "
            f"strides give {_SPEC.sample_rate / hop:g}. Name other weights."
        )
    num_codebooks = num_codebooks_of(config, weights.config["num_quantizers"], _SPEC.num_codebooks)
    fingerprint = codec_fingerprint(config, "mimi/1", weights, num_codebooks)
    size = weights.config["codebook_size"]
    spec = replace(_SPEC, hop_length=hop, num_codebooks=num_codebooks, codebook_size=size)
    return Description(config, spec, fingerprint, weights=weights)


def open_mimi(description: Description, device: str, *, chunk_frames: int = 0) -> CausalCodec:
    """The tokenizer that is described; `chunk_frames` other than 0 are for tests."""
    spec = description.spec
    model = Mimi(
        load_model("MimiModel", description.weights),
        num_codebooks=spec.num_codebooks,
        device=device,
        mode=description.config.mode,
    )
    chunk_frames = chunk_frames or (_CHUNK_FRAMES if device == "cpu" else _CHUNK_FRAMES_ON_GPU)
    return CausalCodec(model, spec, description.fingerprint, chunk_frames=chunk_frames, device=device)


_CHUNK_FRAMES = 25  # 2 s
_CHUNK_FRAMES_ON_GPU = 250  # 20 s

ENTRIES = with_latents(
    TokenizerEntry(
        spec=_SPEC,
        kind="acoustic",
        about="Mimi (Defossez et al. 2024): causal SEANet and transformers, one semantic codebook, the others acoustic",
        needs_codebook=False,
        last_frame="each strided layer pads its own input to a whole stride: with zeros, the last by repetition",
        long_audio="in chunks, all state carried over, attention over 10 s as published; exact",
        weights=_WEIGHTS,
        licence="CC-BY-4.0",
        modes=(Mode.EXACT, Mode.FAST),
        fast_change="26 % of ids, random weights",
        describe=_describe,
        open=open_mimi,
    )
)
