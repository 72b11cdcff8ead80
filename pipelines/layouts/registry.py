"""All layouts by name, and as text: `flatten:stream=acoustic,codebooks=4`.

A layout's text is its name, then options as KEY=VALUE with commas. Lists have commas, too: a comma begins an option
only where KEY= follows. The option `layout` is another layout, and takes all that follows.
"""

import math
import re
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ...storage.layouts import Grouping, grouping_of
from ...tokenizers.spec import UserError, did_you_mean
from .conditioned import conditioned
from .continuous import continuous
from .factorized import factorized
from .flat import flatten, semantic
from .grid import delay, parallel
from .interleaved import interleaved
from .masks import masked
from .moshi import moshi
from .pairs import units_to_units
from .plan import NamedLayout
from .soundstorm import soundstorm
from .speakers import speakers
from .staged import coarse, fine, stages
from .transcript import transcript
from .unified import unified
from .vall_e import vall_e, vall_e_nar

_NEXT_KEY = re.compile(r",(?=[A-Za-z_]+=)")
_INNER = "layout"  # the option that is another layout
_EXPECTED = "expected NAME, or NAME:KEY=VALUE,KEY=VALUE."


@dataclass(frozen=True, slots=True)
class Option:
    """A field of a layout, as text has it."""

    name: str
    kind: Any  # its type
    default: Any  # MISSING: it must be given

    @property
    def is_required(self) -> bool:
        return self.default is MISSING

    @property
    def expected(self) -> str:
        """What its values look like, in words."""
        return "another layout" if self.name == _INNER else _words(_without_none(self.kind))


@dataclass(frozen=True, slots=True)
class LayoutEntry:
    """A layout that text can name: a dataclass, whose fields are its options."""

    layout: type[Any]
    paper: str
    example: str  # of streams that are called what they hold

    @property
    def name(self) -> str:
        return self.layout.__name__.replace("_", "-")

    @property
    def about(self) -> str:
        """The first line of its docstring."""
        return " ".join((self.layout.__doc__ or "").strip().split("\n\n")[0].split("\n")[0].split())

    @property
    def options(self) -> dict[str, Option]:
        kinds = get_type_hints(self.layout)
        return {field.name: Option(field.name, kinds[field.name], _default(field)) for field in fields(self.layout)}

    @property
    def grouping(self) -> Grouping | None:
        """Which rows are one segment together."""
        return grouping_of(parse_layout(self.example))

    def describe(self) -> dict[str, Any]:
        """What `wavemill layout list --json` tells of it. `streams` maps options to numbers of codebooks, None: all."""
        layout = parse_layout(self.example)
        named = {option: _as_tuple(getattr(layout, option)) for option in self.options}
        return {
            "name": self.name,
            "about": self.about,
            "paper": self.paper,
            "example": self.example,
            "streams": {
                option: layout.streams[value]
                for option, values in named.items()
                for value in values
                if isinstance(value, str) and value in layout.streams
            },
            "options": [
                {
                    "name": option.name,
                    "expected": option.expected,
                    "default": None if option.is_required or option.default is None else _said(option.default),
                    "required": option.is_required,
                }
                for option in self.options.values()
            ],
        }


ENTRIES = (
    LayoutEntry(
        semantic,
        "GSLM (Lakhotia et al. 2021); AudioLM, first stage (Borsos et al. 2022)",
        "semantic:stream=semantic,ends=true",
    ),
    LayoutEntry(
        coarse, "AudioLM, second stage (Borsos et al. 2022)", "coarse:semantic=semantic,acoustic=acoustic,codebooks=2"
    ),
    LayoutEntry(fine, "AudioLM, third stage (Borsos et al. 2022)", "fine:acoustic=acoustic,coarse=2,codebooks=4"),
    LayoutEntry(
        stages,
        "AudioLM, its stages in one sequence (Borsos et al. 2022)",
        "stages:semantic=semantic,acoustic=acoustic,coarse=2,codebooks=4",
    ),
    LayoutEntry(
        flatten,
        "AudioLM (Borsos et al. 2022); MusicGen, flattening pattern (Copet et al. 2023)",
        "flatten:stream=acoustic,codebooks=3",
    ),
    LayoutEntry(parallel, "MusicGen, parallel pattern (Copet et al. 2023)", "parallel:stream=acoustic,codebooks=4"),
    LayoutEntry(delay, "MusicGen, delay pattern (Copet et al. 2023)", "delay:stream=acoustic,codebooks=4"),
    LayoutEntry(vall_e, "VALL-E, autoregressive model (Wang et al. 2023)", "vall-e:text=text,acoustic=acoustic"),
    LayoutEntry(
        vall_e_nar,
        "VALL-E, non-autoregressive model (Wang et al. 2023)",
        "vall-e-nar:text=text,acoustic=acoustic,codebooks=4",
    ),
    LayoutEntry(
        soundstorm, "SoundStorm (Borsos et al. 2023)", "soundstorm:semantic=semantic,acoustic=acoustic,codebooks=4"
    ),
    LayoutEntry(
        masked,
        "HuBERT (Hsu et al. 2021); vq-wav2vec (Baevski et al. 2020); BERT (Devlin et al. 2019)",
        "masked:stream=semantic",
    ),
    LayoutEntry(
        unified, "AudioPaLM (Rubenstein et al. 2023)", "unified:tasks=asr,text=text,audio=semantic,language=English"
    ),
    LayoutEntry(interleaved, "SpiritLM (Nguyen et al. 2024)", "interleaved:text=words,units=semantic,words=2"),
    LayoutEntry(moshi, "Moshi (Defossez et al. 2024)", "moshi:text=words,audio=acoustic,codebooks=4"),
    LayoutEntry(transcript, "Whisper (Radford et al. 2022)", "transcript:text=words,audio=semantic"),
    LayoutEntry(
        factorized,
        "UniAudio 2.0 (Yang et al. 2026)",
        "factorized:reasoning=semantic,reconstruction=acoustic,codebooks=3",
    ),
    LayoutEntry(
        units_to_units, "S2ST by units (Lee et al. 2022); SeamlessM4T (2023)", "units-to-units:source=semantic"
    ),
    LayoutEntry(
        speakers, "Conv-TasNet (Luo and Mesgarani 2019), each talker tokenized", "speakers:stream=semantic,chunk=10"
    ),
    LayoutEntry(continuous, "CALM (Rouard et al. 2025)", "continuous:stream=latents"),
    LayoutEntry(
        conditioned,
        "MusicLM (Agostinelli et al. 2023); MusicGen (Copet et al. 2023)",
        "conditioned:stream=voice,layout=delay:stream=acoustic,codebooks=4",
    ),
)
LAYOUTS = {entry.name: entry for entry in ENTRIES}


