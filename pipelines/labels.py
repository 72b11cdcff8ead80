"""When words and phones are said: TextGrid, HTK and HTS labels, TIMIT, Audacity and CTM files, all to seconds."""

import math
import re
from dataclasses import dataclass

from .entries import Label

LABEL_SUFFIXES = frozenset({".textgrid", ".lab", ".phn", ".wrd", ".ctm"})
TIMIT_RATE = 16_000  # Hz; .phn and .wrd files count samples and do not say of which rate: TIMIT's is meant
_HTK_UNITS = 10_000_000  # per second
_WORD_TIERS = frozenset({"word", "words"})
_PHONE_TIERS = frozenset({"phone", "phones", "phoneme", "phonemes", "segment", "segments"})

# Praat reads text files as a row of free-standing numbers, quoted strings and flags, and passes over all else:
# https://www.fon.hum.uva.nl/praat/manual/TextGrid_file_formats.html
_TEXTGRID_TOKEN = re.compile(
    r'"(?P<string>(?:[^"]|"")*)"'
    r"|(?<!\S)(?P<number>-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)%?(?!\S)"
    r"|<(?P<flag>exists|absent)>"
    r"|(?<!\S)![^\n]*"
)
_CONTEXT = re.compile(r"[-]([^-+]+)[+]")  # the middle phone of HTS full-context and HTK triphone labels
_STATE = re.compile(r"\[\d+\]$")
_AUDACITY_LINE = re.compile(r"\d+[.,]\d+\t\d+[.,]\d+(\t.*)?")


class LabelError(ValueError):
    """A label file that is not what its name says."""


@dataclass(frozen=True, slots=True)
class Times:
    """Words and phones of one recording, in the order they are said; None where the file has no such level."""

    words: tuple[Label, ...] | None = None
    phones: tuple[Label, ...] | None = None


def decode_text(content: bytes) -> str:
    """Text in UTF-8, or in UTF-16 behind its byte order mark. Raises `LabelError`."""
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise LabelError("this is neither UTF-8 nor UTF-16 text") from error
    if "\0" in text:
        raise LabelError("this is not text: it holds NUL characters")
    return text


def parse_times(suffix: str, content: bytes) -> Times:
    """The labels of a file called *`suffix`, like `.TextGrid`, `_phones.lab` or `.wrd`.

    `.lab`: whole numbers are HTK's units of 100 ns, decimals are seconds; phones, unless `suffix` says words.
    Raises `LabelError` for what cannot be read, `.ctm` included: see `parse_ctm`.
    """
    suffix = suffix.lower()
    text = decode_text(content)
    if suffix.endswith(".textgrid"):
        return textgrid_times(parse_textgrid(text), suffix)
    if suffix.endswith((".phn", ".wrd")):
        labels = _spans(text, TIMIT_RATE)
        return Times(words=labels) if suffix.endswith(".wrd") else Times(phones=labels)
    if suffix.endswith(".lab"):
        labels = parse_lab(text)
        return Times(words=labels) if "word" in suffix else Times(phones=labels)
    raise LabelError(f"{suffix} is no label file that wavemill knows")


def parse_textgrid(text: str) -> list[tuple[str, tuple[Label, ...]]]:
    """Interval tiers, name and labelled intervals, of a Praat TextGrid, long or short; empty intervals are left out."""
    tokens = _Tokens(text)
    if tokens.string() != "ooTextFile" or tokens.string() != "TextGrid":
        raise LabelError("this is not a TextGrid in one of Praat's text formats")
    tokens.span()
    tiers: list[tuple[str, tuple[Label, ...]]] = []
    if tokens.flag() == "absent":
        return tiers
    for _ in range(tokens.count()):
        kind, name = tokens.string(), tokens.string()
        tokens.span()
        labels = []
        for _ in range(tokens.count()):
            start = tokens.number()
            end = tokens.number() if kind == "IntervalTier" else start
            label = tokens.string().strip()
            if label:
                labels.append(_label(start, end, label))
        if kind == "IntervalTier":
            tiers.append((name, tuple(labels)))
    return tiers


def textgrid_times(tiers: list[tuple[str, tuple[Label, ...]]], suffix: str = "") -> Times:
    """Tiers called word(s), phone(s), phoneme(s) or segment(s), also as the Montreal aligner's `SPEAKER - words`.

    A grid with one tier of another name takes its level from the file's own name, if that says it.
    """
    words = [labels for name, labels in tiers if _level(name) in _WORD_TIERS]
    phones = [labels for name, labels in tiers if _level(name) in _PHONE_TIERS]
    if len(tiers) == 1 and not words and not phones:
        words = [tiers[0][1]] if "word" in suffix else []
        phones = [tiers[0][1]] if "phone" in suffix else []
    return Times(_merged(words), _merged(phones))


