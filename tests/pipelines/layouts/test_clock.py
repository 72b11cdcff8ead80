"""Streams of different frame rates on one clock: exact, and without leaving a frame out."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams_made import spec, text_spec
from wavemill.pipelines.layouts.clock import (
    beginnings,
    covering,
    first_step,
    max_frames,
    place_in_step,
    rate_on_clock,
    steps_filled,
    steps_needed,
    steps_of_frames,
)
from wavemill.tokenizers.spec import FrameRule, UserError

RATES = st.builds(Fraction, st.integers(1, 12), st.integers(1, 12))
COUNTS = st.lists(st.integers(0, 15), max_size=5).map(lambda counts: np.array(counts, dtype=np.int64))


def by_step(counts_N: np.ndarray, steps_N: np.ndarray, rate: Fraction) -> list[list[list[int]]]:
    """Of each segment the frames that each step holds, where there are so many steps."""
    held_N = np.minimum(steps_filled(counts_N, rate), steps_N)
    frame_T, segment_T = beginnings(np.arange(99), counts_N), np.repeat(np.arange(len(counts_N)), counts_N)
    times_T = steps_of_frames(counts_N, held_N, rate) if rate <= 1 else np.ones_like(frame_T)
    found: list[list[list[int]]] = [[[] for _ in range(steps)] for steps in steps_N]
    every = zip(segment_T, frame_T, first_step(frame_T, rate), place_in_step(frame_T, rate), times_T, strict=True)
    for segment, frame, first, place, times in every:
        for step in range(first, first + times):
            assert len(found[segment][step]) == place
            found[segment][step].append(int(frame))
    return found


def test_slow_frames_are_repeated_and_fast_ones_stand_together() -> None:
    two = np.array([2])
    assert by_step(two, np.array([5]), Fraction(25, 50)) == [[[0], [0], [1], [1], []]]
    assert by_step(np.array([5]), np.array([3]), Fraction(50, 25)) == [[[0, 1], [2, 3], [4]]]
    assert by_step(np.array([5]), np.array([4]), Fraction(75, 50)) == [[[0, 1], [2], [3, 4], []]]
    assert by_step(np.array([4]), np.array([6]), Fraction(50, 75)) == [[[0], [0], [1], [2], [2], [3]]]


@given(RATES, COUNTS)
def test_no_frame_is_left_out_and_steps_say_how_many_there_were(rate: Fraction, counts_N: np.ndarray) -> None:
    steps_N = steps_needed(counts_N, rate)
    for count, steps in zip(counts_N, by_step(counts_N, steps_N, rate), strict=True):
        assert (not steps) == (not count)
        if steps:
            frames = [frame for step in steps for frame in step]
            assert frames == sorted(frames)
            assert list(dict.fromkeys(frames)) == list(range(count))
            assert steps[-1][-1] == count - 1
            assert rate <= 1 or len(frames) == count  # each once
            assert max(map(len, steps)) <= max_frames(rate)


@given(RATES, COUNTS, st.integers(0, 6))
def test_a_step_holds_what_covers_its_beginning_or_begins_within_it(
    rate: Fraction, counts_N: np.ndarray, more: int
) -> None:
    steps_N = steps_filled(counts_N, rate) + more
    for count, steps in zip(counts_N.tolist(), by_step(counts_N, steps_N, rate), strict=True):
        for step, frames in enumerate(steps):
            expected = [
                frame
                for frame in range(count)
                if (frame <= step * rate < frame + 1 if rate <= 1 else step <= frame / rate < step + 1)
            ]
            assert frames == expected
        filled = [bool(frames) for frames in steps]
        assert filled == sorted(filled, reverse=True) or rate > 1
        assert not any(filled[len(filled) - more :])
        assert all(filled[:1]) == (count > 0 or not filled)


@given(RATES, st.integers(0, 10**9))
def test_times_are_exact_however_late(rate: Fraction, place: int) -> None:
    places = np.array([place])
    assert covering(places, rate)[0] == place * rate // 1
    step = int(first_step(places, rate)[0])
    if rate <= 1:
        assert step * rate // 1 == place
        assert (step - 1) * rate // 1 < place
    else:
        assert step <= place / rate < step + 1


def test_a_day_of_two_rates_that_floats_confuse() -> None:
    mimi, dac = spec(hop_length=1920, sample_rate=24_000), spec(hop_length=512, sample_rate=44_100)
    specs = {"mimi": mimi, "dac": dac}
    rate = rate_on_clock("toy", specs, "mimi", "dac")
    assert rate == Fraction(24_000 * 512, 1920 * 44_100)
    frames = np.arange(0, 86_400 * 86, 9973)
    assert covering(frames, rate).tolist() == [frame * rate // 1 for frame in frames.tolist()]
    assert rate_on_clock("toy", specs, "dac", "mimi") == 1 / rate


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (text_spec(), "has no clock of its own"),
        (spec(frame_rule=FrameRule.ONE), "has no clock of its own"),
        (replace(spec(), chunk_length=48_000, chunk_stride=47_520), "is made of chunks that overlap"),
    ],
)
def test_a_stream_without_frames_at_whole_hops_is_refused(other: object, why: str) -> None:
    for stream, clock in (("a", "b"), ("b", "a")):
        with pytest.raises(UserError, match=rf"Layout toy aligns stream .*'b' \(.*\) {why}\. Name .*\."):
            rate_on_clock("toy", {"a": spec(), "b": other}, stream, clock)  # type: ignore[dict-item]
