"""Opens recordings wherever they lie: files, members of tars, rows of Parquet and Arrow tables; extracts nothing."""

import gzip
import os
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from .entries import AudioError
from .opened import OpenRecording
from .source_paths import full_path, open_regular, plain_path
from .source_tar import TAR_SUFFIXES

MAX_HELD_BYTES = 2 << 30  # of a recording that has to be taken out of its container into memory
_BATCH_ROWS = 16  # of a table, read at a time,
_BATCH_BYTES = 256 << 20  # or as many as are so large together
_PIECE_BYTES = 1 << 20
_TAR_BLOCK = 512
_ARROW_FILE = b"ARROW1"  # a file with an index; without, it is a stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a recording is."""

    source_root: str
    path: str
    member: str = ""
    member_offset: int | None = None
    size_bytes: int | None = None  # what it had when the corpus was built; None: not known yet

    @property
    def in_order_only(self) -> bool:
        """Whether it is reached by reading its container from the front."""
        return bool(self.member) and self.member_offset is None


class Opener(AbstractContextManager["Opener"]):
    """Opens recordings, keeping its place in the container it read last. For one thread at a time."""

    def __init__(self) -> None:
        self._path = ""
        self._container: _Container | None = None

    def open(self, place: Place) -> OpenRecording:
        """The recording's bytes. Raises `AudioError` if they are not there, or not those the corpus was built of."""
        name = os.path.basename(place.member or place.path)
        try:
            full = full_path(place.source_root, place.path)
            if not place.in_order_only:
                return _open_file(full, name, place)
            _require_regular(full)
            fd, size = _in_memory(self._pieces(full, place.member))
        except FileNotFoundError as error:
            raise AudioError("missing", "the file is not there") from error
        except (OSError, ValueError, tarfile.TarError, pa.ArrowException, EOFError, zlib.error) as error:
            self.close()  # its place in the container is lost
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise AudioError("unreadable", f"it cannot be opened: {reason}") from error
        opened = OpenRecording(fd=fd, offset=0, size=size, whole=True, name=name)
        try:
            _require_size(place, size)
        except AudioError:
            os.close(fd)
            raise
        return opened

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def _pieces(self, path: str, member: str) -> Iterator[Any]:
        """A member's bytes: the container is read on from where it was left, else once more from its start."""
        if self._container is not None and self._path == path:
            try:
                return self._container.read(member)
            except KeyError:
                pass
        self.close()
        self._path = path
        self._container = _CompressedTar(path) if path.lower().endswith(TAR_SUFFIXES) else _Table(path)
        try:
            return self._container.read(member)
        except KeyError:
            raise AudioError("missing", f"{member!r} is not in {os.path.basename(path)!r} (any more)") from None


class _Container(Protocol):
    """Something that is read from the front."""

    def read(self, member: str) -> Iterator[Any]:
        """The bytes of the next member of that name, in pieces. Raises `KeyError` if none follows."""
        ...

    def close(self) -> None: ...


class _CompressedTar:
    def __init__(self, path: str) -> None:
        self._raw = open_regular(path)
        # tarfile's own streams end with the first of several gzip members
        plain: Any = gzip.GzipFile(fileobj=self._raw)
        try:
            self._tar = tarfile.open(  # noqa: SIM115 - closed by `close`
                fileobj=plain, mode="r|", bufsize=_PIECE_BYTES, errors="surrogateescape"
            )
        except BaseException:
            self._raw.close()
            raise

    def read(self, member: str) -> Iterator[Any]:
        while (found := self._tar.next()) is not None:
            self._tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - it would keep them all
            if found.isreg() and not found.issparse() and plain_path(found.name) == member:
                _require_bytes(found.size)
                content = self._tar.extractfile(found)
                assert content is not None
                return iter(partial(content.read, _PIECE_BYTES), b"")
        raise KeyError(member)

    def close(self) -> None:
        self._tar.close()
        self._raw.close()


