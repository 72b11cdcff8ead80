"""SNAC 24 kHz (Siuzdak et al. 2024, "SNAC: Multi-Scale Neural Audio Codec"): codes of three levels, 12, 23 and 47 Hz.

A frame is what one code of the first level stands for, 2,048 samples. Its codebooks are that code, the two codes of the
second level in their order and the four of the third: seven, of which the first 1, 3 or 7 are whole levels.

Axes: B segments, N samples, T frames, L latents of one, D dimensions of a latent, K codebooks of a stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .codec import Chunks, codec_fingerprint, codes_of_chunks, gaps_of_chunks, product, spans_of_chunks
from .dac_model import decoder_reach, encoder_reach, with_fast_snakes
from .hub import Weights
from .latents import with_latents
from .package_weights import Package, fill, find_package, load_state
from .snac_model import LATENT_REACH, MultiRateQuantizer, build, decode, encode, noise_tapes
from .spec import FrameRule, StreamSpec, UserError
from .tokenizer import Description, TokenizerConfig, TokenizerEntry

_PACKAGE = Package(
    model="SNAC",
    weights="hubertsiuzdak/snac_24khz",
    pickled="pytorch_model.bin",
    numbers=("encoder_dim", "decoder_dim", "codebook_size", "codebook_dim"),
    lists=("encoder_rates", "decoder_rates", "vq_strides"),
    published={
        "sampling_rate": 24_000,
        "attn_window_size": None,  # with windows of 32 latents, as at 32 and 44.1 kHz, frames would be 30 times as long
        "noise": (True, False),
        "depthwise": (True, False),
    },
)
_SPEC = StreamSpec(
    tokenizer="snac-24khz",
    sample_rate=24_000,
    decode_sample_rate=24_000,
    hop_length=2_048,
    window_length=1,
    frame_rule=FrameRule.CEIL,
    num_codebooks=7,
    codebook_size=4096,
)


class Snac:
    """A `Tokenizer` and `BatchTokenizer` of both networks and the quantizer, as `build` names them.

    The waveform is followed by zeros to a whole frame. Long segments are taken in chunks of `chunk_frames` with as many
    frames around each as the convolutions reach: exact but for rounding.
    """

    def __init__(
        self,
        model: Any,
        vq_strides: Sequence[int],
        strides: Sequence[int],
        spec: StreamSpec,
        fingerprint: dict[str, str],
        *,
        chunk_frames: int,
        device: str = "cpu",
    ) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        with_fast_snakes(model).to(device)
        self._encoder, self._decoder = model.encoder, model.decoder
        self._tapes = noise_tapes(model.decoder, device)
        self.longest = None
        self._num_latents = vq_strides[0]  # of a frame
        counts = accumulate(vq_strides[0] // stride for stride in vq_strides)
        num_levels = sum(count <= spec.num_codebooks for count in counts)
        levels, self._given = list(model.quantizer.quantizers)[:num_levels], vq_strides[:num_levels]
        self._quantizer = MultiRateQuantizer(levels, self._given, device=device)
        self._encoder_reach = self._in_frames(encoder_reach(strides, LATENT_REACH))
        self._decoder_reach = self._in_frames(decoder_reach(strides))
        self._chunk_frames = chunk_frames
        self._device = device

    def encode(self, waveform_N: Tensor) -> Tensor:
        return self.encode_batch([waveform_N], waveform_N.shape[0])[0]

    @torch.inference_mode()
    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        num_frames = [-(-waveform_N.shape[0] // self.spec.hop_length) for waveform_N in waveforms]
        latents = self.latents(waveforms, padded_length)
        return codes_of_chunks(latents, self._quantizer.encode, num_frames, self.spec.num_codebooks)

    @torch.inference_mode()
    def gaps(self, waveform_N: Tensor) -> Tensor:
        latents = self.latents([waveform_N], waveform_N.shape[0])
        return gaps_of_chunks(latents, self._quantizer.gaps, self.spec.num_codebooks)

    def decode(self, codes_KT: Tensor) -> Tensor:
        return self._sound(codes_KT.shape[1], lambda span: self._quantizer.decode(codes_KT[:, span].to(self._device)))

    def synthesize(self, latents_TX: Tensor) -> Tensor:
        latents_TLD = latents_TX.unflatten(1, (self._num_latents, -1))
        return self._sound(len(latents_TX), lambda span: latents_TLD[span].flatten(0, 1).to(self._device))

    @torch.inference_mode()
    def _sound(self, num_frames: int, latents: Callable[[slice], Tensor]) -> Tensor:
        hop, sound = self.spec.hop_length, [torch.empty(0)]
        for begin, end, first, last in spans_of_chunks(num_frames, self._chunk_frames, self._decoder_reach):
            latents_ND = latents(slice(first, last))
            place = first * self._num_latents
            sound_N = decode(self._decoder, latents_ND.t()[None].contiguous(), self._tapes, place)[0, 0]
            sound.append(sound_N[(begin - first) * hop : (end - first) * hop].cpu())
        return torch.cat(sound)

    def latents(self, waveforms: Sequence[Tensor], padded_length: int) -> Chunks:
        """Frames of L latents each, one after the other, `[B, T, L x D]`."""
        hop, num_latents = self.spec.hop_length, self._num_latents
        frames = [-(-waveform_N.shape[0] // hop) for waveform_N in waveforms]
        padded_frames = min(-(-padded_length // hop), max(frames, default=0))
        for begin, end, first, last in spans_of_chunks(padded_frames, self._chunk_frames, self._encoder_reach):
            # a copy of its own: convolutions' results may depend on the alignment of what they are given
            chunk_B1N = torch.zeros(len(waveforms), 1, (last - first) * hop)
            for row_N, waveform_N in zip(chunk_B1N[:, 0], waveforms, strict=True):
                samples_N = waveform_N[first * hop : last * hop]
                row_N[: samples_N.shape[0]] = samples_N
            valid = [min(max(num - first, 0), last - first) * hop for num in frames]
            latents_BDN = encode(self._encoder, chunk_B1N.to(self._device), valid)
            latents_BDN = latents_BDN[..., (begin - first) * num_latents : (end - first) * num_latents]
            latents_BTX = latents_BDN.transpose(1, 2).contiguous().view(len(waveforms), end - begin, -1)
            yield latents_BTX, [min(max(num - begin, 0), end - begin) for num in frames]

    def _in_frames(self, reach: tuple[int, int]) -> tuple[int, int]:
        return -(-reach[0] // self._num_latents), -(-reach[1] // self._num_latents)


def _describe(config: TokenizerConfig) -> Description:
    weights = find_package(config, _PACKAGE)
    strides, vq_strides = weights.config["encoder_rates"], weights.config["vq_strides"]
    _require_rates(weights, config.tokenizer)
    levels = list(accumulate(vq_strides[0] // stride for stride in vq_strides))
    num_codebooks = levels[-1] if config.num_codebooks is None else config.num_codebooks
    if num_codebooks not in levels:
        raise UserError(
            f"{config.tokenizer} has codebooks of several rates: the first {', '.join(map(str, levels))} are whole "
            f"levels; {num_codebooks} were asked for."
        )
    spec = replace(
        _SPEC,
        hop_length=product(strides) * vq_strides[0],
        num_codebooks=num_codebooks,
        codebook_size=weights.config["codebook_size"],
    )
    fingerprint = codec_fingerprint(config, "snac-24khz/1", weights, num_codebooks)
    return Description(config, spec, fingerprint, weights=weights)


def _require_rates(weights: Weights, tokenizer: str) -> None:
    """Raise `UserError` for levels that do not fill a frame, a decoder of other rates and latents of another width."""
    config = weights.config
    rates, levels = config["encoder_rates"], config["vq_strides"]
    wide = config["encoder_dim"] * 2 ** len(rates)
    wrong = [
        *([f"vq_strides {levels}"] if any(levels[0] % stride for stride in levels) else []),
        *([f"decoder_rates {config['decoder_rates']}"] if config["decoder_rates"] != rates[::-1] else []),
        *([f"latent_dim {config['latent_dim']}"] if config.get("latent_dim") not in (None, wide) else []),
    ]
    if wrong:
        raise UserError(
            f"{weights.name} holds another codec than {tokenizer}: {'; '.join(wrong)} with encoder_rates {rates} and "
            f"encoder_dim {config['encoder_dim']} in its config.json. Name other weights."
        )


def _dim(codec: Description) -> int:
    """Of the latents of a frame, one after the other."""
    config = codec.weights.config
    return config["vq_strides"][0] * config["encoder_dim"] * 2 ** len(config["encoder_rates"])


def open_snac(description: Description, device: str, *, chunk_frames: int = 0) -> Snac:
    """The tokenizer that is described; `chunk_frames` other than 0 are for tests."""
    weights: Weights = description.weights
    model = build(weights.config)
    fill(model, load_state(weights, _PACKAGE), weights)
    return Snac(
        model,
        weights.config["vq_strides"],
        weights.config["encoder_rates"],
        description.spec,
        description.fingerprint,
        chunk_frames=chunk_frames or (_CHUNK_FRAMES if device == "cpu" else _CHUNK_FRAMES_ON_GPU),
        device=device,
    )


_CHUNK_FRAMES = 32  # 2.7 s
_CHUNK_FRAMES_ON_GPU = 360  # 31 s

ENTRIES = with_latents(
    TokenizerEntry(
        spec=_SPEC,
        kind="acoustic",
        about="SNAC 24 kHz (Siuzdak et al. 2024): convolutions that see both ways; 1 + 2 + 4 codes a frame, by levels",
        needs_codebook=False,
        last_frame="zeros after the end",
        long_audio="in chunks with all that the convolutions reach; exact, decode too",
        weights=_PACKAGE.weights,
        licence="MIT",
        describe=_describe,
        open=open_snac,
    ),
    _dim,
)
