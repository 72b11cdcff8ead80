"""Side files: what lies beside a recording under its name and says what is said in it, by whom, and when."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .entries import AudioError, Label
from .labels import LabelError, decode_text, is_audacity, parse_audacity, parse_times
from .source_rows import LANGUAGE_KEYS, SPEAKER_KEYS, TEXT_KEYS, clean_text, pair_of, text_of

# best first: LibriTTS has .normalized.txt and .original.txt
_TEXT_ORDER = (".normalized.txt", ".txt", ".text", ".transcript", ".original.txt")
_LEVEL_SIDE = r"[._-](?:words?|phones?)\.(?:textgrid|lab)"
_SIDES = (
    re.compile(rf"(.+?)({_LEVEL_SIDE}|\.(?:normalized|original)\.txt)", re.IGNORECASE | re.DOTALL),
    re.compile(r"(.+)(\.(?:txt|text|transcript|json|textgrid|lab|phn|wrd))", re.IGNORECASE | re.DOTALL),
)


@dataclass(slots=True)
class Described:
    """What side files say of one recording."""

    text: str | None = None
    speaker: str | None = None
    language: str | None = None
    pair: str | None = None
    words: tuple[Label, ...] | None = None
    phones: tuple[Label, ...] | None = None

    def fields(self) -> dict[str, Any]:
        """By the names they have in an `Entry`."""
        return {name: getattr(self, name) for name in self.__slots__}


def side_stems(name: str) -> list[tuple[str, str]]:
    """How a file's name may divide into a recording's name without suffix, and a side file's suffix."""
    return [(found[1], found[2].lower()) for pattern in _SIDES if (found := pattern.fullmatch(name))]


def is_side(suffix: str) -> bool:
    """Whether a name's end (all behind the recording's own name, dot included) is that of a side file."""
    return any(stem == "x" for stem, _ in side_stems(f"x{suffix}"))


def describe(sides: Mapping[str, Callable[[], bytes]], on_bad: Callable[[str], None]) -> Described:
    """What side files, by suffix in lower case, say together. Calls `on_bad` with the suffix of each unreadable one."""
    described = Described()
    order = sorted(sides, key=lambda suffix: (suffix not in _TEXT_ORDER, _rank(suffix), suffix))
    for suffix in order:
        try:
            _read(suffix, sides[suffix](), described)
        except (LabelError, AudioError):
            on_bad(suffix)
    return described


def _rank(suffix: str) -> int:
    return _TEXT_ORDER.index(suffix) if suffix in _TEXT_ORDER else 0


def _read(suffix: str, content: bytes, described: Described) -> None:
    if suffix == ".json":
        _read_json(content, described)
    elif suffix in _TEXT_ORDER:
        text = decode_text(content).strip()
        if suffix == ".txt" and is_audacity(text):
            described.words = parse_audacity(text)
        elif described.text is None:
            described.text = clean_text(text)
    elif suffix == ".lab" and not _has_times(text := decode_text(content)):
        if described.text is None:  # the Montreal aligner's transcripts
            described.text = clean_text(text.strip())
    else:
        times = parse_times(suffix, content)
        described.words = times.words if times.words is not None else described.words
        described.phones = times.phones if times.phones is not None else described.phones


def _read_json(content: bytes, described: Described) -> None:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LabelError("this is not JSON") from error
    if isinstance(fields, dict):
        described.text = text_of(fields, TEXT_KEYS) if described.text is None else described.text
        described.speaker = text_of(fields, SPEAKER_KEYS)
        described.language = text_of(fields, LANGUAGE_KEYS)
        described.pair = pair_of(fields)


def _has_times(text: str) -> bool:
    first = next((line.split() for line in text.splitlines() if line.strip()), [])
    return len(first) >= 2 and all(re.fullmatch(r"\d+(\.\d+)?", part) for part in first[:2])
