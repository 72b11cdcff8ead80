"""What the token before says of the next one: the cross-entropy of held-out tokens under a smoothed bigram.

It is the figure that a language model has to get under. Two bigrams are counted on the training part, both with
interpolated absolute discounting; they back off to how many tokens a token follows (Kneser and Ney 1995; Chen and
Goodman 1999) and to how often it is there. The better one on the held-out part counts, which favours the bigram.

Axes: M targets, G distinct pairs, V tokens of a column.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Baseline:
    """Nats of a held-out target without a model, by the name of what predicts it; `num_targets` it was counted on."""

    nats: float
    name: str
    num_targets: int
    columns: dict[str, float] = field(default_factory=dict)  # the same, by column, where there are several


@dataclass(frozen=True, slots=True)
class Pairs:
    """Targets of a column of `size` tokens, `[M]`, and the token before each."""

    column: int
    size: int
    before_M: NDArray[np.integer]
    targets_M: NDArray[np.integer]


class BigramCounts:
    """How often each token follows each other one of `size`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._keys_G: Ints = np.empty(0, dtype=np.int64)
        self._counts_G: Ints = np.empty(0, dtype=np.int64)
        self._waiting: list[Ints] = []
        self._num_waiting = 0

    def add(self, before_M: NDArray[np.integer], targets_M: NDArray[np.integer]) -> None:
        self._waiting.append(before_M.astype(np.int64) * self.size + targets_M)
        self._num_waiting += len(targets_M)
        if self._num_waiting > 1 << 22:
            self._merge()

    def nats(self, before_M: NDArray[np.integer], targets_M: NDArray[np.integer], *, kneser_ney: bool) -> float:
        """What these cost together, each given the one before it."""
        self._merge()
        keys_G, counts_G, size = self._keys_G, self._counts_G, self.size
        first_G, second_G = keys_G // size, keys_G % size
        discount = _discount(counts_G)
        lower_V = _unigram(second_G, np.ones_like(counts_G) if kneser_ney else counts_G, size)
        followed_V = np.bincount(first_G, weights=counts_G, minlength=size)
        kinds_V = np.bincount(first_G, minlength=size)
        before, target = before_M.astype(np.int64), targets_M.astype(np.int64)
        key_M = before * size + target
        place_M = np.searchsorted(keys_G, key_M)
        there_M = place_M < len(keys_G)
        there_M[there_M] = keys_G[place_M[there_M]] == key_M[there_M]
        count_M = np.zeros(len(target))
        count_M[there_M] = counts_G[place_M[there_M]]
        total_M = np.maximum(followed_V[before], 1)
        left_M = np.where(followed_V[before] > 0, discount * kinds_V[before] / total_M, 1.0)
        chance_M = np.maximum(count_M - discount, 0) / total_M + left_M * lower_V[target]
        return float(-np.log(chance_M).sum())

    def _merge(self) -> None:
        if not self._waiting:
            return
        keys, places = np.unique(np.concatenate([self._keys_G, *self._waiting]), return_inverse=True)
        ones = np.ones(self._num_waiting, dtype=np.int64)
        sums = np.bincount(places, weights=np.concatenate([self._counts_G, ones]), minlength=len(keys))
        self._keys_G, self._counts_G = keys, np.rint(sums).astype(np.int64)
        self._waiting, self._num_waiting = [], 0


def bigram_baseline(train: Iterable[list[Pairs]], held_out: Iterable[list[Pairs]]) -> Baseline:
    """The better of the two bigrams on the held-out pairs, all targets of all columns alike."""
    counts: dict[int, BigramCounts] = {}
    for pairs in _each(train):
        counts.setdefault(pairs.column, BigramCounts(pairs.size)).add(pairs.before_M, pairs.targets_M)
    asked: dict[int, list[Pairs]] = {}
    for pairs in _each(held_out):
        asked.setdefault(pairs.column, []).append(pairs)
    names = {True: "bigram (interpolated Kneser-Ney)", False: "bigram (interpolated absolute discounting)"}
    nats = {kneser_ney: dict[int, float]() for kneser_ney in names}
    num_targets: dict[int, int] = {}
    for column, every in sorted(asked.items()):
        known = counts.get(column, BigramCounts(every[0].size))
        before_M = np.concatenate([pairs.before_M for pairs in every])
        targets_M = np.concatenate([pairs.targets_M for pairs in every])
        num_targets[column] = len(targets_M)
        for kneser_ney, by_column in nats.items():
            by_column[column] = known.nats(before_M, targets_M, kneser_ney=kneser_ney)
    best = min(nats, key=lambda kneser_ney: sum(nats[kneser_ney].values()))
    total = sum(num_targets.values())
    columns = {f"column {column}": nats[best][column] / max(1, num) for column, num in num_targets.items()}
    return Baseline(sum(nats[best].values()) / max(1, total), names[best], total, columns if len(columns) > 1 else {})


def _each(batches: Iterable[list[Pairs]]) -> Iterator[Pairs]:
    for batch in batches:
        yield from batch


def _unigram(tokens_G: Ints, weights_G: Ints, size: int) -> NDArray[np.float64]:
    """Chances `[V]` of tokens with these weights, discounted, what is left shared by all."""
    sums_V = np.bincount(tokens_G, weights=weights_G, minlength=size)
    total = sums_V.sum()
    if not total:
        return np.full(size, 1 / size)
    discount = _discount(sums_V[sums_V > 0])
    left = discount * np.count_nonzero(sums_V) / total
    return np.maximum(sums_V - discount, 0) / total + left / size


def _discount(counts_G: NDArray[np.number]) -> float:
    """What is taken off each count: n1 / (n1 + 2 n2), of n1 pairs seen once and n2 seen twice (Ney et al. 1994)."""
    once, twice = int((counts_G == 1).sum()), int((counts_G == 2).sum())
    return once / (once + 2 * twice) if once and twice else 0.5
