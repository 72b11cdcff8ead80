"""Lhotse manifests: cuts, or recordings with or without supervisions, as JSON lines. Lhotse itself is not needed."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..storage.stores import is_remote
from ..tokenizers.spec import UserError
from .entries import Entry, Label
from .files import is_file, is_folder, tree_of
from .source_manifests import json_objects
from .source_paths import find_path
from .source_rows import LineErrors, Mistake, checked_path, checked_span, clean_text, manifest_error, pair_of

_NAMES = re.compile(r"(?:.*[_.-])?(cuts|recordings|supervisions)(?:[_.-].*)?\.jsonl(?:\.gz)?", re.DOTALL)
_EXPECTED = "one cut, recording or supervision of Lhotse per line."
_CUTS = frozenset({"MonoCut", "MultiCut", "MixedCut", "PaddingCut"})


def lhotse_part(fields: Mapping[str, Any]) -> str | None:
    """Which of Lhotse's manifests an object comes from: cuts, recordings, supervisions, or None."""
    if fields.get("type") in _CUTS:
        return "cuts"
    if isinstance(fields.get("sources"), list) and "sampling_rate" in fields:
        return "recordings"
    if "recording_id" in fields and "start" in fields:
        return "supervisions"
    return None


def lhotse_files(folder: str) -> dict[str, list[str]]:
    """The names of a folder's manifests, by what their names say they hold. Raises `UserError`."""
    found: dict[str, list[str]] = {}
    for name, _ in tree_of(folder).names(""):
        match = _NAMES.fullmatch(name)
        if match:
            found.setdefault(match[1], []).append(name)
    return found


def lhotse_entries(path: str) -> Iterator[Entry]:
    """One entry per cut; without cuts, one per supervision, and one per recording that has none. Raises `UserError`.

    `path` is a manifest or a folder of them. A recordings manifest is joined with the supervisions beside it, whose
    name differs only in that word; those are held in memory. Times in alignments count from the recording's start,
    as Lhotse has it.
    """
    folder = path if is_folder(path) else os.path.dirname(path)
    if is_folder(path):
        files = lhotse_files(path)
        names = files.get("cuts") or files.get("recordings")
        if not names:
            raise UserError(f"{path} holds no Lhotse manifest: no cuts.jsonl.gz, no recordings.jsonl.gz.")
    else:
        names = [os.path.basename(path)]
    for name in names:
        yield from _manifest(folder, name)


def _manifest(folder: str, name: str) -> Iterator[Entry]:
    manifest = os.path.join(folder, name)
    supervisions: dict[str, list[dict[str, Any]]] | None = None
    for number, fields in json_objects(manifest, _EXPECTED):
        try:
            part = lhotse_part(fields)
            if part == "cuts":
                yield _cut(fields, folder)
            elif part == "recordings":
                if supervisions is None:
                    supervisions = _supervisions(folder, name)
                yield from _recording(fields, supervisions.get(fields["id"], []), folder)
            elif part == "supervisions":
                raise Mistake("supervisions do not say where the audio is; give the recordings beside them")
            else:
                raise Mistake("this is neither a cut nor a recording")
        except LineErrors as error:
            raise manifest_error(manifest, number, error, _EXPECTED) from error


def _supervisions(folder: str, recordings: str) -> dict[str, list[dict[str, Any]]]:
    """Supervisions by recording, from the file beside `recordings`; empty if there is none."""
    beside = recordings.replace("recordings", "supervisions")
    stem = beside.removesuffix(".gz")
    name = next((name for name in (beside, stem, f"{stem}.gz") if is_file(os.path.join(folder, name))), None)
    found: dict[str, list[dict[str, Any]]] = {}
    if name is None or name == recordings:
        return found
    for number, fields in json_objects(os.path.join(folder, name), _EXPECTED):
        try:
            found.setdefault(fields["recording_id"], []).append(fields)
        except LineErrors as error:
            raise manifest_error(os.path.join(folder, name), number, error, _EXPECTED) from error
    return found


