"""The rows of a shard that a trainer takes: which they are, found by their frame counts, and what streams hold of them.

Axes: N segments (of groups: their members after one another), K codebooks, T frames end to end, D numbers of a frame.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as arrow_dataset
import torch

from ..tokenizers.spec import StreamSpec, UserError
from .codes import flat_values, stream_spec
from .groups import Key, group_columns, groups_of
from .layouts import Halves, Ints, Segment, StreamRows, member
from .parquet import CorruptFile, ParquetShard
from .root import Root
from .schema import CORPUS_SCHEMA, code_columns, stream_schema
from .selection import Selection, filter_columns
from .table import Snapshot


@dataclass(frozen=True, slots=True)
class TakenRows:
    """The rows of a shard that are taken, and their frame counts; `members` has those of each member of groups."""

    shard: int
    files: dict[str, ParquetShard]
    members: tuple[Ints, ...]  # rows in the files; of streams without groups one member
    frames: dict[str, Ints]  # by stream, frame counts of all rows
    corpus_ids: pa.Array | None  # of all rows
    is_grouped: bool = False

    def __len__(self) -> int:
        return len(self.members[0])

    @property
    def num_rows(self) -> int:
        """Rows in the files."""
        return len(next(iter(self.frames.values())))

    def counts(self) -> dict[str, StreamRows]:
        """What a layout can plan by: frame counts, by the names that it knows streams by."""
        return {
            name: StreamRows(self.frames[stream][rows_N], ()) for name, stream, rows_N in _known_as(self, self.frames)
        }


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """How many groups there are in a dataset, by what becomes of them: all but the first are left out."""

    taken: int
    refused: int  # a member has an error, or is not chosen by the filter
    incomplete: int  # with fewer rows than a group has members, pairs also with more; children without their numbers
    apart: int  # whose rows lie in several shards of the corpus


@dataclass(frozen=True, slots=True)
class ShardRows:
    """What a shard's streams have of the rows that are taken, by the names that layouts know streams by."""

    ids: pa.Array
    streams: dict[str, StreamRows]
    begins_N: dict[str, Ints]

    def segment(self, index: int) -> Segment:
        codes, frames, durations = {}, {}, {}
        for name, rows in self.streams.items():
            begin = int(self.begins_N[name][index])
            span = slice(begin, begin + int(rows.counts_N[index]))
            if rows.books:
                codes[name] = torch.from_numpy(np.stack([book[span] for book in rows.books]).astype(np.int64))
            if rows.frames_TD is not None:
                frames[name] = torch.from_numpy(rows.frames_TD[span].copy())
            if rows.durations_T is not None:
                durations[name] = torch.from_numpy(rows.durations_T[span].copy())
        return Segment(self.ids[index].as_py(), codes, frames, durations)


def take_rows(selection: Selection, root: Root, shard: int) -> TakenRows:
    """The rows of a shard without an error in any stream, as the selection's filter and groups have it.

    Raises `CorruptFile`, `UserError`.
    """
    taken, frames, files = None, {}, {}
    for name, snapshot in selection.streams.items():
        files[name] = _open(root, snapshot, shard, stream_schema(stream_spec(snapshot)))
        column = _one(files[name].read(["num_frames"])["num_frames"])
        frames[name] = column.fill_null(0).to_numpy().astype(np.int64)
        good = column.is_valid().to_numpy(zero_copy_only=False)
        taken = good if taken is None else taken & good
    assert taken is not None
    grouping = selection.grouping
    if selection.where is None and grouping is None:
        return TakenRows(shard, files, (np.flatnonzero(taken),), frames, None)
    table = _read_corpus(selection, root, shard, len(taken))
    if selection.where is not None:
        mask = arrow_dataset.dataset(table).to_table(columns={"taken": selection.where})["taken"]
        taken &= _one(mask).fill_null(False).to_numpy(zero_copy_only=False)
    if grouping is None:
        return TakenRows(shard, files, (np.flatnonzero(taken),), frames, _one(table["id"]))
    groups = groups_of(table, grouping, selection.pairs_apart).values()
    whole = [rows for rows in groups if rows is not None and taken[rows].all()]
    members = tuple(np.array(whole, dtype=np.int64).reshape(len(whole), grouping.num_members).T)
    return TakenRows(shard, files, members, frames, _one(table["id"]), is_grouped=True)


def read_rows(selection: Selection, taken: TakenRows, streams: Sequence[str] | None = None) -> ShardRows:
    """What the streams (all of them by default) hold of the rows that were taken. Raises `CorruptFile`, `UserError`."""
    ids, found = None, {}
    for name in taken.files if streams is None else streams:
        spec = stream_spec(selection.streams[name])
        columns = code_columns(selection.num_codebooks[name])
        more = [*(["frames"] if spec.dim else []), *(["durations"] if spec.durations else [])]
        table = taken.files[name].read(["id", *columns, *more])
        these = _one(table["id"])
        if ids is None:
            ids = these
        elif not ids.equals(these):
            raise other_segments(next(iter(taken.files)), name, taken.shard)
        where = f"{selection.streams[name].root_uri}/{selection.streams[name].path(taken.shard)}"
        found[name] = _whole(table, columns, taken.frames[name], spec, where)
    assert ids is not None
    if taken.corpus_ids is not None and not taken.corpus_ids.equals(ids):
        raise other_segments("corpus", next(iter(taken.files)), taken.shard)
    known = {name: _chosen(found[stream], rows_N) for name, stream, rows_N in _known_as(taken, found)}
    begins = {name: rows.begins_N for name, rows in known.items()}
    return ShardRows(ids.take(pa.array(taken.members[0])), known, begins)


