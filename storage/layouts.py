"""Layouts: from a segment's streams to the one sequence that a language model reads.

Any callable that takes a `Segment` and gives its tokens is a layout. A planned one, such as those of
`wavemill.pipelines.layouts`, also says beforehand how many steps there will be, and lays out many segments at once:
readers then need no more than the segments they use.

Axes: N segments, K codebooks, T frames of one segment or of many end to end, D numbers of a frame, S steps of a
sequence or of many end to end, Q columns (tokens of a step), M steps that hold a frame of numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..tokenizers.spec import StreamSpec, UserError

Codes = NDArray[np.integer]
Ints = NDArray[np.int64]
Halves = NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment: its id, codes `[K, T]` int64 of each stream, and where streams have them frames and durations."""

    id: str
    codes: dict[str, Tensor]
    frames: dict[str, Tensor] = field(default_factory=dict)  # [T, D] float16
    durations: dict[str, Tensor] = field(default_factory=dict)  # [T] int32


class Layout(Protocol):
    """Tokens of a segment, `[S]`, 0 or greater."""

    def __call__(self, segment: Segment, /) -> Tensor | Codes | Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class StreamRows:
    """What N segments have of one stream, end to end."""

    counts_N: Ints  # frames
    books: Sequence[Codes]  # K arrays [T]; none while only counts are known
    frames_TD: Halves | None = None
    durations_T: NDArray[np.int32] | None = None

    @property
    def begins_N(self) -> Ints:
        """Where each segment's frames begin."""
        return np.cumsum(self.counts_N) - self.counts_N


@dataclass(frozen=True, slots=True)
class Laid:
    """N segments laid out, end to end."""

    tokens: Codes  # [S], or [S, Q] where steps have several
    loss_S: NDArray[np.bool_] | None = None  # false: a step that is given, not predicted; None: all are predicted
    frames: Mapping[str, Halves] = field(default_factory=dict)  # by stream [M, D]: see `Plan.frame_tokens`


class Plan(Protocol):
    """A layout of streams whose clocks and alphabets are known."""

    @property
    def column_sizes(self) -> Sequence[int]:
        """How many tokens there are in each column: they lie in `[0, size)`. One column: `tokens` are `[S]`."""
        ...

    @property
    def frame_tokens(self) -> Mapping[str, int]:
        """By stream of numbers the token, in the first column, of a step that holds a frame of it; never 0."""
        ...

    @property
    def read_to_plan(self) -> Sequence[str]:
        """Streams whose codes decide how many steps there are. Of all others the counts of frames do."""
        ...

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        """Steps of each of N segments; codes are there of the streams that are read to plan."""
        ...

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid: ...


class GroupBy(StrEnum):
    """What rows of a corpus belong together, as one segment of several members."""

    PAIR = "pair"  # those of a source with the same `pair`, in the order of the corpus
    PARENT = "parent"  # those that were separated from one segment


@dataclass(frozen=True, slots=True)
class Grouping:
    """Groups of `num_members` rows of one shard; of more separated children the first ones. Others are left out.

    So are pairs that have further rows, in this shard or in another.
    """

    by: GroupBy
    num_members: int


@runtime_checkable
class PlannedLayout(Protocol):
    """A layout that knows its sizes from frame counts, and lays out many segments at once.

    One that takes chunked streams says so by an attribute `takes_chunks`, one of several rows of a corpus by
    `grouping`: it is then given the streams of each member, by the names that `member` gives. One that gives two
    streams the same tokens says so by `same_tokens`, pairs of their names: they must be of one tokenizer and codebook.
    """

    @property
    def streams(self) -> Mapping[str, int | None]:
        """The streams that it reads, and how many codebooks of each; None: all."""
        ...

    def plan(self, specs: Mapping[str, StreamSpec]) -> Plan:
        """The layout of these streams, of which as many codebooks are read as their specs say.

        Raises `UserError` for streams that it cannot take.
        """
        ...


def member(stream: str, index: int) -> str:
    """What a stream of a group's member is called in `rows`."""
    return f"{stream}@{index}"


def stream_of(name: str) -> str:
    """The stream that a layout knows by this name."""
    return name.partition("@")[0]


def require_made(layout: object) -> None:
    """Raise `UserError` for the class of a layout in the place of a layout."""
    if isinstance(layout, type):
        name = layout.__name__
        raise UserError(f"The layout {name} was given without what it takes: write {name}(...), with its streams.")


def grouping_of(layout: object) -> Grouping | None:
    return getattr(layout, "grouping", None)


def token_dtype(size: int) -> type[np.integer]:
    """The smallest type that holds tokens below `size`."""
    return np.int16 if size <= 2**15 else np.int32
