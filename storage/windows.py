"""A dataset read window by window: which sequences there are (`WindowReader.window`), and their tokens (`Lane.load`).

Planning a window needs its frame counts only; lanes, which hold codes, are read when somebody takes from them.

Axes: S shards of a lane, N segments or sequences, K codebooks, T frames end to end, L tokens of a sequence.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.dataset as arrow_dataset
import torch
from numpy.typing import NDArray

from ..tokenizers.spec import StreamSpec, UserError
from .codes import flat_values, stream_spec
from .layouts import PlannedLayout, Segment, token_dtype
from .order import in_turn, lanes_of, shuffled, windows_of
from .packing import Packed, PackingMethod, pack
from .parquet import CorruptFile, ParquetShard
from .root import Root
from .schema import CORPUS_SCHEMA, code_columns, stream_schema
from .selection import Pack, Selection, filter_columns
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
    """A lane's segments in order: codes `[K, T]` of each stream end to end, those of segment n from `begins[n]` on."""

    ids: pa.Array
    codes: dict[str, NDArray[np.integer]]
    begins: dict[str, Ints]


@dataclass(frozen=True, slots=True)
class LaneTokens:
    """A lane's sequences: tokens `[N, L]`, and the pieces `[first_piece[n], first_piece[n + 1])` of sequence n."""

    ids: pa.Array
    tokens_NL: NDArray[np.integer]
    packed: Packed
    first_piece: Ints


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
        laid_out = self._parts[0].laid_out is not None
        read = [] if laid_out else [self._read(part) for part in self._parts]
        parts = self._parts if laid_out else read
        ids = pa.concat_arrays([part.ids for part in parts]).take(pa.array(self._order_N))
        if self._packed is None:
            return self._codes(ids, read)
        assert self._selection.pack is not None
        if laid_out:
            every = [tokens for part in self._parts for tokens in part.laid_out or ()]
            tokens = np.concatenate([np.empty(0, np.int32), *(every[index] for index in self._order_N)])
        else:
            codes = self._codes(ids, read)
            layout: PlannedLayout = self._selection.pack.layout
            tokens = layout.lay(list(codes.codes[layout.stream]), self._selection.specs[layout.stream])
        return _sequences(ids, tokens, self._packed, self._selection.pack)

    def _codes(self, ids: pa.Array, read: "list[_Read]") -> LaneCodes:
        codes, begins = {}, {}
        for name, num_codebooks in self._selection.num_codebooks.items():
            frames_N = np.concatenate([part.frames_N[name] for part in self._parts])[self._order_N]
            lengths = [len(part.books[name][0]) for part in read]
            shifts = np.cumsum([0, *lengths[:-1]])
            starts_N = np.concatenate([part.starts_N[name] + shift for part, shift in zip(read, shifts, strict=True)])
            from_T = spans(starts_N[self._order_N], frames_N)
            codes[name] = np.empty((num_codebooks, len(from_T)), dtype=read[0].books[name][0].dtype)
            for book, out_T in enumerate(codes[name]):
                values = [part.books[name][book] for part in read]
                (values[0] if len(values) == 1 else np.concatenate(values)).take(from_T, out=out_T, mode="clip")
            begins[name] = np.concatenate([[0], np.cumsum(frames_N)])
        return LaneCodes(ids, codes, begins)

    def _read(self, part: _Rows) -> "_Read":
        selection = self._selection
        books, starts, ids = {}, {}, None
        for name, file in part.files.items():
            spec = stream_spec(selection.streams[name])
            columns = code_columns(selection.num_codebooks[name])
            table = file.read(["id", *columns])
            found = _one(table["id"])
            if ids is None:
                ids = found
            elif not ids.equals(found):
                raise _other_segments(next(iter(part.files)), name, part.shard)
            where = f"{selection.streams[name].root_uri}/{selection.streams[name].path(part.shard)}"
            flat = [flat_values(table[column]) for column in columns]
            offsets = flat[0][1].astype(np.int64)
            for column, (values, own_offsets) in zip(columns, flat, strict=True):
                require_sound(values, own_offsets, part, name, spec, f"{where}, column {column}")
            books[name] = [values for values, _ in flat]
            starts[name] = offsets[part.rows_N]
        assert ids is not None
        if part.corpus_ids is not None and not part.corpus_ids.equals(ids):
            raise _other_segments("corpus", next(iter(part.files)), part.shard)
        return _Read(ids.take(pa.array(part.rows_N)), books, starts)


