"""A recording as bytes: an open descriptor and the part of it that is the recording. A leaf."""

import io
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass(slots=True)
class OpenRecording:
    """A recording's bytes: `size` of them from `offset` of an open, regular file. A context manager that closes it."""

    fd: int
    offset: int
    size: int
    whole: bool  # the file is the recording
    name: str  # the last part of its path, for people

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    def head(self, size: int) -> bytes:
        """The first `size` bytes, or as many as there are."""
        return os.pread(self.fd, min(size, self.size), self.offset)


class Window(io.RawIOBase):
    """Part of a file as a file of its own: seekable, read-only, without a descriptor to ask for."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd = fd
        self._offset = offset
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"cannot seek to {base + offset}")
        self._place = base + offset
        return self._place

    def readinto(self, buffer, /) -> int:  # pyright: ignore[reportMissingParameterType]
        view = memoryview(buffer).cast("B")
        want = max(0, min(len(view), self._size - self._place))
        got = os.preadv(self._fd, [view[:want]], self._offset + self._place) if want else 0
        self._place += got
        return got
