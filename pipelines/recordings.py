"""Opens recordings wherever they lie: files, members of tars, rows of Parquet and Arrow tables; extracts nothing.

On disks and in object stores alike.
"""

import gzip
import os
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ..storage.stores import is_remote
from .entries import AudioError
from .format_bytes import Part, RangesFile
from .opened import OpenRecording, etag_of, etag_version, is_other_version, sample_version
from .remote import FIRST_BYTES, ObjectRanges, RemoteObject
from .source_paths import full_path, open_regular, plain_path
from .source_tar import TAR_SUFFIXES

MAX_HELD_BYTES = 2 << 30  # of a recording that has to be taken out of its container into memory
WHOLE_BYTES = 16 << 20  # of a recording in a store that is fetched whole, by one request, to be read from end to end
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
    version: str | None = None  # what its bytes were then, see `opened.is_other_version`; None: not to be compared

    @property
    def in_order_only(self) -> bool:
        """Whether it is reached by reading its container from the front."""
        return bool(self.member) and self.member_offset is None

    @property
    def is_object(self) -> bool:
        """Whether it is (a range of) an object of a store."""
        return not self.in_order_only and (is_remote(self.path) or is_remote(self.source_root))

    @property
    def is_small(self) -> bool:
        """Whether it is known to be small enough to be fetched whole."""
        return self.size_bytes is not None and self.size_bytes <= WHOLE_BYTES


@dataclass(frozen=True, slots=True)
class Fetched:
    """An object, and its bytes from `begin` on: all of a recording, or the first of them."""

    remote: RemoteObject
    begin: int
    content: bytes


def fetch_first(place: Place, num_bytes: int = FIRST_BYTES) -> Fetched:
    """The first bytes of a recording that is an object. Raises `AudioError`, `StoreTrouble`."""
    remote = RemoteObject(full_path(place.source_root, place.path), etag=etag_of(place.version))
    begin = 0 if place.member_offset is None else place.member_offset - _TAR_BLOCK  # with a member's header
    if place.size_bytes is not None:
        num_bytes = min(num_bytes, place.size_bytes + _TAR_BLOCK)
    return Fetched(remote, begin, remote.fetch(begin, begin + num_bytes))


def fetch_to_end(place: Place) -> Fetched:
    """All of a recording that is an object, if it is small, else its first bytes. Raises as `fetch_first` does."""
    return fetch_first(place, WHOLE_BYTES + _TAR_BLOCK if place.is_small else FIRST_BYTES)


