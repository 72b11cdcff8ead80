"""X-Codec-2 (Ye et al. 2025, "Llasa") and NeuCodec (Julian et al. 2025): one codebook of 65,536, semantic and acoustic.

A w2v-BERT 2.0 of 16 layers and a convolutional encoder see the same samples; what both say is quantized together, 8
dimensions of 4 levels (FSQ). NeuCodec is X-Codec-2 trained on other data, decoded at 24 kHz.

Axes: B segments, N samples, T frames, D dimensions of a latent, K codebooks, of which there is one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import xcodec2_model as layers
from .codec import (
    Chunks,
    codec_fingerprint,
    codes_of_chunks,
    find_codec,
    gaps_of_chunks,
    num_codebooks_of,
    padded_span,
    up_to,
)
from .fsq import FiniteScalarQuantizer
from .hub import Weights, load_model
from .latents import with_latents
from .spec import FrameRule, StreamSpec, UserError, num_frames
from .ssl_windows import LONGEST, Window, plan_windows
from .tokenizer import Description, Mode, TokenizerConfig, TokenizerEntry


class Xcodec2:
    """A `Tokenizer` and `BatchTokenizer` of a transformers `Xcodec2Model` or `NeuCodecModel`.

    Up to 30 s a segment is encoded whole. A longer one has the log mels of the whole, normalized as such; its semantic
    encoder, which attends to all that it is given, sees them in windows (see ssl_windows.py), and so does the decoder.
    The acoustic encoder goes through all segments in chunks of `chunk_frames`, with all that its convolutions reach.
    """

    def __init__(
        self,
        model: Any,
        spec: StreamSpec,
        fingerprint: dict[str, str],
        *,
        margin: int,
        chunk_frames: int,
        device: str = "cpu",
        mode: Mode = Mode.EXACT,
    ) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        self.longest = LONGEST
        self._dtype = torch.bfloat16 if mode is Mode.FAST else torch.float32
        self._semantic = model.semantic_encoder.to(device=device, dtype=self._dtype)
        self._adapter = model.semantic_adapter.to(device=device, dtype=self._dtype)
        self._acoustic = model.acoustic_encoder.to(device=device, dtype=self._dtype)
        self._join = model.fc_encoder.to(device)
        self._quantizer = FiniteScalarQuantizer(model.quantizer, device=device)
        self._decoder = layers.Decoder(model.acoustic_decoder, device=device)
        self._margin = margin
        self._reach = layers.acoustic_reach(model.config.downsampling_ratios)
        self._chunk_frames = chunk_frames
        self._longest = num_frames(LONGEST, spec)
        self._device = device

    def encode(self, waveform_N: Tensor) -> Tensor:
        return self._codes([waveform_N], waveform_N.shape[0])[0]

    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        """As `encode` gives them; those longer than 30 s are encoded by themselves."""
        return up_to(self.longest, self._codes, waveforms, padded_length)

    @torch.inference_mode()
    def _codes(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        latents = self.latents(waveforms, padded_length)
        frames = [num_frames(waveform_N.shape[0], self.spec) for waveform_N in waveforms]
        return codes_of_chunks(latents, self._quantizer.encode, frames, self.spec.num_codebooks)

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
        return self._decoder.sound(self._hidden(num_frames, latents), num_frames) if num_frames else torch.empty(0)

    def _hidden(self, num_frames: int, latents: Callable[[slice], Tensor]) -> Iterator[Tensor]:
        for window in plan_windows(num_frames, self._longest):
            hidden_MD = self._decoder.hidden(latents(slice(window.first, window.first + self._longest)))
            yield hidden_MD[window.keep_begin - window.first : window.keep_end - window.first]

    def latents(self, waveforms: Sequence[Tensor], padded_length: int) -> Chunks:
        """Latents before the quantizer, of several segments of 30 s or less, or of one of any length."""
        frames = [num_frames(waveform_N.shape[0], self.spec) for waveform_N in waveforms]
        if not any(frames):
            return
        mels = [self._mels(waveform_N, num) if num else None for waveform_N, num in zip(waveforms, frames, strict=True)]
        total = num_frames(padded_length, self.spec)
        for window in plan_windows(total, self._longest):
            semantic_BTD = self._semantic_latents(mels, frames, window, min(self._longest, total - window.first))
            acoustic_BTD = self._acoustic_latents(waveforms, window)
            latents_BTD = self._join(torch.cat([semantic_BTD, acoustic_BTD], dim=2).float())
            kept = [min(max(num - window.keep_begin, 0), window.keep_end - window.keep_begin) for num in frames]
            yield latents_BTD, kept

    def _mels(self, waveform_N: Tensor, num_frames: int) -> layers.LogMels:
        return layers.LogMels(waveform_N, num_frames, margin=self._margin, longest=self._longest, device=self._device)

    def _semantic_latents(
        self, mels: Sequence[layers.LogMels | None], frames: Sequence[int], window: Window, size: int
    ) -> Tensor:
        valid = [min(max(num - window.first, 0), size) for num in frames]
        features_BTD = torch.zeros(len(mels), size, layers.STACKED * layers.NUM_MEL, device=self._device)
        for features_TD, mel, num in zip(features_BTD, mels, valid, strict=True):
            if mel is not None and num:
                features_TD[:num] = mel.span(window.first, window.first + num)
        latents_BDT = layers.semantic(
            self._semantic, self._adapter, features_BTD.to(self._dtype), [max(num, 1) for num in valid]
        )
        return latents_BDT[..., window.keep_begin - window.first : window.keep_end - window.first].transpose(1, 2)

    def _acoustic_latents(self, waveforms: Sequence[Tensor], window: Window) -> Tensor:
        hop = self.spec.hop_length
        ends = [waveform_N.shape[0] // hop + 1 for waveform_N in waveforms]  # one sample at least is padded
        parts = []
        for begin in range(window.keep_begin, window.keep_end, self._chunk_frames):
            end = min(begin + self._chunk_frames, window.keep_end)
            first, last = max(0, begin - self._reach), min(max(*ends, window.keep_end), end + self._reach)
            spans = [padded_span(waveform_N, first * hop, last * hop) for waveform_N in waveforms]
            valid = [min(max(num - first, 1), last - first) * hop for num in ends]
            chunk_B1N = torch.stack(spans)[:, None].to(device=self._device, dtype=self._dtype)
            latents_BDT = layers.acoustic(self._acoustic, chunk_B1N, valid)
            parts.append(latents_BDT[..., begin - first : end - first].transpose(1, 2))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True, slots=True)
class _Published:
    """What the two differ in."""

    spec: StreamSpec
    model: str
    weights: str
    rates: dict[str, int]  # of config.json
    margin: int  # zeros before the first sample, for the log mels


_DESIGN = {"downsampling_ratios": [2, 2, 4, 4, 5], "quantization_levels": [4] * 8}
_SEMANTIC = {"model_type": "wav2vec2-bert", "feature_projection_input_dim": 160, "add_adapter": False}
_EXTRACTOR = {"sampling_rate": 16_000, "hop_length": layers.HOP}


def _describe(config: TokenizerConfig, *, published: _Published) -> Description:
    weights = find_codec(config, default=published.weights, architecture=published.spec.tokenizer)
    _require(weights, published)
    num_codebooks = num_codebooks_of(config, 1, 1)
    fingerprint = codec_fingerprint(config, f"{published.spec.tokenizer}/1", weights, num_codebooks)
    return Description(config, published.spec, fingerprint, weights=weights)


def _require(weights: Weights, published: _Published) -> None:
    """Raise `UserError` for weights, or a feature extractor with them, that are built otherwise, naming all that is."""
    semantic = weights.config.get("semantic_model_config") or {}
    differing = [
        f"{where}{key} {found.get(key)}, not {value}"
        for where, found, expected in (
            ("", weights.config, {**published.rates, **_DESIGN}),
            ("a semantic model's ", semantic, _SEMANTIC),
            ("a feature extractor's ", {**_EXTRACTOR, **weights.preprocessor}, _EXTRACTOR),
        )
        for key, value in expected.items()
        if _listed(found.get(key)) != value
    ]
    if differing:
        raise UserError(
            f"{weights.name} holds another codec than {published.spec.tokenizer}: {'; '.join(differing)}. Name other "
            "weights, or the tokenizer that takes these."
        )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def open_xcodec2(description: Description, device: str, *, chunk_frames: int = 0) -> Xcodec2:
    """The tokenizer that is described, NeuCodec too; `chunk_frames` other than 0 are for tests."""
    published = _PUBLISHED[description.spec.tokenizer]
    return Xcodec2(
        load_model(published.model, description.weights, may_lack=("masked_spec_embed",)),
        description.spec,
        description.fingerprint,
        margin=published.margin,
        chunk_frames=chunk_frames or _CHUNK_FRAMES,
        device=device,
        mode=description.config.mode,
    )


_CHUNK_FRAMES = 500  # 10 s; of shorter ones much is done twice


def _spec(name: str, *, decode_sample_rate: int, window_length: int) -> StreamSpec:
    return StreamSpec(
        tokenizer=name,
        sample_rate=16_000,
        decode_sample_rate=decode_sample_rate,
        hop_length=layers.HOP,
        window_length=window_length,
        frame_rule=FrameRule.FLOOR,
        num_codebooks=1,
        codebook_size=65_536,
    )


_PUBLISHED = {
    "xcodec2": _Published(
        # the published feature extractor pads by a whole hop where the segment ends with one
        spec=_spec("xcodec2", decode_sample_rate=16_000, window_length=0),
        model="Xcodec2Model",
        weights="HKUSTAudio/xcodec2-hf",
        rates={"sampling_rate": 16_000},
        margin=layers.HOP // 2,
    ),
    "neucodec": _Published(
        # no zeros around the log mels: the semantic encoder has a frame less, and the shorter one counts
        spec=_spec("neucodec", decode_sample_rate=24_000, window_length=layers.HOP),
        model="NeuCodecModel",
        weights="neuphonic/neucodec",
        rates={"input_sampling_rate": 16_000, "output_sampling_rate": 24_000},
        margin=0,
    ),
}


def _entry(
    name: str, about: str, *, last_frame: str, licence: str, fast_change: str = "not measured"
) -> TokenizerEntry:
    published = _PUBLISHED[name]
    return TokenizerEntry(
        spec=published.spec,
        kind="acoustic",
        about=about,
        needs_codebook=False,
        last_frame=last_frame,
        long_audio="whole up to 30 s; longer in windows of 30 s every 26 s, mels normalized as a whole; counted, not "
        "exact; the acoustic part in chunks, exact; decode in the same windows",
        weights=published.weights,
        licence=licence,
        modes=(Mode.EXACT, Mode.FAST),
        fast_change=fast_change,
        describe=partial(_describe, published=published),
        open=open_xcodec2,
    )


def _dim(codec: Description) -> int:
    config = codec.weights.config
    return config["hidden_size"] + config["semantic_model_config"]["hidden_size"]


_XCODEC2 = _entry(
    "xcodec2",
    "X-Codec-2 (Ye et al. 2025): w2v-BERT 2.0 and convolutions, one finite scalar quantizer of 8 dimensions",
    last_frame="zeros after the end, a whole hop of them where there is none to fill",
    licence="CC-BY-NC-4.0",
    fast_change="68 % of ids, random weights",
)
_NEUCODEC = _entry(
    "neucodec",
    "NeuCodec (Julian et al. 2025): X-Codec-2 on open data, 16 kHz in, 24 kHz out",
    last_frame="whole hops only; what is left is seen, and has no frame",
    licence="Apache-2.0",
)
ENTRIES = (*with_latents(_XCODEC2, _dim), *with_latents(_NEUCODEC, _dim))
