"""Token tables as training data: pinned snapshots of streams, joined, in a seeded order that any reader can resume.

The order is that of `order.py`; windows.py reads it and stepping.py shares it between ranks and workers.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..tokenizers.spec import StreamSpec, UserError
from .batches import PackedBatch, TokenBatch, packed_batch, token_batch
from .identity import require_same
from .order import Consumer, Mixture
from .rows import GroupCounts, count_groups
from .selection import Pack, Selection, one_of, select, whole
from .stepping import Cursor, Step, Tail, steps
from .windows import WindowReader

WINDOW_BYTES = 64 << 20
_THREADS = 2  # that read ahead


class _Feed(IterableDataset[TokenBatch | PackedBatch]):
    """Batches of one or more selections for one rank, shared between DataLoader workers, from a state on."""

    def __init__(
        self,
        selections: list[Selection],
        weights: Sequence[float],
        *,
        batch_size: int,
        rank: int | None,
        world_size: int | None,
        tail: str,
    ) -> None:
        self._selections = selections
        self._weights = [float(weight) for weight in weights]
        self._mixture = Mixture(self._weights)
        self._batch_size = whole(batch_size, "batch_size", least=1)
        self._tail = one_of(Tail, tail, "tail")
        self._rank, self._world_size = _ranks(rank, world_size)
        # whether an iteration has begun here, slot and cursors: shared with workers that live from epoch to epoch
        self._place = torch.zeros(2 + 3 * len(selections), dtype=torch.int64).share_memory_()
        self._resumed: dict[str, Any] | None = None  # in a worker: a state of its own, for one iteration
        self._last: dict[str, Any] | None = None
        self._identities: list[dict[str, Any]] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._place = self._place.share_memory_()  # a copy's own workers share with it

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration begins or goes on with."""
        return int(self._place[2])

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch with the next iteration; if a state of this very epoch was loaded, go on from there."""
        if epoch < 0:
            raise UserError(f"The epoch is {epoch}; it must not be negative.")
        if epoch != self.epoch:
            self._set(0, [Cursor(epoch)] * len(self._selections))
            self._last = None

    def state_dict(self) -> dict[str, Any]:
        """Where the last batch that was made here left the epoch.

        With DataLoader workers these run ahead: save the `state` of the last batch that was trained on instead.
        `StatefulDataLoader` calls this in its workers.
        """
        worker = get_worker_info()
        if self._last is None and self._resumed is not None:
            return dict(self._resumed)
        state = self._state(*self._get()) if self._last is None else dict(self._last)
        if worker is not None:
            state["skip_steps"] = worker.id if self._last is None else worker.num_workers - 1
            state["ended"] = self._last is not None and state["slot"] == 0
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, once, after the step that `state` was saved with, on any number of ranks and workers.

        Raises `UserError` for the state of a dataset with other versions, streams, order or packing.
        """
        datasets, cursors = state.get("datasets", ()), state.get("cursors", ())
        if not datasets or len(cursors) != len(datasets) or "slot" not in state:
            raise UserError("This is no state of a TokenDataset: expected what `batch.state` or `state_dict()` gave.")
        for part, (ours, theirs) in enumerate(zip(self._identity(), datasets, strict=False)):
            require_same(ours, theirs, part)
        if len(datasets) != len(self._selections) or state.get("weights") != self._weights:
            raise UserError("The state is that of another mixture of datasets: build the same one, with its weights.")
        self._last = None
        if get_worker_info() is not None and "skip_steps" in state:
            self._resumed = dict(state)
        else:
            self._set(state["slot"], [Cursor(*cursor) for cursor in cursors])

    def count_sequences(self) -> int:
        """Sequences (segments, where nothing is packed) of the epoch, counted by reading all frame counts."""
        if len(self._selections) != 1:
            raise UserError("Sequences are counted of one dataset; a mixture ends with the dataset that ends first.")
        with ThreadPoolExecutor(_THREADS) as pool:
            reader = WindowReader(self._selections[0], pool)
            return sum(len(reader.window(self.epoch, index)) for index in range(reader.num_windows(self.epoch)))

    def __iter__(self) -> Iterator[TokenBatch | PackedBatch]:
        self._last = None  # now, not with the first batch: `state_dict` may be called before that
        return self._batches()

    def _batches(self) -> Iterator[TokenBatch | PackedBatch]:
        worker, resumed = get_worker_info(), self._resumed
        num_workers, first = (1, 0) if worker is None else (worker.num_workers, worker.id)
        if resumed is None:
            slot, cursors = self._begin(is_first=first == 0)
        else:
            slot, cursors = resumed["slot"], [Cursor(*cursor) for cursor in resumed["cursors"]]
            first = resumed["skip_steps"]
        consumer = Consumer(rank=self._rank, num_ranks=self._world_size, num_workers=num_workers, first_step=first)
        counting, loading = ThreadPoolExecutor(_THREADS), ThreadPoolExecutor(_THREADS)
        try:
            for step in (
                ()
                if resumed is not None and resumed["ended"]
                else steps(
                    [WindowReader(selection, counting) for selection in self._selections],
                    cursors,
                    slot,
                    mixture=self._mixture,
                    consumer=consumer,
                    batch_size=self._batch_size,
                    tail=self._tail,
                    pool=loading,
                )
            ):
                self._last = self._state(step.slot, step.cursors)
                yield self._batch(step, self._last)
        finally:
            self._resumed = None
            for pool in (counting, loading):
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, *, is_first: bool) -> tuple[int, list[Cursor]]:
        """Slot and cursors to begin at. A loaded place inside an epoch is good for one iteration.

        Raises `UserError` for a second one, which would be a shorter epoch; the first of the workers sees to that.
        """
        slot, cursors = self._get()
        if is_first and slot and self._place[0]:
            raise UserError(
                f"The loaded state, inside epoch {self.epoch}, has been gone on from already: call set_epoch for a "
                "whole epoch, or load_state_dict again."
            )
        if is_first:
            self._place[0] = 1
        return slot, cursors

    def _batch(self, step: Step, state: dict[str, Any]) -> TokenBatch | PackedBatch:
        selection = self._selections[0]
        if selection.pack is None:
            return token_batch(step.sources, self._batch_size, selection, state)
        return packed_batch(step.sources, self._batch_size, selection, state)

    def _get(self) -> tuple[int, list[Cursor]]:
        _, slot, *places = self._place.tolist()
        return slot, [Cursor(*places[begin : begin + 3]) for begin in range(0, len(places), 3)]

    def _set(self, slot: int, cursors: Sequence[Cursor]) -> None:
        places = [place for cursor in cursors for place in (cursor.epoch, cursor.window, cursor.offset)]
        self._place.copy_(torch.tensor([0, slot, *places]))

    def _state(self, slot: int, cursors: Sequence[Cursor]) -> dict[str, Any]:
        return {
            "slot": slot,
            "cursors": [[cursor.epoch, cursor.window, cursor.offset] for cursor in cursors],
            "weights": self._weights,
            "datasets": self._identity(),
        }

    def _identity(self) -> list[dict[str, Any]]:
        if self._identities is None:
            self._identities = [selection.identity() for selection in self._selections]
        return self._identities


