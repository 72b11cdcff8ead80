"""A dataset read window by window: which sequences there are (`WindowReader.window`), and their tokens (`Lane.load`).

Planning a window needs its frame counts only; lanes, which hold codes, are read when somebody takes from them.

Axes: N segments or sequences, L steps of a sequence, Q columns, P pieces (see packing.py), M steps with a frame of
numbers, D numbers of a frame.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..tokenizers.spec import UserError
from .layouts import Codes, Grouping, Halves, Ints, Laid, Layout, Plan, PlannedLayout, Segment, stream_of, token_dtype
from .order import in_turn, lanes_of, shuffled, windows_of
from .packing import Packed, pack
from .root import Root
from .rows import ShardRows, TakenRows, read_rows, take_rows
from .selection import Pack, Selection

_LANE_SEQUENCES = 64  # a lane has as many or more, so that its last, padded one weighs little
_OF_SHARDS, _OF_SEGMENTS = 1, 2  # what is shuffled, in the keys of the order


@dataclass(frozen=True, slots=True)
class _Part:
    """The taken rows of a shard, and where a layout has the say how many steps each has."""

    taken: TakenRows
    steps_N: Ints | None = None
    laid_out: list[Codes] | None = None  # tokens, from layouts that cannot plan
    ids: pa.Array | None = None  # of these

    @property
    def num_steps(self) -> Ints:
        assert self.steps_N is not None, "packed"
        return self.steps_N


@dataclass(frozen=True, slots=True)
class LaneCodes:
    """A lane's segments in order: in which shard's rows each is, and which of them."""

    ids: list[str]
    shards: list[ShardRows]
    shard_N: Ints
    row_N: Ints

    def segment(self, index: int) -> Segment:
        return self.shards[self.shard_N[index]].segment(int(self.row_N[index]))


@dataclass(frozen=True, slots=True)
class LaneTokens:
    """A lane's sequences, `tokens` `[N, L]` or `[N, L, Q]`; pieces `[first_piece[n], first_piece[n + 1])` are n's.

    `frames` has by stream those of each piece, `[M, D]`.
    """

    ids: list[str]
    tokens: Codes
    loss_NL: NDArray[np.bool_] | None
    frames: dict[str, list[Halves]]
    packed: Packed
    first_piece: Ints


@dataclass(frozen=True, slots=True)
class _LaidSegments:
    """What a layout gave for segments, one by one."""

    tokens: list[Codes]  # [S] or [S, Q]
    losses: list[NDArray[np.bool_]] | None = None
    frames: dict[str, list[Halves]] = field(default_factory=dict)


class Lane:
    """Some whole shards of a window; their segments, shuffled, are its sequences, or are packed into them."""

    def __init__(self, selection: Selection, parts: list[_Part], epoch: int) -> None:
        self._selection = selection
        self._parts = parts
        total = sum(len(part.taken) for part in parts)
        shuffle = selection.shuffle
        key = (selection.seed, epoch, _OF_SEGMENTS, parts[0].taken.shard)
        self._order_N: Ints = shuffled(total, *key) if shuffle else np.arange(total)
        self._packed: Packed | None = None
        self.num_sequences = total
        if selection.pack is not None:
            sizes_N = np.concatenate([part.num_steps for part in parts])[self._order_N]
            self._packed = pack(sizes_N, selection.pack.length, selection.pack.method)
            self.num_sequences = self._packed.num_sequences

    def load(self) -> LaneCodes | LaneTokens:
        """The lane's codes or tokens. Raises `CorruptFile`, `UserError`."""
        if self._parts[0].laid_out is not None:
            ids = self._ordered([part.ids for part in self._parts])
            return self._sequences(ids, [_LaidSegments(part.laid_out or []) for part in self._parts])
        read = [read_rows(self._selection, part.taken) for part in self._parts]
        ids = self._ordered([rows.ids for rows in read])
        if self._packed is None:
            counts = [len(part.taken) for part in self._parts]
            shard_N = np.repeat(np.arange(len(counts)), counts)
            row_N = np.concatenate([np.arange(count) for count in counts])
            return LaneCodes(ids, read, shard_N[self._order_N], row_N[self._order_N])
        return self._sequences(ids, [self._lay(part, rows) for part, rows in zip(self._parts, read, strict=True)])

    def _ordered(self, ids: list[Any]) -> list[str]:
        return pa.concat_arrays(ids).take(pa.array(self._order_N)).to_pylist()

    def _lay(self, part: _Part, rows: ShardRows) -> _LaidSegments:
        """The taken segments of a shard, laid out all at once."""
        plan, steps_N = self._selection.plan, part.num_steps
        assert plan is not None
        laid = plan.lay(rows.streams)
        assert len(laid.tokens) == steps_N.sum(), "a layout gives as many steps as it said"
        losses = None if laid.loss_S is None else _split(laid.loss_S, steps_N)
        return _LaidSegments(_split(laid.tokens, steps_N), losses, _frames_by_segment(plan, laid, steps_N))

    def _sequences(self, ids: list[str], shards: list[_LaidSegments]) -> LaneTokens:
        """The sequences of segments that were laid out, these in the order of the shards' rows."""
        packed, pack = self._packed, self._selection.pack
        assert packed is not None
        assert pack is not None
        shape = (packed.num_sequences, pack.length)
        sources = [each for shard in shards for each in shard.tokens]
        tokens = self._joined(packed, sources, pack.length)
        loss_NL = None
        if any(shard.losses is not None for shard in shards):
            losses = [each for shard in shards for each in shard.losses or map(_all_predicted, shard.tokens)]
            loss_NL = self._joined(packed, losses, pack.length).reshape(shape)
        first_piece = np.searchsorted(packed.sequence_P, np.arange(packed.num_sequences + 1))
        plan = self._selection.plan
        frames = {
            stream: self._frames(packed, shards, stream, token)
            for stream, token in (plan.frame_tokens if plan else {}).items()
        }
        return LaneTokens(ids, tokens.reshape(*shape, *tokens.shape[1:]), loss_NL, frames, packed, first_piece)

    def _joined(self, packed: Packed, sources: Sequence[NDArray[Any]], length: int) -> NDArray[Any]:
        """All sequences end to end. One copy for each piece: with pieces of a second or more faster than gathering."""
        like = sources[0] if sources else np.empty(0, dtype=np.int32)
        joined = np.zeros((packed.num_sequences * length, *like.shape[1:]), dtype=like.dtype)
        to_P = (packed.sequence_P * length + packed.place_P).tolist()
        for segment, start, size, to in self._pieces(packed, to_P):
            joined[to : to + size] = sources[segment][start : start + size]
        return joined

    def _frames(self, packed: Packed, shards: Sequence[_LaidSegments], stream: str, token: int) -> list[Halves]:
        """The frames of each piece: views, which batches copy."""
        sources = [each for shard in shards for each in shard.tokens]
        frames = [each for shard in shards for each in shard.frames[stream]]
        before_S = _frames_before(np.concatenate(sources), token)
        ends_N = np.cumsum([len(each) for each in sources])
        begins_P = np.concatenate([[0], ends_N])[self._order_N[packed.segment_P]]
        from_P = before_S[begins_P + packed.start_P]
        num_P = before_S[begins_P + packed.start_P + packed.size_P] - from_P
        spans_P = np.stack([from_P - before_S[begins_P], num_P], axis=1).tolist()
        return [frames[segment][first : first + num] for segment, _, _, (first, num) in self._pieces(packed, spans_P)]

    def _pieces(self, packed: Packed, with_P: list[Any]) -> Iterator[tuple[int, int, int, Any]]:
        """Segment, start and size of each piece, and what is given with it."""
        segments = self._order_N[packed.segment_P].tolist()
        yield from zip(segments, packed.start_P.tolist(), packed.size_P.tolist(), with_P, strict=True)


