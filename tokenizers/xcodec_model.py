"""What X-Codec and HiggsAudio v2's tokenizer share: DAC's two networks, a HuBERT beside its encoder, and the seam.

A frame is what DAC's encoder gives for it and what the HuBERT does: the mean of all its layers, through a few
convolutions. Both are joined by a linear map, and that is quantized. The parameters are those of transformers'
`XcodecModel` and `HiggsAudioV2TokenizerModel`; the walk is ours, since theirs lets the padding of a batch leak and
needs a segment in memory as a whole.

The waveform is followed by zeros to a whole frame. The HuBERT sees it at 16 kHz, not normalized, with 160 zeros on
either side, so that it gives one frame for each 320 samples. Segments of up to 30 s it sees whole; of longer ones it
sees windows of 30 s every 26 s, as ssl_windows.py says, and its group norm has the statistics of the whole. DAC's
encoder and decoder take any segment in chunks with all that their convolutions reach, which is exact.

Axes: B segments, N samples, T frames, D dimensions, L layers, K codebooks of a stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torchaudio.functional import resample

from . import ssl_windows as windows
from .codec import (
    Chunks,
    codec_fingerprint,
    codes_of_chunks,
    find_codec,
    gaps_of_chunks,
    num_codebooks_of,
    num_quantizers,
    padded_span,
    product,
    spans_of_chunks,
    up_to,
)
from .dac_model import Beyond, decode, decoder_reach, encode, encoder_reach, with_fast_snakes
from .hub import Weights, load_model, remove_weight_norm
from .spec import StreamSpec, UserError
from .ssl_model import SslModel, Statistics
from .tokenizer import Description, TokenizerConfig

SEMANTIC_RATE = 16_000
LAST_FRAME = "zeros after the end; the HuBERT sees no more than 160 of them past the frame"
LONG_AUDIO = (
    "the HuBERT: whole up to 30 s, longer in windows of 30 s every 26 s, counted, not exact; "
    "the convolutions, decode too: in chunks with all that they reach, exact"
)
_EDGE = 160  # zeros on either side of what the HuBERT sees: (WINDOW - HOP) / 2, and 120 that no frame needs
_STEP = 416_000  # samples at 16 kHz, 26 s
_FILTER_REACH = 4  # times `down` samples, of torchaudio's default filter from `down` samples to `up`
_SEMANTIC_MODELS = ("hubert", "wavlm", "wav2vec2")
_CHUNK_SAMPLES = 160_000
_CHUNK_SAMPLES_ON_GPU = 1_000_000


class Quantizer(Protocol):
    """What `ResidualQuantizer` does."""

    def encode(self, frames_ND: Tensor, /) -> Tensor: ...

    def gaps(self, frames_ND: Tensor, /) -> Tensor: ...

    def decode(self, codes_QN: Tensor, /) -> Tensor: ...


class JointCodec:
    """A `Tokenizer` and `BatchTokenizer` of a transformers `XcodecModel` or one of its kind."""

    def __init__(
        self,
        model: Any,
        quantizer: Quantizer,
        spec: StreamSpec,
        fingerprint: dict[str, str],
        *,
        chunk_frames: int,
        device: str = "cpu",
    ) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        remove_weight_norm(model)
        acoustic = model.config.acoustic_model_config
        self._encoder = with_fast_snakes(model.acoustic_encoder).to(device)
        self._encoder_reach = encoder_reach(acoustic.downsampling_ratios)
        self._decoder = with_fast_snakes(model.acoustic_decoder).to(device)
        self._decoder_reach = decoder_reach(acoustic.upsampling_ratios[::-1])
        self._semantic = Semantic(model, spec, device=device)
        self.longest = self._semantic.longest * spec.hop_length
        self._join = model.fc.to(device)
        self._part = model.fc2.to(device)
        self._quantizer = quantizer
        self._chunk_frames = chunk_frames
        self._device = device

    def encode(self, waveform_N: Tensor) -> Tensor:
        return self._encode([waveform_N], waveform_N.shape[0])[0]

    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        """As `encode` gives them; those longer than 30 s are encoded by themselves."""
        return up_to(self.longest, self._encode, waveforms, padded_length)

    @torch.inference_mode()
    def _encode(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        latents = self.latents(waveforms, padded_length)
        return codes_of_chunks(latents, self._quantizer.encode, self._frames(waveforms), self.spec.num_codebooks)

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
            acoustic_TD = self._part(latents(slice(first, last)))
            sound_N = decode(self._decoder, acoustic_TD.t()[None].contiguous())[0, 0]
            sound.append(sound_N[(begin - first) * hop : (end - first) * hop].cpu())
        return torch.cat(sound)

    def latents(self, waveforms: Sequence[Tensor], padded_length: int) -> Chunks:
        """What is quantized, chunk by chunk; of several segments, none may be longer than 30 s."""
        frames = self._frames(waveforms)
        padded_frames = -(-padded_length // self.spec.hop_length)
        semantic = self._semantic
        plan = windows.plan_windows(padded_frames, longest=semantic.longest, step=semantic.step)
        statistics = [semantic.statistics(waveforms[0], frames[0])] if len(plan) > 1 else []
        for window in plan:
            seen = range(window.first, min(window.first + semantic.longest, padded_frames))
            semantic_BDT = None
            for begin in range(window.keep_begin, window.keep_end, self._chunk_frames):
                if begin >= max(frames):
                    return
                if semantic_BDT is None:
                    semantic_BDT = semantic(waveforms, frames, seen, statistics)
                end = min(begin + self._chunk_frames, window.keep_end)
                acoustic_BDT = self._acoustic(waveforms, frames, begin, end, padded_frames)
                both = [acoustic_BDT, semantic_BDT[..., begin - window.first : end - window.first]]
                latents_BTD = self._join(torch.cat(both, dim=1).transpose(1, 2)).contiguous()
                yield latents_BTD, [min(max(num - begin, 0), end - begin) for num in frames]

    def _acoustic(
        self, waveforms: Sequence[Tensor], frames: Sequence[int], begin: int, end: int, padded_frames: int
    ) -> Tensor:
        """What DAC's encoder gives for frames `begin` to `end`, `[B, D, T]`."""
        hop = self.spec.hop_length
        before, after = self._encoder_reach
        first, last = max(0, begin - before), min(padded_frames, end + after)
        samples = [padded_span(waveform_N, first * hop, last * hop) for waveform_N in waveforms]
        valid = [min(max(num - first, 0), last - first) * hop for num in frames]
        latents_BDT = encode(self._encoder, torch.stack(samples)[:, None].to(self._device), valid)
        return latents_BDT[..., begin - first : end - first]

    def _frames(self, waveforms: Sequence[Tensor]) -> list[int]:
        return [-(-waveform_N.shape[0] // self.spec.hop_length) for waveform_N in waveforms]


class Semantic:
    """What the HuBERT's side gives for frames of segments."""

    def __init__(self, model: Any, spec: StreamSpec, *, device: str) -> None:
        self._model = SslModel(model.semantic_model, device=device)
        self._layers = range(len(model.semantic_model.encoder.layers) + 1)
        self._convolutions = model.encoder_semantic.to(device)
        self._sample_rate = spec.sample_rate
        self._hop = int(spec.hop_length * Fraction(SEMANTIC_RATE, spec.sample_rate))
        self._device = device
        self.longest = windows.LONGEST // self._hop  # frames that are seen whole, 30 s
        self.step = _STEP // self._hop

    def statistics(self, waveform_N: Tensor, num_frames: int) -> Statistics | None:
        """What the group norm has to know of a segment that is seen in windows."""
        return self._model.statistics(partial(self._span, waveform_N, num_frames), num_frames * self._hop + 2 * _EDGE)

    def __call__(
        self,
        waveforms: Sequence[Tensor],
        frames: Sequence[int],
        seen: range,
        statistics: Sequence[Statistics | None],
    ) -> Tensor:
        """`[B, D, T]` of the frames that are `seen`; `frames` are those that each segment has."""
        begin, end = seen.start * self._hop, seen.stop * self._hop + 2 * _EDGE
        spans = [self._span(waveform_N, num, begin, end) for waveform_N, num in zip(waveforms, frames, strict=True)]
        valid = [min(num, seen.stop) - seen.start for num in frames]
        lengths = [max(num, 1) * self._hop + 2 * _EDGE for num in valid]  # one without frames has its row nonetheless
        hidden = self._model.at(torch.stack(spans), lengths, statistics, layers=self._layers)
        mean_BTD = hidden.unflatten(2, (len(self._layers), -1)).mean(dim=2)
        mean_BDT = mean_BTD[:, :: self._hop // windows.HOP].transpose(1, 2).contiguous()
        return _convolve(self._convolutions, mean_BDT, valid)

    def _span(self, waveform_N: Tensor, num_frames: int, begin: int, end: int) -> Tensor:
        """Samples `begin` to `end` at 16 kHz; the first frame begins after `_EDGE` zeros, others follow the last."""
        span_N = torch.zeros(end - begin, device=self._device)
        first, last = max(begin - _EDGE, 0), min(end - _EDGE, num_frames * self._hop)
        if first < last:
            samples_N = at_semantic_rate(waveform_N, self._sample_rate, first, last, device=self._device)
            span_N[first + _EDGE - begin : last + _EDGE - begin] = samples_N
        return span_N


def at_semantic_rate(waveform_N: Tensor, sample_rate: int, begin: int, end: int, *, device: str) -> Tensor:
    """Samples `begin` to `end` of a waveform, and zeros after it, as torchaudio resamples it to 16 kHz."""
    if sample_rate == SEMANTIC_RATE:
        return padded_span(waveform_N, begin, end).to(device)
    ratio = Fraction(SEMANTIC_RATE, sample_rate)
    up, down = ratio.numerator, ratio.denominator
    first, last = max(0, begin // up - _FILTER_REACH), -(-end // up) + _FILTER_REACH
    samples_N = padded_span(waveform_N, first * down, last * down).to(device)
    return resample(samples_N, sample_rate, SEMANTIC_RATE)[begin - first * up : end - first * up]


def _convolve(convolutions: Any, x_BDT: Tensor, valid: Sequence[int]) -> Tensor:
    """`x_BDT` through a transformers `SemanticEncoder` of stride 1; each layer sees zeros past the `valid` frames."""
    beyond = Beyond(valid, x_BDT)
    x_BDT = beyond.silence(convolutions.conv(beyond.silence(x_BDT)))
    for block in convolutions.conv_blocks:
        for unit in block.res_units:
            inner_BDT = unit.conv1(unit.activation(x_BDT))
            x_BDT = beyond.silence(unit.conv2(unit.activation(inner_BDT)).add_(x_BDT))
        x_BDT = beyond.silence(block.conv(x_BDT))
    return x_BDT


@dataclass(frozen=True, slots=True)
class Published:
    """A published codec of this kind."""

    spec: StreamSpec
    weights: str  # a hub id
    architecture: str
    model: str  # the class in transformers
    codec: str  # its name and a number that is raised with every change of a code
    settings: dict[str, Any]  # of config.json, which must be these


def describe_joint(config: TokenizerConfig, published: Published) -> Description:
    """What `config` will give. Raises `UserError` for weights of another architecture, rate or layout."""
    weights = find_codec(config, default=published.weights, architecture=published.architecture)
    differing = list(_differing(weights, published))
    if differing:
        raise UserError(
            f"{weights.name} holds another codec than {config.tokenizer}: {'; '.join(differing)}. Name other weights, "
            "or the tokenizer that takes these."
        )
    spec, size = published.spec, weights.config["codebook_size"]
    there = num_quantizers(weights, spec)
    num_codebooks = num_codebooks_of(config, there, there)
    fingerprint = codec_fingerprint(config, published.codec, weights, num_codebooks)
    return Description(
        config, replace(spec, num_codebooks=num_codebooks, codebook_size=size), fingerprint, weights=weights
    )


def joint_dim(codec: Description) -> int:
    """How many dimensions what is joined has, before the quantizer."""
    config = codec.weights.config
    return config["acoustic_model_config"]["hidden_size"] + config["semantic_model_config"]["hidden_size"]


def _differing(weights: Weights, published: Published) -> list[str]:
    found, spec = weights.config, published.spec
    acoustic, semantic = found["acoustic_model_config"], found["semantic_model_config"]
    told = [
        f"{key} {found.get(key)}, not {value}" for key, value in published.settings.items() if found.get(key) != value
    ]
    if set(found["strides"]) != {1}:
        told.append(f"strides {list(found['strides'])} after the semantic model, not 1")
    if acoustic["model_type"] != "dac":
        return [*told, f"an acoustic model of type {acoustic['model_type']!r}, not 'dac'"]
    hops = {product(acoustic["downsampling_ratios"]), product(acoustic["upsampling_ratios"])}
    if hops != {spec.hop_length}:
        told.append(f"frames of {' and '.join(map(str, sorted(hops)))} samples, not {spec.hop_length}")
    if semantic["model_type"] not in _SEMANTIC_MODELS:
        return [*told, f"a semantic model of type {semantic['model_type']!r}, not one of {', '.join(_SEMANTIC_MODELS)}"]
    hop, window = windows.clock(semantic)
    if (hop, window) != (windows.HOP, windows.WINDOW):
        told.append(
            f"a semantic model with frames of {window} samples every {hop}, not {windows.WINDOW} every {windows.HOP}"
        )
    # of even ones the convolutions after the semantic model would give other numbers of frames
    told += [f"an even {key}, {found[key]}" for key in ("kernel_size", "unit_kernel_size") if found[key] % 2 == 0]
    rate = weights.preprocessor.get("sampling_rate", spec.sample_rate)
    if rate != spec.sample_rate:
        told.append(f"a feature extractor for {rate} Hz, not {spec.sample_rate}")
    padded_to = weights.preprocessor.get("hop_length", spec.hop_length)
    if padded_to != spec.hop_length:
        told.append(f"a feature extractor with hop_length {padded_to}, not {spec.hop_length}")
    return told


def open_joint(
    description: Description,
    published: Published,
    quantizer: Callable[[Any], Quantizer],
    device: str,
    *,
    chunk_frames: int = 0,
) -> JointCodec:
    """The tokenizer that is described; `quantizer` is made of the stages that its stream has.

    `chunk_frames` other than 0 are for tests.
    """
    spec = description.spec
    model: Any = load_model(published.model, description.weights, may_lack=("masked_spec_embed",))
    chunk_samples = _CHUNK_SAMPLES if device == "cpu" else _CHUNK_SAMPLES_ON_GPU
    return JointCodec(
        model,
        quantizer(model.quantizer.quantizers[: spec.num_codebooks]),
        spec,
        description.fingerprint,
        chunk_frames=chunk_frames or chunk_samples // spec.hop_length,
        device=device,
    )
