"""EnCodec 48 kHz (Defossez et al. 2022): stereo, in chunks of a second, each brought to one loudness and coded alone.

Nothing goes from chunk to chunk: normalization, the norms over time and the LSTM all begin anew. So the forward pass is
transformers' own, of one chunk: full chunks together, which nothing pads, and the shorter ones at the end of segments
alone.

Axes: B chunks, C channels, N samples, T frames, D dimensions, K codebooks, S chunks of a segment.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .codec import codec_fingerprint, find_codec, num_codebooks_of, num_quantizers, product, require_published
from .continuous import stored
from .hub import load_model
from .latents import SUFFIX, latents_fingerprint
from .quantize import ResidualQuantizer
from .spec import FrameRule, StreamSpec, UserError, chunk_frames, decoded_samples, frames_by_chunk
from .tokenizer import Description, TokenizerConfig, TokenizerEntry, Tokens

_WEIGHTS = "facebook/encodec_48khz"
_PUBLISHED = {
    "sampling_rate": 48_000,
    "audio_channels": 2,
    "use_causal_conv": False,
    "pad_mode": "reflect",
    "normalize": True,
    "chunk_length_s": 1.0,
    "overlap": 0.01,
    "norm_type": "time_group_norm",
}
_SPEC = StreamSpec(
    tokenizer="encodec-48khz",
    sample_rate=48_000,
    decode_sample_rate=48_000,
    hop_length=320,
    window_length=1,
    frame_rule=FrameRule.CEIL,
    num_codebooks=4,  # 6 kbit/s
    codebook_size=1024,
    chunk_length=48_000,
    chunk_stride=47_520,
    channels=2,
)


@dataclass(frozen=True, slots=True)
class _Chunk:
    segment: int
    place: int  # among the segment's chunks
    begin: int  # its first sample
    num_samples: int
    frames: slice  # of the segment


class Encodec48:
    """A `Tokenizer`, `BatchTokenizer`, `RowTokenizer`, `BatchRowTokenizer` and `RowDecoder`.

    Waveforms are `[2, N]`; one that is `[N]` is on both channels.
    """

    def __init__(
        self, model: Any, spec: StreamSpec, fingerprint: dict[str, str], *, chunks_at_once: int, device: str = "cpu"
    ) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        stages = model.quantizer.layers[: spec.num_codebooks]
        self._quantizer = ResidualQuantizer(torch.stack([stage.codebook.embed for stage in stages]), device=device)
        self._encoder = model.encoder.to(device)
        self._decoder = model.decoder.to(device)
        self._chunks_at_once = chunks_at_once
        self._device = device

    def encode(self, waveform_CN: Tensor) -> Tensor:
        return self.tokens(waveform_CN).codes_KT

    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        return [tokens.codes_KT for tokens in self.tokens_batch(waveforms, padded_length)]

    def tokens(self, waveform_CN: Tensor) -> Tokens:
        return self.tokens_batch([waveform_CN], waveform_CN.shape[-1])[0]

    @torch.inference_mode()
    def tokens_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tokens]:
        del padded_length  # chunks are never padded
        frames = [chunk_frames(waveform.shape[-1], self.spec) for waveform in waveforms]
        codes = [torch.empty(self.spec.num_codebooks, sum(nums), dtype=torch.int64) for nums in frames]
        scales = [torch.empty(len(nums)) for nums in frames]
        for chunks, latents_BTD, scales_B in self.latents(waveforms):
            codes_KBT = self._quantizer.encode(latents_BTD.flatten(0, 1)).unflatten(1, latents_BTD.shape[:2]).cpu()
            for row, chunk in enumerate(chunks):
                codes[chunk.segment][:, chunk.frames] = codes_KBT[:, row]
                scales[chunk.segment][chunk.place] = scales_B[row]
        return [Tokens(codes_KT=codes_KT, scales_C=scales_S) for codes_KT, scales_S in zip(codes, scales, strict=True)]

    @torch.inference_mode()
    def gaps(self, waveform_CN: Tensor) -> Tensor:
        num_frames = sum(chunk_frames(waveform_CN.shape[-1], self.spec))
        gaps_KT = torch.empty(self.spec.num_codebooks, num_frames, dtype=torch.float64)
        for chunks, latents_BTD, _ in self.latents([waveform_CN]):
            for chunk, latents_TD in zip(chunks, latents_BTD, strict=True):
                gaps_KT[:, chunk.frames] = self._quantizer.gaps(latents_TD).cpu()
        return gaps_KT

    def decode(self, codes_KT: Tensor) -> Tensor:
        """Sound `[2, decoded_samples(T, spec)]` with all chunks equally loud, their RMS about 1.

        For how loud they were see `decode_tokens`.
        """
        num_chunks = len(frames_by_chunk(codes_KT.shape[1], self.spec))
        return self.decode_tokens(Tokens(codes_KT=codes_KT, scales_C=torch.ones(num_chunks)))

    def decode_tokens(self, tokens: Tokens) -> Tensor:
        """Sound `[2, decoded_samples(T, spec)]`."""
        return self.sound(tokens, lambda span: self._quantizer.decode(tokens.codes_KT[:, span].to(self._device)))

    @torch.inference_mode()
    def sound(self, tokens: Tokens, latents: Callable[[slice], Tensor]) -> Tensor:
        """Sound `[2, decoded_samples(T, spec)]` of the latents `[T, D]` of each span of frames, as loud as it was."""
        assert tokens.scales_C is not None
        ends = list(accumulate(frames_by_chunk(tokens.num_frames, self.spec)))
        sounds = (
            self._decoder(latents(slice(begin, end)).to(self._device).t()[None])[0].cpu() * scale
            for begin, end, scale in zip([0, *ends], ends, tokens.scales_C, strict=False)
        )
        return _overlap_add(sounds, decoded_samples(tokens.num_frames, self.spec), self.spec.chunk_stride)

    def latents(self, waveforms: Sequence[Tensor]) -> Iterator[tuple[list[_Chunk], Tensor, Tensor]]:
        """Chunks of one length, their latents `[B, T, D]` on the device, and how loud they are, `[B]` on the CPU."""
        chunks = [chunk for number, each in enumerate(waveforms) for chunk in _chunks(number, each, self.spec)]
        full = [chunk for chunk in chunks if chunk.num_samples == self.spec.chunk_length]
        short = [chunk for chunk in chunks if chunk.num_samples < self.spec.chunk_length]
        starts = range(0, len(full), self._chunks_at_once)
        for group in [*(full[start : start + self._chunks_at_once] for start in starts), *([each] for each in short)]:
            sound_BCN = torch.stack([_cut(waveforms[chunk.segment], chunk) for chunk in group])
            scales_B = _loudness(sound_BCN)
            latents_BDT = self._encoder((sound_BCN / scales_B[:, None, None]).to(self._device))
            yield group, latents_BDT.transpose(1, 2).contiguous(), scales_B


class Encodec48Latents:
    """A `RowTokenizer`, `BatchRowTokenizer` and `RowDecoder` of what the codec has before its quantizer."""

    def __init__(self, codec: Encodec48, spec: StreamSpec, fingerprint: dict[str, str]) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        self._codec = codec

    def tokens(self, waveform_CN: Tensor) -> Tokens:
        return self.tokens_batch([waveform_CN], waveform_CN.shape[-1])[0]

    @torch.inference_mode()
    def tokens_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tokens]:
        del padded_length  # chunks are never padded
        rows = []
        for waveform in waveforms:
            frames = chunk_frames(waveform.shape[-1], self.spec)
            frames_TD = torch.empty(sum(frames), self.spec.dim, dtype=torch.float16)
            codes_KT = torch.empty(0, sum(frames), dtype=torch.int64)
            rows.append(Tokens(codes_KT=codes_KT, frames_TD=frames_TD, scales_C=torch.empty(len(frames))))
        for chunks, latents_BTD, scales_B in self._codec.latents(waveforms):
            for chunk, latents_TD, scale in zip(chunks, latents_BTD, scales_B, strict=True):
                row = rows[chunk.segment]
                assert row.frames_TD is not None
                assert row.scales_C is not None
                row.frames_TD[chunk.frames] = stored(latents_TD)
                row.scales_C[chunk.place] = scale
        return rows

    def decode_tokens(self, tokens: Tokens) -> Tensor:
        """Sound `[2, decoded_samples(T, spec)]`."""
        frames_TD = tokens.frames_TD
        assert frames_TD is not None
        return self._codec.sound(tokens, lambda span: frames_TD[span].float())


def _chunks(segment: int, waveform: Tensor, spec: StreamSpec) -> Iterator[_Chunk]:
    num_samples, first = waveform.shape[-1], 0
    for place, frames in enumerate(chunk_frames(num_samples, spec)):
        begin = place * spec.chunk_stride
        length = min(spec.chunk_length, num_samples - begin)
        yield _Chunk(segment, place, begin, length, slice(first, first + frames))
        first += frames


def _cut(waveform: Tensor, chunk: _Chunk) -> Tensor:
    """Samples `[2, N]` of a chunk."""
    return waveform[..., chunk.begin : chunk.begin + chunk.num_samples].expand(2, -1)


def _loudness(sound_BCN: Tensor) -> Tensor:
    """The RMS of each chunk's mean of channels, as in transformers' EncodecModel._encode_frame.

    It is taken in float64, so that it depends neither on the batch nor on the machine.
    """
    return (sound_BCN.double().mean(dim=1).square().mean(dim=1).sqrt() + 1e-8).float()


def _overlap_add(sounds: Iterable[Tensor], num_samples: int, stride: int) -> Tensor:
    """Chunks `[2, N]` laid over one another under triangles, as in transformers' EncodecModel._linear_overlap_add.

    What a chunk has beyond the end of the last one is cut off, where the published model fails: a full chunk may end
    after the chunk of one frame that follows it.
    """
    out_CN, weights_N = torch.zeros(2, num_samples), torch.zeros(num_samples)
    window_N = torch.empty(0)
    for place, sound_CN in enumerate(sounds):
        if place == 0:
            times_N = torch.linspace(0, 1, sound_CN.shape[1] + 2)[1:-1]
            window_N = 0.5 - (times_N - 0.5).abs()
        covered = slice(place * stride, min(place * stride + sound_CN.shape[1], num_samples))
        length = covered.stop - covered.start
        out_CN[:, covered] += window_N[:length] * sound_CN[:, :length]
        weights_N[covered] += window_N[:length]
    return out_CN.div_(weights_N)


def _describe(config: TokenizerConfig) -> Description:
    weights = find_codec(config, default=_WEIGHTS, architecture="encodec")
    require_published(weights, config.tokenizer, _PUBLISHED)
    spec = replace(_SPEC, hop_length=product(weights.config["upsampling_ratios"]))
    num_codebooks = num_codebooks_of(config, num_quantizers(weights, spec), spec.num_codebooks)
    fingerprint = codec_fingerprint(config, "encodec-48khz/1", weights, num_codebooks)
    spec = replace(spec, num_codebooks=num_codebooks, codebook_size=weights.config["codebook_size"])
    return Description(config, spec, fingerprint, weights=weights)


def open_encodec_48khz(description: Description, device: str, *, chunks_at_once: int = 0) -> Encodec48:
    """The tokenizer that is described; `chunks_at_once` other than 0 are for tests."""
    return Encodec48(
        load_model("EncodecModel", description.weights),
        description.spec,
        description.fingerprint,
        chunks_at_once=chunks_at_once or (1 if device == "cpu" else _CHUNKS_ON_GPU),
        device=device,
    )


def _describe_latents(config: TokenizerConfig) -> Description:
    if config.num_codebooks is not None:
        raise UserError(f"{config.tokenizer} has no codebooks: leave out num_codebooks.")
    codec = _describe(config)
    return Description(
        config,
        replace(
            codec.spec,
            tokenizer=config.tokenizer,
            num_codebooks=0,
            codebook_size=1,
            dim=codec.weights.config["hidden_size"],
        ),
        {"tokenizer": config.tokenizer, **latents_fingerprint(codec), "precision": config.mode.precision},
        weights=codec,
    )


def _open_latents(description: Description, device: str) -> Encodec48Latents:
    return Encodec48Latents(open_encodec_48khz(description.weights, device), description.spec, description.fingerprint)


_CHUNKS_ON_GPU = 32

_CODEC = TokenizerEntry(
    spec=_SPEC,
    kind="acoustic",
    about="EnCodec 48 kHz (Defossez et al. 2022): stereo, chunks of 1 s with a loudness each, residual VQ",
    needs_codebook=False,
    last_frame="each strided layer pads its own input to a whole stride by reflection; the last chunk is what is "
    "left, without zeros behind it",
    long_audio="chunk by chunk, as published; exact",
    weights=_WEIGHTS,
    licence="MIT; CC-BY-NC-4.0 up to release 0.1.1",
    describe=_describe,
    open=open_encodec_48khz,
)
ENTRIES = (
    _CODEC,
    replace(
        _CODEC,
        spec=replace(_SPEC, tokenizer=_SPEC.tokenizer + SUFFIX, num_codebooks=0, codebook_size=1, dim=128),
        about=f"latents before the quantizer of {_SPEC.tokenizer}, with the loudness of each chunk",
        describe=_describe_latents,
        open=_open_latents,
    ),
)
