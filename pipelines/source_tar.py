"""Tars of recordings, WebDataset's or any other: read from the front, never extracted."""

import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO, Any, cast

from ..storage.stores import is_remote
from .audio import identify
from .entries import AudioError, Entry
from .sniff import AUDIO_SUFFIXES, SNIFF_BYTES
from .source_paths import full_path, open_regular, plain_path
from .source_sides import describe, is_side

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_MEMBERS = 10_000_000
_MAX_NAME = 4_096  # bytes; Linux's PATH_MAX
_MAX_READ = 1 << 20  # bytes of an extended header (tarfile would take gigabytes at their word), of a side file
_MAX_GROUP = 1_000  # members of one key
_GZIP = b"\x1f\x8b"

_TornErrors = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, RecursionError)


def is_tar(source_root: str, path: str) -> bool:
    """Whether a file whose name is a tar's begins as one."""
    if not path.lower().endswith(TAR_SUFFIXES):
        return False
    try:
        with open_regular(full_path(source_root, path)) as raw:
            head = _plain(raw).read(tarfile.BLOCKSIZE)
        if len(head) < tarfile.BLOCKSIZE or any(head):
            tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except AudioError as error:
        return is_remote(source_root) and error.kind == "missing"  # it was there when the store was listed
    except _TornErrors:
        return False
    return True


def tar_entries(source_root: str, path: str, skipped: Counter[str]) -> Iterator[Entry]:
    """The recordings in a tar, in its order, with what members of the same key say of them.

    A key is a member's name up to the first dot of its last part. What is no audio is counted in `skipped`. A name
    that leads out of the tar, a link, a device, a sparse file, and a name that comes a second time are entries with
    an error; where the tar ends too early, the last entry says so.
    """
    try:
        raw = open_regular(full_path(source_root, path))
    except AudioError as error:
        yield Entry(path=path, error=error)
        return
    with raw:
        group, seen = _Group(path), set[bytes]()
        torn: Entry | None = None
        try:
            for found in _members(raw):
                if found.key != group.key or len(group.entries) >= _MAX_GROUP:
                    yield from group.finish(skipped)
                    group = _Group(path, found.key)
                yield from group.add(found, skipped, seen)
        except _TornErrors as error:
            member = error.member if isinstance(error, _TornMember) else ""
            reason = str(error) or type(error).__name__
            torn = Entry(
                path=path, member=member, error=AudioError("truncated", f"the tar cannot be read on: {reason}")
            )
        yield from group.finish(skipped)
        if torn is not None:
            yield torn


