"""The ladder of lengths and the plan of batches, which are pure functions."""

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wavemill.tokenizers.ladder import (
    BATCH_SECONDS,
    RUNGS,
    UNITS_PER_S,
    VERSION,
    batch_size,
    batches,
    next_size,
    padded_length,
    rung_of,
    useful_share,
)
from wavemill.tokenizers.tokenizer import Mode

RATES = (16_000, 24_000, 32_000, 44_100, 48_000)
rates = st.sampled_from(RATES)
rungs = st.lists(st.sampled_from(RUNGS), max_size=200)
budgets = st.integers(1, 40_000)
modes = st.sampled_from(list(Mode))


def test_the_ladder_of_this_version_never_changes():
    content = ",".join(map(str, RUNGS))
    assert (RUNGS[0], RUNGS[-1], len(RUNGS)) == (25, 3_000, 139)
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    assert (VERSION, digest) == ("1", "d370b89f4d7a")


def test_thirty_seconds_and_its_halves_are_not_padded():
    for seconds in (30, 15, 7.5, 3.75):
        for rate in RATES:
            length = rung_of(int(seconds * rate), rate)
            assert length is not None
            assert padded_length(length, rate) == seconds * rate


@given(num_samples=st.integers(0, 30 * 48_000), rate=rates)
def test_a_segment_is_padded_and_by_no_more_than_a_step(num_samples: int, rate: int):
    length = rung_of(num_samples, rate)
    if num_samples > 30 * rate:
        assert length is None
        return
    assert length in RUNGS
    padded = padded_length(length, rate)
    assert padded >= num_samples
    if num_samples >= rate // 4:
        assert padded <= 1.04 * num_samples + 2 * rate / UNITS_PER_S


@given(num_samples=st.integers(1, 30 * 44_100), rate=rates, other=rates)
def test_the_rung_of_a_segment_holds_it_at_every_rate(num_samples: int, rate: int, other: int):
    length = rung_of(num_samples, rate)
    if length is not None:
        resampled = -(-num_samples * other // rate)
        assert padded_length(length, other) >= resampled
        assert rung_of(resampled, other) == length


def test_longer_segments_have_longer_rungs_and_what_passes_the_top_has_none():
    found = [rung_of(num_samples, 16_000) for num_samples in range(0, 30 * 16_000 + 1, 37)]
    assert found == sorted(found, key=lambda length: length or 0)
    assert found[0] == 25
    assert rung_of(30 * 16_000, 16_000) == 3_000
    assert rung_of(30 * 16_000 + 1, 16_000) is None


@given(lengths=rungs, budget=budgets, mode=modes)
def test_every_segment_is_in_exactly_one_batch_of_its_rung(lengths: Sequence[int], budget: int, mode: Mode):
    planned = batches(lengths, budget, mode)
    assert sorted(place for batch in planned for place in batch.members) == list(range(len(lengths)))
    for batch in planned:
        assert {lengths[place] for place in batch.members} == {batch.rung}
        assert list(batch.members) == sorted(batch.members)


@given(lengths=rungs, budget=budgets, mode=modes)
def test_batches_keep_to_the_budget_and_their_sizes_are_powers_of_two(lengths: list[int], budget: int, mode: Mode):
    for batch in batches(lengths, budget, mode):
        assert batch.size.bit_count() == 1
        assert batch.size == 1 or batch.rung * batch.size <= budget


@given(lengths=rungs, budget=budgets)
def test_exact_batches_have_no_dummies_and_the_fewest_powers_of_two(lengths: list[int], budget: int):
    planned = batches(lengths, budget, Mode.EXACT)
    assert all(len(batch.members) == batch.size for batch in planned)
    for length in set(lengths):
        count, full = lengths.count(length), batch_size(length, budget)
        expected = [full] * (count // full) + [1 << bit for bit in reversed(range(20)) if (count % full) >> bit & 1]
        assert [batch.size for batch in planned if batch.rung == length] == expected


@given(lengths=rungs, budget=budgets)
def test_fast_batches_of_a_rung_have_one_size_whatever_else_there_is(lengths: list[int], budget: int):
    planned = batches(lengths, budget, Mode.FAST)
    assert all(batch.size == batch_size(batch.rung, budget) for batch in planned)
    for length in set(lengths):
        ours = [batch for batch in planned if batch.rung == length]
        assert all(len(batch.members) == batch.size for batch in ours[:-1])


def test_thirteen_segments_are_a_batch_of_eight_one_of_four_and_one_of_one():
    assert [batch.size for batch in batches([100] * 13, 1_600, Mode.EXACT)] == [8, 4, 1]
    assert [batch.size for batch in batches([100] * 13, 1_600, Mode.FAST)] == [16]
    assert next_size(40, 100, 1_600, Mode.EXACT) == 16


def test_dummies_and_padding_count_as_waste():
    assert useful_share([1.0] * 16, batches([100] * 16, 1_600, Mode.FAST)) == 1.0
    assert useful_share([1.0] * 4, batches([100] * 4, 1_600, Mode.FAST)) == 0.25
    assert useful_share([0.5] * 4, batches([100] * 4, 1_600, Mode.EXACT)) == 0.5


@pytest.mark.parametrize("mode", list(Mode))
def test_the_longest_segments_come_in_batches_too(mode: Mode):
    assert batch_size(RUNGS[-1], int(BATCH_SECONDS[mode] * UNITS_PER_S)) >= 2
