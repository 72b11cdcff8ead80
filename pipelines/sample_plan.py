"""Which frames of a corpus a codebook is fitted on: decided from the table of segments, before any audio is read.

Each segment and each frame has a number in [0, 1) that the seed and the segment's id alone decide; the lowest are
taken. So the sample does not depend on shards, workers, order or retries.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Snapshot
from ..tokenizers.spec import StreamSpec, UserError, did_you_mean, num_frames
from .reading import Row
from .resample import resampled_length

STRATIFY = ("source", "speaker", "language", "format", "channel", "sample_rate", "num_channels")
_SPREAD = 8  # segments are chosen with up to this many times the frames that are kept, so that these come from many
_PRUNE_EVERY = 1 << 16  # segments
_CANDIDATE = np.dtype([("number", "f8"), ("frames", "i8"), ("shard", "i8")])
_COLUMNS = ("id", "speaker", "error", "num_samples", "sample_rate")


@dataclass(frozen=True, slots=True)
class Stratum:
    """The segments that have one value in the column that is stratified by, and what is taken of them."""

    num_frames: int  # of all its segments
    quota: int  # frames that are kept
    covered: int  # frames of the segments that are chosen
    last: float  # segments whose number is up to this are chosen

    @property
    def keep(self) -> float:
        """Frames whose number is below this are kept by shards: a few more than the quota, which is cut off later."""
        if self.quota >= self.covered:
            return 1.0
        return min(1.0, (self.quota + 4 * sqrt(self.quota) + 8) / self.covered)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePlan:
    """A choice of segments and of their frames. Picklable."""

    seed: int
    column: str | None  # stratified by
    leave_out: frozenset[str]  # speakers
    strata: Mapping[str, Stratum]  # by value, sorted; without a column, and where a row has none, by ""
    shards: tuple[int, ...]  # that have chosen segments

    @property
    def num_frames(self) -> int:
        """Frames that are kept if no segment fails."""
        return sum(stratum.quota for stratum in self.strata.values())

    def value_of(self, row: Row) -> str:
        value = None if self.column is None else row[self.column]
        return "" if value is None else str(value)

    def chooses(self, row: Row) -> bool:
        if row["error"] is not None or row["speaker"] in self.leave_out:
            return False
        return _number(self.seed, row["id"]) <= self.strata[self.value_of(row)].last

    def frames_of(self, row: Row, num: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Which of a chosen segment's frames are kept, and their numbers."""
        numbers_T = np.random.Generator(np.random.PCG64(_digest(self.seed, row["id"]))).random(num)
        kept = np.flatnonzero(numbers_T < self.strata[self.value_of(row)].keep)
        return kept, numbers_T[kept]


def plan_sample(
    root: Root,
    corpus: Snapshot,
    spec: StreamSpec,
    *,
    budget_frames: int,
    seed: int,
    column: str | None = None,
    leave_out: Collection[str] = (),
) -> SamplePlan:
    """A sample of at most `budget_frames` frames of the segments without an error, of all speakers but some.

    With a column, each of its values gets an equal share as far as it has frames, and what it lacks goes to the others.
    Raises `UserError` for a column that there is not.
    """
    if column is not None and column not in STRATIFY:
        raise UserError(
            f"--stratify {column!r}: expected a column of the corpus: {', '.join(STRATIFY)}."
            f"{did_you_mean(column, STRATIFY)}"
        )
    found: dict[str, _Candidates] = {}
    num_new = num_kept = 0
    columns: list[str] = [*_COLUMNS, *({column} - set(_COLUMNS) if column else ())]
    for shard in corpus.files:
        of_shard: dict[str, list[tuple[float, int]]] = {}
        for row in read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA, columns=columns).to_pylist():
            if row["error"] is None and row["speaker"] not in leave_out:
                frames = num_frames(resampled_length(row["num_samples"], row["sample_rate"], spec.sample_rate), spec)
                value = "" if column is None or row[column] is None else str(row[column])
                of_shard.setdefault(value, []).append((_number(seed, row["id"]), frames))
        for value, segments in of_shard.items():
            found.setdefault(value, _Candidates()).add(segments, shard)
            num_new += len(segments)
        if num_new > max(_PRUNE_EVERY, num_kept):
            num_new, num_kept = 0, _prune(list(found.values()), budget_frames)
    _prune(list(found.values()), budget_frames)
    values = sorted(found)
    quotas = equal_shares([found[value].num_frames for value in values], budget_frames)
    all_of_it = sum(found[value].num_frames for value in values) <= budget_frames
    strata = {
        value: found[value].stratum(quota, all_of_it=all_of_it) for value, quota in zip(values, quotas, strict=True)
    }
    shards = {shard for value in values for shard in found[value].shards(strata[value].last)}
    return SamplePlan(
        seed=seed,
        column=column,
        leave_out=frozenset(leave_out),
        strata=strata,
        shards=tuple(shard for shard in corpus.files if shard in shards),
    )