def _known_as(taken: TakenRows, streams: Mapping[str, Any]) -> Iterator[tuple[str, str, Ints]]:
    """By the name that a layout knows it by, each stream and its rows."""
    for stream in streams:
        for index, rows_N in enumerate(taken.members):
            yield member(stream, index) if taken.is_grouped else stream, stream, rows_N


def _whole(table: pa.Table, columns: Sequence[str], frames_N: Ints, spec: StreamSpec, where: str) -> StreamRows:
    """What a file holds of all its rows."""
    flat = [flat_values(table[column]) for column in columns]
    durations = flat_values(table["durations"]) if spec.durations else None
    offsets = [offsets for _, offsets in ([durations] if durations else []) + flat]
    sound = all(np.array_equal(np.diff(each), frames_N) for each in offsets)
    frames_TD = None
    if spec.dim:
        frames_TD, sizes_N = _frames(table["frames"], spec.dim)
        sound &= np.array_equal(sizes_N, frames_N * spec.dim * 2)
    if not sound:
        raise CorruptFile(f"{where}: there are rows with fewer or more codes than frames. Make the stream again.")
    for values, _ in flat:
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < spec.codebook_size:
            raise CorruptFile(f"{where}: there are codes outside 0 to {spec.codebook_size - 1}. Make the stream again.")
    durations_T = durations[0].astype(np.int32, copy=False) if durations else None
    return StreamRows(frames_N, [values for values, _ in flat], frames_TD, durations_T)


def _chosen(rows: StreamRows, rows_N: Ints) -> StreamRows:
    """The rows end to end: as they lie, if no others have frames. A copy each: faster than gathering all frames."""
    counts_N = rows.counts_N[rows_N]
    in_order = bool((rows_N[1:] > rows_N[:-1]).all())
    if in_order and counts_N.sum() == rows.counts_N.sum():
        return replace(rows, counts_N=counts_N)
    begins_N = rows.begins_N[rows_N]
    spans = [slice(begin, end) for begin, end in zip(begins_N.tolist(), (begins_N + counts_N).tolist(), strict=True)]

    def joined(every: Any) -> Any:
        return np.concatenate([every[:0], *(every[span] for span in spans)])

    return StreamRows(
        counts_N,
        [joined(book_T) for book_T in rows.books],
        None if rows.frames_TD is None else joined(rows.frames_TD),
        None if rows.durations_T is None else joined(rows.durations_T),
    )


def count_groups(selection: Selection) -> GroupCounts:
    """Counted by reading the corpus's columns and all frame counts. Raises `CorruptFile`, `UserError`."""
    root, grouping = Root(selection.root_uri), selection.grouping
    if grouping is None:
        raise UserError("Groups are counted where a layout takes several rows together, as units-to-units does.")
    found: dict[Key, list[tuple[bool, bool]]] = {}  # of each shard that has rows of it: is it whole there, and taken?
    for shard in selection.shards:
        taken = take_rows(selection, root, shard)
        first_members = set(taken.members[0].tolist())
        table = _read_corpus(selection, root, shard, taken.num_rows)
        for key, rows in groups_of(table, grouping, selection.pairs_apart).items():
            found.setdefault(key, []).append((rows is not None, rows is not None and rows[0] in first_members))
    left_out = {key: parts for key, parts in found.items() if not any(is_taken for _, is_taken in parts)}
    apart = sum(len(parts) > 1 or key in selection.pairs_apart for key, parts in left_out.items())
    refused = sum(len(parts) == 1 and parts[0][0] for parts in left_out.values())
    return GroupCounts(len(found) - len(left_out), refused, len(left_out) - apart - refused, apart)


def _read_corpus(selection: Selection, root: Root, shard: int, num_rows: int) -> pa.Table:
    assert selection.corpus is not None
    file = _open(root, selection.corpus, shard, CORPUS_SCHEMA)
    filtered = [] if selection.where is None else filter_columns(selection.where)
    grouped = [] if selection.grouping is None else group_columns(selection.grouping.by)
    table = file.read(list(dict.fromkeys(["id", *filtered, *grouped])))
    if table.num_rows != num_rows:
        raise other_segments("corpus", next(iter(selection.streams)), shard)
    return table


def _open(root: Root, snapshot: Snapshot, shard: int, schema: pa.Schema) -> ParquetShard:
    return ParquetShard(root, snapshot.path(shard), snapshot.files[shard].size_bytes, schema=schema)


def _frames(column: pa.ChunkedArray, dim: int) -> tuple[Halves, Ints]:
    """Frames `[T, D]` of all rows end to end, as they lie in the column, and how many bytes each row has of them."""
    rows = _one(column.cast(pa.large_binary()))  # of which there may be more than 2 GB
    _, places, content = rows.buffers()
    if not len(rows) or content is None:
        return np.empty((0, dim), dtype=np.float16), np.zeros(len(rows), dtype=np.int64)
    offsets = np.frombuffer(places, dtype=np.int64)[rows.offset : rows.offset + len(rows) + 1]
    numbers = np.frombuffer(content, dtype=np.uint8)[offsets[0] : offsets[-1]]
    whole = numbers[: len(numbers) // (2 * dim) * 2 * dim]
    return whole.view("<f2").reshape(-1, dim), np.diff(offsets)


def other_segments(first: str, second: str, shard: int) -> UserError:
    return UserError(
        f"{_named(first)} and {_named(second)} hold other segments in shard {shard}: they were not made from the same "
        "corpus. Read them apart, or make one of them again."
    )


def _named(name: str) -> str:
    return "The corpus" if name == "corpus" else f"stream {name!r}"


def _one(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
