"""What a tokenizer is: the protocols that the families implement, and what the registry knows of each."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from .spec import StreamSpec


class Output(StrEnum):
    """What a stream of features holds: `codes` by a codebook, the `features`, or their mean (`embedding`)."""

    CODES = "codes"
    FEATURES = "features"
    EMBEDDING = "embedding"


class Mode(StrEnum):
    """`exact`: float32, the published model's own codes. `fast`: bfloat16, for a measured share of other codes."""

    EXACT = "exact"
    FAST = "fast"

    @property
    def precision(self) -> str:
        return "float32" if self is Mode.EXACT else "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """What a person asks of a tokenizer; None takes the tokenizer's own default. Picklable."""

    tokenizer: str  # the name in the registry
    weights: str | None = None  # a hub id, or a folder in Hugging Face layout
    revision: str | None = None  # of a hub id: a commit, a branch or a tag
    local_files_only: bool = False  # never ask the network
    layer: int | None = None  # of features: 0 is what the transformer is given, 1 what its first layer gives
    num_codebooks: int | None = None  # of codecs: the first so many
    mode: Mode = Mode.EXACT
    output: Output | None = None  # of features
    reduce: str | None = None  # of features that stay features: see `reduction.parse_reduction`
    language: str | None = None  # of what is transcribed, such as "en"
    task: str | None = None  # of what transcribes: "transcribe" or "translate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a stream has of one segment, on the CPU: T frames of codes, or of numbers where its spec has a `dim`."""

    codes_KT: Tensor  # int64; K is 0 where frames are numbers
    frames_TD: Tensor | None = None  # float16
    durations_T: Tensor | None = None  # int32, frames that each frame stands for
    scales_C: Tensor | None = None  # float32, of the chunks of a chunked stream
    text: str | None = None

    @property
    def num_frames(self) -> int:
        return self.codes_KT.shape[1]


@runtime_checkable
class Tokenizer(Protocol):
    """Waveforms to codes and, where `spec.decode_sample_rate` is set, back."""

    spec: StreamSpec
    fingerprint: dict[str, str]  # named parts of everything that decides the codes

    def encode(self, waveform_N: Tensor) -> Tensor:
        """Codes `[K, T]` int64 on the CPU of a float32 waveform as `spec.sound` says; T is `num_frames(N, spec)`.

        Codes depend on the waveform alone; memory beyond the waveform and the codes does not grow with its length.
        """
        ...

    def decode(self, codes_KT: Tensor) -> Tensor:
        """Sound `[decoded_samples(T, spec)]` or `[channels, ...]`, float32 on the CPU, from the first K codebooks."""
        ...

    def gaps(self, waveform_N: Tensor) -> Tensor:
        """How sure each code is, `[K, T]` float64 on the CPU: see `ResidualQuantizer.gaps`."""
        ...


@runtime_checkable
class BatchTokenizer(Protocol):
    """A tokenizer that can encode several segments at once with the codes that each has alone."""

    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        """Codes of each waveform, as `encode` gives them; all are padded to `padded_length` samples on the device."""
        ...


@runtime_checkable
class RowTokenizer(Protocol):
    """A tokenizer that gives more than codes, or other things."""

    spec: StreamSpec
    fingerprint: dict[str, str]

    def tokens(self, waveform_N: Tensor) -> Tokens:
        """All that the stream has of a waveform, with what `Tokenizer.encode` promises."""
        ...


@runtime_checkable
class BatchRowTokenizer(Protocol):
    """A `RowTokenizer` that can take several segments at once."""

    def tokens_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tokens]:
        """Tokens of each waveform, as `tokens` gives them; all are padded to `padded_length` samples on the device."""
        ...


@runtime_checkable
class RowDecoder(Protocol):
    """A tokenizer whose sound needs more than codes."""

    def decode_tokens(self, tokens: Tokens) -> Tensor:
        """Sound, float32 on the CPU, of a segment."""
        ...


@runtime_checkable
class TextTokenizer(Protocol):
    """A tokenizer of a segment's transcript."""

    spec: StreamSpec
    fingerprint: dict[str, str]

    def tokens_of_text(self, text: str | None) -> Tokens:
        """All that the stream has of a segment with this transcript; None: nobody knows what is said in it."""
        ...


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a segment and when it is said, in exact seconds from the segment's first sample."""

    label: str
    start_s: Fraction
    end_s: Fraction


@runtime_checkable
class WordTokenizer(Protocol):
    """A tokenizer of a segment's words at their times."""

    spec: StreamSpec
    fingerprint: dict[str, str]

    def tokens_of_words(self, words: Sequence[Word] | None) -> Tokens:
        """All that the stream has of a segment with these words; None: nobody knows when what is said in it."""
        ...


@runtime_checkable
class UnitTokenizer(Protocol):
    """A tokenizer of the codes of another stream, which it can give back."""

    spec: StreamSpec
    fingerprint: dict[str, str]

    def tokens_of_tokens(self, source: Tokens) -> Tokens:
        """All that the stream has of a segment of which its source has these."""
        ...

    def source_of(self, tokens: Tokens) -> Tensor:
        """The very codes `[K, S]` int64 that the tokens were made of."""
        ...


