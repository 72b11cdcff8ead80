"""What a recipe says: a dataset from recordings to export, as one checked value. `recipe_file.py` reads and writes it.

Sections are strict: an unknown key or a value of another type is a mistake. Descriptions become the comments of the
file that `wavemill recipe init` writes. Ranges of the corpus's policies are those of `pipelines/policy.py`.
"""

import glob
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from ..pipelines.policy import CorpusPolicy, VadPolicy
from ..pipelines.policy import Filters as FilterPolicy
from ..pipelines.policy import Transforms as TransformPolicy
from ..storage.stores import is_remote, redacted
from ..tokenizers.spec import UserError
from .arguments import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from ..pipelines.audio import Limits as AudioLimits


class Mistake(ValueError):
    """A value that does not fit, with the place of the key that is at fault, counted from the validated section."""

    def __init__(self, message: str, *place: str | int) -> None:
        super().__init__(message)
        self.place = place


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


def _checked(check: Callable[..., Any], *values: Any, flag: str = "") -> Any:
    """What `check` gives; its `UserError` becomes a mistake of the recipe, without the flag's name."""
    try:
        return check(*values)
    except UserError as error:
        raise Mistake(str(error).removeprefix(f"{flag} ")) from error


def _window(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise Mistake("expected a length of time such as 30s, 2.5min or 1h, or null.")
    if value is not None:
        _checked(parse_seconds, str(value), flag="--window")
    return value


def _budget(value: str) -> str:
    _checked(parse_bytes, value, flag="--budget")
    return value


def _deadline(value: str) -> str:
    _checked(partial(parse_seconds, least_s=1), value, "--deadline", flag="--deadline")
    return value


def _kind(value: str) -> str:
    if value != "auto":
        from ..pipelines.sources import SOURCE_KINDS

        if value not in SOURCE_KINDS:
            raise Mistake(f"there is no kind of source {value!r}; there are: auto, {', '.join(SOURCE_KINDS)}.")
    return value


def _stream_name(value: str) -> str:
    from ..storage.schema import require_stream_name

    _checked(require_stream_name, value)
    return value


def _local(path: str, info: ValidationInfo) -> str:
    """A path, counted from the recipe's folder; URLs and absolute paths as they are."""
    folder = (info.context or {}).get("folder")
    if not path.strip():
        raise Mistake("expected a path, found nothing.")
    if folder is None or "://" in path:
        return path
    path = os.path.expanduser(path)
    if is_remote(folder):
        scheme, _, rest = folder.partition("://")
        return path if os.path.isabs(path) else f"{scheme}://{os.path.normpath(os.path.join(rest, path))}"
    place = os.path.normpath(os.path.join(folder, path))
    if glob.has_magic(path) and not os.path.isabs(path) and not os.path.lexists(place):
        return os.path.join(glob.escape(folder), path)
    return place


def _on_this_machine(path: str) -> str:
    if "://" in path:
        raise Mistake(f"{redacted(path)!r} is a URL; expected a file on this machine: copy it here first.")
    return path


def _weights(value: str, info: ValidationInfo) -> str:
    """A folder of weights as an absolute path, counted from the recipe's folder; what is no folder is a hub id."""
    folder = (info.context or {}).get("folder")
    if not value.strip():
        raise Mistake("expected a folder or a hub id, found nothing.")
    place = os.path.normpath(os.path.join(folder or ".", os.path.expanduser(value)))
    return os.path.abspath(place) if os.path.isdir(place) else value


def _reduction(value: str, info: ValidationInfo) -> str:
    """A reduction whose weights, if it has any, are placed as those of a tokenizer."""
    way, colon, weights = value.partition(":")
    return f"{way}:{_weights(weights, info)}" if way == "ctc" and colon else value


def _source(value: Any, info: ValidationInfo) -> Any:
    """`[NAME=]PATH` as the keys of a source; what is no text is left to the model."""
    if not isinstance(value, str):
        return value
    folder = (info.context or {}).get("folder") or "."
    name, equals, path = value.partition("=")
    if equals and "/" not in name and not os.path.lexists(os.path.join(folder, value)):
        return {"name": name, "path": path}
    return {"path": value}


LocalPath = Annotated[str, AfterValidator(_local)]  # or a store's URI
LocalFile = Annotated[str, AfterValidator(_local), AfterValidator(_on_this_machine)]
StreamName = Annotated[str, AfterValidator(_stream_name)]
WeightsPlace = Annotated[str, AfterValidator(_weights)]
ReductionPlace = Annotated[str, AfterValidator(_reduction)]

_TOKENIZER = "a name that `wavemill tokenizers` lists"
_WEIGHTS = "a folder in Hugging Face layout or a hub id; null: the published ones"
_REVISION = "of a hub id: a commit, a branch or a tag; null: the newest"
_LAYER = "of features; null: the tokenizer's own"


class Source(Section):
    path: LocalPath = Field(description="a folder, a glob, an audio file, a manifest; or its URI in a store")
    name: str | None = Field(default=None, description="what ids are made of; null: the folder's or file's own name")
    kind: Annotated[str, AfterValidator(_kind)] = Field(
        default="auto", description="what it is, where that cannot be seen; `wavemill corpus kinds` lists them"
    )
    text_column: str | None = Field(default=None, description="the transcript's column in manifests and tables")
    audio_column: str | None = Field(default=None, description="the audio's column in manifests and tables")

    def argument(self) -> str:
        """The source as the command line names it."""
        return self.path if self.name is None else f"{self.name}={self.path}"


class Vad(Section):
    threshold: float = Field(default=0.5, description="probability from which speech begins; it ends 0.15 below")
    min_speech_s: float = Field(default=0.25, description="shorter speech is none")
    max_speech_s: float = Field(default=30.0, description="longer speech is cut at its deepest pauses")
    min_silence_s: float = Field(default=0.3, description="speech on both sides of a shorter pause is one segment")
    pad_s: float = Field(default=0.1, description="kept before and behind")

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        _checked(self.policy)
        return self

    def policy(self) -> VadPolicy:
        return VadPolicy(**self.model_dump())


class Filters(Section):
    min_duration_s: float | None = Field(default=None, description="leave out shorter segments")
    max_duration_s: float | None = Field(default=None, description="leave out longer segments")
    min_level_db: float | None = Field(default=None, description="leave out quieter segments, dBFS, for example -60")
    max_clipping: float | None = Field(default=None, description="leave out segments with more clipped samples, 0 to 1")
    languages: list[str] = Field(default=[], description="take only these; []: all. Quote 'no'")
    speakers: list[str] = Field(default=[], description="take only these; []: all")

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        _checked(self.policy)
        return self

    def policy(self) -> FilterPolicy:
        values = self.model_dump()
        return FilterPolicy(
            **{**values, "languages": tuple(self.languages), "speakers": tuple(self.speakers)},
        )


class Transforms(Section):
    trim_silence_db: float | None = Field(default=None, description="cut what is quieter, dBFS, off both ends")
    loudness_lufs: float | None = Field(
        default=None, description="bring every segment to this loudness, for example -23"
    )

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        _checked(self.policy)
        return self

    def policy(self) -> TransformPolicy:
        return TransformPolicy(**self.model_dump())


class Limits(Section):
    max_bytes: int = Field(default=64 * 10**9, ge=1, description="of a recording's file")
    max_channels: int = Field(default=64, ge=1, description="of a recording")
    min_sample_rate: int = Field(default=4_000, ge=1, description="Hz")
    max_sample_rate: int = Field(default=768_000, ge=1, description="Hz")
    max_duration_s: float = Field(default=100 * 3600.0, gt=0, description="of a recording")
    max_expansion: float = Field(default=10_000.0, gt=0, description="decoded bytes for each byte of a file")

    def limits(self) -> "AudioLimits":
        from ..pipelines.audio import Limits as AudioLimits

        return AudioLimits(**self.model_dump())


class Corpus(Section):
    sources: list[Annotated[Source, BeforeValidator(_source)]] = Field(
        min_length=1, description="[NAME=]PATH each, or keys and values: path, name, kind, text_column, audio_column"
    )
    window: Annotated[Any, AfterValidator(_window)] = Field(
        default=None, description="30s, 2.5min: cut recordings into windows; null: whole"
    )
    channels: Literal["mix", "first", "split"] = Field(
        default="mix", description="mix (their mean), first, or split (each a segment of its own)"
    )
    shard_hours: float = Field(default=0.5, ge=0.001, description="hours of audio per shard, the unit of work")
    vad: Vad | None = Field(default=None, description="cut recordings into the speech in them; null: do not")
    filters: Filters = Field(default=Filters(), description="what is left out")
    transforms: Transforms = Field(default=Transforms(), description="what is done to the sound")
    separate: LocalFile | None = Field(default=None, description="weights of a Conv-TasNet that takes talkers apart")
    limits: Limits = Field(default=Limits(), description="recordings beyond these are errors, not audio")
    deadline: Annotated[str, AfterValidator(_deadline)] = Field(
        default="60s", description="a decoder without a sign of life for so long is stopped; in tokenize, too"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _checked(self.policy)
        return self

    @property
    def deadline_s(self) -> float:
        return parse_seconds(self.deadline, "--deadline", least_s=1)

    def policy(self) -> CorpusPolicy:
        """The policy of the corpus, but for the separator, whose weights have not been read."""
        return CorpusPolicy(
            window_s=None if self.window is None else parse_seconds(str(self.window)),
            channels=self.channels,
            vad=self.vad.policy() if self.vad else None,
            filters=self.filters.policy(),
            transforms=self.transforms.policy(),
        )


_OF_FITTING = (
    "size",
    "num_codebooks",
    "groups",
    "spherical",
    "refine",
    "stratify",
    "budget",
    "seed",
    "leave_out_speakers",
)


class Codebook(Section):
    tokenizer: str = Field(description=_TOKENIZER)
    name: StreamName | None = Field(default=None, description="null: the tokenizer's")
    weights: WeightsPlace | None = Field(default=None, description=_WEIGHTS)
    revision: str | None = Field(default=None, description=_REVISION)
    layer: int | None = Field(default=None, ge=0, description=_LAYER)
    file: LocalFile | None = Field(default=None, description="centroids from elsewhere, .npy; null: fitted here")
    size: int | None = Field(
        default=None, ge=2, le=1 << 20, description="centroids per codebook; null: the tokenizer's own"
    )
    num_codebooks: int | None = Field(
        default=None, ge=1, le=64, description="residual codebooks; null: the tokenizer's own"
    )
    groups: int = Field(default=1, ge=1, le=64, description="parts that frames are cut into, each with its codebooks")
    spherical: bool = Field(default=False, description="centroids of directions, for one codebook")
    refine: bool = Field(default=False, description="fit residual codebooks jointly where that lowers the error")
    stratify: str | None = Field(default=None, description="a corpus column whose values get equal shares")
    budget: Annotated[str, AfterValidator(_budget)] = Field(
        default="64MB", description="bytes of sampled frames to fit on"
    )
    seed: int = Field(default=0, ge=0, le=10**9, description="of the sample and the fit")
    leave_out_speakers: list[str] = Field(default=[], description="kept for measuring")

    @model_validator(mode="after")
    def _fitted_or_from_a_file(self) -> Self:
        for key in _OF_FITTING:
            if self.file is not None and getattr(self, key) != type(self).model_fields[key].default:
                raise Mistake("centroids from a file are as they are; take this key away, or file.", key)
        return self

    @property
    def codebook_name(self) -> str:
        return self.name or self.tokenizer


class Stream(Section):
    tokenizer: str = Field(description=_TOKENIZER)
    codebook: str | None = Field(default=None, description="null: the one of the tokenizer's name, or its own")
    weights: WeightsPlace | None = Field(default=None, description=_WEIGHTS)
    revision: str | None = Field(default=None, description=_REVISION)
    layer: int | None = Field(default=None, ge=0, description=_LAYER)
    num_codebooks: int | None = Field(
        default=None, ge=1, description="of codecs, the first so many; null: as published"
    )
    mode: Literal["exact", "fast"] = Field(default="exact", description="exact (float32), or fast (bfloat16)")
    output: Literal["codes", "features", "embedding"] | None = Field(
        default=None, description="of features: codes, features or embedding; null: the tokenizer's own"
    )
    reduce: ReductionPlace | None = Field(
        default=None, description="of features kept as they are: stack:4, stride:2, mean:8 or ctc:WEIGHTS"
    )
    language: str | None = Field(default=None, description="of what is transcribed, such as 'en'; null: it is heard")
    task: str | None = Field(
        default=None, description="transcribe, or translate (into English); null: the weights' own"
    )
    of: str | None = Field(default=None, description="of derived tokens: the stream that they are made of")


class Units(Section):
    stream: str = Field(description="a stream of this recipe, of one codebook, that is made first")
    name: StreamName = Field(default="bpe", description="what tokenizer bpe names as its codebook")
    size: int = Field(default=5_000, ge=2, le=1 << 20, description="tokens, the units themselves among them")
    budget: Annotated[str, AfterValidator(_budget)] = Field(default="64MB", description="bytes of units, four each")
    seed: int = Field(default=0, ge=0, le=10**9, description="of the sample")


class Tokenize(Section):
    engine: Literal["ray", "inline"] = Field(default="ray", description="ray, or inline (this process)")
    address: str | None = Field(default=None, description="a Ray cluster; null: one on this machine")
    workers: int | None = Field(default=None, ge=1, description="null: one per CPU core, or per GPU")
    device: str = Field(default="cpu", description="cpu or cuda; codebooks are fitted on it, too")
    max_error_share: float = Field(
        default=0.05, ge=0, le=1, description="stop when more than this share of segments fails"
    )
    any_numerics: bool = Field(default=False, description="let one stream mix machines whose rounding may differ")
    local_files_only: bool = Field(default=False, description="never ask the network for weights")


class Export(Section):
    format: Literal["webdataset"] = Field(default="webdataset", description="webdataset: plain tars")
    view: StreamName = Field(default="plain", description="its name, below ROOT/webdataset/")
    streams: list[str] | None = Field(default=None, description="null: all of this recipe")


class Recipe(Section):
    root: LocalPath = Field(default="tokens", description="the dataset's folder, or a store's URI; created if need be")
    corpus: Corpus = Field(description="the recordings, and how they become segments")
    codebooks: list[Codebook] = Field(
        default=[Codebook(tokenizer="mfcc-kmeans"), Codebook(tokenizer="mel-rvq")],
        description="made where there is none of the name yet; if left out: those that the streams need",
    )
    streams: dict[StreamName, Stream] = Field(
        default={"semantic": Stream(tokenizer="mfcc-kmeans"), "acoustic": Stream(tokenizer="mel-rvq")},
        min_length=1,
        description="the tables of tokens, by name",
    )
    units: list[Units] = Field(default=[], description="models that join frequent units, made where there is none")
    tokenize: Tokenize = Field(default=Tokenize(), description="where the work is done")
    export: list[Export] = Field(default=[], description="views for trainers that do not read tables")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [codebook.codebook_name for codebook in self.codebooks]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise Mistake(f"two codebooks are called {name!r}; give this one another name.", "codebooks", number)
        for number, model in enumerate(self.units):
            if model.name in [other.name for other in self.units[:number]]:
                raise Mistake(f"two models are called {model.name!r}; name them apart.", "units", number, "name")
            if model.stream not in self.streams:
                there = ", ".join(self.streams)
                raise Mistake(
                    f"this recipe has no stream {model.stream!r}; it has: {there}.", "units", number, "stream"
                )
        views = [export.view for export in self.export]
        for number, export in enumerate(self.export):
            if export.view in views[:number]:
                raise Mistake(f"two exports have the view {export.view!r}; name them apart.", "export", number, "view")
            for place, name in enumerate(export.streams or ()):
                if name not in self.streams:
                    raise Mistake(
                        f"this recipe has no stream {name!r}; it has: {', '.join(self.streams)}.",
                        *("export", number, "streams", place),
                    )
        return self
