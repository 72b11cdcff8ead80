"""A dataset read window by window: which sequences there are (`WindowReader.window`), and their tokens (`Lane.load`).

Planning a window needs its frame counts only; lanes, which hold codes, are read when somebody takes from them.

Axes: S shards of a lane, N segments or sequences, K codebooks, T frames end to end, L tokens of a sequence.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as arrow_dataset
import torch
from numpy.typing import NDArray

from ..tokenizers.spec import StreamSpec, UserError
from .codes import flat_values, stream_spec
from .layouts import PlannedLayout, Segment, token_dtype
from .order import in_turn, lanes_of, shuffled, windows_of
from .packing import Packed, pack
from .parquet import CorruptFile, ParquetShard
from .root import Root
from .schema import CORPUS_SCHEMA, code_columns, stream_schema
from .selection import Selection, filter_columns
from .table import Snapshot

Ints = NDArray[np.int64]
_LANE_SEQUENCES = 64  # a lane has as many or more, so that its last, padded one weighs little
_OF_SHARDS, _OF_SEGMENTS = 1, 2  # what is shuffled, in the keys of the order


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a shard that are taken, and their frame counts."""

    shard: int
    files: dict[str, ParquetShard]
    rows_N: Ints
    frames_N: dict[str, Ints]
    corpus_ids: pa.Array | None  # of all rows
    laid_out: list[NDArray[np.integer]] | None  # tokens, from layouts that cannot plan
    ids: pa.Array | None = None  # of these


@dataclass(frozen=True, slots=True)
class LaneCodes:
    """A lane's segments in order: their ids, and where in the codes of which shard each begins."""

    ids: list[str]
    shards: "list[_Codes]"
    shard_N: Ints  # into `shards`
    row_N: Ints  # among the shard's taken rows


@dataclass(frozen=True, slots=True)
class LaneTokens:
    """A lane's sequences: tokens `[N, L]`, and the pieces `[first_piece[n], first_piece[n + 1])` of sequence n."""

    ids: list[str]
    tokens_NL: NDArray[np.integer]
    packed: Packed
    first_piece: Ints


@dataclass(frozen=True, slots=True)
class _Codes:
    """A shard's codes: by stream K arrays of all its frames, and begin and length in them of each taken segment."""

    ids: pa.Array
    books: dict[str, list[NDArray[np.integer]]]
    begins_N: dict[str, Ints]
    frames_N: dict[str, Ints]