def _split(array: NDArray[Any], counts_N: Ints) -> list[NDArray[Any]]:
    """Views of runs of so many."""
    ends = np.cumsum(counts_N)
    return [array[begin:end] for begin, end in zip((ends - counts_N).tolist(), ends.tolist(), strict=True)]


def _all_predicted(tokens: Codes) -> NDArray[np.bool_]:
    return np.ones(len(tokens), dtype=bool)


def _frames_before(tokens: Codes, token: int) -> Ints:
    """How many steps before each, and before the end, hold a frame."""
    first_column = tokens if tokens.ndim == 1 else tokens[:, 0]
    return np.concatenate([[0], np.cumsum(first_column == token)])


def _frames_by_segment(plan: Plan, laid: Laid, steps_N: Ints) -> dict[str, list[Halves]]:
    frames = {}
    for stream, token in plan.frame_tokens.items():
        counts_N = np.diff(_frames_before(laid.tokens, token)[np.cumsum(steps_N)], prepend=0)
        assert counts_N.sum() == len(laid.frames[stream]), "a layout gives a frame with each of its tokens"
        frames[stream] = _split(laid.frames[stream], counts_N)
    return frames


class Window:
    """The sequences of one window in their order; lanes are loaded on request, each once."""

    def __init__(self, lanes: list[Lane], *, shuffle: bool) -> None:
        self._lanes = lanes
        self._loads: dict[int, Future[LaneCodes | LaneTokens]] = {}
        self._lane_N, self._place_N = in_turn([lane.num_sequences for lane in lanes], shuffle=shuffle)

    def __len__(self) -> int:
        return len(self._lane_N)

    def request(self, wanted_N: NDArray[np.bool_], pool: ThreadPoolExecutor) -> None:
        """Begin to load the lanes of these sequences, those needed first before the others."""
        lanes, first = np.unique(self._lane_N[wanted_N], return_index=True)
        for lane in lanes[np.argsort(first)].tolist():
            self._loads[lane] = pool.submit(self._lanes[lane].load)

    def sequence(self, index: int) -> "tuple[LaneCodes | LaneTokens, int]":
        """The lane of a sequence that was requested, loaded, and its place there."""
        return self._loads[int(self._lane_N[index])].result(), int(self._place_N[index])