class _Table:
    """Parquet, or the Arrow streams and files that Hugging Face's `save_to_disk` writes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._column = ""
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._begin = 0  # the row that `_batch` begins with
        self._file: Any = None

    def read(self, member: str) -> Iterator[Any]:
        column, _, number = member.rpartition("/")
        row = int(number)
        if column != self._column:
            self.close()
            self._column = column
            self._file, self._batches = _batches(self._path, column)
            self._batch, self._begin = None, 0
        if row < self._begin:
            raise KeyError(member)
        while self._batch is None or row >= self._begin + len(self._batch):
            self._begin += len(self._batch) if self._batch is not None else 0
            self._batch = next(self._batches, None)
            if self._batch is None:
                self._column = ""
                raise KeyError(member)
        values = self._batch.column(0)
        if pa.types.is_struct(values.type):
            values = values.flatten()[values.type.get_field_index("bytes")]  # null where the struct is
        content = values[row - self._begin].as_buffer()
        if content is None:
            raise AudioError("empty", "the table holds no audio in this row")
        _require_bytes(content.size)
        return iter([content])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _batches(path: str, column: str) -> tuple[Any, Iterator[pa.RecordBatch]]:
    if not path.lower().endswith(".arrow"):
        file = pq.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise KeyError(column)
        return file, file.iter_batches(batch_size=_rows_at_once(file, column), columns=[column], use_threads=False)
    source = pa.memory_map(path)
    if source.read_at(len(_ARROW_FILE), 0) == _ARROW_FILE:
        table = pa.ipc.open_file(source)
        batches = (table.get_batch(number) for number in range(table.num_record_batches))
    else:
        table = batches = pa.ipc.open_stream(source)
    if column not in table.schema.names:
        raise KeyError(column)
    return source, (batch.select([column]) for batch in batches)


def _rows_at_once(file: pq.ParquetFile, column: str) -> int:
    """As many rows as the footer promises to be small enough together."""
    largest = 1
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        chunks = [group.column(index) for index in range(group.num_columns)]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
        largest = max(largest, size // max(1, group.num_rows))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // largest))


def _open_file(full: str, name: str, place: Place) -> OpenRecording:
    _require_regular(full)
    fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = os.fstat(fd).st_size
        if place.member_offset is None:
            _require_size(place, size)
            return OpenRecording(fd=fd, offset=0, size=size, whole=True, name=name)
        if place.size_bytes is None or size < place.member_offset + place.size_bytes:
            raise AudioError("changed", "the tar is shorter than when the corpus was built")
        header = os.pread(fd, _TAR_BLOCK, place.member_offset - _TAR_BLOCK)
        if _member_size(header) != place.size_bytes:
            raise AudioError("changed", "another member lies at this place of the tar than when the corpus was built")
        return OpenRecording(fd=fd, offset=place.member_offset, size=place.size_bytes, whole=False, name=name)
    except BaseException:
        os.close(fd)
        raise


def _member_size(header: bytes) -> int | None:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        return None


def _require_regular(path: str) -> None:
    """A FIFO or a device would block for ever, so what it is is asked first."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise AudioError("not-a-file", "not a regular file")


def _require_size(place: Place, found: int) -> None:
    if place.size_bytes is not None and found != place.size_bytes:
        raise AudioError("changed", f"it had {place.size_bytes:,} bytes when the corpus was built, now {found:,}")


def _require_bytes(size: int) -> None:
    if size > MAX_HELD_BYTES:
        raise AudioError(
            "too-large",
            f"it has {size:,} bytes; out of compressed tars and tables up to {MAX_HELD_BYTES:,} are taken: put it into "
            "a plain tar or a folder",
        )


def _in_memory(pieces: Iterator[Any]) -> tuple[int, int]:
    """The bytes behind a descriptor of their own, and their number: decoders get descriptors, whatever was read."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("wavemill", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    size = 0
    try:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            size += len(view)
            while view:
                view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd, size
