"""Where a dataset lives: one place that turns a root's name into tables, files and folders."""

import os
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..tokenizers.spec import UserError
from .failpoints import failpoint
from .stores import has_scheme, is_remote, open_store, redacted, store_errors

_NEAR_BYTES = 16_384  # ranges this near to each other are one request


class Root:
    """A folder or object-store prefix that holds a corpus, its streams and its codebooks."""

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        self.is_local = not has_scheme(text) or text.startswith("file://")
        if self.is_local:
            text = os.path.abspath(os.path.expanduser(text.removeprefix("file://")))
        self.uri = text.rstrip("/") or "/"
        if "%" in self.uri:
            raise UserError(f"The root {redacted(self.uri)} holds a %, which table names cannot; name another folder.")
        require_no_keys(self.uri)
        self._fs, self._path = open_store(self.uri)

    def __str__(self) -> str:
        return self.uri

    def join(self, relative: str) -> str:
        """The full name of something below this root."""
        return f"{self.uri}/{relative}"

    def below(self, relative: str) -> "Root":
        """A root inside this one."""
        return Root(self.join(relative))

    def read_bytes(self, relative: str) -> bytes:
        """A file's content. Raises `FileNotFoundError`."""
        with store_errors(self.join(relative)):
            return self._fs.cat_file(f"{self._path}/{relative}")

    def read_ranges(self, relative: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes `[begin, end)` of a file for each range, near ones by one request. Raises `FileNotFoundError`.

        Raises `EOFError` where the file ends before.
        """
        path = f"{self._path}/{relative}"
        joined = _joined(ranges)
        if self.is_local:
            with open(path, "rb", buffering=0) as file:
                blocks = [os.pread(file.fileno(), end - begin, begin) for begin, end in joined]
        else:
            begins, ends = [begin for begin, _ in joined], [end for _, end in joined]
            with store_errors(self.join(relative)):
                blocks = self._fs.cat_ranges([path] * len(joined), begins, ends, on_error="raise")
        found = []
        for begin, end in ranges:
            index = bisect_right(joined, (begin, sys.maxsize)) - 1
            first = joined[index][0]
            piece = blocks[index][begin - first : end - first]
            if len(piece) != end - begin:
                raise EOFError(f"it ends before byte {end:,}")
            found.append(piece)
        return found

    def exists(self, relative: str) -> bool:
        with store_errors(self.join(relative)):
            return self._fs.exists(f"{self._path}/{relative}")

    def list_files(self, relative: str) -> list[tuple[str, int, float]]:
        """Name, bytes and time of writing (seconds since 1970) of the files directly below a folder, by name."""
        try:
            with store_errors(self.join(relative)):
                entries = self._fs.ls(f"{self._path}/{relative}", detail=True, refresh=True)
        except FileNotFoundError:
            return []
        files = [entry for entry in entries if entry["type"] == "file"]
        return sorted((str(entry["name"]).rpartition("/")[2], entry["size"], _written(entry)) for entry in files)

    def list(self, relative: str) -> list[str]:
        """Names directly below a folder, sorted; empty if there is no such folder."""
        try:
            with store_errors(self.join(relative)):
                entries = self._fs.ls(f"{self._path}/{relative}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in entries)

    def modified(self, relative: str) -> float:
        """When a file was written, in seconds since 1970. Raises `FileNotFoundError`."""
        with store_errors(self.join(relative)):
            return self._fs.modified(f"{self._path}/{relative}").timestamp()

    def remove(self, relative: str) -> None:
        """Delete a file. Raises `FileNotFoundError`."""
        with store_errors(self.join(relative)):
            self._fs.rm_file(f"{self._path}/{relative}")

    def remove_tree(self) -> None:
        """Delete everything below this root, if there is anything."""
        with suppress(FileNotFoundError), store_errors(self.uri):
            self._fs.rm(self._path, recursive=True)

    def write_bytes(self, relative: str, content: bytes, *, part_bytes: int | None = None) -> None:
        """Put a whole file in place, or nothing: on a disk through a synced temporary file beside it.

        In a store, content of two parts or more is sent in parts, of the store's own size if none is given.
        """
        target = f"{self._path}/{relative}"
        failpoint("before-write")
        if not self.is_local:
            with store_errors(self.join(relative)):
                self._fs.pipe_file(target, content, **({"chunksize": part_bytes} if part_bytes else {}))
            failpoint("after-write")
            return
        folder, name = os.path.split(target)
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}-", suffix=".tmp")  # no name that is listed
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            failpoint("before-replace")
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        failpoint("after-write")

    def create(self, relative: str, content: bytes) -> bool:
        """Put an object where there is none; False if there is one already."""
        path = f"{self._path}/{relative}"
        try:
            with store_errors(self.join(relative), creating=True):
                self._fs.pipe_file(path, content, mode="create")
        except FileExistsError:
            return False
        return True

    def require_writable(self) -> None:
        """Raise `UserError` if nothing can be written here."""
        if not self.is_local:
            self._require_store_writable()
            return
        try:
            os.makedirs(self._path, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._path):
                pass
        except OSError as error:
            found = "a file, not a folder, is there" if os.path.isfile(self._path) else error.strerror
            raise UserError(
                f"Cannot write to the root {self.uri}: {found}. Name a folder that you may write to."
            ) from error

    def _require_store_writable(self) -> None:
        trial = f"tmp/writable-{uuid4().hex}"
        try:
            self.write_bytes(trial, b"")
            self.remove(trial)
        except FileNotFoundError as error:
            raise UserError(f"Cannot write to the root {self.uri}: there is no such bucket. Make it first.") from error


def require_no_keys(uri: str) -> None:
    """Raise `UserError` for a URI in a store that comes with a signature."""
    if is_remote(uri) and "?" in uri:
        raise UserError(
            f"{redacted(uri.partition('?')[0])} comes with a signature, which would stand in tables and logs. Give "
            "SCHEME://BUCKET/PREFIX alone, and credentials by the environment (AWS_PROFILE and the like)."
        )


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in ascending order, near ones made one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if joined and begin - joined[-1][1] <= _NEAR_BYTES:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _written(entry: dict[str, Any]) -> float:
    """When a file was written: file systems name it as they like."""
    found = next(entry[key] for key in ("mtime", "LastModified", "last_modified", "updated") if key in entry)
    return found if isinstance(found, (int, float)) else found.timestamp()