def equal_shares(there: Sequence[int], budget: int) -> list[int]:
    """What each gets of a budget: the same, or all that is there; the first ones get one more where it does not divide.

    Water-filling: from the least on, each takes an equal share of what is left, or all it has.
    """
    shares = [0] * len(there)
    order = sorted(range(len(there)), key=lambda place: (there[place], -place))
    for done, place in enumerate(order):
        shares[place] = min(there[place], budget // (len(there) - done))
        budget -= shares[place]
    return shares


class _Candidates:
    """Segments of a stratum that may be chosen, those with the lowest numbers: its number, its frames and its shard."""

    def __init__(self) -> None:
        self.num_frames = 0  # of all segments
        self._new: list[NDArray[np.void]] = []
        self._kept = np.empty(0, dtype=_CANDIDATE)

    def add(self, segments: Sequence[tuple[float, int]], shard: int) -> None:
        self.num_frames += sum(frames for _, frames in segments)
        self._new.append(np.array([(number, frames, shard) for number, frames in segments], dtype=_CANDIDATE))

    def stratum(self, quota: int, *, all_of_it: bool) -> Stratum:
        """Segments from the lowest number on until they hold `_SPREAD` quotas of frames."""
        covered_M = np.cumsum(self._kept["frames"])
        num = len(covered_M) if all_of_it else int(np.searchsorted(covered_M, _SPREAD * quota)) + 1
        num = min(num, len(covered_M)) if quota or all_of_it else 0
        if not num:
            return Stratum(self.num_frames, quota, 0, -1.0)
        return Stratum(self.num_frames, quota, int(covered_M[num - 1]), float(self._kept["number"][num - 1]))

    def shards(self, last: float) -> list[int]:
        """Those of the segments whose number is up to `last`."""
        return np.unique(self._kept["shard"][self._kept["number"] <= last]).tolist()

    def prune(self, most: int) -> int:
        """Keep as many as hold `most` frames; how many these are."""
        every = np.sort(np.concatenate([self._kept, *self._new]), order=("number", "frames", "shard"))
        self._new = []
        before_M = np.cumsum(every["frames"]) - every["frames"]
        self._kept = every[before_M < most].copy()
        return len(self._kept)


def _prune(strata: Sequence[_Candidates], budget: int) -> int:
    """Keep what may be chosen yet, so that memory does not grow with the corpus; how many segments these are.

    What the largest stratum gets of the budget only falls with what comes, and no other gets more.
    """
    there = [stratum.num_frames for stratum in strata]
    most = budget if sum(there) <= budget else max(equal_shares(there, budget)) + 1
    return sum(stratum.prune(_SPREAD * most) for stratum in strata)


def _digest(seed: int, row_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{row_id}".encode(), digest_size=16).digest(), "little")


def _number(seed: int, row_id: str) -> float:
    """A number in [0, 1) that only the seed and the id decide."""
    return (_digest(seed, row_id) >> 75) / 2**53
