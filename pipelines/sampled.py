"""The samples of all shards as one: the frames in their final order, in memory or in a file that stands for it.

Frames come in the order of their numbers, each stratum spread over the whole: so they do not depend on shards, and any
first so many are a sample themselves. Axes: N frames, D dimensions, S frames of a shard.
"""

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..storage.root import Root
from ..tokenizers.spec import RunFailed
from ..tokenizers.spill import reserved
from .sample import SampleReport, index_file, part_file, report_file
from .sample_plan import SamplePlan

_REPORT = re.compile(r"shard-\d{6,}\.json")


class SampleGone(RunFailed):
    """Files of a sample were removed while they were needed."""


class Sampled:
    """The frames that a plan keeps, of the shards whose samples lie in a folder of the root."""

    def __init__(self, root: Root, folder: str, plan: SamplePlan) -> None:
        """Read what each shard has. Raises `SampleGone` if a sample is not there."""
        self._root = root
        self._folder = folder
        self.reports = [SampleReport.from_bytes(self._read(report_file(shard))) for shard in plan.shards]
        indexes = [np.load(io.BytesIO(self._read(index_file(shard)))) for shard in plan.shards]
        numbers_N = _joined([index["numbers"] for index in indexes], np.float64)
        strata_N = _joined([index["strata"] for index in indexes], np.int32)
        ranks_N = _ranks(numbers_N, strata_N, plan)
        ends = np.cumsum([report.frames for report in self.reports])
        self._ranks = [ranks_N[end - report.frames : end] for end, report in zip(ends, self.reports, strict=True)]
        kept = ranks_N >= 0
        self.num_frames = int(kept.sum())
        values = list(plan.strata)
        counts = np.bincount(strata_N[kept], minlength=len(values))
        self.frames_by_value = {value: int(count) for value, count in zip(values, counts, strict=True)}
        self.phones, self.phones_N = self._phones([index["phones"] for index in indexes])

    @property
    def num_segments(self) -> int:
        return sum(report.segments for report in self.reports)

    @property
    def num_errors(self) -> int:
        return sum(report.errors for report in self.reports)

    @property
    def num_speakers(self) -> int:
        return len({speaker for report in self.reports for speaker in report.speakers})

    def frames(self, layer: int | None, dim: int, *, memory_bytes: int, scratch: Path) -> NDArray[np.float32]:
        """Frames `[N, D]` of a layer; past `memory_bytes` they lie in a file in `scratch`, which may be large."""
        shape = (self.num_frames, dim)
        if 4 * self.num_frames * dim <= memory_bytes:
            frames_ND = np.empty(shape, dtype=np.float32)
        else:
            frames_ND = reserved(scratch / "frames", shape)
        for report, ranks_S in zip(self.reports, self._ranks, strict=True):
            begin = 0
            for part in range(report.parts):
                part_SD = np.load(io.BytesIO(self._read(part_file(report.shard, layer, part))))
                ranks = ranks_S[begin : begin + len(part_SD)]
                frames_ND[ranks[ranks >= 0]] = part_SD[ranks >= 0]
                begin += len(part_SD)
        return frames_ND

    def _phones(self, phones: Sequence[NDArray[np.int32]]) -> tuple[list[str], NDArray[np.int64]]:
        """Names of all phones, sorted, and which of them each frame has, or -1."""
        names = sorted({name for report in self.reports for name in report.phones})
        rows = {name: row for row, name in enumerate(names)}
        phones_N = np.full(self.num_frames, -1, dtype=np.int64)
        for report, ranks_S, phones_S in zip(self.reports, self._ranks, phones, strict=True):
            row_of = np.array([*(rows[name] for name in report.phones), -1], dtype=np.int64)  # the last: none
            phones_N[ranks_S[ranks_S >= 0]] = row_of[phones_S[ranks_S >= 0]]
        return names, phones_N

    def _read(self, name: str) -> bytes:
        try:
            return self._root.read_bytes(f"{self._folder}/{name}")
        except FileNotFoundError as error:
            raise SampleGone(
                f"{self._root.join(self._folder)}/{name} has gone while it was needed: another fit of the same sample "
                "has ended, or a vacuum was run. Run the command again."
            ) from error


def sampled_before(root: Root, folder: str) -> set[int]:
    """The shards whose samples are whole already."""
    return {int(name[6:-5]) for name in root.list(folder) if _REPORT.fullmatch(name)}


def _ranks(numbers_N: NDArray[np.float64], strata_N: NDArray[np.int32], plan: SamplePlan) -> NDArray[np.int64]:
    """The place of each frame in the final order, -1 for those beyond their stratum's quota."""
    order_N = np.full(len(numbers_N), np.inf)
    for place, frames in _by_stratum(strata_N):
        stratum = list(plan.strata.values())[place]
        if len(frames) > stratum.quota:
            frames = frames[np.argpartition(numbers_N[frames], stratum.quota)[: stratum.quota]]
        order_N[frames] = numbers_N[frames] * (stratum.covered / max(1, stratum.quota))
    ranks_N = np.full(len(numbers_N), -1, dtype=np.int64)
    kept = np.flatnonzero(order_N < np.inf)
    ranks_N[kept[np.argsort(order_N[kept], kind="stable")]] = np.arange(len(kept))
    return ranks_N


def _by_stratum(strata_N: NDArray[np.int32]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The places of each stratum's frames."""
    order_N = np.argsort(strata_N, kind="stable")
    places, begins, counts = np.unique(strata_N[order_N], return_index=True, return_counts=True)
    for place, begin, count in zip(places, begins, counts, strict=True):
        yield int(place), order_N[begin : begin + count]


def _joined(arrays: Sequence[NDArray], kind: type) -> NDArray:
    return np.concatenate([np.empty(0, dtype=kind), *arrays]).astype(kind)