def tokens_of(tokenizer: Tokenizer | RowTokenizer, waveform_N: Tensor) -> Tokens:
    """All that a stream has of one segment."""
    if isinstance(tokenizer, RowTokenizer):
        return tokenizer.tokens(waveform_N)
    return Tokens(codes_KT=tokenizer.encode(waveform_N))


def tokens_of_batch(
    tokenizer: Tokenizer | RowTokenizer, waveforms: Sequence[Tensor], padded_length: int
) -> list[Tokens]:
    """`tokens_of` each, padded to `padded_length` together where the tokenizer takes batches."""
    if isinstance(tokenizer, BatchRowTokenizer):
        return tokenizer.tokens_batch(waveforms, padded_length)
    if isinstance(tokenizer, BatchTokenizer) and not isinstance(tokenizer, RowTokenizer):
        return [Tokens(codes_KT=codes_KT) for codes_KT in tokenizer.encode_batch(waveforms, padded_length)]
    return [tokens_of(tokenizer, waveform_N) for waveform_N in waveforms]


def sound_of(tokenizer: Tokenizer | RowTokenizer, tokens: Tokens) -> Tensor:
    """Sound of one segment, float32 on the CPU."""
    if isinstance(tokenizer, RowDecoder):
        return tokenizer.decode_tokens(tokens)
    assert not isinstance(tokenizer, RowTokenizer)
    return tokenizer.decode(tokens.codes_KT)


class Features(Protocol):
    """Frames of real numbers on a clock: what a codebook is fitted on and quantizes."""

    spec: StreamSpec  # with the number and size of codebooks that `codebook fit` makes by default
    dim: int
    fingerprint: dict[str, str]  # named parts of everything that decides the numbers in `exact` mode
    precision: str  # float32 or bfloat16

    def extract(self, waveform_N: Tensor) -> Tensor:
        """Features `[T, dim]` float32 on the device."""
        ...


@runtime_checkable
class PiecewiseFeatures(Protocol):
    """Features that need not be in memory all at once."""

    def pieces(self, waveform_N: Tensor) -> Iterator[Tensor]:
        """Features `[t, dim]` from the first frame to the last; where pieces end is a function of the length alone."""
        ...


@runtime_checkable
class LayeredFeatures(Protocol):
    """Features that a model has at several layers, all from one pass."""

    def layer_pieces(self, waveform_N: Tensor, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Pieces of the features at each layer, as those that are opened for that layer alone give them."""
        ...


@runtime_checkable
class BatchFeatures(Protocol):
    """Features of several segments at once, each as it is alone."""

    def extract_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        """Features `[T, dim]` of each waveform, all padded to `padded_length` samples on the device."""
        ...


@runtime_checkable
class Synthesizer(Protocol):
    """Features that know the way back to sound."""

    def synthesize(self, features_TD: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Description:
    """What a tokenizer will be with given weights, known before any model is built."""

    config: TokenizerConfig
    spec: StreamSpec
    fingerprint: dict[str, str]  # of features: without the codebook
    dim: int | None = None  # of features
    weights: Any = None  # what the family found out about its weights, for `open`


@dataclass(frozen=True, slots=True)
class SourceStream:
    """What derived tokens are told of the stream that they are made of."""

    name: str
    spec: StreamSpec
    fingerprint: dict[str, str]  # of its tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerEntry:
    """What the registry knows of a tokenizer without its weights.

    `describe` raises `UserError` for weights, layers and numbers of codebooks that cannot be had; `open` builds the
    model on a device: `Features` where `needs_codebook`, else a `Tokenizer` or `RowTokenizer`, by what it `takes` a
    `TextTokenizer`, a `WordTokenizer` or a `UnitTokenizer`. What takes codes is described in two steps: `describe`
    looks at the options, `derive` at the source and at the model of units, if it needs one.
    """

    spec: StreamSpec  # of the published weights
    kind: Literal["semantic", "acoustic", "text", "derived"]
    takes: Literal["audio", "text", "codes"] = "audio"
    about: str
    needs_codebook: bool
    last_frame: str  # what the last, partial frame sees
    long_audio: str  # the rule for long recordings, and what of it is exact
    weights: str | None = None  # where the published ones are: a hub id, or a page
    licence: str = ""  # of the published weights
    layer: int | None = None  # of features: the default
    num_layers: int = 0  # of features
    output: Output = Output.CODES  # of features: the default
    modes: tuple[Mode, ...] = (Mode.EXACT,)
    fast_change: str = ""  # share of ids that `fast` changes, as measured
    hears_words: bool = False  # whether it can be told the language and the task
    needs_units: bool = False  # of what takes codes: whether it needs a model that `wavemill units fit` makes
    describe: Callable[[TokenizerConfig], Description]
    derive: Callable[[Description, SourceStream, Any], Description] | None = None
    open: Callable[[Description, str], Any]


def fingerprint_hash(fingerprint: dict[str, str]) -> str:
    """Twelve hexadecimal digits that stand for all parts."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
