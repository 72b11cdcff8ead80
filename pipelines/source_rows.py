"""A manifest's row becomes an entry: which names its fields go by, what they may hold, how a mistake is told."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..storage.stores import is_remote
from ..tokenizers.spec import UserError
from .entries import Entry
from .files import can_be_served, whole_path
from .source_paths import is_elsewhere, relative_path

# in the order they are asked for: Hugging Face, NeMo, Common Voice and whatever people write by hand
PATH_KEYS = ("audio_filepath", "file_name", "path", "file", "filename", "audio", "wav", "audio_path", "wav_path")
TEXT_KEYS = ("text", "transcript", "transcription", "sentence", "normalized_text")
SPEAKER_KEYS = ("speaker", "speaker_id", "client_id")
LANGUAGE_KEYS = ("language", "lang", "locale")
PAIR_KEYS = ("pair", "pair_id")
START_KEYS = ("offset", "start", "start_s")
END_KEYS = ("end", "end_s")
DURATION_KEYS = ("duration", "duration_s")
CHANNEL_KEYS = ("channel", "channel_selector")
ROW_KEYS = (
    *(PATH_KEYS + TEXT_KEYS + SPEAKER_KEYS + LANGUAGE_KEYS + PAIR_KEYS),
    *(START_KEYS + END_KEYS + DURATION_KEYS + CHANNEL_KEYS),
)
MAX_SECONDS = 10**8  # three years
_MAX_CHANNEL = 1_000

# what reading one line of somebody's manifest may raise
LineErrors = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
_CREDENTIALS = re.compile(r"(?<=//)[^/]*@")  # never repeated to logs and tables
_SIGNATURE = re.compile(r"[?&][^/]*(signature|sig|security-token)=", re.IGNORECASE)


class Mistake(ValueError):
    """What is wrong with one line of a manifest."""


def manifest_error(manifest: str, number: int, error: Exception, expected: str) -> UserError:
    """A mistake in a line, told with file, line, and what a line should be."""
    return UserError(f"{manifest}, line {number}: {_mistake(error)} Expected {expected}")


def entry_of(fields: Mapping[str, Any], root: str, *, text_column: str | None = None) -> Entry:
    """The entry of one row of a manifest in the folder `root`. Raises `Mistake` and what `LineErrors` lists."""
    offset_s, duration_s = span_of(fields)
    return Entry(
        path=path_of(fields, root),
        channel=_channel(fields),
        offset_s=offset_s,
        duration_s=duration_s,
        text=text_of(fields, (text_column,) if text_column else TEXT_KEYS),
        speaker=text_of(fields, SPEAKER_KEYS),
        language=text_of(fields, LANGUAGE_KEYS),
        pair=pair_of(fields),
    )


def path_of(fields: Mapping[str, Any], root: str) -> str:
    """The path that a row names, relative to `root` if it lies below."""
    key = next((key for key in PATH_KEYS if fields.get(key) is not None), None)
    if key is None:
        raise Mistake("the key 'audio_filepath' is missing")
    if not isinstance(fields[key], str):
        raise Mistake(f"{key!r} is {_short(fields[key])}, not a path")
    return relative_path(checked_path(fields[key], root), root)


def checked_path(path: str, root: str) -> str:
    """The path of a file, or the URI of an object, that a manifest in the folder `root` names; see `checked_name`."""
    if not is_remote(path):
        if is_remote(root) and os.path.isabs(path):
            raise Mistake(f"{path[:200]!r} is a path of one machine, and this list lies in a store; name the object")
        return checked_name(path)
    try:
        uri = whole_path(path)
    except UserError as error:
        raise Mistake(str(error).rstrip(".")) from error
    if _SIGNATURE.search(uri):
        raise Mistake(
            f"{uri.partition('?')[0][:200]!r} comes with a signature, which no table should hold; leave it out"
        )
    place = uri.partition("://")[2]
    if "/" not in place or not can_be_served(place):
        raise Mistake(f"{uri[:200]!r} names no object: there is no name behind the bucket, or a '.' or '..' in it")
    return uri


def checked_name(path: str) -> str:
    """The path itself. Raises `Mistake` for URLs and commands, which are never fetched or run."""
    if is_elsewhere(path) or is_remote(path):
        said = _CREDENTIALS.sub("...@", path).partition("?")[0][:200]
        raise Mistake(f"{said!r} is a URL or a command; wavemill opens only files, so download it first")
    if "\0" in path:
        raise Mistake("the path holds a NUL character")
    return path


def span_of(fields: Mapping[str, Any]) -> tuple[float, float | None]:
    """Offset and duration in seconds; the duration may be given by an end instead, None is to the recording's end."""
    offset = _seconds(fields, START_KEYS) or 0.0
    duration, end = _seconds(fields, DURATION_KEYS), _seconds(fields, END_KEYS)
    if duration is None and end is not None:
        duration = end - offset
    return checked_span(offset, duration)


def checked_span(offset_s: float, duration_s: float | None) -> tuple[float, float | None]:
    if not 0 <= offset_s <= MAX_SECONDS or (duration_s is not None and not 0 < duration_s <= MAX_SECONDS):
        raise Mistake(f"offset and duration must not be negative or over {MAX_SECONDS:,} seconds, duration not 0")
    return offset_s, duration_s


def text_of(fields: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    value = next((fields[key] for key in keys if fields.get(key) is not None), None)
    return None if value is None else clean_text(str(value))


def pair_of(fields: Mapping[str, Any]) -> str | None:
    """What the row shares with those that it belongs together with; an empty one is none."""
    return text_of(fields, PAIR_KEYS) or None


def clean_text(text: str) -> str:
    """The text as a table can hold it: JSON can hold half characters, UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _seconds(fields: Mapping[str, Any], keys: Iterable[str]) -> float | None:
    for key in keys:
        value = fields.get(key)
        if value is None or value == "":
            continue
        try:
            return float(value)
        except (TypeError, ValueError):
            raise Mistake(f"{key!r} is {_short(value)}, expected seconds") from None
    return None


def _channel(fields: Mapping[str, Any]) -> int | None:
    for key in CHANNEL_KEYS:
        value = fields.get(key)
        if value is None or value == "":
            continue
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MAX_CHANNEL:
            raise Mistake(f"{key!r} is {_short(value)}, expected a channel's number, counted from 0")
        return number
    return None


def _short(value: Any) -> str:
    return f"{repr(value)[:50]} (a {type(value).__name__})"


def _mistake(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the key {error} is missing."
    if isinstance(error, json.JSONDecodeError):
        return f"this is not JSON ({error.msg} at column {error.colno})."
    if isinstance(error, UnicodeDecodeError):
        return "this is not UTF-8."
    if isinstance(error, RecursionError):
        return "this is nested too deeply."
    return f"{error}."


def stem_of(path: str) -> str:
    """A manifest's name without its suffixes."""
    stem, suffix = os.path.splitext(os.path.basename(path))
    return os.path.splitext(stem)[0] if suffix == ".gz" else stem
