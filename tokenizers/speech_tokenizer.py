"""SpeechTokenizer (Zhang et al. 2023, "SpeechTokenizer: Unified Speech Tokenizer for Speech Large Language Models").

A SEANet that sees both ways, with a bidirectional LSTM, and a residual VQ. Its first codebook is distilled from HuBERT.

Axes: B segments, N samples, T frames, C channels before the LSTM, D dimensions of a latent, K codebooks of a stream.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .codec import Chunks, codec_fingerprint, codes_of_chunks, gaps_of_chunks, num_codebooks_of, product, up_to
from .dac_model import with_fast_snakes
from .hub import Weights
from .latents import with_latents
from .package_weights import Package, fill, find_package, load_state
from .quantize import ResidualQuantizer
from .spec import FrameRule, StreamSpec
from .speech_tokenizer_model import BothWays, Recurrent, build, piecewise, reach_of, through
from .tokenizer import Description, TokenizerConfig, TokenizerEntry

_PACKAGE = Package(
    model="SpeechTokenizer",
    weights="fnlp/SpeechTokenizer",
    inside="speechtokenizer_hubert_avg",
    pickled="SpeechTokenizer.pt",
    numbers=("n_filters", "dimension", "n_q", "codebook_size"),
    lists=("strides",),
    published={
        "sample_rate": 16_000,
        "bidirectional": True,
        "lstm_layers": 2,
        "n_residual_layers": 1,
        "residual_kernel_size": 3,
        "activation": ("ELU", "Snake"),
    },
)
_SPEC = StreamSpec(
    tokenizer="speechtokenizer",
    sample_rate=16_000,
    decode_sample_rate=16_000,
    hop_length=320,
    window_length=1,
    frame_rule=FrameRule.CEIL,
    num_codebooks=8,
    codebook_size=1024,
)


class SpeechTokenizer:
    """A `Tokenizer` and `BatchTokenizer` of both networks and the codebooks, as `build` names them.

    Segments of up to `stretch_frames` are encoded together. Longer ones are encoded alone, in stretches of so many
    frames that are gone through three times: the LSTM's way back begins at the end. The convolutions of either kind are
    taken in chunks of `chunk_frames` with all that they see.
    """

    def __init__(
        self,
        model: Any,
        spec: StreamSpec,
        fingerprint: dict[str, str],
        *,
        chunk_frames: int,
        stretch_frames: int,
        device: str = "cpu",
    ) -> None:
        self.spec = spec
        self.fingerprint = fingerprint
        model.to(device)
        encoder, decoder = list(model.encoder.model), list(model.decoder.model)
        middle = next(place for place, layer in enumerate(encoder) if isinstance(layer, Recurrent))
        self._to_frames, self._to_latents = encoder[:middle], encoder[middle + 1 :]
        self._lstm = BothWays(encoder[middle].lstm)
        self._from_latents, self._decoder_lstm, self._to_samples = decoder[:1], decoder[1].lstm, decoder[2:]
        self._quantizer = ResidualQuantizer(torch.stack(list(model.quantizer)[: spec.num_codebooks]), device=device)
        first, last = reach_of(self._to_frames, 0, 0)
        # what is reflected at the end of a segment looks back by up to a stride more, at every layer
        self._reach = -(first // spec.hop_length) + 2, last // spec.hop_length
        self._chunk_frames = chunk_frames
        self._stretch_frames = stretch_frames
        self.longest = stretch_frames * spec.hop_length
        self._device = device

    def encode(self, waveform_N: Tensor) -> Tensor:
        return self.encode_batch([waveform_N], waveform_N.shape[0])[0]

    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        return up_to(self.longest, self._together, waveforms, padded_length)

    @torch.inference_mode()
    def _together(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        chunks = self.latents(waveforms, padded_length)
        frames = [self._num_frames(waveform_N) for waveform_N in waveforms]
        return codes_of_chunks(chunks, self._quantizer.encode, frames, self.spec.num_codebooks)

    @torch.inference_mode()
    def gaps(self, waveform_N: Tensor) -> Tensor:
        latents = self.latents([waveform_N], waveform_N.shape[0])
        return gaps_of_chunks(latents, self._quantizer.gaps, self.spec.num_codebooks)

    def decode(self, codes_KT: Tensor) -> Tensor:
        chunks = codes_KT.split(self._chunk_frames, dim=1) if codes_KT.shape[1] else ()
        latents = (self._quantizer.decode(chunk_KT.to(self._device)) for chunk_KT in chunks)
        return self._sound(latents, codes_KT.shape[1])

    def synthesize(self, latents_TD: Tensor) -> Tensor:
        chunks = latents_TD.split(self._chunk_frames) if len(latents_TD) else ()
        return self._sound((chunk_TD.to(self._device) for chunk_TD in chunks), len(latents_TD))

    @torch.inference_mode()
    def _sound(self, latents: Iterator[Tensor], num_frames: int) -> Tensor:
        pieces = (latents_TD.t()[None].contiguous() for latents_TD in latents)
        hidden = self._remembered(piecewise(self._from_latents, pieces, num_frames))
        sound = piecewise(self._to_samples, hidden, num_frames, hop=self.spec.hop_length)
        return torch.cat([torch.empty(0), *(piece_11N[0, 0].cpu() for piece_11N in sound)])

    def latents(self, waveforms: Sequence[Tensor], padded_length: int) -> Chunks:
        """Latents of segments of up to `stretch_frames`, or of a single longer one."""
        num_frames = [self._num_frames(waveform_N) for waveform_N in waveforms]
        longest = max(num_frames, default=0)
        if longest > self._stretch_frames:
            (waveform_N,) = waveforms
            yield from self._long_latents(waveform_N, longest)
        elif longest:
            padded = min(-(-padded_length // self.spec.hop_length), self._stretch_frames)
            hidden_BCT = self._lstm.whole(self._frames(waveforms, 0, padded), num_frames)
            latents_BDT, _ = through(self._to_latents, hidden_BCT, num_frames)
            yield latents_BDT.transpose(1, 2).contiguous(), num_frames

    def _long_latents(self, waveform_N: Tensor, num_frames: int) -> Chunks:
        begins = range(0, num_frames, self._stretch_frames)
        ends = [*begins[1:], num_frames]
        hidden = self._lstm.stretches(lambda i: self._frames([waveform_N], begins[i], ends[i]), len(begins))
        for latents_1DT in piecewise(self._to_latents, hidden, num_frames):
            yield latents_1DT.transpose(1, 2).contiguous(), [latents_1DT.shape[2]]

    def _frames(self, waveforms: Sequence[Tensor], begin: int, end: int) -> Tensor:
        """What the LSTM is given of the frames from `begin` to `end`, `[B, C, T]`."""
        hop, (before, after) = self.spec.hop_length, self._reach
        parts = []
        for chunk in range(begin, end, self._chunk_frames):
            chunk_end = min(chunk + self._chunk_frames, end)
            first, last = max(0, chunk - before), chunk_end + after
            # a copy of its own: convolutions' results may depend on the alignment of what they are given
            samples_B1N = torch.zeros(len(waveforms), 1, (last - first) * hop)
            valid = []
            for row_N, waveform_N in zip(samples_B1N[:, 0], waveforms, strict=True):
                samples_N = waveform_N[first * hop : last * hop]
                row_N[: samples_N.shape[0]] = samples_N
                valid.append(samples_N.shape[0])
            frames_BCT, _ = through(self._to_frames, samples_B1N.to(self._device), valid)
            parts.append(frames_BCT[..., chunk - first : chunk_end - first])
        return torch.cat(parts, dim=2)

    def _remembered(self, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        """The decoder's LSTM, which carries its state on from piece to piece."""
        state = None
        for x_1CT in pieces:
            x_T1C = x_1CT.permute(2, 0, 1)
            y_T1C, state = self._decoder_lstm(x_T1C, state)
            yield (y_T1C + x_T1C).permute(1, 2, 0)

    def _num_frames(self, waveform_N: Tensor) -> int:
        return -(-waveform_N.shape[0] // self.spec.hop_length)


def _describe(config: TokenizerConfig) -> Description:
    weights = find_package(config, _PACKAGE)
    there = weights.config["n_q"]
    num_codebooks = num_codebooks_of(config, there, there)
    spec = replace(
        _SPEC,
        hop_length=product(weights.config["strides"]),
        num_codebooks=num_codebooks,
        codebook_size=weights.config["codebook_size"],
    )
    fingerprint = codec_fingerprint(config, "speechtokenizer/1", weights, num_codebooks)
    return Description(config, spec, fingerprint, weights=weights)


def open_speech_tokenizer(
    description: Description, device: str, *, chunk_frames: int = 0, stretch_frames: int = 0
) -> SpeechTokenizer:
    """The tokenizer that is described; numbers of frames other than 0 are for tests."""
    weights: Weights = description.weights
    state = {_own_name(name): tensor for name, tensor in load_state(weights, _PACKAGE).items()}
    model = build(weights.config)
    fill(model, state, weights)
    if weights.config["activation"] == "Snake":
        with_fast_snakes(model)
    return SpeechTokenizer(
        model,
        description.spec,
        description.fingerprint,
        chunk_frames=chunk_frames or (_CHUNK_FRAMES if device == "cpu" else _CHUNK_FRAMES_ON_GPU),
        stretch_frames=stretch_frames or _STRETCH_FRAMES,
        device=device,
    )


def _own_name(name: str) -> str:
    name = name.replace(".conv.conv.", ".conv.").replace(".convtr.convtr.", ".conv.")
    return re.sub(r"^quantizer\.vq\.layers\.(\d+)\._codebook\.embed$", r"quantizer.\1", name)


_CHUNK_FRAMES = 100  # 2 s
_CHUNK_FRAMES_ON_GPU = 1_500
_STRETCH_FRAMES = 1_500  # 30 s

ENTRIES = with_latents(
    TokenizerEntry(
        spec=_SPEC,
        kind="acoustic",
        about="SpeechTokenizer (Zhang et al. 2023): bidirectional LSTM, residual VQ; codebook 1 distilled from HuBERT",
        needs_codebook=False,
        last_frame="each layer reflects its own input, to a whole stride",
        long_audio="in stretches of 30 s, three times through: the LSTM also comes back from the end; exact",
        weights=_PACKAGE.weights,
        licence="Apache-2.0",
        describe=_describe,
        open=open_speech_tokenizer,
    ),
    lambda codec: codec.weights.config["dimension"],
)