class Lane:
    """Some whole shards of a window; their segments, shuffled, are its sequences, or are packed into them."""

    def __init__(self, selection: Selection, parts: list[_Rows], epoch: int) -> None:
        self._selection = selection
        self._parts = parts
        total = sum(len(part.rows_N) for part in parts)
        shuffle = selection.shuffle
        key = (selection.seed, epoch, _OF_SEGMENTS, parts[0].shard)
        self._order_N: Ints = shuffled(total, *key) if shuffle else np.arange(total)
        self._packed: Packed | None = None
        self.num_sequences = total
        if selection.pack is not None:
            sizes_N = np.concatenate([token_counts(selection, part) for part in parts])[self._order_N]
            self._packed = pack(sizes_N, selection.pack.length, selection.pack.method)
            self.num_sequences = self._packed.num_sequences

    def load(self) -> LaneCodes | LaneTokens:
        """The lane's codes or tokens. Raises `CorruptFile`, `UserError`."""
        if self._parts[0].laid_out is not None:
            ids = [part.ids for part in self._parts]
            sources = [tokens for part in self._parts for tokens in part.laid_out or ()]
            return self._sequences(self._ordered(ids), sources)
        read = [self._read(part) for part in self._parts]
        ids = self._ordered([codes.ids for codes in read])
        if self._packed is None:
            counts = [len(part.rows_N) for part in self._parts]
            shard_N = np.repeat(np.arange(len(counts)), counts)
            row_N = np.concatenate([np.arange(count) for count in counts])
            return LaneCodes(ids, read, shard_N[self._order_N], row_N[self._order_N])
        return self._sequences(ids, [tokens for codes in read for tokens in self._lay(codes)])

    def _ordered(self, ids: list[Any]) -> list[str]:
        return pa.concat_arrays(ids).take(pa.array(self._order_N)).to_pylist()

    def _lay(self, codes: _Codes) -> list[NDArray[np.integer]]:
        """Tokens of each taken segment of a shard, laid out all at once."""
        assert self._selection.pack is not None
        layout = self._selection.pack.layout
        assert isinstance(layout, PlannedLayout)
        stream, per_frame = layout.stream, layout.tokens_per_frame(self._selection.num_codebooks[layout.stream])
        tokens = layout.lay(codes.books[stream], self._selection.specs[stream])
        begins = codes.begins_N[stream] * per_frame
        ends = begins + codes.frames_N[stream] * per_frame
        return [tokens[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]

    def _sequences(self, ids: list[str], sources: list[NDArray[np.integer]]) -> LaneTokens:
        """The sequences of segments whose tokens are `sources`, these in the order of the shards' rows.

        One copy for each piece: with pieces of a second or more faster than gathering all tokens at once.
        """
        packed, pack = self._packed, self._selection.pack
        assert packed is not None
        assert pack is not None
        dtype = sources[0].dtype if sources else np.dtype(np.int32)
        tokens = np.zeros(packed.num_sequences * pack.length, dtype=dtype)
        segments = self._order_N[packed.segment_P].tolist()
        to_P = (packed.sequence_P * pack.length + packed.place_P).tolist()
        for segment, start, size, to in zip(
            segments, packed.start_P.tolist(), packed.size_P.tolist(), to_P, strict=True
        ):
            tokens[to : to + size] = sources[segment][start : start + size]
        first_piece = np.searchsorted(packed.sequence_P, np.arange(packed.num_sequences + 1))
        return LaneTokens(ids, tokens.reshape(-1, pack.length), packed, first_piece)

    def _read(self, part: _Rows) -> _Codes:
        selection = self._selection
        books, begins, ids = {}, {}, None
        for name, file in part.files.items():
            columns = code_columns(selection.num_codebooks[name])
            table = file.read(["id", *columns])
            found = _one(table["id"])
            if ids is None:
                ids = found
            elif not ids.equals(found):
                raise _other_segments(next(iter(part.files)), name, part.shard)
            flat = [flat_values(table[column]) for column in columns]
            where = f"{selection.streams[name].root_uri}/{selection.streams[name].path(part.shard)}"
            require_sound(flat, part.rows_N, part.frames_N[name], stream_spec(selection.streams[name]), where)
            books[name] = [values for values, _ in flat]
            begins[name] = flat[0][1][part.rows_N].astype(np.int64)
        assert ids is not None
        if part.corpus_ids is not None and not part.corpus_ids.equals(ids):
            raise _other_segments("corpus", next(iter(part.files)), part.shard)
        return _Codes(ids.take(pa.array(part.rows_N)), books, begins, part.frames_N)


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
        self._ahead: dict[tuple[int, int], list[Future[_Rows]]] = {}

    def num_windows(self, epoch: int) -> int:
        return len(self._shards(epoch))

    def window(self, epoch: int, index: int) -> Window:
        """The window at a place of an epoch. Raises `CorruptFile`, `UserError`."""
        parts = [future.result() for future in self._request(epoch, index)]
        del self._ahead[epoch, index]
        if index + 1 < self.num_windows(epoch):
            self._request(epoch, index + 1)
        pack = self._selection.pack
        sizes = [len(part.rows_N) if pack is None else int(token_counts(self._selection, part).sum()) for part in parts]
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

    def _request(self, epoch: int, index: int) -> "list[Future[_Rows]]":
        if (epoch, index) not in self._ahead:
            shards = self._shards(epoch)[index]
            self._ahead[epoch, index] = [self._pool.submit(self._rows, shard) for shard in shards]
        return self._ahead[epoch, index]

    def _rows(self, shard: int) -> _Rows:
        selection = self._selection
        taken, frames, files = None, {}, {}
        for name, snapshot in selection.streams.items():
            files[name] = self._open(snapshot, shard, stream_schema(stream_spec(snapshot)))
            column = _one(files[name].read(["num_frames"])["num_frames"])
            frames[name] = column.fill_null(0).to_numpy().astype(np.int64)
            good = column.is_valid().to_numpy(zero_copy_only=False)
            taken = good if taken is None else taken & good
        assert taken is not None
        corpus_ids = None
        if selection.where is not None:
            mask, corpus_ids = self._chosen(shard, len(taken))
            taken &= mask
        rows_N = np.flatnonzero(taken)
        frames_N = {name: every[rows_N] for name, every in frames.items()}
        part = _Rows(shard, files, rows_N, frames_N, corpus_ids, None)
        if selection.pack is None or isinstance(selection.pack.layout, PlannedLayout):
            return part
        return _laid_out(selection, part)

    def _chosen(self, shard: int, num_rows: int) -> tuple[NDArray[np.bool_], pa.Array]:
        """Which rows of a shard the filter takes, and the ids of all."""
        corpus = self._selection.corpus
        assert corpus is not None
        file = self._open(corpus, shard, CORPUS_SCHEMA)
        columns = filter_columns(self._selection.where)
        table = file.read(list(dict.fromkeys(["id", *columns])))
        if table.num_rows != num_rows:
            raise _other_segments("corpus", next(iter(self._selection.streams)), shard)
        mask = arrow_dataset.dataset(table).to_table(columns={"taken": self._selection.where})["taken"]
        return _one(mask).fill_null(False).to_numpy(zero_copy_only=False), _one(table["id"])

    def _open(self, snapshot: Snapshot, shard: int, schema: pa.Schema) -> ParquetShard:
        return ParquetShard(self._root, snapshot.path(shard), snapshot.files[shard].size_bytes, schema=schema)


def token_counts(selection: Selection, part: _Rows) -> Ints:
    """Tokens of each taken segment."""
    assert selection.pack is not None
    if part.laid_out is not None:
        return np.array([len(tokens) for tokens in part.laid_out], dtype=np.int64)
    layout = selection.pack.layout
    assert isinstance(layout, PlannedLayout)
    return part.frames_N[layout.stream] * layout.tokens_per_frame(selection.num_codebooks[layout.stream])


def require_sound(
    books: list[tuple[NDArray[np.integer], NDArray[np.int32]]],
    rows_N: Ints,
    frames_N: Ints,
    spec: StreamSpec,
    where: str,
) -> None:
    """Raise `CorruptFile` unless each codebook has as many codes as there are frames, and none outside it."""
    offsets = books[0][1]
    same = all(np.array_equal(offsets, others) for _, others in books)
    if not same or not np.array_equal(offsets[rows_N + 1] - offsets[rows_N], frames_N):
        raise CorruptFile(f"{where}: there are rows with fewer or more codes than frames. Make the stream again.")
    for values, _ in books:
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < spec.codebook_size:
            raise CorruptFile(f"{where}: there are codes outside 0 to {spec.codebook_size - 1}. Make the stream again.")


def _laid_out(selection: Selection, part: _Rows) -> _Rows:
    """The rows with the tokens that a layout which cannot plan gives for each."""
    assert selection.pack is not None
    pack = selection.pack
    codes: LaneCodes = Lane(replace(selection, pack=None, shuffle=False), [part], epoch=0).load()  # pyright: ignore[reportAssignmentType]
    laid_out = []
    for index, id_ in enumerate(codes.ids):
        segment = Segment(id_, segment_codes(codes, index))
        tokens = np.asarray(pack.layout(segment), dtype=np.int64).reshape(-1)
        limit = pack.vocab_size or 2**31
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < limit:
            raise UserError(
                f"The layout gives token {int(tokens.max() if tokens.min() >= 0 else tokens.min())} for segment {id_}; "
                f"tokens must lie in 0 to {limit - 1:,}."
            )
        laid_out.append(tokens.astype(token_dtype(limit)))
    return _Rows(
        part.shard, part.files, part.rows_N, part.frames_N, part.corpus_ids, laid_out, pa.array(codes.ids, pa.string())
    )


def segment_codes(lane: LaneCodes, index: int) -> dict[str, torch.Tensor]:
    """Codes `[K, T]` int64 of one segment by stream."""
    shard, row = lane.shards[lane.shard_N[index]], lane.row_N[index]
    codes = {}
    for name, books in shard.books.items():
        begin = shard.begins_N[name][row]
        end = begin + shard.frames_N[name][row]
        codes[name] = torch.from_numpy(np.stack([book[begin:end] for book in books]).astype(np.int64))
    return codes


def _other_segments(first: str, second: str, shard: int) -> UserError:
    return UserError(
        f"{_named(first)} and {_named(second)} hold other segments in shard {shard}: they were not made from the same "
        "corpus. Read them apart, or make one of them again."
    )


def _named(name: str) -> str:
    return "The corpus" if name == "corpus" else f"stream {name!r}"


def _one(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
