"""Resampling in blocks: torchaudio's windowed sinc, in bounded memory, the same numbers however long the audio."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torchaudio.transforms import Resample

VERSION = "torchaudio-sinc-hann/1"
_BLOCK_SAMPLES = 1 << 18  # input samples at a time, rounded down to whole ratio periods
_MAX_KERNEL = 1 << 26  # elements; torchaudio keeps one row of taps per output phase
_LOWPASS_WIDTH = 6
_ROLLOFF = 0.99


def resampled_length(num_samples: int, sample_rate: int, new_rate: int) -> int:
    """Samples at `new_rate` that `num_samples` at `sample_rate` become: the ceiling, as torchaudio has it."""
    return -(-num_samples * new_rate // sample_rate)


def can_resample(sample_rate: int, new_rate: int) -> bool:
    """Whether the ratio of the rates is small enough for a kernel that fits in memory."""
    divisor = math.gcd(sample_rate, new_rate)
    return (sample_rate // divisor) * (new_rate // divisor) <= _MAX_KERNEL


class StreamResampler:
    """Takes a mono waveform piece by piece and writes it, resampled, into one tensor of known length.

    The result is that of `torchaudio.transforms.Resample` (float64 taps) on the whole waveform: blocks begin at fixed
    multiples of the ratio's period from the first sample and see the filter's full width of samples on both sides.
    """

    def __init__(self, num_samples: int, sample_rate: int, new_rate: int) -> None:
        self.out = torch.empty(resampled_length(num_samples, sample_rate, new_rate))
        divisor = math.gcd(sample_rate, new_rate)
        self._orig, self._new = sample_rate // divisor, new_rate // divisor
        self._resample = _kernel(sample_rate, new_rate) if self._orig != self._new else None
        width = math.ceil(_LOWPASS_WIDTH * self._orig / (min(self._orig, self._new) * _ROLLOFF))
        self._context = self._orig * -(-(width + self._orig) // self._orig)
        self._block = self._orig * max(1, _BLOCK_SAMPLES // self._orig)
        self._pending = torch.zeros(self._context)  # silence before the first sample, then what is not yet used up
        self._written = 0

    def push(self, piece_N: Tensor) -> None:
        if self._resample is None:
            self.out[self._written : self._written + piece_N.shape[0]] = piece_N
            self._written += piece_N.shape[0]
            return
        self._pending = torch.cat([self._pending, piece_N])
        while self._pending.shape[0] >= self._block + 2 * self._context:
            self._emit(self._pending[: self._block + 2 * self._context], self._block)
            self._pending = self._pending[self._block :]

    def finish(self) -> Tensor:
        """The whole waveform at the new rate. Call once, after the last piece."""
        if self._resample is not None:
            left = self._pending.shape[0] - self._context
            while left > 0:
                block = min(left, self._block)
                window = self._pending[: block + 2 * self._context]
                missing = block + 2 * self._context - window.shape[0]
                self._emit(torch.nn.functional.pad(window, (0, missing)), block)
                self._pending = self._pending[block:]
                left -= block
        assert self._written == self.out.shape[0], "the waveform was not as long as promised"
        return self.out

    def _emit(self, window: Tensor, block: int) -> None:
        assert self._resample is not None
        begin = self._context // self._orig * self._new
        count = -(-block * self._new // self._orig)
        self.out[self._written : self._written + count] = self._resample(window.clone())[begin : begin + count]
        self._written += count


@lru_cache(maxsize=8)
def _kernel(sample_rate: int, new_rate: int) -> Resample:
    return Resample(sample_rate, new_rate, lowpass_filter_width=_LOWPASS_WIDTH, rolloff=_ROLLOFF)
