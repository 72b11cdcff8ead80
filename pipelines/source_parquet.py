"""Parquet files, and the Arrow files of Hugging Face's `save_to_disk`, with a column of audio."""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ..storage.stores import is_remote
from ..tokenizers.spec import UserError
from .entries import AudioError, Entry
from .source_footer import null_counts
from .source_paths import full_path, open_regular
from .source_rows import PATH_KEYS, ROW_KEYS, LineErrors, checked_path, entry_of, relative_path

TABLE_SUFFIXES = (".parquet", ".arrow")
_BATCH_ROWS = 1_024
_BLOB_ROWS = 16  # rows read at a time where only the bytes themselves can say whether they are there
_FILE_MAGIC = b"ARROW1"
_HF_KEY = b"huggingface"
_TableErrors = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last: pyarrow, of columns' names


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a table has what."""

    audio: str
    kind: str  # "struct" (Hugging Face's: bytes, path), "binary", "path"
    metadata: tuple[str, ...]
    text: str | None
    classes: dict[str, list[str]]  # names of Hugging Face's class labels, by column


def open_table(source_root: str, path: str, *, audio_column: str | None, text_column: str | None) -> Columns:
    """Which columns a table has for us. Raises `UserError` where that cannot be told, `AudioError` if it is torn."""
    with closing(_open(full_path(source_root, path))) as table:
        try:
            return _columns(table, path, audio_column, text_column)
        except _TableErrors as error:
            raise _unreadable(error) from error


def is_table(source_root: str, path: str) -> bool:
    """Whether a file whose name says Parquet or Arrow is one, and has audio or paths of audio in it."""
    if not path.lower().endswith(TABLE_SUFFIXES):
        return False
    try:
        open_table(source_root, path, audio_column=None, text_column=None)
    except AudioError as error:
        return is_remote(source_root) and error.kind == "missing"  # it was there when the store was listed
    except UserError:
        return False
    return True


def table_entries(
    source_root: str, path: str, *, audio_column: str | None = None, text_column: str | None = None
) -> Iterator[Entry]:
    """One entry per row: the bytes in the audio column, or where there are none the file whose path stands there.

    Metadata goes by the same names as in a CSV file. Only the columns that are needed are read, and of the bytes
    only whether they are there. Raises `UserError` for a file without a column of audio; one that cannot be read
    is an entry with an error.
    """
    row = 0
    try:
        with closing(_open(full_path(source_root, path))) as table:
            columns = _columns(table, path, audio_column, text_column)
            for batch in table.batches(columns):
                for fields in _plain_rows(batch, columns):
                    yield _entry(fields, columns, source_root, path, row)
                    row += 1
    except AudioError as error:
        yield Entry(path=path, member=f"{row}" if row else "", error=error)
    except _TableErrors as error:
        yield Entry(path=path, member=f"{row}" if row else "", error=_unreadable(error))


def saved_files(folder: str) -> list[str]:
    """The Arrow files of a folder that `datasets` saved, by its state.json; empty if it is none."""
    try:
        with open_regular(os.path.join(folder, "state.json")) as file:
            state = json.load(file)
        names = [found["filename"] for found in state["_data_files"]]
    except (AudioError, *LineErrors):
        return []
    plain = [name for name in names if isinstance(name, str) and os.path.basename(name) == name]
    return plain if all(name.endswith(".arrow") for name in plain) else []


@dataclass(slots=True)
class _Batch:
    metadata: pa.RecordBatch | None
    audio: pa.Array | None  # paths, where there may be some
    present: list[bool]  # whether the bytes are there


class _Table(Protocol):
    @property
    def schema(self) -> pa.Schema: ...

    def batches(self, columns: Columns) -> Iterator[_Batch]: ...

    def close(self) -> None: ...


class _Parquet:
    def __init__(self, path: str) -> None:
        self._raw = open_regular(path)
        try:
            self._file = pq.ParquetFile(self._raw, page_checksum_verification=True)
            self.schema = self._file.schema_arrow
        except _TableErrors as error:
            self._raw.close()
            raise _unreadable(error) from error

    def batches(self, columns: Columns) -> Iterator[_Batch]:
        blob = f"{columns.audio}.bytes" if columns.kind == "struct" else columns.audio
        try:
            counts = [] if columns.kind == "path" else null_counts(self._raw, blob)
            for group in range(self._file.num_row_groups):
                missing = 0 if columns.kind == "path" else counts[group] if group < len(counts) else None
                yield from self._group(group, columns, missing)
        except _TableErrors as error:
            raise _unreadable(error) from error

    def _group(self, group: int, columns: Columns, missing: int | None) -> Iterator[_Batch]:
        """One row group, whose audio column is `missing` so many of its values; None: nobody knows."""
        blob = f"{columns.audio}.bytes" if columns.kind == "struct" else columns.audio
        num_rows = self._file.metadata.row_group(group).num_rows
        names = list(columns.metadata)
        if columns.kind == "path" or (columns.kind == "struct" and missing != 0):
            names.append(columns.audio if columns.kind == "path" else f"{columns.audio}.path")
        blind = missing in (0, num_rows)  # the footer says it for all rows at once
        if not blind:
            names.append(blob)
        rows = _BATCH_ROWS if blind else _BLOB_ROWS
        if not names:
            yield _Batch(None, None, [missing == 0] * num_rows)
            return
        for batch in self._file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False):
            audio = batch.column(columns.audio) if columns.audio in batch.schema.names else None
            paths = _child(audio, "path") if columns.kind == "struct" else audio
            if blind:
                present = [missing == 0 and columns.kind != "path"] * len(batch)
            else:
                values = _child(audio, "bytes") if columns.kind == "struct" else audio
                present = [] if values is None else values.is_valid().to_pylist()
            yield _Batch(batch.select(list(columns.metadata)), paths if columns.kind != "binary" else None, present)

    def close(self) -> None:
        self._file.close()
        self._raw.close()


class _Arrow:
    def __init__(self, path: str) -> None:
        with open_regular(path) as raw:
            is_file = raw.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        try:
            self._map = pa.PythonFile(open_regular(path), "r") if is_remote(path) else pa.memory_map(path)
            reader = pa.ipc.open_file(self._map) if is_file else pa.ipc.open_stream(self._map)
            self.schema = reader.schema
        except _TableErrors as error:
            raise _unreadable(error) from error
        self._reader = reader

    def batches(self, columns: Columns) -> Iterator[_Batch]:
        try:
            for found in self._found():
                for begin in range(0, len(found), _BATCH_ROWS):
                    batch = found.slice(begin, _BATCH_ROWS)
                    audio = batch.column(columns.audio)
                    audio.validate()
                    values = _child(audio, "bytes") if columns.kind == "struct" else audio
                    paths = _child(audio, "path") if columns.kind == "struct" else audio
                    present = [False] * len(batch)
                    if columns.kind != "path" and values is not None:
                        values.validate(full=True)
                        present = values.is_valid().to_pylist()
                    yield _Batch(
                        batch.select(list(columns.metadata)), paths if columns.kind != "binary" else None, present
                    )
        except _TableErrors as error:
            raise _unreadable(error) from error

    def _found(self) -> Iterator[pa.RecordBatch]:
        if isinstance(self._reader, pa.ipc.RecordBatchFileReader):
            for index in range(self._reader.num_record_batches):
                yield self._reader.get_batch(index)
        else:
            yield from self._reader

    def close(self) -> None:
        self._map.close()


def _open(path: str) -> _Table:
    return _Arrow(path) if path.lower().endswith(".arrow") else _Parquet(path)


def _unreadable(error: Exception) -> AudioError:
    return AudioError("corrupt", f"the table cannot be read: {str(error).partition(chr(10))[0]}")


def _child(values: pa.Array | None, name: str) -> pa.Array | None:
    """A field of a struct column, null where the struct is; None if there is no such field."""
    index = -1 if values is None else values.type.get_field_index(name)
    return values.flatten()[index] if index >= 0 else None  # pyright: ignore[reportOptionalMemberAccess]


def _columns(table: _Table, path: str, audio: str | None, text: str | None) -> Columns:
    """Which columns of a table are what. Raises `UserError` where that cannot be told."""
    schema = table.schema
    for name in (audio, text):
        if name is not None and name not in schema.names:
            raise UserError(f"{path} has no column {name!r}; it has {_listed(schema)}.")
    features = _features(schema)
    kinds = {field.name: kind for field in schema if (kind := _audio_kind(field.type)) is not None}
    marked = [name for name in kinds if features.get(name, {}).get("_type") == "Audio"]
    inside = marked or [name for name, kind in kinds.items() if kind != "path"]
    named = [name for name in PATH_KEYS if kinds.get(name) == "path"]
    candidates = [audio] if audio else [name for name in inside if name in PATH_KEYS] or inside or named
    if not candidates or candidates[0] not in kinds:
        raise UserError(
            f"{path} has no column of audio: it has {_listed(schema)}. Expected bytes, Hugging Face's Audio "
            f"(a struct of bytes and path), or paths in a column called {', '.join(PATH_KEYS)}."
        )
    if len(candidates) > 1 and candidates[0] not in named:
        raise UserError(f"{path} has several columns of audio ({', '.join(candidates)}); name one with --audio-column.")
    known = set(ROW_KEYS) - set(PATH_KEYS)
    metadata = tuple(name for name in schema.names if name != candidates[0] and (name in known or name == text))
    classes = {
        name: list(features[name]["names"])
        for name in metadata
        if isinstance(features.get(name, {}).get("names"), list)
    }
    return Columns(candidates[0], kinds[candidates[0]], metadata, text, classes)


def _listed(schema: pa.Schema) -> str:
    return ", ".join(repr(name[:50]) for name in schema.names[:20])


def _audio_kind(type: pa.DataType) -> str | None:
    if isinstance(type, pa.BaseExtensionType):
        type = type.storage_type
    if pa.types.is_binary(type) or pa.types.is_large_binary(type):
        return "binary"
    if pa.types.is_string(type) or pa.types.is_large_string(type):
        return "path"
    if pa.types.is_struct(type) and type.get_field_index("bytes") >= 0:
        return "struct" if _audio_kind(type.field("bytes").type) == "binary" else None
    return None


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What `datasets` writes of each column; empty for files of others."""
    try:
        features = json.loads((schema.metadata or {})[_HF_KEY])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except LineErrors:
        return {}


