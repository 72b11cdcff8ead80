"""The bigram that models have to beat: a distribution, counted right, and not a straw man."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wavemill.jobs.lm.bigram import BigramCounts, Pairs, bigram_baseline


def counts_of(tokens: list[int], size: int) -> BigramCounts:
    counts = BigramCounts(size)
    array = np.array(tokens, dtype=np.int64)
    counts.add(array[:-1], array[1:])
    return counts


def pairs(tokens: np.ndarray, size: int, column: int = 0) -> Pairs:
    return Pairs(column, size, tokens[:-1], tokens[1:])


@pytest.mark.parametrize("kneser_ney", [True, False])
@given(tokens=st.lists(st.integers(0, 6), max_size=40), before=st.integers(0, 6))
def test_the_chances_after_any_token_sum_to_one(tokens: list[int], before: int, kneser_ney: bool):
    counts, every = counts_of(tokens, 7), np.arange(7)
    nats = [counts.nats(np.array([before]), np.array([target]), kneser_ney=kneser_ney) for target in every]
    assert sum(math.exp(-each) for each in nats) == pytest.approx(1.0)


def test_a_pair_costs_what_it_does_on_paper():
    # pairs 01 01 10 12: two counts of one, one of two; discount 2 / (2 + 2 * 1) = 1/2
    counts = counts_of([0, 1, 0, 1, 2], 3)
    # tokens follow 1, 1 and 1 others: continuation discount 1/2 (nothing twice), of 3 kinds; half of 3/3 is shared
    lower = (1 - 0.5) / 3 + 0.5 * 3 / 3 / 3
    expected = (2 - 0.5) / 2 + 0.5 * 1 / 2 * lower  # 0 was followed twice, by one kind
    assert counts.nats(np.array([0]), np.array([1]), kneser_ney=True) == pytest.approx(-math.log(expected))
    assert counts.nats(np.array([2]), np.array([1]), kneser_ney=True) == pytest.approx(-math.log(lower))


def test_counts_that_come_in_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    before, target = rng.integers(0, 50, (2, 5_000))
    whole, parts = BigramCounts(50), BigramCounts(50)
    whole.add(before, target)
    for begin in range(0, 5_000, 700):
        parts.add(before[begin : begin + 700], target[begin : begin + 700])
        parts.nats(before[:3], target[:3], kneser_ney=True)  # which counts what has come
    asked = rng.integers(0, 50, (2, 300))
    assert parts.nats(*asked, kneser_ney=False) == whole.nats(*asked, kneser_ney=False)


def test_of_a_chain_the_baseline_is_near_its_entropy_and_far_below_single_tokens():
    rng = np.random.default_rng(1)
    chances = rng.dirichlet(np.full(20, 0.1), size=20)
    tokens = [0]
    for _ in range(40_000):
        tokens.append(int(rng.choice(20, p=chances[tokens[-1]])))
    array = np.array(tokens)
    baseline = bigram_baseline([[pairs(array[:35_000], 20)]], [[pairs(array[35_000:], 20)]])
    true = -np.log(chances[array[35_000:-1], array[35_001:]]).mean()
    shares = np.bincount(array, minlength=20) / len(array)
    assert true < baseline.nats < true + 0.02
    assert baseline.nats < -np.log(shares[array]).mean() - 0.5
    assert baseline.num_targets == len(array) - 35_000 - 1


def test_columns_are_counted_apart_and_the_mean_is_over_all_targets():
    rng = np.random.default_rng(2)
    same, random = np.zeros(100, dtype=np.int64), rng.integers(0, 8, 300)
    both = [pairs(same, 8, 0), pairs(random, 8, 1)]
    baseline = bigram_baseline([both], [both])
    assert baseline.columns["column 0"] < 0.1 < 1 < baseline.columns["column 1"]
    expected = (99 * baseline.columns["column 0"] + 299 * baseline.columns["column 1"]) / 398
    assert baseline.nats == pytest.approx(expected)


def test_a_column_that_training_never_saw_is_anybodys_guess():
    baseline = bigram_baseline([], [[pairs(np.arange(8), 8)]])
    assert baseline.nats == pytest.approx(math.log(8))
