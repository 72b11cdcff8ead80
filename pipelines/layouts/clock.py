"""Streams of different frame rates on one clock: which frames each step of the clock holds, on exact fractions.

A step is a frame of the stream whose clock it is; frame t begins at t hops of it. The rate of a stream on the clock is
its frames per step, p/q. A stream as fast as the clock or slower (p <= q) has at step t the frame that covers the
step's beginning, t x p // q, so that slow frames are repeated. Of a faster one each step holds the frames that begin
within it, `max_frames` of them or one fewer. So no frame is ever left out, whatever the fraction. A step behind the end
of a stream's last frame holds nothing of it, rather than the last frame again: so what the steps hold says how many
frames there were.

Axes: N segments, S steps and T frames, of one segment or of many end to end.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from ...storage.layouts import Ints
from ...tokenizers.spec import FrameRule, StreamSpec, UserError


def rate_on_clock(layout: str, specs: Mapping[str, StreamSpec], stream: str, clock: str) -> Fraction:
    """Frames of a stream in one step of the clock of another, exact.

    Raises `UserError`, in the name of a layout, for streams whose frames do not lie at whole hops.
    """
    for name in (stream, clock):
        spec = specs[name]
        if spec.chunk_length or spec.frame_rule not in (FrameRule.FLOOR, FrameRule.CEIL):
            why = "is made of chunks that overlap" if spec.chunk_length else "has no clock of its own"
            raise UserError(
                f"Layout {layout} aligns stream {stream!r} with {clock!r}, but {name!r} ({spec.tokenizer}) {why}. "
                "Name a stream with a frame every hop."
            )
    return specs[stream].frame_rate / specs[clock].frame_rate


def max_frames(rate: Fraction) -> int:
    """How many frames of a stream a step holds at most."""
    return max(1, math.ceil(rate))


def covering(step_S: Ints, rate: Fraction) -> Ints:
    """The frame that covers the beginning of each step."""
    return step_S * rate.numerator // rate.denominator


def first_step(frame_T: Ints, rate: Fraction) -> Ints:
    """The first step that holds each frame: the one that it begins within, or the next one of a slow stream's."""
    return _up(frame_T, 1 / rate) if rate <= 1 else covering(frame_T, 1 / rate)


def place_in_step(frame_T: Ints, rate: Fraction) -> Ints:
    """Which of the frames of its first step each frame is, from 0."""
    return frame_T - _up(first_step(frame_T, rate), rate) if rate > 1 else np.zeros_like(frame_T)


def steps_needed(counts_N: Ints, rate: Fraction) -> Ints:
    """How many steps hold each of so many frames at least once; 0 for none."""
    return np.where(counts_N > 0, first_step(counts_N - 1, rate) + 1, 0)


def steps_filled(counts_N: Ints, rate: Fraction) -> Ints:
    """How many steps hold a frame, if there are enough: a slow last one is repeated as long as it lasts."""
    return first_step(counts_N, rate) if rate <= 1 else steps_needed(counts_N, rate)


def steps_of_frames(counts_N: Ints, steps_N: Ints, rate: Fraction) -> Ints:
    """In how many steps each frame of N segments is held, where there are so many, but enough for each to be held.

    Of streams as fast as the clock or slower; any other frame is held once.
    """
    first = first_step(np.arange(counts_N.max(initial=0) + 1), rate)
    steps_T = beginnings(np.diff(first), counts_N)
    has_frames = counts_N > 0
    last = np.cumsum(counts_N)[has_frames] - 1
    steps_T[last] -= (first[counts_N] - steps_N)[has_frames]
    return steps_T


def beginnings(table: Ints, counts_N: Ints) -> Ints:
    """The first so many entries of a table for each segment, end to end: what is the same in all is computed once."""
    return np.concatenate([table[:0], *(table[:count] for count in counts_N.tolist())])


def within(counts_N: Ints) -> Ints:
    """0, 1, ... in each of N segments, end to end."""
    return beginnings(np.arange(counts_N.max(initial=0)), counts_N)


def _up(place: Ints, rate: Fraction) -> Ints:
    """Places times a rate, rounded up."""
    return -(-place * rate.numerator // rate.denominator)
