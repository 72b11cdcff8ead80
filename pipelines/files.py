"""Where sources touch files: folders of a disk, and an object store's names as if they were such. A leaf.

An object goes by its URI, s3://BUCKET/FOLDER/NAME. A folder of a store is what names say it is: it needs no object of
its own, and where it has one (an empty object whose name ends in a slash) that one is passed over.
"""

import errno
import io
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..storage.stores import StoreTrouble, has_scheme, is_remote, open_store, require_bucket, store_errors
from ..tokenizers.spec import UserError
from .entries import AudioError
from .remote import RemoteObject

Names = list[tuple[str, bool]]  # what is in a folder, and which of it are folders, sorted

_MAX_NAME = 1_024  # bytes, everywhere
_VERSION = "?versionId="  # s3fs takes it for no part of a name
_MIN_BLOCK, _MAX_BLOCK = 8 << 10, 4 << 20  # bytes that one request asks for
_NUM_THREADS = 8
_NEAR_BYTES = 64 << 10  # reading on over so many costs less time than another request


class Replaced(StoreTrouble):
    """An object that was replaced or deleted while it was read."""


def whole_path(path: str) -> str:
    """A path as it is kept: absolute, or a URI without a slash at its end. Raises `UserError` for one that is none."""
    if not is_remote(path):
        return os.path.abspath(path)
    require_bucket(path)
    scheme, _, rest = path.partition("://")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


def can_be_served(name: str) -> bool:
    """Whether an object's name, counted from its source or bucket, can be kept as a path and asked for again.

    Clients and proxies take `.` and `..` for folders; a path that begins with a slash is one of this machine, and one
    that begins like a URL is that of another bucket.
    """
    parts = name.split("/")
    if not (parts[0] and parts[-1]) or {".", ".."} & set(parts) or has_scheme(name):
        return False
    if "\0" in name or _VERSION in name:
        return False
    try:
        return len(name.encode()) <= _MAX_NAME
    except UnicodeEncodeError:
        return False


def is_file(path: str) -> bool:
    return _type(path) == "file" if is_remote(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    return _type(path) == "directory" if is_remote(path) else os.path.isdir(path)


def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    return _type(path) is not None if is_remote(path) else os.path.exists(path)


def is_same(path: str, other: str) -> bool:
    """Whether two paths lead to one folder."""
    if is_remote(path) or is_remote(other):
        return is_remote(path) and is_remote(other) and whole_path(path) == whole_path(other)
    return os.path.realpath(path) == os.path.realpath(other)


def open_regular(path: str) -> BinaryIO:
    """Open a regular file or an object, which is read by range; seekable. Raises `AudioError`.

    A store that fails raises `StoreTrouble`, then and while it is read; an object that changes meanwhile, `Replaced`.
    """
    if is_remote(path):
        return io.BufferedReader(_Object(path), _MIN_BLOCK)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO or a device would block for ever, so this is asked first
            raise AudioError("not-a-file", "not a regular file")
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise AudioError("missing", "the file is not there") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AudioError("unreadable", f"the file cannot be opened: {reason}") from error


class Tree(Protocol):
    """The folders below a source's root."""

    root: str
    background: Executor | None  # what may read ahead, where reading takes requests
    strays: list[str]  # names, relative to the root, of what is there and cannot be served

    def names(self, path: str) -> Names:
        """What is in a folder, by its path relative to the root; no hidden names, no links to folders.

        Raises `UserError` if it cannot be listed.
        """
        ...

    def has(self, path: str) -> bool:
        """Whether there is a file of this path."""
        ...


def tree_of(root: str, exclude: str = "", *, deep: bool = False) -> Tree:
    """What lies below a folder, without the folder `exclude`.

    `deep`: all of it is wanted. A store is then listed once, in pages, whatever folders there are.
    """
    return _StoreTree(root, exclude, deep=deep) if is_remote(root) else _DiskTree(root, exclude)


def matching(tree: Tree, pattern: list[str], path: str = "") -> Iterator[str]:
    """Files whose path fits a pattern, part by part; `**` is any number of folders. Some may come twice."""
    first, rest = pattern[0], pattern[1:]
    if first == "**" and rest:
        yield from matching(tree, rest, path)
    for name, is_inner in tree.names(path):
        below = f"{path}/{name}" if path else name
        if first == "**":
            if is_inner:
                yield from matching(tree, pattern, below)
            elif not rest:
                yield below
        elif is_inner == bool(rest) and fnmatchcase(name, first):
            if rest:
                yield from matching(tree, rest, below)
            else:
                yield below


class _DiskTree:
    def __init__(self, root: str, exclude: str) -> None:
        self.root = root
        self.background: Executor | None = None
        self.strays: list[str] = []
        self._exclude = os.path.realpath(exclude) if exclude else ""

    def names(self, path: str) -> Names:
        full = os.path.join(self.root, path)
        try:
            with os.scandir(full) as scan:
                found = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"Cannot list {full!r}: {error.strerror}.") from error
        names = []
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if os.path.realpath(entry.path) != self._exclude:
                    names.append((entry.name, True))
            elif not os.path.isdir(entry.path):  # a link to itself is none, where `entry.is_dir()` would raise
                names.append((entry.name, False))
        return names

    def has(self, path: str) -> bool:
        return os.path.exists(os.path.join(self.root, path))


