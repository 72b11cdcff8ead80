"""Where recordings come from: whatever a corpus looks like on disk or in a store, as one ordered list of entries."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain

from ..storage.stores import SCHEMES, is_remote, redacted
from ..tokenizers.spec import UserError, did_you_mean
from .entries import AudioError, Entry, Source
from .files import exists, is_file, is_folder, is_same, matching, tree_of, whole_path
from .source_folder import (
    file_entry,
    folder_entries,
    glob_paths,
    listed_entries,
    require_listable,
    stray_entries,
)
from .source_kaldi import is_kaldi, kaldi_entries
from .source_lhotse import lhotse_entries, lhotse_files, lhotse_part
from .source_manifests import (
    common_voice_entries,
    csv_entries,
    first_json,
    first_line,
    is_common_voice,
    is_ljspeech,
    jsonl_entries,
    ljspeech_entries,
)
from .source_parquet import TABLE_SUFFIXES, open_table, saved_files, table_entries
from .source_paths import is_audio as is_audio
from .source_paths import is_elsewhere
from .source_rows import stem_of
from .source_tar import TAR_SUFFIXES, is_tar, tar_entries

SOURCE_KINDS = {
    "folder": "Audio files at any depth, with what lies beside them: NAME.txt, .json, .TextGrid, .lab, .ctm ...; "
    "tars and Parquet files in it are opened.",
    "glob": "A quoted pattern, like '~/data/**/*.flac' or 'shards/*.tar'.",
    "file": "One recording.",
    "jsonl": "JSON lines with NeMo's keys (audio_filepath, offset, duration, text, speaker, lang, pair), or Hugging "
    "Face's metadata.jsonl.",
    "csv": "A CSV or TSV file with a header: a column of paths (path, audio_filepath, file_name ...), and if you like "
    "text, speaker, language, pair, start, end, duration, channel.",
    "kaldi": "A Kaldi data folder: wav.scp with plain paths, and segments, text, utt2spk, utt2lang, utt2pair.",
    "lhotse": "Lhotse's cuts.jsonl.gz, or its recordings with their supervisions; audio in files.",
    "webdataset": "A tar, plain or gzipped, of recordings with .txt or .json members beside them.",
    "parquet": "A Parquet or Arrow file with a column of audio (Hugging Face's or plain bytes) or of paths, or the "
    "folder that datasets' save_to_disk wrote.",
    "librispeech": "Folders with SPEAKER-CHAPTER.trans.txt beside the recordings.",
    "common-voice": "A language's folder of Common Voice (validated.tsv, clips/), or one of its lists.",
    "ljspeech": "LJSpeech's metadata.csv (ID|text|normalised text) beside wavs/.",
}
_TEXT_COLUMN_KINDS = ("csv", "jsonl", "common-voice", "parquet")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_TABLE_FILES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_UNREAD_TARS = (".tar.bz2", ".tar.xz", ".tar.zst", ".tbz2", ".txz", ".zip", ".7z", ".rar")
_SOURCE_NAME_LENGTH = 100


def open_source(
    argument: str,
    *,
    exclude: str,
    kind: str = "auto",
    text_column: str | None = None,
    audio_column: str | None = None,
) -> Source:
    """A source from a command-line argument `[NAME=]PATH`.

    NAME defaults to the folder's or manifest's own name; ids are made of it, so the same tree under another mount
    keeps its ids. `exclude` is a folder that is never looked into (the dataset's own root). `kind` is one of
    `SOURCE_KINDS`, or "auto": what is there says it. `text_column` and `audio_column` name columns of manifests and
    tables that go by other names. Raises `UserError`, also for a mistake in any line of a manifest.
    """
    if kind != "auto" and kind not in SOURCE_KINDS:
        there = ("auto", *SOURCE_KINDS)
        raise UserError(
            f"There is no kind of source {kind!r}; there are: {', '.join(there)}.{did_you_mean(kind, there)}"
        )
    name, path = _split(argument)
    if is_elsewhere(path):
        stores = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(
            f"{redacted(path)!r} is a URL, and wavemill opens only files and folders, on a disk or in a store "
            f"({stores}): download or mount it first."
        )
    if is_remote(path):
        path = whole_path(path)
    if kind == "glob" or (kind == "auto" and glob.has_magic(path) and not os.path.lexists(path) and not exists(path)):
        source = _glob_source(name, path, exclude)
    else:
        if not exists(path):
            bucket = "/".join(path.split("/")[:3])
            what = f"bucket {bucket!r}" if is_remote(path) and not exists(bucket) else f"file or folder {path!r}"
            raise UserError(f"There is no {what}. Give a folder, a file, a quoted glob or a manifest.")
        path = whole_path(path)
        kind = kind_of(path) if kind == "auto" else kind
        _require_columns(path, kind, text_column, audio_column)
        source = _opened(name, path, kind, exclude, text_column, audio_column)
    try:
        (source.name + source.root).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The source {source.root!a} has a name that is not valid UTF-8; rename it.") from error
    return source


def _require_columns(path: str, kind: str, text_column: str | None, audio_column: str | None) -> None:
    """Raise `UserError` for a column that is named for a source which has none."""
    for column, kinds in ((text_column, _TEXT_COLUMN_KINDS), (audio_column, ("parquet",))):
        if column is not None and kind not in kinds:
            raise UserError(
                f"The column {column!r} is asked for, but {path} is read as {kind}, which has no such columns "
                f"({', '.join(kinds)} have). Leave it out, or say what the source is with --kind."
            )


def kind_of(path: str) -> str:
    """Which of `SOURCE_KINDS` lies at a path, by what is there. Raises `UserError` where nothing can be made of it."""
    if is_kaldi(path):
        return "kaldi"
    if is_common_voice(path):
        return "common-voice"
    if is_folder(path):
        return _kind_of_folder(path)
    lower = path.lower()
    if lower.endswith(_JSON_SUFFIXES):
        return "lhotse" if lhotse_part(first_json(path)) else "jsonl"
    if lower.endswith(_TABLE_FILES):
        return "ljspeech" if is_ljspeech(path) else "csv"
    if is_tar(os.path.dirname(path), os.path.basename(path)):
        return "webdataset"
    if lower.endswith(TABLE_SUFFIXES):
        return "parquet"
    if lower.endswith(_UNREAD_TARS):
        raise UserError(
            f"{path!r} is an archive of a kind that wavemill does not read; it reads {', '.join(TAR_SUFFIXES)}. "
            "Unpack it and give the folder."
        )
    return "file"


def _kind_of_folder(path: str) -> str:
    files = lhotse_files(path)
    if files.get("cuts") or files.get("recordings"):
        return "lhotse"
    if is_ljspeech(path):
        return "ljspeech"
    if _metadata_file(path):
        return "csv"
    return "parquet" if saved_files(path) else "folder"


def _metadata_file(folder: str) -> str | None:
    """Hugging Face's list of an audio folder, if there is one."""
    for name in ("metadata.csv", "metadata.jsonl"):
        manifest = os.path.join(folder, name)
        if is_file(manifest) and b"file_name" in first_line(manifest):
            return manifest
    return None


def _opened(name: str, path: str, kind: str, exclude: str, text_column: str | None, audio_column: str | None) -> Source:
    is_dir = is_folder(path)
    if kind in ("folder", "librispeech"):
        return _folder_source(name, path, kind, exclude)
    if kind in ("webdataset", "parquet", "file") and not is_dir:
        return _file_source(name, path, kind, text_column, audio_column)
    if kind == "parquet":
        files = saved_files(path)
        return _tables_source(name, path, files, text_column, audio_column)
    if kind in ("jsonl", "csv") and is_dir:
        manifest = _metadata_file(path)
        if manifest is None:
            raise UserError(f"{path} is a folder without metadata.csv or metadata.jsonl; give the manifest itself.")
        return _checked(name or _name_of(path), path, _manifest_reader(manifest, text_column))
    if kind in ("webdataset", "file"):
        raise UserError(f"{path} is a folder, not a {'tar' if kind == 'webdataset' else 'file'}.")
    root = path if is_dir else os.path.dirname(path)
    readers: dict[str, Callable[[], Iterator[Entry]]] = {
        "jsonl": partial(jsonl_entries, path, text_column),
        "csv": partial(csv_entries, path, text_column),
        "kaldi": partial(kaldi_entries, path),
        "lhotse": partial(lhotse_entries, path),
        "common-voice": partial(common_voice_entries, path, text_column),
        "ljspeech": partial(ljspeech_entries, path),
    }
    by_file = not is_dir and kind in ("jsonl", "csv", "lhotse")
    return _checked(name or (stem_of(path) if by_file else _name_of(root)), root, readers[kind])


def _manifest_reader(manifest: str, text_column: str | None) -> Callable[[], Iterator[Entry]]:
    return partial(jsonl_entries if manifest.endswith(".jsonl") else csv_entries, manifest, text_column)


def _checked(name: str, root: str, entries: Callable[[], Iterator[Entry]]) -> Source:
    """A source read twice: a mistake in the last line is told before the first one is worked on."""
    for _ in entries():
        pass
    return Source(name, root, entries())


def _folder_source(name: str, path: str, kind: str, exclude: str) -> Source:
    if not is_folder(path):
        raise UserError(f"{path} is not a folder.")
    if exclude and is_same(path, exclude):
        raise UserError(f"{path} is both the source and the root; give the dataset a folder of its own: --to OTHER.")
    tree = tree_of(path, exclude, deep=True)
    if not require_listable(tree) and kind == "librispeech":
        raise UserError(f"{path} holds no SPEAKER-CHAPTER.trans.txt, so it is not laid out like LibriSpeech.")
    skipped: Counter[str] = Counter()
    return Source(name or _name_of(path), path, folder_entries(tree, skipped), skipped)


def _file_source(name: str, path: str, kind: str, text_column: str | None, audio_column: str | None) -> Source:
    root, base = os.path.split(path)
    skipped: Counter[str] = Counter()
    if kind == "parquet":
        return _tables_source(name, root, [base], text_column, audio_column)
    if kind == "webdataset" and not is_tar(root, base):
        raise UserError(f"{path} is no tar, plain or gzipped; expected a name in {', '.join(TAR_SUFFIXES)}.")
    entries = tar_entries(root, base, skipped) if kind == "webdataset" else file_entry(root, base)
    return Source(name or _name_of(root), root, entries, skipped)


def _tables_source(name: str, root: str, files: list[str], text_column: str | None, audio_column: str | None) -> Source:
    if not files:
        raise UserError(f"{root} is not a folder that datasets' save_to_disk wrote; give its Parquet files, or a glob.")
    for file in files:
        try:
            open_table(root, file, audio_column=audio_column, text_column=text_column)
        except AudioError as error:
            raise UserError(f"Cannot read {os.path.join(root, file)!r}: {error.message.rstrip('.')}.") from error
    read = partial(table_entries, root, audio_column=audio_column, text_column=text_column)
    return Source(name or _name_of(root), root, chain.from_iterable(map(read, files)))


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
    root = whole_path(fixed or ".")
    parts = pattern.removeprefix(f"{root}/").split("/")
    tree = tree_of(root, exclude, deep="**" in parts)
    paths = sorted({*matching(tree, parts)}) if is_remote(root) else glob_paths(pattern, root, exclude)
    strays = [path for path in tree.strays if fnmatchcase(os.path.basename(path), parts[-1])]
    if not paths and not strays:
        raise UserError(f"The glob {pattern!r} matches no file. (Quote it, and use ** for folders at any depth.)")
    skipped: Counter[str] = Counter()
    entries = chain(listed_entries(tree, paths, skipped), stray_entries(strays))
    return Source(name or _name_of(root), root, entries, skipped)
