"""How recordings become segments: a corpus's policy, fixed when it is created. A leaf."""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..tokenizers.spec import UserError

CHANNEL_POLICIES = ("mix", "first", "split")
GRID_HZ = 100  # measured boundaries lie on a grid of 10 ms from the first sample of the recording or its named part
_MAX_S = 12 * 3600.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VadPolicy:
    """Which spans of a recording count as speech; `pipelines/vad.py` says how."""

    threshold: float = 0.5  # probability from which speech begins; it ends 0.15 below
    min_speech_s: float = 0.25  # shorter speech is none
    max_speech_s: float = 30.0  # longer speech is cut at its deepest pauses
    min_silence_s: float = 0.3  # speech on both sides of a shorter pause is one span
    pad_s: float = 0.1  # kept before and behind
    model: str = ""  # "silero-vad/VERSION": filled in when the corpus is created

    def __post_init__(self) -> None:
        _require("The VAD's threshold", self.threshold, 0.01, 0.99)
        _require("The VAD's min_speech_s", self.min_speech_s, 0, 600)
        _require("The VAD's max_speech_s", self.max_speech_s, 1, _MAX_S)
        _require("The VAD's min_silence_s", self.min_silence_s, 0, 600)
        _require("The VAD's pad_s", self.pad_s, 0, 10)
        _require_text("The VAD's model", self.model)
        if self.max_speech_s < 2 * self.min_speech_s:
            raise UserError(
                f"The VAD's max_speech_s is {self.max_speech_s:g} s and its min_speech_s {self.min_speech_s:g} s; "
                "speech that is cut in two needs a maximum of at least twice the minimum."
            )

    def words(self) -> str:
        return (
            f"speech found by {self.model or 'Silero VAD'} (threshold {self.threshold:g}, "
            f"{self.min_speech_s:g} to {self.max_speech_s:g} s, pauses from {self.min_silence_s:g} s, "
            f"padded by {self.pad_s:g} s)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What is left out of a corpus. None and () let everything in."""

    min_duration_s: float | None = None
    max_duration_s: float | None = None
    min_level_db: float | None = None  # RMS over the segment, dB below a full-scale square wave
    max_clipping: float | None = None  # share of samples at full scale, 0 to 1
    languages: tuple[str, ...] = ()
    speakers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_optional("The filter min_duration_s", self.min_duration_s, 0, _MAX_S)
        _require_optional("The filter max_duration_s", self.max_duration_s, 0, _MAX_S)
        _require_optional("The filter min_level_db", self.min_level_db, -120, 0)
        _require_optional("The filter max_clipping", self.max_clipping, 0, 1)
        _require_texts("The filter languages", self.languages)
        _require_texts("The filter speakers", self.speakers)
        least, most = self.min_duration_s, self.max_duration_s
        if least is not None and most is not None and least > most:
            raise UserError(f"The filters keep no segment: min_duration_s is {least:g}, max_duration_s {most:g}.")

    def words(self) -> list[str]:
        said = []
        if self.min_duration_s is not None:
            said.append(f"at least {self.min_duration_s:g} s")
        if self.max_duration_s is not None:
            said.append(f"at most {self.max_duration_s:g} s")
        if self.min_level_db is not None:
            said.append(f"at least {self.min_level_db:g} dBFS")
        if self.max_clipping is not None:
            said.append(f"at most {100 * self.max_clipping:g} % clipped")
        if self.languages:
            said.append(f"languages {', '.join(self.languages)}")
        if self.speakers:
            said.append(f"{len(self.speakers):,} speaker{'s' * (len(self.speakers) > 1)}")
        return said


@dataclass(frozen=True, slots=True, kw_only=True)
class Transforms:
    """What is done to a segment's sound."""

    trim_silence_db: float | None = None  # dBFS: quieter 10 ms at the start and at the end are cut off
    loudness_lufs: float | None = None  # the loudness (ITU-R BS.1770) that a segment is brought to by one gain

    def __post_init__(self) -> None:
        _require_optional("The transform trim_silence_db", self.trim_silence_db, -120, 0)
        _require_optional("The transform loudness_lufs", self.loudness_lufs, -70, 0)

    def words(self) -> list[str]:
        said = []
        if self.trim_silence_db is not None:
            said.append(f"trim {self.trim_silence_db:g} dBFS")
        if self.loudness_lufs is not None:
            said.append(f"loudness {self.loudness_lufs:g} LUFS")
        return said


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusPolicy:
    """How recordings become segments: fixed when a corpus is created, the same for all that is added later.

    Raises `UserError` for a value out of its range, and for windows together with VAD.
    """

    window_s: float | None = None  # None: whole recordings
    channels: str = "mix"  # the mean of all channels; the first; or each a segment of its own
    vad: VadPolicy | None = None
    filters: Filters = field(default_factory=Filters)
    transforms: Transforms = field(default_factory=Transforms)
    separate: str | None = None  # sha256 of the separator's weights

    def __post_init__(self) -> None:
        _require_optional("The window", self.window_s, 0.1, _MAX_S, unit=" s")
        if self.channels not in CHANNEL_POLICIES:
            raise UserError(f"Channels cannot be {self.channels!r}; choose one of {', '.join(CHANNEL_POLICIES)}.")
        if self.window_s is not None and self.vad is not None:
            raise UserError("Windows and VAD both cut recordings into segments; choose one of them.")
        if self.separate is not None and not (isinstance(self.separate, str) and _SHA256.fullmatch(self.separate)):
            raise UserError(f"A separator is named by the sha256 of its weights, 64 digits; found {self.separate!r}.")

    @property
    def needs_analysis(self) -> bool:
        """Whether a segment's place, gain or right to be in the corpus depends on its sound."""
        return (
            self.vad is not None
            or self.transforms != Transforms()
            or self.filters.min_level_db is not None
            or self.filters.max_clipping is not None
        )

    def transforms_fingerprint(self) -> str:
        """What is done to the sound of the segments, for the fingerprint of a stream."""
        return "; ".join(self.transforms.words()) or "none"

    def words(self) -> str:
        """The policy as people say it: "30 s windows, channels mix, loudness -23 LUFS"."""
        whole = "whole recordings" if self.window_s is None else f"{self.window_s:g} s windows"
        said = [self.vad.words() if self.vad else whole, f"channels {self.channels}"]
        said += self.filters.words() + self.transforms.words()
        if self.separate is not None:
            said.append(f"separated with {self.separate[:12]}")
        return ", ".join(said)

    def to_json(self) -> dict[str, Any]:
        policy = asdict(self)
        policy["filters"] |= {"languages": list(self.filters.languages), "speakers": list(self.filters.speakers)}
        return policy

    @classmethod
    def from_json(cls, policy: dict[str, Any]) -> "CorpusPolicy":
        """What `to_json` wrote; keys left out have their defaults. Raises `UserError` for keys that nobody knows."""
        known = _known(cls, policy, "The corpus policy")
        vad = known.get("vad")
        filters = _known(Filters, known.get("filters") or {}, "The corpus policy's filters")
        for name in ("languages", "speakers"):
            if isinstance(filters.get(name), list):
                filters[name] = tuple(filters[name])
        return cls(
            **{
                **known,
                "vad": None if vad is None else VadPolicy(**_known(VadPolicy, vad, "The corpus policy's vad")),
                "filters": Filters(**filters),
                "transforms": Transforms(
                    **_known(Transforms, known.get("transforms") or {}, "The corpus policy's transforms")
                ),
            }
        )


def _known(kind: type, found: Any, name: str) -> dict[str, Any]:
    """A copy of the keys and values of `found`, all of them fields of the dataclass `kind`."""
    if not isinstance(found, dict):
        raise UserError(f"{name} is {found!r}; expected keys and values.")
    names = [each.name for each in fields(kind)]
    unknown = sorted(str(key) for key in found if key not in names)
    if unknown:
        raise UserError(
            f"{name} holds {', '.join(unknown)}, which this version does not know; it knows {', '.join(names)}. "
            "Mend the spelling, or use the version that wrote it."
        )
    return dict(found)


def _require(name: str, value: Any, low: float, high: float, *, unit: str = "") -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        found = f"{value:g}{unit}" if number else repr(value)
        raise UserError(f"{name} is {found}; accepted are numbers from {low:g} to {high:g}{unit}.")


def _require_optional(name: str, value: Any, low: float, high: float, *, unit: str = "") -> None:
    if value is not None:
        _require(name, value, low, high, unit=unit)


def _require_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise UserError(f"{name} is {value!r}; expected text.")


def _require_texts(name: str, values: Any) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, str) and value for value in values):
        raise UserError(f"{name} is {values!r}; expected a list of names.")