def _cut(cut: dict[str, Any], folder: str) -> Entry:
    if cut["type"] not in ("MonoCut", "MultiCut"):
        raise Mistake(f"a {cut['type']} is made while training, it is not part of one recording; export its sources")
    recording = cut.get("recording")
    if recording is None:
        raise Mistake("the cut has features but no recording")
    path, channel = _place(recording, cut["channel"], folder)
    offset_s, duration_s = checked_span(float(cut["start"]), float(cut["duration"]))
    said = _said(cut.get("supervisions") or [])
    said["pair"] = pair_of(cut.get("custom") or {}) or said["pair"]
    return Entry(path=path, channel=channel, offset_s=offset_s, duration_s=duration_s, **said)


def _recording(recording: dict[str, Any], supervisions: list[dict[str, Any]], folder: str) -> Iterator[Entry]:
    for supervision in supervisions:
        path, channel = _place(recording, supervision.get("channel", 0), folder)
        offset_s, duration_s = checked_span(float(supervision["start"]), float(supervision["duration"]))
        yield Entry(path=path, channel=channel, offset_s=offset_s, duration_s=duration_s, **_said([supervision]))
    if not supervisions:
        for source in recording["sources"]:
            yield Entry(path=_place(recording, source["channels"], folder)[0])


def _place(recording: dict[str, Any], channels: int | list[int], folder: str) -> tuple[str, int | None]:
    """The file that holds the channels, and which of its channels; None for all that it has."""
    if recording.get("transforms"):
        names = ", ".join(_transform(transform) for transform in recording["transforms"])
        raise Mistake(f"the recording is to be changed ({names[:200]}); save the changed audio first (save_audios)")
    wanted = channels if isinstance(channels, list) else [channels]
    source = next((source for source in recording["sources"] if set(wanted) <= set(source["channels"])), None)
    if source is None:
        raise Mistake(f"no file of the recording holds the channels {wanted} together")
    if source["type"] != "file" and not (source["type"] == "url" and is_remote(source["source"])):
        raise Mistake(f"the audio is of the type {source['type']!r}, and wavemill opens only files; save it first")
    path = find_path(checked_path(source["source"], folder), folder)
    held = source["channels"]
    if set(wanted) == set(held):
        return path, None
    if len(wanted) > 1:
        raise Mistake(f"the channels {wanted} are some of {held}; wavemill takes one or all")
    return path, held.index(wanted[0])


def _transform(transform: Any) -> str:
    return str(transform.get("name", transform) if isinstance(transform, dict) else transform)


def _said(supervisions: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Texts joined in the order of time; speaker, language and pair where all agree; words and phones of all."""
    ordered = sorted(supervisions, key=lambda supervision: float(supervision["start"]))
    pairs = {pair for found in ordered if (pair := pair_of(found.get("custom") or {}))}
    texts = [str(found["text"]) for found in ordered if found.get("text") is not None]
    return {
        "text": clean_text(" ".join(texts)) if texts else None,
        "speaker": _agreed(ordered, "speaker"),
        "language": _agreed(ordered, "language"),
        "pair": pairs.pop() if len(pairs) == 1 else None,
        "words": _alignment(ordered, ("word", "words")),
        "phones": _alignment(ordered, ("phone", "phones", "phoneme", "phonemes")),
    }


def _agreed(supervisions: list[dict[str, Any]], key: str) -> str | None:
    values = {str(found[key]) for found in supervisions if found.get(key) is not None}
    return clean_text(values.pop()) if len(values) == 1 else None


def _alignment(supervisions: list[dict[str, Any]], levels: tuple[str, ...]) -> tuple[Label, ...] | None:
    found: list[Label] | None = None
    for supervision in supervisions:
        alignments = supervision.get("alignment") or {}
        for level in levels:
            if level in alignments:
                found = found or []
                found += [_label(aligned) for aligned in alignments[level]]
    return None if found is None else tuple(sorted(found, key=lambda label: label.start_s))


def _label(aligned: Any) -> Label:
    """An item as Lhotse writes it, `[symbol, start, duration, score]`; before 1.8 an object."""
    if isinstance(aligned, dict):
        aligned = [aligned["symbol"], aligned["start"], aligned["duration"]]
    symbol, start, duration = aligned[:3]
    start_s, duration_s = float(start), float(duration)
    if start_s < 0 or not duration_s >= 0:
        raise Mistake(f"the alignment of {str(symbol)[:50]!r} lasts from {start_s:g} s for {duration_s:g} s")
    return Label(start_s, start_s + duration_s, clean_text(str(symbol)))
