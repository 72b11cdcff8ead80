"""Manifests of one row per recording or part of one: JSON lines, CSV, TSV, Common Voice and LJSpeech."""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from ..tokenizers.spec import UserError
from .entries import AudioError, Entry
from .files import Tree, is_file, is_folder, tree_of
from .source_paths import MAX_SIDE_BYTES, open_regular
from .source_rows import PATH_KEYS, ROW_KEYS, LineErrors, Mistake, checked_name, clean_text, entry_of, manifest_error

_JSON_LINE = (
    'one JSON object per line with "audio_filepath" and, if you like, "offset", "duration" (seconds), "text", '
    '"speaker", "language", "pair".'
)
_TABLE_LINE = "as many cells as the header has, with a path, and times in seconds."
_LJ_LINE = "ID|text or ID|text|normalised text."
_DELIMITERS = (",", "\t", ";", "|")
_COMMON_VOICE_FILES = ("train.tsv", "dev.tsv", "test.tsv", "other.tsv", "invalidated.tsv")
_LJ_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")


def manifest_lines(manifest: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a manifest, which may be gzipped. Raises `UserError` where it cannot be read."""
    try:
        with open_regular(manifest) as raw:
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if manifest.endswith(".gz") else raw
            number = 0
            while line := file.readline(MAX_SIDE_BYTES + 1):
                number += 1
                if len(line) > MAX_SIDE_BYTES:
                    raise UserError(f"{manifest}, line {number} is over {MAX_SIDE_BYTES >> 20} MiB long.")
                yield number, line
    except AudioError as error:
        raise UserError(f"Cannot read {manifest!r}: {error.message}.") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"Cannot read {manifest!r} to its end: {reason}.") from error


def first_line(manifest: str) -> bytes:
    """The first line that is not blank; empty if there is none. Raises `UserError`."""
    return next((line for _, line in manifest_lines(manifest) if line.strip()), b"")


def first_json(manifest: str) -> dict[str, Any]:
    """The first line's object; empty if it is none. Raises `UserError` if the file cannot be read."""
    try:
        fields = json.loads(first_line(manifest))
    except LineErrors:
        return {}
    return fields if isinstance(fields, dict) else {}


def json_objects(manifest: str, expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered objects of a file of JSON lines. Raises `UserError` for what is none."""
    for number, line in manifest_lines(manifest):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise Mistake("this is not a JSON object")
        except LineErrors as error:
            raise manifest_error(manifest, number, error, expected) from error
        yield number, fields


def jsonl_entries(manifest: str, text_column: str | None = None) -> Iterator[Entry]:
    """Lines of a NeMo manifest: audio_filepath, and if you like offset, duration (seconds), text, speaker, lang, pair.

    Hugging Face's `metadata.jsonl`, with file_name, is read the same way.
    """
    root = os.path.dirname(manifest)
    for number, fields in json_objects(manifest, _JSON_LINE):
        try:
            yield entry_of(fields, root, text_column=text_column)
        except LineErrors as error:
            raise manifest_error(manifest, number, error, _JSON_LINE) from error


def csv_entries(manifest: str, text_column: str | None = None) -> Iterator[Entry]:
    """Rows of a CSV or TSV file with a header that names a column of paths (see `PATH_KEYS`)."""
    root = os.path.dirname(manifest)
    for number, fields in _table_rows(manifest, text_column, quoted=True):
        try:
            yield entry_of(fields, root, text_column=text_column)
        except LineErrors as error:
            raise manifest_error(manifest, number, error, _TABLE_LINE) from error


def is_common_voice(path: str) -> bool:
    """Whether this is a language's folder of Common Voice, or one of its lists."""
    folder = path if is_folder(path) else os.path.dirname(path)
    if not is_folder(os.path.join(folder, "clips")):
        return False
    lists = ("validated.tsv", *_COMMON_VOICE_FILES) if is_folder(path) else (os.path.basename(path),)
    return any(_is_clip_list(os.path.join(folder, name)) for name in lists)


def common_voice_entries(path: str, text_column: str | None = None) -> Iterator[Entry]:
    """Clips of the list named, of validated.tsv in a folder, or of all lists where that one is missing."""
    if not is_folder(path):
        folder, lists = os.path.dirname(path), [path]
    else:
        folder = path
        names = ("validated.tsv",) if _is_clip_list(os.path.join(path, "validated.tsv")) else _COMMON_VOICE_FILES
        lists = [os.path.join(path, name) for name in names if _is_clip_list(os.path.join(path, name))]
    if not lists:
        raise UserError(f"{path} holds none of Common Voice's lists (validated.tsv, train.tsv, ...).")
    for manifest in lists:
        for number, fields in _table_rows(manifest, text_column, quoted=False):
            try:
                name = fields.get("path")
                if not name:
                    raise Mistake("the path is missing")
                name = name if name.lower().endswith(".mp3") else f"{name}.mp3"  # the first releases left it out
                clip = {**fields, "path": f"clips/{checked_name(name)}"}
                yield entry_of(clip, folder, text_column=text_column)
            except LineErrors as error:
                raise manifest_error(manifest, number, error, _TABLE_LINE) from error


def is_ljspeech(path: str) -> bool:
    """Whether this is a folder like LJSpeech's (metadata.csv with `|`, wavs/), or its metadata.csv."""
    manifest = os.path.join(path, "metadata.csv") if is_folder(path) else path
    if not is_file(manifest) or not is_folder(os.path.join(os.path.dirname(manifest), "wavs")):
        return False
    cells = first_line(manifest).decode("utf-8", "replace").strip("\r\n").lower().split("|")
    return len(cells) in (2, 3) and not set(cells) & set(PATH_KEYS)


def ljspeech_entries(path: str) -> Iterator[Entry]:
    """Rows `ID|text|normalised text`; the recording is wavs/ID.wav, the text the normalised one where there is one."""
    manifest = os.path.join(path, "metadata.csv") if is_folder(path) else path
    root = os.path.dirname(manifest)
    beside = tree_of(root)
    for number, line in manifest_lines(manifest):
        if not line.strip():
            continue
        try:
            name, *texts = line.decode("utf-8-sig").rstrip("\r\n").split("|")
            if not name or len(texts) not in (1, 2):
                raise Mistake(f"there are {len(texts) + 1} cells")
            audio = _lj_file(beside, f"wavs/{checked_name(name)}")
            yield Entry(path=os.path.normpath(audio), text=clean_text(texts[-1] or texts[0]))
        except LineErrors as error:
            raise manifest_error(manifest, number, error, _LJ_LINE) from error


def _lj_file(beside: Tree, stem: str) -> str:
    if stem.lower().endswith(_LJ_SUFFIXES):
        return stem
    found = (stem + suffix for suffix in _LJ_SUFFIXES if beside.has(stem + suffix))
    return next(found, stem + _LJ_SUFFIXES[0])


def _is_clip_list(manifest: str) -> bool:
    if not is_file(manifest):
        return False
    columns = first_line(manifest).decode("utf-8", "replace").strip("\ufeff\r\n").split("\t")
    return {"client_id", "path", "sentence"} <= set(columns)


def _table_rows(manifest: str, text_column: str | None, *, quoted: bool) -> Iterator[tuple[int, dict[str, str]]]:
    """Numbered rows by column name; empty cells are left out. Raises `UserError`."""
    delimiter = _delimiter(manifest)
    lines = _decoded(manifest)
    rows = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=quoted
    )
    columns: list[str] | None = None
    while True:
        try:
            cells = next(rows, None)
        except (csv.Error, UnicodeDecodeError) as error:
            number = rows.line_num + isinstance(error, UnicodeDecodeError)  # that line was never counted
            raise manifest_error(manifest, number, error, _TABLE_LINE) from error
        if cells is None:
            break
        if not any(cell.strip() for cell in cells):
            continue
        if columns is None:
            columns = _columns(manifest, cells, text_column)
            continue
        if len(cells) != len(columns):
            mistake = Mistake(f"there are {len(cells)} cells under {len(columns)} columns")
            raise manifest_error(manifest, rows.line_num, mistake, _TABLE_LINE)
        yield rows.line_num, {name: cell for name, cell in zip(columns, cells, strict=True) if cell}
    if columns is None:
        raise UserError(f"{manifest} is empty; expected a header with a column of paths ({', '.join(PATH_KEYS)}).")


def _decoded(manifest: str) -> Iterator[str]:
    for number, line in manifest_lines(manifest):
        yield line.decode("utf-8-sig" if number == 1 else "utf-8")


def _columns(manifest: str, cells: list[str], text_column: str | None) -> list[str]:
    """The header's names; those that we know are known in any case."""
    columns = [cell.strip() for cell in cells]
    columns = [name.lower() if name.lower() in ROW_KEYS else name for name in columns]
    if not set(columns) & set(PATH_KEYS):
        raise UserError(
            f"{manifest} has no column of paths: its first line is {_listed(columns)}. Expected a header with one of "
            f"{', '.join(PATH_KEYS)}."
        )
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{manifest} has two columns called {twice!r}.")
    if text_column is not None and text_column not in columns:
        raise UserError(f"{manifest} has no column {text_column!r}; it has {_listed(columns)}.")
    return columns


def _listed(columns: list[str]) -> str:
    return ", ".join(repr(name[:50]) for name in columns[:20])


def _delimiter(manifest: str) -> str:
    """What divides the cells: the tab in a .tsv, else whatever the header has most of."""
    plain = manifest.removesuffix(".gz")
    if plain.endswith(".tsv"):
        return "\t"
    header = first_line(manifest).decode("utf-8", "replace")
    return max(_DELIMITERS, key=header.count)
