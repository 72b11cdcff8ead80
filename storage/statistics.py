"""Mean and variance of the numbers of a continuous stream: each shard has its own in its footer, merged from there.

Axes: T frames, D dimensions.
"""

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..tokenizers.spec import UserError
from .codes import open_stream, stream_spec
from .parquet import ParquetShard
from .root import Root
from .schema import stream_schema
from .table import Snapshot

KEY = "wavemill.statistics"  # of a shard file's metadata
_BLOCK_FRAMES = 4_096  # taken to float64 at a time


@dataclass(frozen=True, slots=True)
class Statistics:
    """Frames that were counted, their mean and the sum of squared differences from it, each dimension by itself."""

    count: int
    mean_D: NDArray[np.float64]
    squares_D: NDArray[np.float64]

    @classmethod
    def of_none(cls, dim: int) -> "Statistics":
        return cls(0, np.zeros(dim), np.zeros(dim))

    @classmethod
    def of(cls, segments: Iterable[NDArray[np.float16]], dim: int) -> "Statistics":
        """Of the frames `[T, D]` of segments, in their order; frames with a number that is not finite are left out."""
        total = cls.of_none(dim)
        for frames_TD in segments:
            for begin in range(0, frames_TD.shape[0], _BLOCK_FRAMES):
                block_TD = frames_TD[begin : begin + _BLOCK_FRAMES].astype(np.float64)
                block_TD = block_TD[np.isfinite(block_TD).all(axis=1)]
                if block_TD.shape[0]:
                    mean_D = block_TD.mean(axis=0)
                    total += cls(block_TD.shape[0], mean_D, np.square(block_TD - mean_D).sum(axis=0))
        return total

    def __add__(self, other: "Statistics") -> "Statistics":
        """Of both (Chan, Golub and LeVeque 1979); what is added to what decides the last bits."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        away_D = other.mean_D - self.mean_D
        return Statistics(
            count,
            self.mean_D + away_D * (other.count / count),
            self.squares_D + other.squares_D + np.square(away_D) * (self.count * other.count / count),
        )

    @property
    def variance_D(self) -> NDArray[np.float64]:
        """The mean squared difference; 0 where nothing was counted."""
        return self.squares_D / max(1, self.count)

    def to_json(self) -> str:
        """Numbers as base64 of little-endian float64, which is exact and a third as long as digits."""
        arrays = {"mean": self.mean_D, "m2": self.squares_D}
        told = {name: base64.b64encode(array.astype("<f8").tobytes()).decode() for name, array in arrays.items()}
        return json.dumps({"count": self.count, **told})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Statistics":
        told = json.loads(text)
        mean_D, squares_D = (np.frombuffer(base64.b64decode(told[name]), dtype="<f8") for name in ("mean", "m2"))
        return cls(told["count"], mean_D, squares_D)


def stream_statistics(root: Root, name: str) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Frames, mean `[D]` and variance `[D]` of a continuous stream, over all of its shards; reads their footers alone.

    Raises `UserError` for a stream of codes or of text, `CorruptFile` for a footer that is not what was written.
    """
    snapshot = open_stream(root, name)
    merged = merged_statistics(root, snapshot, list(snapshot.files))
    return merged.count, merged.mean_D, merged.variance_D


def merged_statistics(root: Root, snapshot: Snapshot, shards: Iterable[int]) -> Statistics:
    """Statistics of these shards, merged in the order given. Raises as `stream_statistics` does."""
    spec, schema = stream_spec(snapshot), stream_schema(stream_spec(snapshot))
    name = snapshot.folder.rpartition("/")[2]
    if not spec.dim:
        raise UserError(f"Stream {name!r} ({spec.tokenizer}) has no frames of numbers, so it has no mean of them.")
    total = Statistics.of_none(spec.dim)
    for shard in shards:
        file = ParquetShard(root, snapshot.path(shard), snapshot.files[shard].size_bytes, schema=schema)
        told = file.key_values().get(KEY.encode())
        if told is None:
            raise UserError(
                f"Shard {shard} of stream {name!r} has no statistics in its footer: another tool wrote it. Make the "
                "stream again under another name."
            )
        total += Statistics.from_json(told)
    return total
