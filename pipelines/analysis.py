"""From one recording's sound to its segments: speech, trimming, level, clipping and loudness, in one bounded pass.

A recording becomes a few figures for every 10 ms (24 bytes; 8.6 MB an hour), then everything is a pure function of
those. Decibels are relative to full scale 1.0 (dBFS): a full-scale square wave has a level of 0, a sine of -3.01.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchaudio.functional import lfilter

from .entries import AudioError
from .policy import GRID_HZ, CorpusPolicy
from .vad import Spans, SpeechDetector, require_vad_model, speech_spans

FULL_SCALE = 1 - 2**-15  # from here up a sample counts as clipped: the largest 16-bit number
MAX_GAIN_DB = 40.0
_BLOCK_SAMPLES = 1 << 19  # analysed at a time, rounded to whole seconds, so that the grid begins anew in each
_GATE_FRAMES, _GATE_STEP = 40, 10  # BS.1770: blocks of 400 ms, every 100 ms
_ABSOLUTE_GATE_LUFS, _RELATIVE_GATE_LU = -70.0, -10.0
_LOUDNESS_OFFSET = -0.691  # so that a 997 Hz sine at full scale has -3.01 LUFS

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Found:
    """A segment: its place in the recording, at the recording's rate, and the gain that its sound is to get."""

    start_sample: int
    num_samples: int
    gain_db: float | None  # None: no loudness asked for, or too quiet to have one


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What is kept of `num_samples` samples: sums over every 10 ms; frame i begins at sample `i * rate // 100`."""

    sample_rate: int
    num_samples: int
    squares_F: NDArray[np.float64]
    peaks_F: NDArray[np.float32]
    clipped_F: NDArray[np.int32]  # samples at full scale
    weighted_F: NDArray[np.float64]  # K-weighted squares, for loudness; empty when not asked for
    probabilities_T: NDArray[np.float32]  # of speech, see vad.py; empty when not asked for

    def frames(self, start: int, end: int) -> slice:
        """The frames that samples [start, end) touch."""
        first = _frame_of(start, self.sample_rate)
        return slice(first, max(first, _frame_of(end - 1, self.sample_rate) + 1))

    def count(self, frames: slice) -> int:
        """Samples in these frames."""
        return self._start(frames.stop) - self._start(frames.start)

    def counts(self, frames: slice) -> NDArray[np.int64]:
        """Samples in each of these frames."""
        starts = np.arange(frames.start, frames.stop + 1, dtype=np.int64) * self.sample_rate // GRID_HZ
        return np.diff(np.minimum(starts, self.num_samples))

    def _start(self, frame: int) -> int:
        return min(self.num_samples, frame * self.sample_rate // GRID_HZ)


def find_segments(
    pieces: Iterator[Samples], *, sample_rate: int, start_sample: int, num_samples: int, policy: CorpusPolicy
) -> tuple[list[Found], Counter[str]]:
    """Segments of a recording, or of its part of `num_samples` from `start_sample`, and why others are left out.

    `pieces` are the part's mono samples in order, cut anywhere: the result does not depend on the cuts. The part is
    divided into windows, spans of speech, or not at all; each of these is trimmed, then filtered, then measured for
    its gain. Figures are of the 10 ms frames that a segment touches, so exact for one that lies on the grid.
    Reasons: "no speech" (of the whole part), "silent" (trimmed to nothing), "too short", "too long", "too quiet",
    "clipped". Raises `AudioError` when there are fewer or more samples than promised, `UserError` without the
    package that VAD needs.
    """
    figures = measure(pieces, sample_rate=sample_rate, num_samples=num_samples, policy=policy)
    found: list[Found] = []
    left_out: Counter[str] = Counter()
    spans = _spans(figures, policy)
    if policy.vad is not None and not spans:
        left_out["no speech"] += 1
    for start, end in spans:
        if policy.transforms.trim_silence_db is not None:
            start, end = trimmed(figures, start, end, policy.transforms.trim_silence_db)
        reason = "silent" if start == end else _reason(figures, start, end, policy)
        if reason is not None:
            left_out[reason] += 1
            continue
        gain_db = None
        if policy.transforms.loudness_lufs is not None:
            gain_db = loudness_gain_db(figures, start, end, policy.transforms.loudness_lufs)
        found.append(Found(start_sample + start, end - start, gain_db))
    return found, left_out


def metadata_reason(language: str | None, speaker: str | None, policy: CorpusPolicy) -> str | None:
    """Why a recording is left out for what is known of it, or None. What is not known is not among those named."""
    if policy.filters.languages and language not in policy.filters.languages:
        return "other language"
    if policy.filters.speakers and speaker not in policy.filters.speakers:
        return "other speaker"
    return None


def duration_reason(duration_s: float, policy: CorpusPolicy) -> str | None:
    """Why a segment of this duration is left out, or None."""
    least, most = policy.filters.min_duration_s, policy.filters.max_duration_s
    if least is not None and duration_s < least:
        return "too short"
    if most is not None and duration_s > most:
        return "too long"
    return None


def measure(pieces: Iterator[Samples], *, sample_rate: int, num_samples: int, policy: CorpusPolicy) -> Figures:
    """The figures of a recording, block by block; loudness and speech only where the policy asks."""
    weighting = KWeighting(sample_rate) if policy.transforms.loudness_lufs is not None else None
    detector = None
    if policy.vad is not None:
        require_vad_model(policy.vad)
        detector = SpeechDetector(sample_rate)
    squares, peaks, clipped, weighted = [np.zeros(0)], [np.zeros(0, np.float32)], [np.zeros(0, np.int32)], [np.zeros(0)]
    seen = 0
    for block_N in _blocks(pieces, sample_rate * max(1, _BLOCK_SAMPLES // sample_rate)):
        seen += len(block_N)
        if seen > num_samples:
            break
        num_frames = _frame_of(len(block_N) - 1, sample_rate) + 1
        starts_F = np.arange(num_frames, dtype=np.int64) * sample_rate // GRID_HZ
        wide_N, sizes_N = block_N.astype(np.float64), np.abs(block_N)
        squares.append(np.add.reduceat(np.square(wide_N), starts_F))
        peaks.append(np.maximum.reduceat(sizes_N, starts_F))
        clipped.append(np.add.reduceat(sizes_N >= FULL_SCALE, starts_F, dtype=np.int32))
        if weighting is not None:
            weighted.append(np.add.reduceat(np.square(weighting.push(wide_N)), starts_F))
        if detector is not None:
            detector.push(block_N)
    if seen != num_samples:
        found = f"more than {num_samples:,}" if seen > num_samples else f"{seen:,}"
        raise AudioError("corrupt", f"{found} samples came, {num_samples:,} were expected")
    return Figures(
        sample_rate=sample_rate,
        num_samples=num_samples,
        squares_F=np.concatenate(squares),
        peaks_F=np.concatenate(peaks),
        clipped_F=np.concatenate(clipped),
        weighted_F=np.concatenate(weighted),
        probabilities_T=detector.finish() if detector is not None else np.zeros(0, np.float32),
    )


class KWeighting:
    """The filter of ITU-R BS.1770-4, Annex 1, for any rate: a shelf for the head, then a high-pass (RLB).

    The standard gives coefficients for 48 kHz; the analogue parameters they come from are those of De Man,
    "Evaluation of implementations of the EBU R128 loudness measurement" (2018). In float64, state kept between calls.
    """

    def __init__(self, sample_rate: int) -> None:
        self._sections = [_Biquad(*_shelf(sample_rate)), _Biquad(*_high_pass(sample_rate))]

    def push(self, block_N: NDArray[np.float64]) -> NDArray[np.float64]:
        for section in self._sections:
            block_N = section.push(block_N)
        return block_N


class _Biquad:
    """y[n] = b0 x[n] + b1 x[n-1] + b2 x[n-2] - a1 y[n-1] - a2 y[n-2], over blocks."""

    def __init__(self, b: tuple[float, float, float], a: tuple[float, float]) -> None:
        self._b, self._a = b, a
        self._poles = torch.tensor([1.0, *a], dtype=torch.float64)
        self._pass = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        self._x, self._y = np.zeros(2), np.zeros(2)  # the last two, oldest first

    def push(self, block_N: NDArray[np.float64]) -> NDArray[np.float64]:
        x_N = np.concatenate([self._x, block_N])
        driven_N = self._b[0] * x_N[2:] + self._b[1] * x_N[1:-1] + self._b[2] * x_N[:-2]
        # what the earlier output adds, so that lfilter may start from rest
        driven_N[0] -= self._a[0] * self._y[1] + self._a[1] * self._y[0]
        driven_N[1:2] -= self._a[1] * self._y[1]
        y_N = lfilter(torch.from_numpy(driven_N)[None], self._poles, self._pass, clamp=False)[0].numpy()
        self._x, self._y = x_N[-2:].copy(), np.concatenate([self._y, y_N])[-2:]
        return y_N


def _shelf(sample_rate: int) -> tuple[tuple[float, float, float], tuple[float, float]]:
    k = math.tan(math.pi * 1681.974450955533 / sample_rate)
    q, high = 0.7071752369554196, 10 ** (3.999843853973347 / 20)
    band = high**0.4996667741545416
    a0 = 1 + k / q + k * k
    b = ((high + band * k / q + k * k) / a0, 2 * (k * k - high) / a0, (high - band * k / q + k * k) / a0)
    return b, (2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0)


def _high_pass(sample_rate: int) -> tuple[tuple[float, float, float], tuple[float, float]]:
    k, k_48 = (math.tan(math.pi * 38.13547087602444 / rate) for rate in (sample_rate, 48_000))
    q = 0.5003270373238773
    a0 = 1 + k / q + k * k
    gain = (1 + k_48 / q + k_48 * k_48) / a0  # 1 at 48 kHz, as the standard has it; the same response at other rates
    return (gain, -2 * gain, gain), (2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0)


def trimmed(figures: Figures, start: int, end: int, floor_db: float) -> tuple[int, int]:
    """[start, end) without the frames at both ends whose level is below `floor_db`; (start, start) if all are."""
    frames = figures.frames(start, end)
    means_F = figures.squares_F[frames] / figures.counts(frames)
    loud = np.flatnonzero(means_F >= 10 ** (floor_db / 10))
    if len(loud) == 0:
        return start, start
    first, last = frames.start + int(loud[0]), frames.start + int(loud[-1]) + 1
    rate = figures.sample_rate
    return max(start, first * rate // GRID_HZ), min(end, last * rate // GRID_HZ)


def level_db(figures: Figures, start: int, end: int) -> float:
    """RMS level of [start, end) in dBFS; minus infinity for digital silence."""
    frames = figures.frames(start, end)
    return _db(float(figures.squares_F[frames].sum()) / figures.count(frames))


def clipped_share(figures: Figures, start: int, end: int) -> float:
    """Share of the samples of [start, end) at full scale, 0 to 1."""
    frames = figures.frames(start, end)
    return int(figures.clipped_F[frames].sum()) / figures.count(frames)


def loudness_lufs(figures: Figures, start: int, end: int) -> float | None:
    """Integrated loudness of [start, end), ITU-R BS.1770-4 for one channel; None if all of it is below -70 LUFS.

    Blocks of 400 ms every 100 ms, gated at -70 LUFS, then at 10 LU below the mean of what is left. Less than 400 ms
    is one block of that length, which the standard does not define. The filter has heard what comes before `start`.
    """
    frames = figures.frames(start, end)
    sums = np.concatenate([[0.0], figures.weighted_F[frames].cumsum()])
    sizes = np.concatenate([[0], figures.counts(frames).cumsum()])
    width = min(_GATE_FRAMES, len(sums) - 1)
    begins = np.arange(0, len(sums) - width, _GATE_STEP)
    means = (sums[begins + width] - sums[begins]) / (sizes[begins + width] - sizes[begins])
    means = means[means > _power(_ABSOLUTE_GATE_LUFS)]
    if len(means) == 0:
        return None
    means = means[means > means.mean() * 10 ** (_RELATIVE_GATE_LU / 10)]
    return _LOUDNESS_OFFSET + _db(float(means.mean()))


def loudness_gain_db(figures: Figures, start: int, end: int, target_lufs: float) -> float | None:
    """The gain that brings [start, end) to `target_lufs`, to 0.01 dB; None if it is too quiet to have a loudness.

    No gain lifts the segment's sample peak over full scale (louder segments are turned down to it), and none is
    beyond +-40 dB.
    """
    loudness = loudness_lufs(figures, start, end)
    peak = float(figures.peaks_F[figures.frames(start, end)].max())
    if loudness is None or peak == 0:  # silence in which the filter still rings with what came before
        return None
    headroom_db = math.floor(-2 * _db(peak) * 100) / 100
    gain_db = min(round(target_lufs - loudness, 2), headroom_db)
    return max(-MAX_GAIN_DB, min(MAX_GAIN_DB, gain_db)) + 0.0


def _spans(figures: Figures, policy: CorpusPolicy) -> Spans:
    rate, total = figures.sample_rate, figures.num_samples
    if policy.vad is not None:
        return speech_spans(figures.probabilities_T, sample_rate=rate, num_samples=total, policy=policy.vad)
    window = total if policy.window_s is None else round(policy.window_s * rate)
    return [(start, min(start + window, total)) for start in range(0, total, max(1, window))]


def _reason(figures: Figures, start: int, end: int, policy: CorpusPolicy) -> str | None:
    """Why this segment is left out, or None."""
    filters = policy.filters
    reason = duration_reason((end - start) / figures.sample_rate, policy)
    if reason is not None:
        return reason
    if filters.min_level_db is not None and level_db(figures, start, end) < filters.min_level_db:
        return "too quiet"
    if filters.max_clipping is not None and clipped_share(figures, start, end) > filters.max_clipping:
        return "clipped"
    return None


def _blocks(pieces: Iterator[Samples], size: int) -> Iterator[Samples]:
    """The same samples in blocks of `size`, the last one shorter."""
    pending: list[Samples] = []
    waiting = 0
    for piece_N in pieces:
        pending.append(piece_N)
        waiting += len(piece_N)
        if waiting >= size:
            held_N = np.concatenate(pending)
            whole = waiting // size * size
            yield from (held_N[start : start + size] for start in range(0, whole, size))
            pending, waiting = [held_N[whole:].copy()], waiting - whole
    if waiting:
        yield np.concatenate(pending)


def _frame_of(sample: int, sample_rate: int) -> int:
    """The frame that a sample lies in: the last that begins no later."""
    return ((sample + 1) * GRID_HZ - 1) // sample_rate


def _db(power: float) -> float:
    return 10 * math.log10(power) if power > 0 else -math.inf


def _power(lufs: float) -> float:
    return 10 ** ((lufs - _LOUDNESS_OFFSET) / 10)