def _values(column: pa.Array) -> list[Any]:
    """A column's values. Text that is not UTF-8, which Arrow does not check, has U+FFFD where it is not."""
    plain = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
    column = column if plain is None else column.view(plain)
    column.validate(full=True)
    values = column.to_pylist()
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]


def _plain_rows(batch: _Batch, columns: Columns) -> Iterator[dict[str, Any]]:
    paths = _values(batch.audio) if batch.audio is not None else [None] * len(batch.present)
    metadata = {name: _values(batch.metadata.column(name)) for name in columns.metadata} if batch.metadata else {}
    rows = ({name: values[row] for name, values in metadata.items()} for row in range(len(batch.present)))
    for fields, path, present in zip(rows, paths, batch.present, strict=True):
        for name, names in columns.classes.items():
            if isinstance(fields[name], int) and 0 <= fields[name] < len(names):
                fields[name] = names[fields[name]]
        yield {**fields, "path": None if present else path, "": present}


def _entry(fields: dict[str, Any], columns: Columns, source_root: str, path: str, row: int) -> Entry:
    member = f"{columns.audio}/{row}"
    folder = os.path.dirname(path)
    present, named = fields.pop(""), fields.pop("path")
    try:
        entry = entry_of({**fields, "path": "-"}, source_root, text_column=columns.text)
        if present:
            return replace(entry, path=path, member=member)
        if not named:
            raise AudioError("empty", "the table holds neither audio nor a path in this row")
        named = checked_path(named, source_root)
        beside = named if is_remote(named) else os.path.join(folder, named)
        return replace(entry, path=relative_path(beside, source_root))
    except AudioError as error:
        return Entry(path=path, member=member, error=error)
    except LineErrors as error:
        return Entry(path=path, member=member, error=AudioError("bad-row", f"row {row}: {error}"))
