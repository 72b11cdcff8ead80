"""What HuBERT, WavLM and wav2vec 2.0 share around the model: its clock, the waveform's normalization, long recordings.

Up to 30 s (480,000 samples) a segment is run whole. A longer one is run in windows of 30 s (1,499 frames) that begin
every 26 s (1,300 frames); the last is moved left until it ends with the last frame. The waveform is normalized as a
whole, and the group norm of base models has the statistics of the whole, so that frames before the transformer are
those of the whole recording; attention and the positional convolution see the window only. Of frames that two windows
have, the first half is taken from the first: each frame has two seconds around it, but at the ends of the recording.

Axes: N samples, T frames, D dimensions, B segments.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from .ssl_model import SslModel, Statistics

HOP = 320  # samples
WINDOW = 400  # samples that a frame sees before the transformer
LONGEST = 480_000  # samples that are run whole
_LONGEST_FRAMES = (LONGEST - WINDOW) // HOP + 1
_STEP_FRAMES = 1_300
_BLOCK = 1 << 20  # samples whose moments are taken at a time


@dataclass(frozen=True, slots=True)
class Window:
    """A span that is run by itself, in frames of the segment."""

    first: int
    keep_begin: int  # the frames that are taken from it
    keep_end: int


def clock(config: Mapping[str, Any]) -> tuple[int, int]:
    """Samples from frame to frame, and how many one sees, of the convolutions that a model's `config` describes."""
    hop, window = 1, 1
    for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
        hop, window = hop * stride, window + (kernel - 1) * hop
    return hop, window


def num_frames(num_samples: int) -> int:
    return 0 if num_samples < WINDOW else (num_samples - WINDOW) // HOP + 1


def plan_windows(num_frames: int, longest: int = _LONGEST_FRAMES, step: int = _STEP_FRAMES) -> list[Window]:
    """The windows, of `longest` frames every `step`, of a segment of so many: each frame is kept once, in order."""
    if num_frames == 0:
        return []
    last = max(0, num_frames - longest)
    firsts = [*range(0, last, step), last]
    borders = [(after + before + longest) // 2 for before, after in pairwise(firsts)]
    return [
        Window(first, begin, end)
        for first, begin, end in zip(firsts, [0, *borders], [*borders, num_frames], strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Normalization:
    """To zero mean and unit variance over a whole segment: (x - mean) / sqrt(variance + epsilon).

    transformers' Wav2Vec2FeatureExtractor has an epsilon of 1e-7, torchaudio's bundles 1e-5.
    """

    epsilon: float

    def of(self, waveform_N: Tensor) -> Callable[[Tensor], Tensor]:
        """The normalization that `waveform_N` has as a whole, for spans of it; one pass, a block at a time."""
        blocks = waveform_N.split(_BLOCK)
        count = max(1, waveform_N.shape[0])
        mean = math.fsum(float(block.double().sum()) for block in blocks) / count
        squares = math.fsum(float((block.double() - mean).square().sum()) for block in blocks)
        deviation = math.sqrt(squares / count + self.epsilon)
        return lambda span_N: (span_N - mean) / deviation


class Run(Protocol):
    """`SslModel` or its `frames`."""

    def __call__(
        self, waveforms_BN: Tensor, lengths: Sequence[int], statistics: Sequence[Statistics | None] = ()
    ) -> Tensor: ...


def run_windows(
    waveform_N: Tensor, model: SslModel, run: Run, *, normalization: Normalization | None, device: str
) -> Iterator[Tensor]:
    """What `run` of `model` gives for each window `[t, D]`, in order, cut to the frames that are taken from it."""
    windows = plan_windows(num_frames(waveform_N.shape[0]))
    if not windows:
        return
    normalize = _nothing if normalization is None else normalization.of(waveform_N)

    def span(begin: int, end: int) -> Tensor:
        return normalize(waveform_N[begin:end].to(device))

    statistics = model.statistics(span, waveform_N.shape[0])
    for window in windows:
        begin = window.first * HOP
        end = waveform_N.shape[0] if window is windows[-1] else begin + LONGEST
        hidden_TD = run(span(begin, end)[None], [end - begin], [statistics])[0]
        yield hidden_TD[window.keep_begin - window.first : window.keep_end - window.first]


def run_batch(
    waveforms: Sequence[Tensor],
    padded_length: int,
    run: Run,
    *,
    normalization: Normalization | None,
    device: str,
) -> list[Tensor | None]:
    """What `run` gives for each waveform `[T, D]`; None for those too short or too long to be run whole.

    They have their row in the batch nonetheless: in `fast` mode its shape decides the last bits.
    """
    fit = [WINDOW <= waveform_N.shape[0] <= LONGEST for waveform_N in waveforms]
    if not any(fit):
        return [None] * len(waveforms)
    padded_BN = torch.zeros(len(waveforms), min(padded_length, LONGEST))
    lengths = [WINDOW] * len(waveforms)
    for i, waveform_N in enumerate(waveforms):
        if fit[i]:
            normalize = _nothing if normalization is None else normalization.of(waveform_N)
            lengths[i] = waveform_N.shape[0]
            padded_BN[i, : lengths[i]] = normalize(waveform_N)
    hidden_BTD = run(padded_BN.to(device), lengths)
    return [hidden_BTD[i, : num_frames(length)] if fit[i] else None for i, length in enumerate(lengths)]


def _nothing(span_N: Tensor) -> Tensor:
    return span_N
