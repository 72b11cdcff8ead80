"""The order of an epoch, as pure functions of the snapshot, the seed and the epoch.

An epoch is a row of *windows*: its shards, shuffled, cut where their bytes reach a bound. A window is cut into
*lanes*, runs of whole shards; a lane's segments are shuffled, and packed if asked, into its sequences. The window's
sequences are taken from its lanes in turn. So a reader holds one window at a time and reads each shard once, and the
neighbours of a segment come from all over the window.

Ranks and workers take from this one order and do not shape it: step s of W ranks with B sequences each is the next
W x B of it, of which rank r takes the r-th B.

Axes: S shards, L lanes, N sequences of a window, P slots of a mixture's pattern.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def shuffled(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `range(count)` that only the key decides, on every machine and in every version of NumPy."""
    state = 0
    for part in key:
        state = _mixed(state ^ (part & _MASK))
    with np.errstate(over="ignore"):
        ranks = _mixed_array(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(state))
    return np.argsort(ranks, kind="stable")


def windows_of(bytes_S: NDArray[np.int64], window_bytes: int) -> NDArray[np.int64]:
    """Where each window begins in the order of the shards, and last where the order ends.

    A window ends with the shard whose bytes reach the next multiple of `window_bytes`.
    """
    if not len(bytes_S):
        return np.zeros(1, dtype=np.int64)
    before_S = np.concatenate([[0], np.cumsum(bytes_S)[:-1]])
    window_S = before_S // window_bytes
    begins = np.flatnonzero(np.concatenate([[True], window_S[1:] != window_S[:-1]]))
    return np.append(begins, len(bytes_S)).astype(np.int64)


def lanes_of(sizes_S: Sequence[int], min_size: int) -> list[range]:
    """Runs of shards that have `min_size` tokens or more between them; what is left joins the last."""
    lanes: list[range] = []
    begin, size = 0, 0
    for shard, added in enumerate(sizes_S):
        size += added
        if size >= min_size:
            lanes.append(range(begin, shard + 1))
            begin, size = shard + 1, 0
    if begin < len(sizes_S):
        rest = range(begin, len(sizes_S))
        if lanes and size < min_size:
            lanes[-1] = range(lanes[-1].start, rest.stop)
        else:
            lanes.append(rest)
    return lanes


def in_turn(sequences_L: Sequence[int], *, shuffle: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lane `[N]` and place in that lane `[N]` of a window's sequences: one of each lane, then the next of each, ...

    Without `shuffle` lane by lane.
    """
    counts_L = np.asarray(sequences_L, dtype=np.int64)
    lane_N = np.repeat(np.arange(len(counts_L)), counts_L)
    begins_L = np.cumsum(counts_L) - counts_L
    place_N = np.arange(len(lane_N)) - begins_L[lane_N]
    if shuffle:
        order_N = np.lexsort((lane_N, place_N))
        return lane_N[order_N], place_N[order_N]
    return lane_N, place_N


@dataclass(frozen=True, slots=True)
class Consumer:
    """One reader among all: worker `worker` of `num_workers` of rank `rank` of `num_ranks`.

    Steps go to a rank's workers in turn, beginning with `first_step`, this worker's own first.
    """

    rank: int = 0
    num_ranks: int = 1
    num_workers: int = 1
    first_step: int = 0

    def takes(self, slots: NDArray[np.int64], batch_size: int) -> NDArray[np.bool_]:
        """Which slots, counted from where all consumers began, are this one's."""
        batches = slots // batch_size
        steps = batches // self.num_ranks
        own = (steps >= self.first_step) & ((steps - self.first_step) % self.num_workers == 0)
        return own & (batches % self.num_ranks == self.rank)


class Mixture:
    """Which of several datasets each slot is filled from: a fixed pattern, in which each has its share.

    `weights` are shares to a thousandth; the pattern is as short as they allow.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        counts = shares(weights)
        turns = [((turn + 0.5) / count, part) for part, count in enumerate(counts) for turn in range(count)]
        self.pattern_P = np.array([part for _, part in sorted(turns)], dtype=np.int64)
        self._places = [np.flatnonzero(self.pattern_P == part) for part in range(len(counts))]
        self._before_P = np.zeros(len(self.pattern_P), dtype=np.int64)  # of the same part, in the pattern
        for places in self._places:
            self._before_P[places] = np.arange(len(places))

    def source(self, slot: int) -> tuple[int, int]:
        """The part that fills a slot and the how-manieth of its sequences that is."""
        turn, place = divmod(slot, len(self.pattern_P))
        part = int(self.pattern_P[place])
        return part, turn * len(self._places[part]) + int(self._before_P[place])

    def slots(self, part: int, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots that a part's sequences fill."""
        places = self._places[part]
        return sequences // len(places) * len(self.pattern_P) + places[sequences % len(places)]

    def taken(self, part: int, slot: int) -> int:
        """How many sequences of a part fill the slots before `slot`."""
        turn, place = divmod(slot, len(self.pattern_P))
        return turn * len(self._places[part]) + int(np.searchsorted(self._places[part], place))


def shares(weights: Sequence[float]) -> list[int]:
    """Weights as the smallest whole numbers in the same ratios, to a thousandth of their sum; none is 0."""
    total = sum(weights)
    counts = [max(1, round(1000 * weight / total)) for weight in weights]
    divisor = int(np.gcd.reduce(counts))
    return [count // divisor for count in counts]


# SplitMix64 (Steele, Lea and Flood 2014): the n-th output is the mix of n times the golden ratio
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def _mixed(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _mixed_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))