class TokenDataset(_Feed):
    """Batches of chosen streams and codebooks of a dataset, every good segment once an epoch.

    The order is a function of the snapshot, the seed and the epoch. Ranks and DataLoader workers share it between them,
    and each batch carries the `state` from which any number of ranks and workers goes on. Snapshots are resolved here,
    once, to lists of files; copies in workers read those files and nothing newer.

        dataset = TokenDataset("my-tokens", {"semantic": None, "acoustic": 4}, batch_size=16, seed=1)
        for batch in DataLoader(dataset, batch_size=None, num_workers=2): ...       # TokenBatch

        pack = Pack(flatten("acoustic"), length=4096)
        dataset = TokenDataset("my-tokens", ["acoustic"], pack=pack, batch_size=8)  # PackedBatch

    - `streams` maps a stream's name to how many of its codebooks to read (None: all), or lists names; a planned layout
      names its own. Segments with an error in any of them are left out (`num_errors` counts them), and where a layout
      takes several rows together, such as pairs, groups that are not whole (`count_groups` does).
    - `where` chooses segments by columns of the corpus: a pyarrow expression, or filters as `pq.read_table` takes them.
    - `versions` (a stream's name to a version of its table; "corpus" for `where`) or `pin` (a name given with
      `wavemill pin`) say which snapshots; the newest otherwise.
    - `rank` and `world_size` are those of torch.distributed if it is initialized, else 0 and 1.
    - `tail`: "pad" fills up the last step of an epoch with padding, "drop" leaves it out.
    - `window_bytes`: segments are shuffled within windows of about so many bytes of files; readers hold two or three.

    Raises `UserError` for what is not there or does not belong together. Reading raises `CorruptFile` for files
    that are gone or damaged.
    """

    def __init__(
        self,
        root: str,
        streams: Mapping[str, int | None] | Sequence[str] | None = None,
        *,
        batch_size: int = 16,
        pack: Pack | None = None,
        seed: int = 0,
        shuffle: bool = True,
        where: Any = None,
        versions: Mapping[str, int] | None = None,
        pin: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        tail: str = "pad",
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        selection = select(
            root,
            streams,
            pack=pack,
            seed=seed,
            shuffle=shuffle,
            where=where,
            versions=versions,
            pin=pin,
            window_bytes=window_bytes,
        )
        super().__init__([selection], [1.0], batch_size=batch_size, rank=rank, world_size=world_size, tail=tail)

    @property
    def selection(self) -> Selection:
        return self._selections[0]

    @property
    def versions(self) -> dict[str, int]:
        """The table version each stream, and the corpus if it is read, is pinned to."""
        return self.selection.versions

    @property
    def specs(self) -> dict[str, StreamSpec]:
        return self.selection.specs

    @property
    def num_rows(self) -> int:
        """Segments in the snapshot, those with errors included."""
        return next(iter(self.selection.streams.values())).num_rows

    @property
    def num_errors(self) -> dict[str, int]:
        """Segments with an error, by stream."""
        return {name: snapshot.num_errors for name, snapshot in self.selection.streams.items()}

    def count_groups(self) -> GroupCounts:
        """How many groups of rows there are, and why some are left out, counted by reading the corpus's columns.

        Raises `UserError` if the layout takes rows one by one.
        """
        return count_groups(self.selection)


class MixedDataset(_Feed):
    """Batches of several datasets, each with its share of the sequences: `weights`, to a thousandth.

    Which dataset fills which place of which batch is a fixed pattern; each keeps its own order. The epoch ends when the
    first of them ends: nothing is repeated. All must be packed to one length, or all have the same streams and
    codebooks. Their own batch sizes, ranks and tails do not count.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        weights: Sequence[float],
        *,
        batch_size: int = 16,
        rank: int | None = None,
        world_size: int | None = None,
        tail: str = "pad",
    ) -> None:
        if not datasets or len(datasets) != len(weights):
            raise UserError(f"There are {len(datasets)} datasets and {len(weights)} weights; give one for each.")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise UserError(f"The weights are {list(weights)}; each must be a number greater than 0.")
        selections = [dataset.selection for dataset in datasets]
        shapes = [selection.shape for selection in selections]
        if any(shape != shapes[0] for shape in shapes):
            other = next(shape for shape in shapes if shape != shapes[0])
            raise UserError(f"The datasets cannot share batches: one gives {shapes[0]}, another {other}.")
        super().__init__(selections, weights, batch_size=batch_size, rank=rank, world_size=world_size, tail=tail)


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's place among the trainer's, which must not be guessed wrong: every rank would read everything."""
    if (rank is None) != (world_size is None):
        raise UserError("Give both rank and world_size, or neither.")
    if rank is None or world_size is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed:
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialized: build the "
                "dataset after init_process_group, or give it rank and world_size."
            )
        return 0, 1
    if not 0 <= rank < world_size:
        raise UserError(f"Rank {rank} of {world_size} was asked for; ranks go from 0 to world_size - 1.")
    return rank, world_size
