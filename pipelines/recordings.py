"""Opens recordings wherever they lie: files, members of tars, rows of Parquet and Arrow tables; extracts nothing."""

import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from .entries import AudioError
from .source_paths import full_path, plain_path
from .window import OpenRecording

MAX_BYTES = 16 << 30  # of one recording
_BATCH_ROWS = 16  # of a table, read at a time
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


class Opener:
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
            content = self._content(full, place.member)
        except FileNotFoundError as error:
            raise AudioError("missing", "the file is not there") from error
        except (OSError, ValueError, tarfile.TarError, pa.ArrowException, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise AudioError("unreadable", f"it cannot be opened: {reason}") from error
        _require_size(place, len(content))
        return _in_memory(content, name)

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _content(self, path: str, member: str) -> bytes:
        """A member's bytes: the container is read on from where it was left, else once more from its start."""
        if self._container is not None and self._path == path:
            try:
                return self._container.read(member)
            except KeyError:
                pass
        self.close()
        self._path = path
        self._container = _CompressedTar(path) if tarfile.is_tarfile(path) else _Table(path)
        try:
            return self._container.read(member)
        except KeyError:
            raise AudioError("missing", f"{member!r} is not in {os.path.basename(path)!r} (any more)") from None


class _Container(Protocol):
    """Something that is read from the front."""

    def read(self, member: str) -> bytes:
        """The next member of that name. Raises `KeyError` if none follows."""
        ...

    def close(self) -> None: ...


class _CompressedTar:
    def __init__(self, path: str) -> None:
        self._tar = tarfile.open(path, mode="r|*", errors="surrogateescape")  # noqa: SIM115 - closed by `close`

    def read(self, member: str) -> bytes:
        for found in self._tar:
            if found.isreg() and plain_path(found.name) == member:
                _require_bytes(found.size)
                content = self._tar.extractfile(found)
                assert content is not None
                return content.read()
        raise KeyError(member)

    def close(self) -> None:
        self._tar.close()


class _Table:
    """Parquet, or the Arrow streams and files that Hugging Face's `save_to_disk` writes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._column = ""
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._begin = 0  # the row that `_batch` begins with
        self._file: Any = None

    def read(self, member: str) -> bytes:
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
            values = values.field("bytes")
        content = values[row - self._begin].as_buffer()
        if content is None:
            raise AudioError("empty", "the table holds no audio in this row")
        _require_bytes(content.size)
        return content.to_pybytes()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _batches(path: str, column: str) -> tuple[Any, Iterator[pa.RecordBatch]]:
    if path.lower().endswith(".parquet"):
        file = pq.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise KeyError(column)
        return file, file.iter_batches(batch_size=_BATCH_ROWS, columns=[column], use_threads=False)
    source = pa.memory_map(path)
    if source.read_at(len(_ARROW_FILE), 0) == _ARROW_FILE:
        table = pa.ipc.open_file(source)
        batches = (table.get_batch(number) for number in range(table.num_record_batches))
    else:
        table = batches = pa.ipc.open_stream(source)
    if column not in table.schema.names:
        raise KeyError(column)
    return source, (batch.select([column]) for batch in batches)


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
    if size > MAX_BYTES:
        raise AudioError("too-large", f"the member has {size:,} bytes; accepted are up to {MAX_BYTES:,}")


def _in_memory(content: bytes, name: str) -> OpenRecording:
    """The bytes behind a descriptor of their own: decoders get descriptors, whatever they were read from."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("wavemill", os.MFD_CLOEXEC)
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
    else:
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.flush()
            fd = os.dup(file.fileno())
    return OpenRecording(fd=fd, offset=0, size=len(content), whole=True, name=name)
