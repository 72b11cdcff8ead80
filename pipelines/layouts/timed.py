"""Text with times: what the ids of `whisper-text` and `word-tokens` streams say, of many segments at once.

Such a stream has ids of text, then a mark between windows, then 1,501 timestamps, as tokenizers/whisper_text.py tells;
a tick is the 0.02 s between two of these. What is said between two timestamps is a phrase: a word of `word-tokens`, a
sentence of `whisper-text`.

Axes: N segments, T codes end to end, X ids of text end to end, P phrases end to end, W windows end to end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ...storage.layouts import Codes, Ints, StreamRows
from ...tokenizers.spec import FrameRule, StreamSpec, UserError
from .vocabulary import stream_taken

NUM_TIMES = 1_501
WINDOW = NUM_TIMES - 1  # ticks
_TOKENIZERS = ("word-tokens", "whisper-text")


@dataclass(frozen=True, slots=True)
class TimedText:
    """The ids of text of N segments, and when their phrases begin and end, in ticks from each segment's beginning."""

    ids_X: Codes
    counts_N: Ints  # ids of each segment
    phrases_N: Ints  # phrases of each segment
    sizes_P: Ints  # ids of each phrase
    starts_P: Ints
    ends_P: Ints  # its beginning where no timestamp follows


def timed_stream(layout: str, specs: Mapping[str, StreamSpec], stream: str) -> StreamSpec:
    """The spec of a stream of text with its times. Raises `UserError` for any other, in the name of a layout."""
    spec = stream_taken(layout, specs, stream)
    if not has_times(spec):
        raise UserError(
            f"Layout {layout} takes text with its times; stream {stream!r} ({spec.tokenizer}) has none. Name a stream "
            f"made with {' or '.join(_TOKENIZERS)}."
        )
    return spec


def frames_a_tick(layout: str, text: StreamSpec, stream: str, spec: StreamSpec) -> Fraction:
    """Frames of a stream in one tick of a text, exact. Raises `UserError` for one without a frame every hop."""
    if spec.frame_rule not in (FrameRule.FLOOR, FrameRule.CEIL):
        raise UserError(
            f"Layout {layout} finds the times of text in stream {stream!r}, but that ({spec.tokenizer}) has no clock. "
            "Name a stream with a frame every hop."
        )
    return spec.frame_rate / text.frame_rate


def has_times(spec: StreamSpec) -> bool:
    """Whether a stream is text with its times."""
    return spec.tokenizer in _TOKENIZERS


def num_text_ids(spec: StreamSpec) -> int:
    """How many ids of text a stream with times has: they are `[0, n)`, as in its text tokenizer."""
    return spec.codebook_size - NUM_TIMES - 1


def timed_text(rows: StreamRows, spec: StreamSpec) -> TimedText:
    """What N segments of a stream with times say; the same as `whisper_text.timestamps` says of each."""
    codes_T, first, num_segments = rows.books[0], spec.codebook_size - NUM_TIMES, len(rows.counts_N)
    is_text_T = codes_T < first - 1
    segment_T = np.repeat(np.arange(num_segments), rows.counts_N)
    marks_T = np.cumsum(codes_T == first - 1)
    window_T = marks_T + segment_T  # a mark is the first code of the window behind it
    marks_N = np.append(0, marks_T)[rows.begins_N + rows.counts_N]  # in all segments so far
    windows_N = np.diff(marks_N, prepend=0) + 1
    after_T = np.where(codes_T >= first, codes_T.astype(np.int64) - first, -1)  # ticks from the window's beginning
    begin_W = _window_begins(after_T, window_T, windows_N)

    place_P = np.flatnonzero(is_text_T & ~_follows(is_text_T, window_T))
    sizes_P = np.diff(np.append(np.cumsum(is_text_T)[place_P] - 1, is_text_T.sum()))
    window_P = window_T[place_P]
    before_P, behind_P = (_time_at(at_P, after_T, window_T, window_P) for at_P in (place_P - 1, place_P + sizes_P))
    starts_P = begin_W[window_P] + np.maximum(before_P, 0)
    return TimedText(
        codes_T[is_text_T],
        np.bincount(segment_T[is_text_T], minlength=num_segments),
        np.bincount(segment_T[place_P], minlength=num_segments),
        sizes_P,
        starts_P,
        np.where(behind_P < 0, starts_P, begin_W[window_P] + behind_P),
    )


def _window_begins(after_T: Ints, window_T: Ints, windows_N: Ints) -> Ints:
    """When each window begins, in ticks from its segment's beginning.

    30 s after the one before; but where in that two timestamps follow one another, and it does not end in one alone,
    the last two say how much later (Radford et al. 2022, section 4.5).
    """
    advance_W = np.full(int(windows_N.sum()), WINDOW, dtype=np.int64)
    is_time_T = after_T >= 0
    is_second_T = is_time_T & _follows(is_time_T, window_T)
    second_T = np.flatnonzero(is_second_T)
    by_T = after_T[second_T - 1]
    advance_W[window_T[second_T]] = np.where(by_T > 0, by_T, WINDOW)  # of a window's pairs the last stays
    is_last_T = np.ones(len(window_T), dtype=bool)
    is_last_T[:-1] = window_T[1:] != window_T[:-1]
    advance_W[window_T[is_last_T & is_time_T & ~is_second_T]] = WINDOW
    before_W = np.cumsum(advance_W) - advance_W
    return before_W - np.repeat(before_W[np.cumsum(windows_N) - windows_N], windows_N)


def _follows(is_one_T: NDArray[np.bool_], window_T: Ints) -> NDArray[np.bool_]:
    """Whether the code before, in the same window, is one of these."""
    follows_T = np.zeros(len(is_one_T), dtype=bool)
    follows_T[1:] = is_one_T[:-1] & (window_T[1:] == window_T[:-1])
    return follows_T


def _time_at(place_P: Ints, after_T: Ints, window_T: Ints, window_P: Ints) -> Ints:
    """The timestamps at places, in ticks from the beginning of these windows; -1 where there is none of the window."""
    inside_P = (place_P >= 0) & (place_P < len(after_T))
    place_P = np.where(inside_P, place_P, 0)
    return np.where(inside_P & (window_T[place_P] == window_P), after_T[place_P], -1)


def within(counts_N: Ints) -> Ints:
    """0, 1, ... in each of N segments, end to end."""
    return np.arange(int(counts_N.sum())) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
