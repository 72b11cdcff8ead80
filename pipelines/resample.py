"""Resampling in blocks: torchaudio's windowed sinc, in bounded memory, the same numbers however long the audio.

torchaudio keeps a row of taps for every output phase. Rates with a large ratio (11,127 to 16,000 Hz: 178 million taps)
have theirs evaluated where they are needed instead.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.transforms import Resample

VERSION = "torchaudio-sinc-hann/2"
_BLOCK_SAMPLES = 1 << 18  # input samples at a time, rounded down to whole ratio periods
_MAX_KERNEL = 1 << 22  # taps; with more, they are evaluated on the fly
_MAX_RATIO = 1 << 12  # of the rates: a filter of 25,000 taps
_CHUNK_TAPS = 1 << 17  # evaluated at a time
_NEAR_ZERO = 1e-4  # zero crossings; closer to the centre, the sine of a sum would lose digits
_LOWPASS_WIDTH = 6
_ROLLOFF = 0.99


def resampled_length(num_samples: int, sample_rate: int, new_rate: int) -> int:
    """Samples at `new_rate` that `num_samples` at `sample_rate` become: the ceiling, as torchaudio has it."""
    return -(-num_samples * new_rate // sample_rate)


def can_resample(sample_rate: int, new_rate: int) -> bool:
    """Whether a filter of reasonable length does it: any two rates of audio, however odd."""
    return max(sample_rate, new_rate) <= _MAX_RATIO * min(sample_rate, new_rate)


class StreamResampler:
    """Takes a mono waveform piece by piece and writes it, resampled, into one tensor of known length.

    The result is that of `torchaudio.transforms.Resample` (float64 taps) on the whole waveform: blocks begin at fixed
    multiples of the ratio's period from the first sample and see the filter's full width of samples on both sides.
    """

    def __init__(self, num_samples: int, sample_rate: int, new_rate: int) -> None:
        self.out = torch.empty(resampled_length(num_samples, sample_rate, new_rate))
        divisor = math.gcd(sample_rate, new_rate)
        self._orig, self._new = sample_rate // divisor, new_rate // divisor
        width = math.ceil(_LOWPASS_WIDTH * self._orig / (min(self._orig, self._new) * _ROLLOFF))
        self._resample: Resample | _LongRatio | None = None
        if (2 * width + self._orig) * self._new > _MAX_KERNEL:
            self._resample = _LongRatio(self._orig, self._new, width)
        elif self._orig != self._new:
            self._resample = _kernel(sample_rate, new_rate)
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
        if isinstance(self._resample, _LongRatio):
            resampled = self._resample(window, self._context, count)
        else:
            resampled = self._resample(window.clone())[begin : begin + count]
        self.out[self._written : self._written + count] = resampled
        self._written += count


@lru_cache(maxsize=8)
def _kernel(sample_rate: int, new_rate: int) -> Resample:
    return Resample(sample_rate, new_rate, lowpass_filter_width=_LOWPASS_WIDTH, rolloff=_ROLLOFF)


class _LongRatio:
    """torchaudio's filter evaluated tap by tap, for ratios whose table of taps would not fit in memory.

    Output m lies in period p = m // new at phase j = m % new, and torchaudio weighs sample p * orig + k with the tap at
    t = (k / orig - j / new) * cutoff zero crossings, where j / new is rounded to float32.
    """

    def __init__(self, orig: int, new: int, width: int) -> None:
        self._orig, self._new, self._width = orig, new, width
        self._cutoff = min(orig, new) * _ROLLOFF
        steps_W = np.arange(2 * width + 3) * (self._cutoff / orig)  # zero crossings from an output's first tap
        self._steps_W = steps_W
        self._sin_W, self._cos_W = np.sin(np.pi * steps_W), np.cos(np.pi * steps_W)
        slow_W = np.pi * steps_W / _LOWPASS_WIDTH  # of the window, cos(x)^2 = (1 + cos(2x)) / 2
        self._slow_sin_W, self._slow_cos_W = np.sin(slow_W), np.cos(slow_W)

    def __call__(self, window: Tensor, context: int, count: int) -> Tensor:
        """`count` outputs; the first lies at sample `context` of `window`, which is silent or known on both sides."""
        x_N = window.numpy().astype(np.float64)
        out_M = np.empty(count, dtype=np.float32)
        chunk = max(1, _CHUNK_TAPS // len(self._steps_W))
        for begin in range(0, count, chunk):
            m_M = np.arange(begin, min(begin + chunk, count))
            out_M[begin : begin + len(m_M)] = self._outputs(x_N, m_M, context)
        return torch.from_numpy(out_M)

    def _outputs(self, x_N: NDArray[np.float64], m_M: NDArray[np.int64], context: int) -> NDArray[np.float64]:
        period_M, phase_M = np.divmod(m_M, self._new)
        first_M = phase_M * self._orig // self._new - self._width - 1  # the first tap's sample, from the period's start
        rounded_M = np.float32(phase_M) / np.float32(self._new)
        t_M = (first_M / self._orig - rounded_M.astype(np.float64)) * self._cutoff
        place_M = context + period_M * self._orig + first_M
        x_MW = np.lib.stride_tricks.sliding_window_view(x_N, len(self._steps_W))[place_M]
        return (self._taps(t_M[:, None]) * x_MW).sum(axis=1)

    def _taps(self, t_M1: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights `[M, W]` of the samples from `t_M1` zero crossings on."""
        t_MW = t_M1 + self._steps_W
        sine_MW = np.sin(np.pi * t_M1) * self._cos_W + np.cos(np.pi * t_M1) * self._sin_W
        slow_M1 = np.pi * t_M1 / _LOWPASS_WIDTH
        window_MW = 0.5 + 0.5 * (np.cos(slow_M1) * self._slow_cos_W - np.sin(slow_M1) * self._slow_sin_W)
        near = np.abs(t_MW) < _NEAR_ZERO
        sinc_MW = np.where(near, 1 - (np.pi * t_MW) ** 2 / 6, sine_MW / np.where(near, 1.0, np.pi * t_MW))
        return np.where(np.abs(t_MW) < _LOWPASS_WIDTH, sinc_MW * window_MW, 0.0) * (self._cutoff / self._orig)
