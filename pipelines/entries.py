"""What a source hands to the corpus: entries, one per recording or named part of one. A leaf."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


class AudioError(Exception):
    """Audio that cannot be tokenized: a class for counting, a message for the person. Becomes a row."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = " ".join(message.split())[:300]


@dataclass(frozen=True, slots=True)
class Label:
    """A word or a phone and when it is said, in seconds from the recording's start."""

    start_s: float
    end_s: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One recording, or the part of one that a manifest names."""

    path: str  # relative to the source's root, or absolute where a manifest says so; what ids are made of
    member: str = ""  # inside a tar: its name; inside a table: COLUMN/ROW; "": `path` itself is the audio
    member_offset: int | None = None  # bytes before the member's content, in a plain tar
    size_bytes: int | None = None  # of a member; None: the file's own size
    channel: int | None = None  # the one channel that a manifest names; None: the corpus's channel policy
    offset_s: float = 0.0
    duration_s: float | None = None  # to the end
    text: str | None = None
    speaker: str | None = None
    language: str | None = None
    pair: str | None = None  # entries of a source with the same pair belong together
    words: tuple[Label, ...] | None = None  # times count from the recording's start, whatever the offset
    phones: tuple[Label, ...] | None = None
    error: AudioError | None = None  # what the source itself found: a torn tar, a member whose name leads out of it


@dataclass(slots=True)
class Source:
    """A named set of recordings below one folder."""

    name: str
    root: str
    entries: Iterator[Entry]
    skipped: Counter[str] = field(default_factory=Counter)  # files that are no audio, by suffix