def parse_layout(text: str) -> NamedLayout:
    """The layout that a text such as `delay:stream=acoustic,codebooks=4` names. Raises `UserError`."""
    name, colon, rest = text.partition(":")
    if name not in LAYOUTS:
        raise UserError(f"There is no layout {name!r}; there are: {', '.join(LAYOUTS)}.{did_you_mean(name, LAYOUTS)}")
    if colon and not rest:
        raise UserError(f"Layout {text!r}: {_EXPECTED}")
    entry, settings = LAYOUTS[name], _settings(text, rest)
    options, values = entry.options, dict[str, Any]()
    for key, value in settings.items():
        if key not in options:
            there = ", ".join(options)
            raise UserError(
                f"Layout {text!r}: there is no option {key!r}; there are: {there}.{did_you_mean(key, options)}"
            )
        values[key] = _read(text, options[key], value)
    missing = [option for option in options.values() if option.is_required and option.name not in values]
    if missing:
        raise UserError(
            f"Layout {text!r}: {missing[0].name} is missing; expected {missing[0].expected}, as in {entry.example}."
        )
    return entry.layout(**values)


def layout_said(layout: Any) -> str:
    """The text that `parse_layout` takes for a layout of this folder; options as they are by default are left out."""
    entry = LAYOUTS[type(layout).__name__.replace("_", "-")]
    values = {name: getattr(layout, name) for name in entry.options}
    told = [
        f"{name}={_said(value)}"
        for name, value in sorted(values.items(), key=lambda each: each[0] == _INNER)  # which takes all that follows
        if value != entry.options[name].default
    ]
    return f"{entry.name}:{','.join(told)}" if told else entry.name


def _settings(text: str, rest: str) -> dict[str, str]:
    """Options by name, as they were written. Raises `UserError`."""
    settings: dict[str, str] = {}
    while rest:
        setting, *following = _NEXT_KEY.split(rest, maxsplit=1)
        if rest.startswith(f"{_INNER}="):
            setting, following = rest, []
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UserError(f"Layout {text!r}: {_EXPECTED}")
        if key in settings:
            raise UserError(f"Layout {text!r}: {key} is there twice; keep one.")
        if not value:
            raise UserError(f"Layout {text!r}: {key} is empty; give it a value or leave it out.")
        settings[key] = value
        rest = following[0] if following else ""
    return settings


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _without_none(kind: Any) -> Any:
    """X of `X | None`."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    return kind


def _read(text: str, option: Option, value: str) -> Any:
    """An option's value. Raises `UserError`."""
    if option.name == _INNER:
        return parse_layout(value)
    if value == "none" and option.default is not None and _without_none(option.kind) is not option.kind:
        return None
    try:
        return _typed(_without_none(option.kind), value)
    except ValueError:
        raise UserError(f"Layout {text!r}: {option.name} is {value!r}; expected {option.expected}.") from None


def _typed(kind: Any, value: str) -> Any:
    """Raises `ValueError` for text that stands for no value of a type."""
    if get_origin(kind) is tuple:
        return tuple(_typed(get_args(kind)[0], part) for part in value.split(","))
    if kind is bool:
        return ("false", "true").index(value) == 1
    if kind is int:
        if not (value.isascii() and value.isdecimal()):
            raise ValueError
        return int(value)
    if kind is float:
        number = float(value)
        if not 0 <= number < math.inf:
            raise ValueError
        return number
    assert kind is str, kind
    if not value or "," in value:
        raise ValueError
    return value


def _said(value: Any) -> str:
    """A value as text."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(_said, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return layout_said(value) if hasattr(value, "__dataclass_fields__") else str(value)


def _words(kind: Any) -> str:
    """What values of a type look like."""
    if get_origin(kind) is tuple:
        return f"{_words(get_args(kind)[0])}, or several with commas"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number, 0 or greater",
        str: "a name",
    }[kind]