class _StoreTree:
    def __init__(self, root: str, exclude: str, *, deep: bool) -> None:
        self.root = root
        self.background: Executor | None = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sides")
        self.strays: list[str] = []
        self._deep = deep
        self._exclude = _below(root, exclude)
        self._folders: dict[str, set[str]] = {}  # names by folder, those of folders with a slash behind

    def names(self, path: str) -> Names:
        return sorted((name.removesuffix("/"), name.endswith("/")) for name in self._found(path))

    def has(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self._found(folder)

    def _found(self, path: str) -> set[str]:
        if not (self._folders if self._deep else path in self._folders):
            self._folders["" if self._deep else path] = set()
            self._list("" if self._deep else path)
        return self._folders.get(path, set())

    def _list(self, path: str) -> None:
        above = f"{path}/" if path else ""
        for name in _listed(f"{self.root}/{above}", deep=self._deep):
            *folders, last = f"{above}{name}".removesuffix("/").split("/")
            if any(part.startswith(".") and part not in (".", "..") for part in (*folders, last)):
                continue
            if self._exclude is not None and f"{above}{name}/".startswith(self._exclude):
                continue
            if can_be_served("/".join([*folders, last])):
                self._note(folders, f"{last}/" if name.endswith("/") else last)
            elif name and not name.endswith("/"):
                self.strays.append(above + name)

    def _note(self, folders: list[str], name: str) -> None:
        """Note a name in a folder, and that folder in the one above, up to the root or one that is noted there."""
        names = self._folders.setdefault("/".join(folders), set())
        while name not in names:
            names.add(name)
            if folders and self._deep:
                name = f"{folders.pop()}/"
                names = self._folders.setdefault("/".join(folders), set())


def _below(root: str, exclude: str) -> str | None:
    """The path of a folder relative to the root it lies in, a slash behind; None where it lies elsewhere."""
    if not is_remote(exclude):
        return None
    folder = f"{whole_path(exclude)}/"
    return folder.removeprefix(f"{root}/") if folder.startswith(f"{root}/") else None


def _listed(folder: str, *, deep: bool) -> Iterator[str]:
    """Names of objects behind a URI that ends in a slash, relative to it, a thousand or so by one request.

    Unless `deep`, only what is in the folder itself: the folders there come with a slash behind. Raises `UserError`.
    """
    store, path = open_store(folder)
    try:
        with store_errors(folder):
            if folder.startswith("s3://"):
                yield from _listed_s3(store, path, "" if deep else "/")
                return
            top = path.rstrip("/")
            store.invalidate_cache()
            found = (
                store.find(top, detail=True) if deep else {each["name"]: each for each in store.ls(top, detail=True)}
            )
            for name, each in found.items():
                yield name.rstrip("/").removeprefix(f"{top}/") + ("/" if each["type"] == "directory" else "")
    except FileNotFoundError as error:
        if not exists("/".join(folder.split("/")[:3])):
            raise UserError(f"Cannot list {folder!r}: there is no such bucket.") from error


def _listed_s3(store: Any, path: str, delimiter: str) -> Iterator[str]:
    """s3fs's own listings hold a dictionary for each object at once, and lose names with `//`; so by its requests."""
    bucket, _, prefix = path.partition("/")
    asked = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
    while True:
        page = store.call_s3("list_objects_v2", **asked)
        yield from (found["Prefix"].removeprefix(prefix) for found in page.get("CommonPrefixes", ()))
        yield from (found["Key"].removeprefix(prefix) for found in page.get("Contents", ()))
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _type(uri: str) -> str | None:
    store, path = open_store(uri)
    try:
        with store_errors(uri):
            return store.info(path)["type"]
    except FileNotFoundError:
        return None


class _Object(io.RawIOBase):
    """An object as a file. Its blocks are small where reading jumps and grow where it goes on; the last one is kept."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._remote = RemoteObject(uri)
        self._position = 0
        self._block, self._begin = self._remote.fetch(0, _MIN_BLOCK), 0
        self._step = _MIN_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._remote.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer, /) -> int:  # pyright: ignore[reportMissingParameterType]
        view = memoryview(buffer).cast("B")
        if not view or self._position >= self._remote.size:
            return 0
        if not self._begin <= self._position < self._begin + len(self._block):
            self._fetch(len(view))
        inside = self._position - self._begin
        piece = self._block[inside : inside + len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def _fetch(self, wanted: int) -> None:
        """Have a block that begins where reading is."""
        gap = self._position - self._begin - len(self._block)
        self._step = min(2 * self._step, _MAX_BLOCK) if 0 <= gap <= _NEAR_BYTES else _MIN_BLOCK
        try:
            block = self._remote.fetch(self._position, self._position + max(wanted, self._step))
        except AudioError as error:
            raise Replaced(f"{self._uri} was replaced or deleted while it was read. Run the command again.") from error
        self._block, self._begin = block, self._position
