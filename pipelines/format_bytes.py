"""Part of a recording's bytes as a file of its own: what parsers read and decoders are given."""

import io
import os
from typing import BinaryIO

from .opened import Ranges

File = BinaryIO | io.RawIOBase


def descriptor(file: File) -> int | None:
    """The file's descriptor, or None for a file-like object that has none."""
    try:
        return file.fileno()
    except OSError:
        return None


class RangesFile(io.RawIOBase):
    """What is read by ranges, as a file to make a `Part` of."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._place = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._place = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, at least one where there are any."""
        content = self._ranges.read(self._place, self._place + size)
        self._place += len(content)
        return content


class Part(io.RawIOBase):
    """`size` bytes of `file` from `offset` on: seekable and read-only, with a place of its own.

    `patch` puts other bytes over a place, for decoders that would believe a wrong header.
    """

    def __init__(self, file: File, offset: int, size: int, *, patch: tuple[int, bytes] | None = None) -> None:
        self.size = max(0, size)
        self._file, self._fd = file, descriptor(file)
        self._offset = offset
        self._place = 0
        self._patch = patch

    def part(self, offset: int, size: int | None = None, *, patch: tuple[int, bytes] | None = None) -> "Part":
        """A part of this part."""
        rest = max(0, self.size - offset)
        return Part(self._file, self._offset + offset, rest if size is None else min(size, rest), patch=patch)

    @property
    def whole_descriptor(self) -> int | None:
        """The descriptor, where this is all of a real file, as it is."""
        if self._fd is None or self._offset or self._patch or os.fstat(self._fd).st_size != self.size:
            return None
        return self._fd

    def at(self, place: int, size: int) -> bytes:
        """Up to `size` bytes from `place` on; fewer at the end. The place of those who read on stays theirs."""
        before, self._place = self._place, place
        try:
            return self.read(size)
        finally:
            self._place = before

    def close(self) -> None:
        """Stays open, whoever wraps it: the file is somebody else's."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(f"cannot seek to {base + offset}")
        self._place = base + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self.size - self._place)
        wanted = rest if size is None or size < 0 else min(size, rest)
        pieces = []
        while wanted:
            content = self._raw(wanted, self._offset + self._place)
            if not content:
                break
            pieces.append(self._patched(content))
            self._place += len(content)
            wanted -= len(content)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, buffer, /) -> int:  # pyright: ignore[reportMissingParameterType]
        view = memoryview(buffer).cast("B")
        content = self.read(len(view))
        view[: len(content)] = content
        return len(content)

    def _raw(self, size: int, place: int) -> bytes:
        if self._fd is not None:
            return os.pread(self._fd, size, place)
        self._file.seek(place)
        return self._file.read(size)

    def _patched(self, content: bytes) -> bytes:
        if self._patch is None:
            return content
        place, new = self._patch
        begin, end = max(place, self._place), min(place + len(new), self._place + len(content))
        if begin >= end:
            return content
        return content[: begin - self._place] + new[begin - place : end - place] + content[end - self._place :]
