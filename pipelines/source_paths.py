"""Paths of recordings: what a table can hold, where a file really lies, whether it is audio. A leaf."""

import os
import re

from ..storage.stores import is_remote
from .audio import identify
from .entries import AudioError
from .files import can_be_served
from .files import open_regular as open_regular

MAX_SIDE_BYTES = 16 << 20  # of a transcript or label file, a line of a manifest
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")


def is_elsewhere(path: str) -> bool:
    """Whether a path is a URL, but of no object store, or a command: such things are never fetched or run."""
    return _ELSEWHERE.match(path) is not None and not is_remote(path)


def full_path(source_root: str, path: str) -> str:
    """Where a recording is: a path or a URI. Raises `AudioError` if its path leaves its source (a link or `..`)."""
    if is_remote(path):
        return path  # a manifest names it, so its writer wants it
    if is_remote(source_root):
        uri = f"{source_root}/{path}"
        if not (can_be_served(path) and can_be_served(uri.partition("://")[2])):
            raise AudioError("outside-source", "the path leads out of its source, or is none that a store has")
        return uri
    joined = os.path.join(source_root, path)
    if os.path.isabs(path):
        return joined  # a manifest names it, so its writer wants it
    real, root = os.path.realpath(joined), os.path.realpath(source_root)
    if os.path.commonpath([real, root]) != root:
        raise AudioError("outside-source", f"the path leads out of its source, to {real!r}")
    return joined


def plain_path(path: str) -> str:
    """The path as a table can hold it: bytes that are no UTF-8 become escapes."""
    return path.encode("utf-8", "backslashreplace").decode()


def relative_path(path: str, root: str) -> str:
    """A manifest's path in its one spelling: relative to `root` where it lies below, else as it is."""
    if is_remote(path):
        return path.removeprefix(f"{root}/")
    path = os.path.normpath(path)
    if os.path.isabs(path) and path.startswith(root.rstrip(os.sep) + os.sep):
        path = os.path.relpath(path, root)
    return path


def find_path(path: str, root: str) -> str:
    """`relative_path` for manifests whose paths count from their own folder or from where their tools are started."""
    if is_remote(path) or is_remote(root):
        return relative_path(path, root)
    path = os.path.normpath(path)
    if not os.path.isabs(path) and not os.path.lexists(os.path.join(root, path)) and os.path.lexists(path):
        path = os.path.abspath(path)
    return relative_path(path, root)


def is_audio(source_root: str, path: str) -> bool:
    """Whether a file of a source is audio by its content. False for what cannot be opened or lies elsewhere."""
    try:
        with open_regular(full_path(source_root, path)) as file:
            identify(file)
    except AudioError:
        return False
    return True


def read_head(source_root: str, path: str, size: int) -> bytes:
    """The first bytes of a file of a source. Raises `AudioError` if it cannot be read or lies elsewhere."""
    try:
        with open_regular(full_path(source_root, path)) as file:
            return file.read(size)
    except OSError as error:
        raise AudioError("unreadable", f"the file cannot be read: {error.strerror}") from error


def read_small(source_root: str, path: str) -> bytes:
    """A side file's bytes. Raises `AudioError` if it cannot be read, lies elsewhere or is too large for one."""
    content = read_head(source_root, path, MAX_SIDE_BYTES + 1)
    if len(content) > MAX_SIDE_BYTES:
        raise AudioError("too-large", f"over {MAX_SIDE_BYTES >> 20} MiB for one transcript or label file")
    return content
