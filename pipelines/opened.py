"""An open recording: what a decoder is given instead of a name, and what tells its bytes from others. A leaf."""

import hashlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

_END_BYTES = 16_384  # of a sample: the first and the last of them,
_BLOCK_BYTES = 4_096  # and so many in each of
_NUM_BLOCKS = 16  # blocks evenly between
_SAMPLE, _ETAG = "sample:", "etag:"


class Ranges(Protocol):
    """The bytes of something that is not a file here."""

    def read(self, begin: int, end: int) -> bytes:
        """Bytes `[begin, end)`, at least the first of them. Raises `AudioError` if they cannot be had (any more)."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class OpenRecording(AbstractContextManager["OpenRecording"]):
    """A recording's bytes: `size` of them from `offset` on. A context manager that closes what they come from."""

    content: int | Ranges  # the descriptor of an open, regular file, or what is asked for its bytes
    offset: int
    size: int
    name: str  # the last part of its path, for people
    version: str | None  # see `is_other_version`

    def __exit__(self, *error: object) -> None:
        if isinstance(self.content, int):
            os.close(self.content)
        else:
            self.content.close()


def sample_version(fd: int, offset: int, size: int) -> str:
    """The version of `size` bytes from `offset` on, by a hash over some 96 KiB of them, wherever they lie.

    It tells one recording from another. A change of a few bytes inside a large one it may miss.
    """
    inner = size - 2 * _END_BYTES
    if inner <= _NUM_BLOCKS * _BLOCK_BYTES:
        ranges = [(0, size)]
    else:
        step = (inner - _BLOCK_BYTES) // (_NUM_BLOCKS - 1)
        begins = [_END_BYTES + number * step for number in range(_NUM_BLOCKS)]
        blocks = [(begin, begin + _BLOCK_BYTES) for begin in begins]
        ranges = [(0, _END_BYTES), *blocks, (size - _END_BYTES, size)]
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    for begin, end in ranges:
        digest.update(os.pread(fd, end - begin, offset + begin))
    return _SAMPLE + digest.hexdigest()


def etag_version(etag: str | None) -> str | None:
    """The version of an object's bytes by the name that its store gives them."""
    return None if etag is None else _ETAG + etag


def etag_of(version: str | None) -> str | None:
    """The ETag that a version is, or None."""
    return version.removeprefix(_ETAG) if version is not None and version.startswith(_ETAG) else None


def is_other_version(one: str | None, other: str | None) -> bool:
    """Whether two versions are surely of other bytes. A sample and an ETag say nothing of each other."""
    if one is None or other is None or one.partition(":")[0] != other.partition(":")[0]:
        return False
    return one != other
