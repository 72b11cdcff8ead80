"""Token tables as training data: a pinned snapshot of one or more streams, joined, in a seeded order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..tokenizers.spec import StreamSpec, UserError
from .codes import ShardCodes, open_stream, read_codes, stream_spec
from .root import Root
from .table import Snapshot


@dataclass(frozen=True, slots=True)
class TokenSample:
    """One segment: its id and the codes `[K, T]` int64 of each stream."""

    id: str
    codes: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """B segments: codes `[B, K, T]` int64 by stream, padded behind `num_frames` `[B]` with the pad value."""

    ids: list[str]
    codes: dict[str, Tensor]
    num_frames: dict[str, Tensor]


class TokenDataset(IterableDataset[TokenSample]):
    """Segments of chosen streams and codebooks of a dataset, in an order that (seed, epoch) alone decides.

    The snapshot is resolved here, once, to a list of files; copies in DataLoader workers read those files and nothing
    newer, and share the shards between them. Segments with an error in any chosen stream are passed over.

        dataset = TokenDataset("my-tokens", {"semantic": None, "acoustic": 4}, seed=1)
        for batch in DataLoader(dataset, batch_size=16, collate_fn=collate): ...

    `streams` maps a stream's name to how many of its codebooks to read (None: all), or lists names. `versions` pins
    streams to table versions; `dataset.versions` says which were taken. Raises `UserError` for streams that are not
    there, that lack shards others have, or for more codebooks than there are.
    """

    def __init__(
        self,
        root: str,
        streams: Mapping[str, int | None] | Sequence[str],
        *,
        seed: int = 0,
        shuffle: bool = True,
        versions: Mapping[str, int] | None = None,
    ) -> None:
        wanted = dict(streams) if isinstance(streams, Mapping) else dict.fromkeys(streams)
        if not wanted:
            raise UserError("Name at least one stream to read.")
        if seed < 0:
            raise UserError(f"The seed is {seed}; it must not be negative.")
        stray = sorted(set(versions or ()) - set(wanted))
        if stray:
            raise UserError(f"A version is pinned for {stray[0]!r}, but the streams to read are {', '.join(wanted)}.")
        place = Root(root)
        self._snapshots = {name: open_stream(place, name, version=(versions or {}).get(name)) for name in wanted}
        self._num_codebooks = {name: _books(name, self._snapshots[name], count) for name, count in wanted.items()}
        self._shards = _common_shards(self._snapshots)
        self._root_uri = place.uri
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0

    @property
    def versions(self) -> dict[str, int]:
        """The table version each stream is pinned to."""
        return {name: snapshot.version for name, snapshot in self._snapshots.items()}

    @property
    def specs(self) -> dict[str, StreamSpec]:
        return {name: stream_spec(snapshot) for name, snapshot in self._snapshots.items()}

    @property
    def num_rows(self) -> int:
        """Segments in the snapshot, those with errors included."""
        return next(iter(self._snapshots.values())).num_rows

    def set_epoch(self, epoch: int) -> None:
        """Choose another order. Call it before a DataLoader starts its workers: persistent ones keep the old order."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[TokenSample]:
        worker = get_worker_info()
        shards = self._shards
        if self._shuffle:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(len(shards))
            shards = [shards[index] for index in order]
        if worker is not None:
            shards = shards[worker.id :: worker.num_workers]
        root = Root(self._root_uri)
        for shard in shards:
            yield from self._shard_samples(root, shard)

    def _shard_samples(self, root: Root, shard: int) -> Iterator[TokenSample]:
        parts = {
            name: read_codes(root, snapshot, shard, num_codebooks=self._num_codebooks[name])
            for name, snapshot in self._snapshots.items()
        }
        ids = _same_ids(parts, shard)
        rows: Sequence[int] | np.ndarray = range(len(ids))
        if self._shuffle:
            rows = np.random.default_rng([self._seed, self._epoch, shard]).permutation(len(ids))
        for row in rows:
            codes = {name: part.codes(int(row)) for name, part in parts.items()}
            if any(codes_KT is None for codes_KT in codes.values()):
                continue
            yield TokenSample(
                ids[row],
                {name: torch.from_numpy(np.asarray(part, dtype=np.int64)) for name, part in codes.items()},
            )


def collate(samples: Sequence[TokenSample], *, pad: int = -1) -> TokenBatch:
    """A padded batch, for a DataLoader's `collate_fn`."""
    names = list(samples[0].codes)
    num_frames = {name: torch.tensor([sample.codes[name].shape[1] for sample in samples]) for name in names}
    codes = {}
    for name in names:
        num_codebooks = samples[0].codes[name].shape[0]
        padded_BKT = torch.full((len(samples), num_codebooks, int(num_frames[name].max())), pad)
        for row, sample in enumerate(samples):
            padded_BKT[row, :, : sample.codes[name].shape[1]] = sample.codes[name]
        codes[name] = padded_BKT
    return TokenBatch([sample.id for sample in samples], codes, num_frames)


def _books(name: str, snapshot: Snapshot, count: int | None) -> int:
    there = stream_spec(snapshot).num_codebooks
    if count is None:
        return there
    if not 1 <= count <= there:
        raise UserError(f"Stream {name!r} has {there} codebooks; {count} were asked for.")
    return count


def _common_shards(snapshots: Mapping[str, Snapshot]) -> list[int]:
    every = set().union(*(snapshot.files for snapshot in snapshots.values()))
    for name, snapshot in snapshots.items():
        missing = sorted(every - set(snapshot.files))
        if missing:
            raise UserError(
                f"Stream {name!r} (version {snapshot.version}) lacks {len(missing)} shard(s) that other streams have, "
                f"the first being {missing[0]}. Finish it with `wavemill tokenize`, or pin older versions of the rest."
            )
    return sorted(every)


def _same_ids(parts: Mapping[str, ShardCodes], shard: int) -> list[str]:
    (first_name, first), *rest = parts.items()
    for name, part in rest:
        if part.ids != first.ids:
            raise UserError(
                f"Streams {first_name!r} and {name!r} hold other segments in shard {shard}: they were not made from "
                "the same corpus. Read them apart, or make one of them again."
            )
    return first.ids