class WindowReader:
    """Plans the windows of a dataset, one ahead."""

    def __init__(self, selection: Selection, pool: ThreadPoolExecutor) -> None:
        self._selection = selection
        self._root = Root(selection.root_uri)
        self._pool = pool
        self._epochs: dict[int, list[list[int]]] = {}
        self._ahead: dict[tuple[int, int], list[Future[_Part]]] = {}

    @property
    def grouping(self) -> Grouping | None:
        return self._selection.grouping

    def num_windows(self, epoch: int) -> int:
        return len(self._shards(epoch))

    def window(self, epoch: int, index: int) -> Window:
        """The window at a place of an epoch. Raises `CorruptFile`, `UserError`."""
        parts = [future.result() for future in self._request(epoch, index)]
        del self._ahead[epoch, index]
        if index + 1 < self.num_windows(epoch):
            self._request(epoch, index + 1)
        pack = self._selection.pack
        sizes = [len(part.taken) if part.steps_N is None else int(part.steps_N.sum()) for part in parts]
        lanes = lanes_of(sizes, 1 if pack is None else _LANE_SEQUENCES * pack.length)
        return Window(
            [Lane(self._selection, [parts[index] for index in lane], epoch) for lane in lanes],
            shuffle=self._selection.shuffle,
        )

    def _shards(self, epoch: int) -> list[list[int]]:
        """The shards of each window of an epoch."""
        if epoch not in self._epochs:
            selection = self._selection
            shards = np.array(selection.shards, dtype=np.int64)
            if selection.shuffle:
                shards = shards[shuffled(len(shards), selection.seed, epoch, _OF_SHARDS)]
            begins = windows_of(selection.bytes_to_read[shards], selection.window_bytes)
            windows = [shards[begin:end].tolist() for begin, end in pairwise(begins)]
            self._epochs = {epoch: windows}
        return self._epochs[epoch]

    def _request(self, epoch: int, index: int) -> list[Future[_Part]]:
        if (epoch, index) not in self._ahead:
            shards = self._shards(epoch)[index]
            self._ahead[epoch, index] = [
                self._pool.submit(_plan, self._selection, self._root, shard) for shard in shards
            ]
        return self._ahead[epoch, index]


def _plan(selection: Selection, root: Root, shard: int) -> _Part:
    """The rows of a shard that are taken, with what is needed to know how many steps they have."""
    taken = take_rows(selection, root, shard)
    if selection.pack is None:
        return _Part(taken)
    plan, layout = selection.plan, selection.pack.layout
    if plan is None:
        assert not isinstance(layout, PlannedLayout)
        return _laid_out(selection, selection.pack, layout, taken)
    rows = taken.counts()
    if plan.read_to_plan:
        rows |= read_rows(selection, taken, sorted({stream_of(name) for name in plan.read_to_plan})).streams
    return _Part(taken, plan.num_steps(rows))


def _laid_out(selection: Selection, pack: Pack, layout: Layout, taken: TakenRows) -> _Part:
    """The rows with the tokens that a layout which cannot plan gives for each."""
    rows = read_rows(selection, taken)
    laid_out = []
    for index in range(len(taken)):
        segment = rows.segment(index)
        tokens = np.asarray(layout(segment), dtype=np.int64).reshape(-1)
        limit = pack.vocab_size or 2**31
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < limit:
            raise UserError(
                f"The layout gives token {int(tokens.max() if tokens.min() >= 0 else tokens.min())} for segment "
                f"{segment.id}; tokens must lie in 0 to {limit - 1:,}."
            )
        laid_out.append(tokens.astype(token_dtype(limit)))
    steps_N = np.array([len(tokens) for tokens in laid_out], dtype=np.int64)
    return _Part(taken, steps_N, laid_out, rows.ids)
