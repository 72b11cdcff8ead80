"""DAC 16, 24 and 44.1 kHz (Kumar et al. 2023, "High-Fidelity Audio Compression with Improved RVQGAN").

Axes: B segments, N samples, T frames, D dimensions of a latent, K codebooks of a stream.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .codec import (
    Chunks,
    codec_fingerprint,
    codes_of_chunks,
    find_codec,
    gaps_of_chunks,
    num_codebooks_of,
    product,
    spans_of_chunks,
)
from .dac_model import (
    decode,
    decode_trim,
    decoder_reach,
    encode,
    encoder_reach,
    with_fast_snakes,
)
from .factorized import FactorizedQuantizer
from .hub import Weights, load_model, remove_weight_norm
from .latents import with_latents
from .spec import FrameRule, StreamSpec, UserError
from .tokenizer import Description, Mode, TokenizerConfig, TokenizerEntry

_NAMES = {16_000: "dac-16khz", 24_000: "dac-24khz", 44_100: "dac-44khz"}


class Dac:
    """A `Tokenizer` and `BatchTokenizer` of a transformers `DacModel`.

    The waveform is followed by zeros to a whole hop. Long segments are taken in chunks of `chunk_frames`, counted from
    the first frame, with as many frames around each as its convolutions reach: exact but for rounding.
    """

    def __init__(
        self,
        model: Any,
        spec: StreamSpec,
        fingerprint: dict[str, str],
        *,
        chunk_frames: int,
        device: str = "cpu",
        mode: Mode = Mode.EXACT,
    ) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        strides = model.config.downsampling_ratios
        with_fast_snakes(remove_weight_norm(model))
        self.longest = None
        self._dtype = torch.bfloat16 if mode is Mode.FAST else torch.float32
        self._encoder = model.encoder.to(device=device, dtype=self._dtype)
        self._decoder = model.decoder.to(device)
        self._quantizer = FactorizedQuantizer(model.quantizer.quantizers[: spec.num_codebooks], device=device)
        self._encoder_reach = encoder_reach(strides)
        self._decoder_reach = decoder_reach(strides)
        self._chunk_frames = chunk_frames
        self._device = device

    def encode(self, waveform_N: Tensor) -> Tensor:
        return self.encode_batch([waveform_N], waveform_N.shape[0])[0]

    @torch.inference_mode()
    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        latents = self.latents(waveforms, padded_length)
        num_frames = [-(-waveform_N.shape[0] // self.spec.hop_length) for waveform_N in waveforms]
        return codes_of_chunks(latents, self._quantizer.encode, num_frames, self.spec.num_codebooks)

    @torch.inference_mode()
    def gaps(self, waveform_N: Tensor) -> Tensor:
        latents = self.latents([waveform_N], waveform_N.shape[0])
        return gaps_of_chunks(latents, self._quantizer.gaps, self.spec.num_codebooks)

    def decode(self, codes_KT: Tensor) -> Tensor:
        return self._sound(codes_KT.shape[1], lambda span: self._quantizer.decode(codes_KT[:, span].to(self._device)))

    def synthesize(self, latents_TD: Tensor) -> Tensor:
        return self._sound(len(latents_TD), lambda span: latents_TD[span].to(self._device))

    @torch.inference_mode()
    def _sound(self, num_frames: int, latents: Callable[[slice], Tensor]) -> Tensor:
        hop = self.spec.hop_length
        sound = [torch.empty(0)]
        for begin, end, first, last in spans_of_chunks(num_frames, self._chunk_frames, self._decoder_reach):
            latents_TD = latents(slice(first, last))
            sound_N = decode(self._decoder, latents_TD.t()[None].contiguous())[0, 0]
            sound.append(sound_N[(begin - first) * hop : (end - first) * hop].cpu())
        return torch.cat(sound)

    def latents(self, waveforms: Sequence[Tensor], padded_length: int) -> Chunks:
        hop = self.spec.hop_length
        frames = [-(-waveform_N.shape[0] // hop) for waveform_N in waveforms]
        padded_frames = -(-padded_length // hop)
        for begin, end, first, last in spans_of_chunks(padded_frames, self._chunk_frames, self._encoder_reach):
            if begin >= max(frames):
                return
            # a copy of its own: convolutions' results may depend on the alignment of what they are given
            chunk_B1N = torch.zeros(len(waveforms), 1, (last - first) * hop)
            for row_N, waveform_N in zip(chunk_B1N[:, 0], waveforms, strict=True):
                samples_N = waveform_N[first * hop : last * hop]
                row_N[: samples_N.shape[0]] = samples_N
            valid = [min(max(num - first, 0), last - first) * hop for num in frames]
            latents_BDT = encode(self._encoder, chunk_B1N.to(device=self._device, dtype=self._dtype), valid)
            latents_BTD = latents_BDT[..., begin - first : end - first].transpose(1, 2).float().contiguous()
            yield latents_BTD, [min(max(num - begin, 0), end - begin) for num in frames]


def _spec(sample_rate: int, strides: Sequence[int], num_codebooks: int, codebook_size: int = 1024) -> StreamSpec:
    return StreamSpec(
        tokenizer=_NAMES[sample_rate],
        sample_rate=sample_rate,
        decode_sample_rate=sample_rate,
        hop_length=product(strides),
        window_length=1,
        frame_rule=FrameRule.CEIL,
        num_codebooks=num_codebooks,
        codebook_size=codebook_size,
        decode_trim=decode_trim(strides),
    )


def _describe(config: TokenizerConfig) -> Description:
    published = _PUBLISHED[config.tokenizer]
    weights = find_codec(config, default=_weights_of(published), architecture="dac")
    _require_rate(weights, published)
    there = weights.config["n_codebooks"]
    num_codebooks = num_codebooks_of(config, there, there)
    fingerprint = codec_fingerprint(config, "dac/2", weights, num_codebooks)
    strides, size = weights.config["downsampling_ratios"], weights.config["codebook_size"]
    spec = _spec(published.sample_rate, strides, num_codebooks, size)
    return Description(config, spec, fingerprint, weights=weights)


def _require_rate(weights: Weights, published: StreamSpec) -> None:
    """Raise `UserError` for weights, or a feature extractor with them, of another rate."""
    expected = published.sample_rate
    rates = [weights.config["sampling_rate"], weights.preprocessor.get("sampling_rate", expected)]
    for rate in rates:
        if rate != expected:
            other = f"use {_NAMES[rate]}" if rate in _NAMES else "name other weights"
            raise UserError(
                f"The weights in {weights.name} are for {rate:,} Hz, {published.tokenizer} takes {expected:,} Hz: "
                f"{other}."
            )


def open_dac(description: Description, device: str, *, chunk_frames: int = 0) -> Dac:
    """The tokenizer that is described; `chunk_frames` other than 0 are for tests."""
    chunk_samples = _CHUNK_SAMPLES if device == "cpu" else _CHUNK_SAMPLES_ON_GPU
    return Dac(
        load_model("DacModel", description.weights),
        description.spec,
        description.fingerprint,
        chunk_frames=chunk_frames or chunk_samples // description.spec.hop_length,
        device=device,
        mode=description.config.mode,
    )


_CHUNK_SAMPLES = 64_000  # longer ones leave the caches, of shorter ones much is done twice
_CHUNK_SAMPLES_ON_GPU = 1_400_000  # more than 30 s at 44.1 kHz


def _weights_of(spec: StreamSpec) -> str:
    return f"descript/{spec.tokenizer.replace('-', '_')}"


def _entry(spec: StreamSpec, about: str, fast_change: str = "") -> TokenizerEntry:
    return TokenizerEntry(
        spec=spec,
        kind="acoustic",
        about=f"DAC {about} (Kumar et al. 2023): convolutions that see both ways, residual VQ by direction",
        needs_codebook=False,
        last_frame="zeros after the end",
        long_audio="in chunks with all that the convolutions reach; exact, decode too",
        weights=_weights_of(spec),
        licence="MIT",
        modes=(Mode.EXACT, Mode.FAST),
        fast_change=fast_change,
        describe=_describe,
        open=open_dac,
    )


_PUBLISHED = {
    spec.tokenizer: spec
    for spec in (
        _spec(16_000, (2, 4, 5, 8), 12),
        _spec(24_000, (2, 4, 5, 8), 32),
        _spec(44_100, (2, 4, 8, 8), 9),
    )
}
ENTRIES = (
    *with_latents(_entry(_PUBLISHED["dac-16khz"], "16 kHz", "23 % of ids, random weights")),
    *with_latents(_entry(_PUBLISHED["dac-24khz"], "24 kHz", "32 % of ids, random weights")),
    *with_latents(_entry(_PUBLISHED["dac-44khz"], "44.1 kHz", "21 % of ids, random weights")),
)