class Opener(AbstractContextManager["Opener"]):
    """Opens recordings, keeping its place in the container it read last. For one thread at a time.

    `fetch` gets the beginning of recordings in stores: `fetch_to_end` where they are meant to be read to their ends.
    """

    def __init__(self, fetch: Callable[[Place], Fetched] = fetch_first) -> None:
        self._fetch = fetch
        self._path = ""
        self._container: _Container | None = None
        self._held: tuple[Place, OpenRecording] | None = None  # the one in memory that was opened last
        self._background = ThreadPoolExecutor(1, thread_name_prefix="ranges")

    def open(self, place: Place, fetched: Callable[[], Fetched] | None = None) -> OpenRecording:
        """The recording's bytes. Raises `AudioError` if they are not there, or not those the corpus was built of.

        `fetched` gives what is fetched of it, where somebody does so ahead. Raises `StoreTrouble` if a store fails.
        """
        try:
            opened = self._open(place, fetched)
        except FileNotFoundError as error:
            raise AudioError("missing", "the file is not there") from error
        except (OSError, ValueError, tarfile.TarError, pa.ArrowException, EOFError, zlib.error) as error:
            self._leave_container()  # its place in it is lost
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise AudioError("unreadable", f"it cannot be opened: {reason}") from error
        except AudioError as error:
            if place.in_order_only and error.kind in ("changed", "missing"):
                self._leave_container()
            raise
        try:
            _require_same(place, opened)
        except AudioError:
            opened.__exit__()
            raise
        return opened

    def close(self) -> None:
        self._leave_container()
        self._let_go()
        self._background.shutdown(wait=False, cancel_futures=True)

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, place: Place, fetched: Callable[[], Fetched] | None) -> OpenRecording:
        name = os.path.basename(place.member or place.path)
        if place.is_object:
            return self._open_object(name, place, fetched)
        full = full_path(place.source_root, place.path)
        if not is_remote(full):
            _require_regular(full)
        if not place.in_order_only:
            return _open_file(full, name, place)
        fd, size = _in_memory(self._pieces(full, place.member))
        return OpenRecording(content=fd, offset=0, size=size, name=name, version=sample_version(fd, 0, size))

    def _open_object(self, name: str, place: Place, fetched: Callable[[], Fetched] | None) -> OpenRecording:
        """A recording in a store: in memory, if all of it was fetched, else by ranges."""
        if self._held is None or self._held[0] != place:
            self._let_go()
            found = fetched() if fetched is not None else self._fetch(place)
            offset, size = _extent(place, found.content, found.remote.size)
            version = etag_version(found.remote.etag)
            if found.begin + len(found.content) < offset + size:
                ranges = ObjectRanges(
                    found.remote, offset + size, self._background, begin=found.begin, first=found.content
                )
                return OpenRecording(content=ranges, offset=offset, size=size, name=name, version=version)
            fd, _ = _in_memory(iter([memoryview(found.content)[offset - found.begin :][:size]]))
            if place.version is not None and etag_of(place.version) is None:
                version = sample_version(fd, 0, size)  # the corpus was built of files
            self._held = place, OpenRecording(content=fd, offset=0, size=size, name=name, version=version)
        held = self._held[1]
        assert isinstance(held.content, int)
        return replace(held, content=os.dup(held.content))

    def _let_go(self) -> None:
        if self._held is not None:
            self._held[1].__exit__()
            self._held = None

    def _leave_container(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def _pieces(self, path: str, member: str) -> Iterator[Any]:
        """A member's bytes: the container is read on from where it was left, else once more from its start."""
        if self._container is not None and self._path == path:
            try:
                return self._container.read(member)
            except KeyError:
                pass
        self._leave_container()
        self._path = path
        object = _seekable(path, self._background) if is_remote(path) else None
        kind = _CompressedTar if path.lower().endswith(TAR_SUFFIXES) else _Table
        self._container = kind(path, object)
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
    def __init__(self, path: str, object: Part | None) -> None:
        self._raw: Any = object or open_regular(path)
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

    def __init__(self, path: str, object: Part | None) -> None:
        self._path = path
        self._object = object
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
            self._file, self._batches = _batches(self._path, self._object, column)
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


def _batches(path: str, object: Part | None, column: str) -> tuple[Any, Iterator[pa.RecordBatch]]:
    if not path.lower().endswith(".arrow"):
        # without a buffer, a column of a row group, which may be gigabytes of audio, would be fetched in one piece
        file = pq.ParquetFile(path) if object is None else pq.ParquetFile(object, buffer_size=_PIECE_BYTES)
        if column not in file.schema_arrow.names:
            raise KeyError(column)
        return file, file.iter_batches(batch_size=_rows_at_once(file, column), columns=[column], use_threads=False)
    source = pa.memory_map(path) if object is None else pa.PythonFile(object, mode="r")
    begin = source.read(len(_ARROW_FILE))
    source.seek(0)
    if begin == _ARROW_FILE:
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
        head = b"" if place.member_offset is None else os.pread(fd, _TAR_BLOCK, place.member_offset - _TAR_BLOCK)
        offset, size = _extent(place, head, os.fstat(fd).st_size)
        return OpenRecording(content=fd, offset=offset, size=size, name=name, version=sample_version(fd, offset, size))
    except BaseException:
        os.close(fd)
        raise


def _extent(place: Place, header: bytes, total: int) -> tuple[int, int]:
    """Where a recording begins in its file or object of `total` bytes, and its size.

    `header` are the bytes before a member of a tar. Raises `AudioError` if the tar is not the one that was listed.
    """
    if place.member_offset is None:
        return 0, total
    if place.size_bytes is None or total < place.member_offset + place.size_bytes:
        raise AudioError("changed", "the tar is shorter than when the corpus was built")
    if _member_size(header[:_TAR_BLOCK]) != place.size_bytes:
        raise AudioError("changed", "another member lies at this place of the tar than when the corpus was built")
    return place.member_offset, place.size_bytes


def _seekable(uri: str, background: ThreadPoolExecutor) -> Part:
    """An object as a file, all of it of one version."""
    remote = RemoteObject(uri)
    head = remote.fetch(0, FIRST_BYTES)
    ranges = ObjectRanges(remote, remote.size, background, begin=0, first=head)
    return Part(RangesFile(ranges), 0, remote.size)


def _member_size(header: bytes) -> int | None:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        return None


def _require_regular(path: str) -> None:
    """A FIFO or a device would block for ever, so what it is is asked first."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise AudioError("not-a-file", "not a regular file")


def _require_same(place: Place, opened: OpenRecording) -> None:
    _require_size(place, opened.size)
    if is_other_version(place.version, opened.version):
        raise AudioError(
            "changed",
            f"it has {opened.size:,} bytes as when the corpus was built, but others: {place.version} then, now "
            f"{opened.version}",
        )


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