def parse_lab(text: str) -> tuple[Label, ...]:
    """HTK labels `start end label`, the phone alone of full-context ones (HTS); states of one phone become one."""
    lines = [line.split(None, 2) for line in text.splitlines() if line.strip()]
    seconds = any(not number.isdigit() for line in lines for number in line[:2])
    if not seconds and any("[" in line[2] for line in lines if len(line) == 3):
        lines = _without_states(lines)
    labels = _from_lines(lines, 1 if seconds else _HTK_UNITS)
    return tuple(_label(label.start_s, label.end_s, _phone(label.label.split()[0])) for label in labels)


def is_audacity(text: str) -> bool:
    """Whether every line of a text is one of Audacity's labels: two times in seconds and a label, between tabs."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("\\")]
    return bool(lines) and all(_AUDACITY_LINE.fullmatch(line) for line in lines)


def parse_audacity(text: str) -> tuple[Label, ...]:
    """Audacity's exported labels; the frequency ranges that it may write on lines of their own are passed over."""
    lines = [line.split("\t", 2) for line in text.splitlines() if line.strip() and not line.startswith("\\")]
    labelled = [[start.replace(",", "."), end.replace(",", "."), *rest] for start, end, *rest in lines]
    return _from_lines([line for line in labelled if len(line) == 3 and line[2].strip()], 1)


def parse_ctm(text: str) -> dict[str, tuple[Label, ...]]:
    """Labels by recording from NIST's CTM lines: `recording channel start duration label [confidence]`, in seconds."""
    found: dict[str, list[Label]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith(";;"):
            continue
        parts = line.split()
        if len(parts) < 5:
            raise LabelError(f"line {number} is not `recording channel start duration label`")
        start, duration = (_number(part, number) for part in parts[2:4])
        found.setdefault(parts[0], []).append(_label(start, start + duration, parts[4], number))
    return {name: tuple(sorted(labels, key=_start)) for name, labels in found.items()}


class _Tokens:
    """The row of values that Praat sees in a text file."""

    def __init__(self, text: str) -> None:
        self._found = (found for found in _TEXTGRID_TOKEN.finditer(text) if found.lastgroup)

    def _next(self, kind: str) -> str:
        token = next(self._found, None)
        if token is None:
            raise LabelError("the TextGrid ends before its last tier does")
        if token.lastgroup != kind:
            raise LabelError(f"the TextGrid has {token.group()[:50]!r} where a {kind} belongs")
        return token[kind]

    def string(self) -> str:
        return self._next("string").replace('""', '"')

    def number(self) -> float:
        return float(self._next("number"))

    def span(self) -> tuple[float, float]:
        return self.number(), self.number()

    def flag(self) -> str:
        return self._next("flag")

    def count(self) -> int:
        number = self._next("number")
        if not number.isdigit():
            raise LabelError(f"the TextGrid has {number[:50]} where a count belongs")
        return int(number)


def _level(name: str) -> str:
    return name.rpartition(" - ")[2].strip().lower()


def _merged(tiers: list[tuple[Label, ...]]) -> tuple[Label, ...] | None:
    """Several speakers' tiers as one, by time."""
    if not tiers:
        return None
    return tiers[0] if len(tiers) == 1 else tuple(sorted((label for tier in tiers for label in tier), key=_start))


def _start(label: Label) -> float:
    return label.start_s


def _spans(text: str, per_second: int) -> tuple[Label, ...]:
    return _from_lines([line.split(None, 2) for line in text.splitlines() if line.strip()], per_second)


def _from_lines(lines: list[list[str]], per_second: int) -> tuple[Label, ...]:
    labels = []
    for number, parts in enumerate(lines, start=1):
        if len(parts) < 3:
            raise LabelError(f"label {number} is not `start end label`")
        start, end = (_number(part, number) / per_second for part in parts[:2])
        labels.append(_label(start, end, parts[2].strip(), number))
    return tuple(labels)


def _without_states(lines: list[list[str]]) -> list[list[str]]:
    """Lines `... phone[2]`, `... phone[3]`, one per state of a model, as one line per phone."""
    merged: list[list[str]] = []
    for line in lines:
        if len(line) < 3:
            return lines
        context, state = _STATE.sub("", line[2].split()[0]), _STATE.search(line[2].split()[0])
        if merged and state and merged[-1][2] == context and state.group() != "[2]":  # HTS numbers states from 2
            merged[-1][1] = line[1]
        else:
            merged.append([line[0], line[1], context])
    return merged


def _phone(label: str) -> str:
    context = _CONTEXT.search(label)
    return context[1] if context else label


def _number(text: str, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise LabelError(f"label {line} has {text[:50]!r} where a time belongs") from None


def _label(start_s: float, end_s: float, label: str, line: int = 0) -> Label:
    if not (math.isfinite(end_s) and 0 <= start_s <= end_s):
        place = f"label {line}" if line else f"the label {label[:50]!r}"
        raise LabelError(f"{place} lasts from {start_s:g} s to {end_s:g} s")
    return Label(start_s, end_s, label)