@dataclass(frozen=True, slots=True)
class _Read:
    """A shard's codes: K arrays of all its frames by stream, and where each taken segment starts in them."""

    ids: pa.Array
    books: dict[str, list[NDArray[np.integer]]]
    starts_N: dict[str, Ints]


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
    layout: PlannedLayout = selection.pack.layout
    return part.frames_N[layout.stream] * layout.tokens_per_frame(selection.num_codebooks[layout.stream])


def spans(starts: Ints, counts: Ints) -> Ints:
    """`starts[0], starts[0] + 1, ...`, counts[0] of them, then the same of the next."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def require_sound(
    values: NDArray[np.integer],
    offsets: NDArray[np.int32],
    part: _Rows,
    name: str,
    spec: StreamSpec,
    where: str,
) -> None:
    """Raise `CorruptFile` unless there are as many codes as frames, each of its codebook."""
    counts_N = offsets[part.rows_N + 1] - offsets[part.rows_N]
    if not np.array_equal(counts_N, part.frames_N[name]):
        raise CorruptFile(f"{where}: there are rows with fewer or more codes than frames. Make the stream again.")
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < spec.codebook_size:
        raise CorruptFile(f"{where}: there are codes outside 0 to {spec.codebook_size - 1}. Make the stream again.")


def _laid_out(selection: Selection, part: _Rows) -> _Rows:
    """The rows with the tokens that a layout which cannot plan gives for each."""
    assert selection.pack is not None
    pack = selection.pack
    codes: LaneCodes = Lane(replace(selection, pack=None, shuffle=False), [part], epoch=0).load()  # pyright: ignore[reportAssignmentType]
    laid_out = []
    for index, id_ in enumerate(codes.ids.to_pylist()):
        segment = Segment(id_, segment_codes(codes, index))
        tokens = np.asarray(pack.layout(segment), dtype=np.int64).reshape(-1)
        limit = pack.vocab_size or 2**31
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < limit:
            raise UserError(
                f"The layout gives token {int(tokens.max() if tokens.min() >= 0 else tokens.min())} for segment {id_}; "
                f"tokens must lie in 0 to {limit - 1:,}."
            )
        laid_out.append(tokens.astype(token_dtype(limit)))
    return _Rows(part.shard, part.files, part.rows_N, part.frames_N, part.corpus_ids, laid_out, codes.ids)


def segment_codes(lane: LaneCodes, index: int) -> dict[str, torch.Tensor]:
    """Codes `[K, T]` int64 of one segment by stream."""
    return {
        name: torch.from_numpy(codes_KT[:, lane.begins[name][index] : lane.begins[name][index + 1]].astype(np.int64))
        for name, codes_KT in lane.codes.items()
    }


def _sequences(ids: pa.Array, tokens: NDArray[np.integer], packed: Packed, pack: Pack) -> LaneTokens:
    size = packed.num_sequences * pack.length
    if pack.method is PackingMethod.CONCATENATE:
        tokens_NL = np.zeros(size, dtype=tokens.dtype)
        tokens_NL[: len(tokens)] = tokens
    else:
        sizes = np.bincount(packed.segment_P, weights=packed.size_P, minlength=len(ids)).astype(np.int64)
        begins = np.cumsum(sizes) - sizes
        tokens_NL = np.zeros(size, dtype=tokens.dtype)
        to = spans(packed.sequence_P * pack.length + packed.place_P, packed.size_P)
        tokens_NL[to] = tokens[spans(begins[packed.segment_P] + packed.start_P, packed.size_P)]
    first_piece = np.searchsorted(packed.sequence_P, np.arange(packed.num_sequences + 1))
    return LaneTokens(ids, tokens_NL.reshape(-1, pack.length), packed, first_piece)


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
