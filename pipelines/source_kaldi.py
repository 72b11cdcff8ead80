"""Kaldi data folders: wav.scp, and if there segments, text, utt2spk, utt2lang, utt2pair, reco2file_and_channel."""

import os
import re
from collections.abc import Iterator

from ..tokenizers.spec import UserError
from .entries import Entry
from .files import is_file, is_folder
from .source_manifests import manifest_lines
from .source_paths import find_path
from .source_rows import LineErrors, Mistake, checked_path, checked_span, manifest_error

_ARCHIVE_PLACE = re.compile(r".+:\d+(\[.*\])?$")
_CHANNELS = {"A": 0, "B": 1, "1": 0, "2": 1}


def is_kaldi(path: str) -> bool:
    """Whether this is a Kaldi data folder, or its wav.scp."""
    return is_file(os.path.join(path, "wav.scp")) or os.path.basename(path) == "wav.scp"


def kaldi_entries(path: str) -> Iterator[Entry]:
    """One entry per segment, or per recording where there is no segments file. Raises `UserError`.

    Paths count from the folder, then from the current directory. A recording that is a command or lies in an
    archive is refused: nothing is run. The tables are held in memory.
    """
    folder = path if is_folder(path) else os.path.dirname(path)
    if not is_file(os.path.join(folder, "wav.scp")):
        raise UserError(f"{folder} holds no wav.scp, so it is no Kaldi data folder.")
    text, speaker, language, pair = (_table(folder, name) for name in ("text", "utt2spk", "utt2lang", "utt2pair"))
    channels = _channels(folder)
    paths = _recordings(folder)
    if not is_file(os.path.join(folder, "segments")):
        spans = ((name, name, 0.0, None) for name in paths)
    else:
        spans = _segments(folder, paths)
    for utterance, recording, offset_s, duration_s in spans:
        yield Entry(
            path=paths[recording],
            channel=channels.get(recording),
            offset_s=offset_s,
            duration_s=duration_s,
            text=text.get(utterance),
            speaker=speaker.get(utterance),
            language=language.get(utterance),
            pair=pair.get(utterance),
        )


def _rows(folder: str, name: str, expected: str) -> Iterator[tuple[int, str, str]]:
    """Numbered lines `ID REST` of one file."""
    manifest = os.path.join(folder, name)
    for number, line in manifest_lines(manifest):
        if not line.strip():
            continue
        try:
            key, *rest = line.decode().strip().split(None, 1)
        except UnicodeDecodeError as error:
            raise manifest_error(manifest, number, error, expected) from error
        yield number, key, rest[0] if rest else ""


def _table(folder: str, name: str) -> dict[str, str]:
    """A file's values by utterance; empty if the folder does not have the file."""
    if not is_file(os.path.join(folder, name)):
        return {}
    return {key: rest for _, key, rest in _rows(folder, name, "UTTERANCE VALUE.") if rest}


def _recordings(folder: str) -> dict[str, str]:
    """Paths by recording, from wav.scp."""
    manifest, expected = os.path.join(folder, "wav.scp"), "RECORDING PATH."
    paths: dict[str, str] = {}
    for number, key, rest in _rows(folder, "wav.scp", expected):
        try:
            paths[key] = find_path(_plain_file(rest, folder), folder)
        except LineErrors as error:
            raise manifest_error(manifest, number, error, expected) from error
    return paths


def _plain_file(value: str, folder: str) -> str:
    if not value:
        raise Mistake("the path is missing")
    if value.endswith("|") or value.startswith("|"):
        raise Mistake(f"{value[:200]!r} is a command, and wavemill runs none; write its output to files first")
    if _ARCHIVE_PLACE.match(value) or value == "-":
        raise Mistake(
            f"{value[:200]!r} is a place in a Kaldi archive, which wavemill does not read; use wav-copy to get files"
        )
    return checked_path(value, folder)


def _segments(folder: str, paths: dict[str, str]) -> Iterator[tuple[str, str, float, float | None]]:
    """Utterance, recording, offset and duration in seconds; an end of -1 is the recording's end."""
    manifest, expected = os.path.join(folder, "segments"), "UTTERANCE RECORDING START END, in seconds."
    for number, utterance, rest in _rows(folder, "segments", expected):
        try:
            recording, start, end = rest.split()[:3]
            if recording not in paths:
                raise Mistake(f"the recording {recording[:200]!r} is not in wav.scp")
            offset = float(start)
            offset_s, duration_s = checked_span(offset, None if float(end) == -1 else float(end) - offset)
        except LineErrors as error:
            raise manifest_error(manifest, number, error, expected) from error
        yield utterance, recording, offset_s, duration_s


def _channels(folder: str) -> dict[str, int]:
    """Channels by recording, from reco2file_and_channel: A or 1 is the first, B or 2 the second."""
    if not is_file(os.path.join(folder, "reco2file_and_channel")):
        return {}
    expected = "RECORDING FILE CHANNEL, the channel A or B."
    found: dict[str, int] = {}
    for number, recording, rest in _rows(folder, "reco2file_and_channel", expected):
        channel = rest.split()[-1:] or [""]
        if channel[0] not in _CHANNELS:
            mistake = Mistake(f"the channel is {channel[0][:50]!r}")
            raise manifest_error(os.path.join(folder, "reco2file_and_channel"), number, mistake, expected)
        found[recording] = _CHANNELS[channel[0]]
    return found
