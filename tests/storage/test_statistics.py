"""Mean and variance of frames: those that numpy finds in all of them at once, however they are divided."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wavemill.storage.statistics import Statistics


def frames(num: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num, dim)) * [1.0, 30.0, 0.01][:dim] + [0.0, 500.0, -3.0][:dim]).astype(np.float16)


def require_moments(found: Statistics, frames_TD: np.ndarray) -> None:
    wide_TD = frames_TD.astype(np.float64)
    assert found.count == len(frames_TD)
    np.testing.assert_allclose(found.mean_D, wide_TD.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.variance_D, wide_TD.var(axis=0), rtol=1e-9, atol=1e-15)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 7))
def test_moments_are_those_of_all_frames_however_they_are_divided(sizes: list[int], seed: int):
    whole_TD = frames(sum(sizes) + 1, 3, seed)
    parts = np.split(whole_TD, np.cumsum(sizes))
    require_moments(Statistics.of(parts, 3), whole_TD)
    merged = Statistics.of_none(3)
    for part_TD in parts:
        merged += Statistics.of([part_TD], 3)
    require_moments(merged, whole_TD)


def test_long_segments_are_taken_in_blocks():
    whole_TD = frames(20_000, 3, 1)
    require_moments(Statistics.of([whole_TD], 3), whole_TD)


def test_frames_with_a_number_that_is_not_finite_are_left_out():
    whole_TD = frames(50, 3, 2)
    spoilt_TD = whole_TD.copy()
    spoilt_TD[7, 0], spoilt_TD[9, 2] = np.nan, np.inf
    require_moments(Statistics.of([spoilt_TD], 3), np.delete(whole_TD, [7, 9], axis=0))


def test_nothing_has_a_mean_and_a_variance_of_nothing():
    for found in (Statistics.of([], 2), Statistics.of([np.empty((0, 2), dtype=np.float16)], 2)):
        assert found.count == 0
        assert found.mean_D.tolist() == found.variance_D.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num", [0, 33])
def test_statistics_are_read_back_to_the_last_bit(num: int):
    written = Statistics.of([frames(num, 3, 4)], 3)
    read = Statistics.from_json(written.to_json())
    assert read.count == written.count
    assert np.array_equal(read.mean_D, written.mean_D)
    assert np.array_equal(read.squares_D, written.squares_D)
    assert read.to_json() == written.to_json()