class _TornMember(tarfile.ReadError):
    """A tar that ends within a member."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"it ends within {name!a}" + (f" ({reason})" if reason else ""))
        self.member = plain_path(name)[:_MAX_NAME]


@dataclass(slots=True)
class _Member:
    tar: tarfile.TarInfo
    head: bytes  # the content's first bytes
    content: bytes | None  # all of it, for side files
    plain: bool  # whether the tar is not compressed, so that offsets mean something
    key: str
    suffix: str  # behind the key, dot included


@dataclass(slots=True)
class _Group:
    """Members of one key, neighbours in the tar."""

    path: str
    key: str = ""
    entries: list[Entry] = field(default_factory=list)
    sides: dict[str, bytes] = field(default_factory=dict)

    def add(self, found: _Member, skipped: Counter[str], seen: set[bytes]) -> Iterator[Entry]:
        """Take in a member; gives its entry at once if it is one that nobody can open."""
        name = plain_path(found.tar.name)
        suffix = found.suffix.lower()
        problem = _problem(found.tar)
        if problem is not None:
            yield Entry(path=self.path, member=name[:_MAX_NAME], error=problem)
        elif not found.tar.isreg() or _is_hidden(found.tar.name):
            return
        elif os.path.splitext(name)[1].lower() not in AUDIO_SUFFIXES and is_side(suffix):
            if found.content is None and found.tar.size:
                skipped[f"{suffix} that cannot be read"] += 1
            else:
                self.sides.setdefault(suffix, found.content or b"")
        elif os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES or _is_audio(found.head):
            self.entries.append(self._entry(found, seen))
        else:
            skipped[_last(suffix)] += 1

    def _entry(self, found: _Member, seen: set[bytes]) -> Entry:
        name = plain_path(found.tar.name)
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        error = AudioError("duplicate-member", "a member of this name came before in the same tar")
        entry = Entry(
            path=self.path,
            member=name,
            member_offset=found.tar.offset_data if found.plain else None,
            size_bytes=found.tar.size,
            error=error if digest in seen else None,
        )
        seen.add(digest)
        return entry

    def finish(self, skipped: Counter[str]) -> Iterator[Entry]:
        """The recordings of the group, with what its side files say."""
        if not self.entries:
            for suffix in self.sides:
                skipped[_last(suffix)] += 1
            return
        sides = {suffix: partial(bytes, content) for suffix, content in self.sides.items()}
        described = describe(sides, lambda suffix: skipped.update({f"{suffix} that cannot be read": 1}))
        for entry in self.entries:
            yield replace(entry, **described.fields())


def _members(raw: IO[bytes]) -> Iterator[_Member]:
    """Members from the front, each proven to be there to its last byte.

    Raises one of `_TornErrors` where the tar cannot be read on.
    """
    file = _plain(raw)
    bounded = _Bounded(file)
    with tarfile.TarFile(fileobj=cast(Any, bounded), mode="r", errors="surrogateescape", encoding="utf-8") as tar:
        # TarFile.next() takes a torn or damaged header for the end, and keeps every member for ever
        tar.offset = 0
        for _ in range(MAX_MEMBERS):
            begin = tar.offset
            file.seek(begin)
            try:
                found = tarfile.TarInfo.fromtarfile(tar)
            except tarfile.HeaderError as error:
                if len(bounded.last) == tarfile.BLOCKSIZE and not any(bounded.last):
                    return
                raise tarfile.ReadError(str(error) if bounded.last else "its end mark is missing") from error
            if found.size < 0 or tar.offset <= begin:
                raise tarfile.ReadError("a member's size is negative")
            try:
                yield _member(file, found, plain=file is raw)
            except _TornMember:
                raise
            except _TornErrors as error:
                raise _TornMember(found.name, str(error)) from error
        raise tarfile.ReadError(f"there are over {MAX_MEMBERS:,} members")


def _member(file: IO[bytes], found: tarfile.TarInfo, *, plain: bool) -> _Member:
    """A member with what is wanted of its content, proven to be there to its last byte."""
    key, suffix = _divided(found.name)
    member = _Member(found, b"", None, plain, key, suffix)
    if not found.isreg() or found.size == 0 or found.issparse():
        return member
    member.head = file.read(min(found.size, SNIFF_BYTES))
    if is_side(suffix.lower()) and found.size <= _MAX_READ:
        member.content = member.head + file.read(found.size - len(member.head))
    file.seek(found.offset_data + found.size - 1)
    if not file.read(1):
        raise _TornMember(found.name, "")
    return member


class _Bounded:
    """A file that refuses the reads with which a hostile header would fill the memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.last = b""  # what was read last

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError(f"a header asks for {size:,} bytes")
        self.last = self._file.read(size)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _plain(raw: IO[bytes]) -> IO[bytes]:
    """The tar itself, whether or not it is gzipped."""
    compressed = raw.read(2) == _GZIP
    raw.seek(0)
    return cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if compressed else raw


def _divided(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return folder + slash + stem, dot + suffix


def _last(suffix: str) -> str:
    """`.json` of `.meta.json`."""
    return f".{suffix.rpartition('.')[2]}" if suffix else "no suffix"


def _problem(member: tarfile.TarInfo) -> AudioError | None:
    """Why a member is one that nobody should open, or None."""
    name = member.name
    if len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME or "\0" in name:
        return AudioError("unsafe-name", f"the member's name is over {_MAX_NAME:,} bytes long or holds a NUL")
    if name.startswith("/") or ".." in name.split("/"):
        return AudioError("unsafe-name", "the member's name leads out of the tar")
    if member.issym() or member.islnk():
        return AudioError("unsafe-name", "the member is a link; links in tars are not followed")
    if member.issparse():
        return AudioError("unsupported", "the member is stored as a sparse file, which wavemill does not read")
    if not member.isreg() and not member.isdir():
        return AudioError("unsafe-name", "the member is a device, a pipe or of a kind that wavemill does not know")
    return None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def _is_audio(head: bytes) -> bool:
    if head[:3] == b"ID3":
        return True
    try:
        identify(io.BytesIO(head))
    except AudioError:
        return False
    return True
