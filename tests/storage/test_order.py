"""The order of an epoch, against plain Python: permutations, windows, lanes, mixtures, and who takes what."""

import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wavemill.storage.order import Consumer, Mixture, in_turn, lanes_of, shares, shuffled, windows_of

MASK = 2**64 - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15

sizes = st.lists(st.integers(0, 50), max_size=30)
weights = st.lists(st.floats(0.001, 10), min_size=1, max_size=5)


def split_mix(state: int) -> int:
    """The output of SplitMix64 (Steele, Lea and Flood 2014) whose state was just advanced to this."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def shuffled_naively(count: int, key: list[int]) -> list[int]:
    state = 0
    for part in key:
        state = split_mix(((state ^ part) + GOLDEN_RATIO) & MASK)
    outputs = [split_mix((state + GOLDEN_RATIO * (place + 1)) & MASK) for place in range(count)]
    return sorted(range(count), key=lambda place: outputs[place])


def test_the_random_numbers_are_those_of_split_mix_64() -> None:
    # the first outputs of the published generator, seeded with 1234567 (rosettacode.org, "Pseudo-random
    # numbers/Splitmix64")
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [split_mix((1234567 + GOLDEN_RATIO * turn) & MASK) for turn in range(1, 5)] == published


@pytest.mark.parametrize(
    ("count", "key", "expected"),
    [
        (0, (1,), []),
        (1, (1,), [0]),
        (12, (0,), [11, 5, 7, 8, 2, 10, 9, 0, 3, 1, 6, 4]),
        (12, (0, 0, 1), [10, 9, 1, 5, 2, 4, 7, 8, 6, 0, 11, 3]),
        (12, (7, 3, 2, 41), [9, 8, 3, 10, 0, 7, 11, 6, 1, 5, 4, 2]),
        (10, (2**64 - 1, 2**63), [3, 4, 5, 6, 2, 1, 9, 8, 0, 7]),
    ],
)
def test_orders_stay_what_they_were_in_the_first_release(count: int, key: tuple[int, ...], expected: list[int]) -> None:
    # a change here reshuffles every epoch that somebody is in the middle of: saved states would repeat and skip
    assert shuffled(count, *key).tolist() == expected


@given(st.integers(0, 200), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_a_shuffle_is_the_order_of_the_generators_outputs(count: int, key: list[int]) -> None:
    order = shuffled(count, *key)
    assert order.tolist() == shuffled_naively(count, key)
    assert sorted(order.tolist()) == list(range(count))


def test_every_part_of_the_key_and_its_place_changes_the_order() -> None:
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 1, 2), (0, 2, 1), (2**63, 0), (2**64 - 1,)]
    orders = {tuple(shuffled(50, *key).tolist()) for key in keys}
    assert len(orders) == len(keys)


def test_every_place_of_a_shuffle_is_taken_by_everything_equally_often() -> None:
    # 2,000 shuffles of 8: each of 64 counts is 250 on average, with a standard deviation below 15
    counts = np.zeros((8, 8), dtype=int)
    for epoch in range(2_000):
        counts[np.arange(8), shuffled(8, 3, epoch, 1)] += 1
    assert 160 < counts.min() <= counts.max() < 340


def windows_naively(sizes_S: list[int], window_bytes: int) -> list[int]:
    begins, total, bound = [0], 0, window_bytes
    for shard, size in enumerate(sizes_S[:-1]):
        total += size
        if total >= bound:
            begins.append(shard + 1)
            bound = (total // window_bytes + 1) * window_bytes
    return begins + ([len(sizes_S)] if sizes_S else [])


@given(sizes, st.integers(1, 200))
def test_a_window_ends_with_the_shard_that_reaches_the_next_multiple_of_its_bytes(
    sizes_S: list[int], window_bytes: int
) -> None:
    begins = windows_of(np.array(sizes_S, dtype=np.int64), window_bytes).tolist()
    assert begins == windows_naively(sizes_S, window_bytes)


@given(sizes, st.integers(1, 200))
def test_windows_hold_every_shard_once_and_little_more_than_their_bytes(sizes_S: list[int], window_bytes: int) -> None:
    begins = windows_of(np.array(sizes_S, dtype=np.int64), window_bytes).tolist()
    assert begins[0] == 0
    assert begins[-1] == len(sizes_S)
    assert begins == sorted(set(begins))
    for begin, end in pairwise(begins):
        assert sum(sizes_S[begin : end - 1]) < window_bytes


@given(sizes, st.integers(1, 200))
def test_lanes_are_the_shortest_runs_of_shards_that_are_large_enough(sizes_S: list[int], min_size: int) -> None:
    lanes = lanes_of(sizes_S, min_size)
    assert [shard for lane in lanes for shard in lane] == list(range(len(sizes_S)))
    for lane in lanes:
        assert len(lane) > 0
    for lane in lanes[:-1]:
        assert sum(sizes_S[lane.start : lane.stop]) >= min_size > sum(sizes_S[lane.start : lane.stop - 1])
    if len(lanes) > 1 or sum(sizes_S) >= min_size:
        # the last holds one such run and, it may be, a rest that is too small for another
        last = sizes_S[lanes[-1].start :]
        first_enough = next(count for count in range(1, len(last) + 1) if sum(last[:count]) >= min_size)
        assert sum(last[first_enough:]) < min_size


def in_turn_naively(sequences_L: list[int]) -> list[tuple[int, int]]:
    order, place = [], 0
    while any(place < count for count in sequences_L):
        order += [(lane, place) for lane, count in enumerate(sequences_L) if place < count]
        place += 1
    return order


@given(st.lists(st.integers(0, 12), max_size=8))
def test_a_window_takes_one_sequence_of_each_lane_in_turn(sequences_L: list[int]) -> None:
    lane_N, place_N = in_turn(sequences_L, shuffle=True)
    assert list(zip(lane_N.tolist(), place_N.tolist(), strict=True)) == in_turn_naively(sequences_L)


@given(st.lists(st.integers(0, 12), max_size=8))
def test_without_a_shuffle_a_window_goes_lane_by_lane(sequences_L: list[int]) -> None:
    lane_N, place_N = in_turn(sequences_L, shuffle=False)
    expected = [(lane, place) for lane, count in enumerate(sequences_L) for place in range(count)]
    assert list(zip(lane_N.tolist(), place_N.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([5], [1]),
        ([0.7, 0.3], [7, 3]),
        ([70, 30], [7, 3]),
        ([1, 1, 1], [1, 1, 1]),
        ([0.5, 0.25, 0.125, 0.125], [4, 2, 1, 1]),
        ([0.999, 0.001], [999, 1]),
        ([1, 1e-9], [1000, 1]),  # what is asked for is never left out
    ],
)
def test_weights_become_the_smallest_whole_numbers(weights: list[float], expected: list[int]) -> None:
    assert shares(weights) == expected


def sources(mixture: Mixture, num_slots: int) -> list[tuple[int, int]]:
    return [mixture.source(slot) for slot in range(num_slots)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 3))
def test_each_dataset_has_exactly_its_share_of_every_turn_of_the_pattern(counts: list[int], turns: int) -> None:
    mixture = Mixture(counts)
    expected = shares(counts)
    length = sum(expected)
    filled = [part for part, _ in sources(mixture, turns * length)]
    for turn in range(turns):
        of_turn = filled[turn * length : (turn + 1) * length]
        assert [of_turn.count(part) for part in range(len(counts))] == expected


@settings(deadline=None)
@given(weights)
def test_a_dataset_is_never_far_from_its_share(weights: list[float]) -> None:
    mixture = Mixture(weights)
    counts = shares(weights)
    slots = random.Random(0).sample(range(2 * sum(counts) + 1), min(20, 2 * sum(counts) + 1))
    for slot in slots:
        for part, count in enumerate(counts):
            due = Fraction(slot * count, sum(counts))
            assert abs(mixture.taken(part, slot) - due) <= Fraction(len(counts) + 1, 2)


@settings(deadline=None)
@given(weights)
def test_slots_sources_and_counts_of_a_mixture_agree(weights: list[float]) -> None:
    mixture = Mixture(weights)
    taken = [0] * len(weights)
    slots: list[list[int]] = [[] for _ in weights]
    for slot in range(80):
        assert [mixture.taken(part, slot) for part in range(len(weights))] == taken
        part, number = mixture.source(slot)
        assert number == taken[part]
        taken[part] += 1
        slots[part].append(slot)
    for part, own in enumerate(slots):
        assert mixture.slots(part, np.arange(len(own))).tolist() == own


@given(weights, st.integers(0, 10**15))
def test_a_mixture_agrees_with_itself_a_long_way_into_an_epoch(weights: list[float], slot: int) -> None:
    mixture = Mixture(weights)
    part, number = mixture.source(slot)
    assert mixture.slots(part, np.array([number])).tolist() == [slot]
    assert mixture.taken(part, slot) == number
    assert mixture.taken(part, slot + 1) == number + 1


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_every_slot_belongs_to_one_worker_of_one_rank(
    batch_size: int, num_ranks: int, num_workers: int, rotated: int
) -> None:
    slots = np.arange(batch_size * num_ranks * num_workers * 3 + 1)
    owners: dict[int, tuple[int, int]] = {}
    for rank in range(num_ranks):
        for worker in range(num_workers):
            # a resumed loader's first batch may come from any of its workers
            first_step = (worker + rotated) % num_workers
            consumer = Consumer(rank=rank, num_ranks=num_ranks, num_workers=num_workers, first_step=first_step)
            for slot in slots[consumer.takes(slots, batch_size)].tolist():
                assert slot not in owners
                owners[slot] = rank, worker
    expected = {}
    for slot in slots.tolist():
        step, place = divmod(slot, num_ranks * batch_size)
        expected[slot] = place // batch_size, (step - rotated) % num_workers
    assert owners == expected
