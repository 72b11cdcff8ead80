"""What a codec has before its quantizer, as features: to fit other codebooks on, or to be kept as they are.

Axes: B segments, T frames, D dimensions, N samples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .codec import Chunks, up_to
from .spec import StreamSpec
from .tokenizer import Description, Mode, Output, TokenizerConfig, TokenizerEntry

SUFFIX = "-latents"


def _hidden_size(codec: Description) -> int:
    return codec.weights.config["hidden_size"]


class LatentCodec(Protocol):
    """A codec that shows its latents."""

    spec: StreamSpec

    @property
    def longest(self) -> int | None:
        """Samples of a segment that is taken together with others; a longer one comes alone."""
        ...

    def latents(self, waveforms: Sequence[Tensor], padded_length: int) -> Chunks:
        """Latents of several segments, chunk by chunk."""
        ...

    def synthesize(self, latents_TD: Tensor) -> Tensor:
        """Sound of latents, those that are quantized or those that are not."""
        ...


class CodecLatents:
    """`Features`, `PiecewiseFeatures`, `BatchFeatures` and `Synthesizer` of a codec."""

    def __init__(self, codec: LatentCodec, description: Description) -> None:
        self.spec = description.spec
        self.dim = description.dim or 0
        self.fingerprint = description.fingerprint
        self.precision = description.config.mode.precision
        self._codec = codec

    def extract(self, waveform_N: Tensor) -> Tensor:
        return self.extract_batch([waveform_N], waveform_N.shape[0])[0]

    @torch.inference_mode()  # of the body alone, not of who iterates
    def pieces(self, waveform_N: Tensor) -> Iterator[Tensor]:
        for latents_BTD, (num,) in self._codec.latents([waveform_N], waveform_N.shape[0]):
            yield latents_BTD[0, :num]

    def extract_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        return up_to(self._codec.longest, self._together, waveforms, padded_length)

    @torch.inference_mode()
    def _together(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        parts: list[list[Tensor]] = [[torch.empty(0, self.dim)] for _ in waveforms]
        for latents_BTD, frames in self._codec.latents(waveforms, padded_length):
            for row, num in enumerate(frames):
                parts[row].append(latents_BTD[row, :num].clone())
        return [torch.cat([part.to(row[-1].device) for part in row]) for row in parts]

    def synthesize(self, features_TD: Tensor) -> Tensor:
        return self._codec.synthesize(features_TD)


def with_latents(
    entry: TokenizerEntry, dim: Callable[[Description], int] = _hidden_size
) -> tuple[TokenizerEntry, TokenizerEntry]:
    """A codec's entry, and the one of its latents, which have `dim` dimensions by the codec's description."""
    name = entry.spec.tokenizer + SUFFIX
    return entry, replace(
        entry,
        spec=replace(entry.spec, tokenizer=name),
        about=f"latents before the quantizer of {entry.spec.tokenizer}",
        needs_codebook=True,
        output=Output.FEATURES,
        fast_change="not measured" if Mode.FAST in entry.modes else "",
        describe=partial(_describe, entry, dim),
        open=partial(_open, entry),
    )


# what the fingerprint of a codec says of its codes alone, or says otherwise here
_OF_CODES = ("tokenizer", "codec", "codebooks", "precision")


def _describe(entry: TokenizerEntry, dim: Callable[[Description], int], config: TokenizerConfig) -> Description:
    name = entry.spec.tokenizer
    codec = entry.describe(replace(config, tokenizer=name, output=None, reduce=None))
    return Description(
        config,
        replace(codec.spec, tokenizer=config.tokenizer),
        latents_fingerprint(codec),
        dim=dim(codec),
        weights=codec,
    )


def latents_fingerprint(codec: Description) -> dict[str, str]:
    """What decides the latents of a codec, but for their precision."""
    decides = {part: value for part, value in codec.fingerprint.items() if part not in _OF_CODES}
    return {"features": f"{codec.fingerprint['codec']} latents", **decides}


def _open(entry: TokenizerEntry, description: Description, device: str) -> CodecLatents:
    return CodecLatents(entry.open(description.weights, device), description)
