"""Where recordings come from: folders, globs, single files and JSONL manifests, as one ordered list of entries."""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tokenizers.spec import UserError
from .audio import AudioError, probe_format
from .sniff import AUDIO_SUFFIXES

_MANIFEST_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SOURCE_NAME_LENGTH = 100
_MAX_SECONDS = 10**8  # three years


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One recording, or the part of one that a manifest names."""

    path: str  # relative to the source's root; what ids are made of
    offset_s: float = 0.0
    duration_s: float | None = None  # to the end
    text: str | None = None
    speaker: str | None = None
    language: str | None = None


@dataclass(slots=True)
class Source:
    """A named set of recordings below one folder."""

    name: str
    root: str
    entries: Iterator[Entry]
    skipped: Counter[str] = field(default_factory=Counter)  # files that are no audio, by suffix


def open_source(argument: str, *, exclude: str) -> Source:
    """A source from a command-line argument `[NAME=]PATH`: a folder, a glob, an audio file or a JSONL manifest.

    NAME defaults to the folder's or file's own name; ids are made of it, so the same tree under another mount keeps
    its ids. `exclude` is a folder that is never looked into (the dataset's own root). Raises `UserError`.
    """
    source = _open_source(argument, exclude)
    try:
        (source.name + source.root).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The source {source.root!a} has a name that is not valid UTF-8; rename it.") from error
    return source


def _open_source(argument: str, exclude: str) -> Source:
    name, path = _split(argument)
    if glob.has_magic(path) and not os.path.lexists(path):
        return _glob_source(name, path, exclude)
    if not os.path.exists(path):
        raise UserError(f"There is no file or folder {path!r}. Give a folder, a quoted glob or a JSONL manifest.")
    root = os.path.abspath(path)
    if os.path.isdir(root):
        source = Source(name or _name_of(root), root, iter(()))
        if os.path.realpath(root) == os.path.realpath(exclude):
            raise UserError(
                f"{root} is both the source and the root; give the dataset a folder of its own: --to OTHER."
            )
        for _ in _walk(root, "", exclude):  # a folder that cannot be listed is told before anything is done
            pass
        source.entries = _audio_entries(source, _walk(root, "", exclude))
        return source
    if root.endswith(_MANIFEST_SUFFIXES):
        for _ in _manifest_entries(root):  # a mistake in the last line is told before the first one is worked on
            pass
        return Source(name or Path(root).stem, os.path.dirname(root), _manifest_entries(root))
    entry = Entry(path=os.path.basename(root))
    return Source(name or _name_of(os.path.dirname(root)), os.path.dirname(root), iter([entry]))


def is_audio(source_root: str, path: str) -> bool:
    """Whether a file of a source is audio by its content. False for what cannot be opened or lies elsewhere."""
    try:
        probe_format(full_path(source_root, path))
    except AudioError:
        return False
    return True


def full_path(source_root: str, path: str) -> str:
    """Where a recording is. Raises `AudioError` if its path leaves its source (a link or `..`)."""
    joined = os.path.join(source_root, path)
    if os.path.isabs(path):
        return joined  # a manifest names it, so its writer wants it
    real, root = os.path.realpath(joined), os.path.realpath(source_root)
    if os.path.commonpath([real, root]) != root:
        raise AudioError("outside-source", f"the path leads out of its source, to {real!r}")
    return joined


def _split(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    if equals and "/" not in name and not os.path.lexists(argument):
        if not name or len(name) > _SOURCE_NAME_LENGTH:
            raise UserError(f"{argument!r}: a source's name has 1 to {_SOURCE_NAME_LENGTH} characters: NAME=PATH.")
        return name, os.path.expanduser(path)
    return "", os.path.expanduser(argument)


def _name_of(folder: str) -> str:
    return os.path.basename(folder) or "root"


def _glob_source(name: str, pattern: str, exclude: str) -> Source:
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    root = os.path.abspath(fixed or ".")
    dataset = os.path.realpath(exclude) + os.sep
    paths = sorted(
        os.path.relpath(path, root)
        for path in glob.glob(pattern, recursive=True)
        if not os.path.isdir(path) and not os.path.realpath(path).startswith(dataset)
    )
    if not paths:
        raise UserError(f"The glob {pattern!r} matches no file. (Quote it, and use ** for folders at any depth.)")
    source = Source(name or _name_of(root), root, iter(()))
    source.entries = _audio_entries(source, paths)
    return source


def _audio_entries(source: Source, paths: Iterable[str]) -> Iterator[Entry]:
    """Audio files in the order of their paths. What is not audio, by name and by content, is counted."""
    for path in paths:
        suffix = os.path.splitext(path)[1].lower()
        if suffix in AUDIO_SUFFIXES or is_audio(source.root, path):
            yield Entry(path=path)
        else:
            source.skipped[suffix or "no suffix"] += 1


def _walk(root: str, folder: str, exclude: str) -> Iterator[str]:
    """Relative paths of files, depth first, sorted by name; hidden names and links to folders are passed over."""
    try:
        names = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"Cannot list {os.path.join(root, folder)!r}: {error.strerror}.") from error
    for found in names:
        if found.name.startswith("."):
            continue
        relative = f"{folder}/{found.name}" if folder else found.name
        if found.is_dir(follow_symlinks=False):
            if os.path.realpath(found.path) != os.path.realpath(exclude):
                yield from _walk(root, relative, exclude)
        elif not found.is_dir():
            yield relative


def _manifest_entries(manifest: str) -> Iterator[Entry]:
    """Lines of a NeMo manifest: audio_filepath, and if you like offset, duration (seconds), text, speaker, lang."""
    root = os.path.dirname(manifest)
    with open(manifest, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = _manifest_entry(json.loads(line), root)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise _manifest_error(manifest, number, error) from error
            yield entry


def _manifest_error(manifest: str, number: int, error: Exception) -> UserError:
    return UserError(
        f"{manifest}, line {number}: {_manifest_mistake(error)} Expected one JSON object per line with "
        '"audio_filepath" and, if you like, "offset", "duration" (seconds), "text", "speaker", "language".'
    )


def _manifest_entry(fields: Any, root: str) -> Entry:
    if not isinstance(fields, dict):
        raise ValueError("this is not a JSON object")
    path = os.path.normpath(fields["audio_filepath"])
    if os.path.isabs(path) and path.startswith(root + os.sep):
        path = os.path.relpath(path, root)
    if "\0" in path:
        raise ValueError("the path holds a NUL character")
    duration = fields.get("duration")
    offset = float(fields.get("offset") or 0.0)
    if not 0 <= offset <= _MAX_SECONDS or (duration is not None and not 0 < float(duration) <= _MAX_SECONDS):
        raise ValueError(f"offset and duration must not be negative or over {_MAX_SECONDS:,} seconds, duration not 0")
    return Entry(
        path=path,
        offset_s=offset,
        duration_s=None if duration is None else float(duration),
        text=_text(fields, "text"),
        speaker=_text(fields, "speaker"),
        language=_text(fields, "language") or _text(fields, "lang"),
    )


def _text(fields: dict[str, Any], key: str) -> str | None:
    value = fields.get(key)
    if value is None:
        return None
    return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON can hold half characters


def _manifest_mistake(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the key {error} is missing."
    if isinstance(error, json.JSONDecodeError):
        return f"this is not JSON ({error.msg} at column {error.colno})."
    if isinstance(error, UnicodeDecodeError):
        return "this is not UTF-8."
    if isinstance(error, RecursionError):
        return "this is nested too deeply."
    return f"{error}."
