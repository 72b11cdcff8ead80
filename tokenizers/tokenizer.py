"""What a tokenizer is: the protocols that the families implement, and what the registry knows of each."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from .spec import StreamSpec


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


class Tokenizer(Protocol):
    """Waveforms to codes and, where `spec.decode_sample_rate` is set, back."""

    spec: StreamSpec
    fingerprint: dict[str, str]  # named parts of everything that decides the codes

    def encode(self, waveform_N: Tensor) -> Tensor:
        """Codes `[K, T]` int64 on the CPU of a mono float32 waveform at `spec.sample_rate`; T is `num_frames(N, spec)`.

        Codes depend on the waveform alone; memory beyond the waveform and the codes does not grow with its length.
        """
        ...

    def decode(self, codes_KT: Tensor) -> Tensor:
        """Sound `[decoded_samples(T, spec)]`, float32 on the CPU, from the first K >= 1 codebooks."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerEntry:
    """What the registry knows of a tokenizer without its weights.

    `describe` raises `UserError` for weights, layers and numbers of codebooks that cannot be had; `open` builds the
    model on a device: `Features` where `needs_codebook`, else a `Tokenizer`.
    """

    spec: StreamSpec  # of the published weights
    kind: Literal["semantic", "acoustic"]
    about: str
    needs_codebook: bool
    last_frame: str  # what the last, partial frame sees
    long_audio: str  # the rule for long recordings, and what of it is exact
    weights: str | None = None  # where the published ones are: a hub id
    licence: str = ""  # of the published weights
    layer: int | None = None  # of features: the default
    num_layers: int = 0  # of features
    modes: tuple[Mode, ...] = (Mode.EXACT,)
    fast_change: str = ""  # share of ids that `fast` changes, as measured
    describe: Callable[[TokenizerConfig], Description]
    open: Callable[[Description, str], Any]


def fingerprint_hash(fingerprint: dict[str, str]) -> str:
    """Twelve hexadecimal digits that stand for all parts."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
