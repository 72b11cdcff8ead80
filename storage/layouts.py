"""Layouts: from a segment's streams to the one sequence of tokens that a language model reads.

Any callable that takes a `Segment` and gives its tokens is a layout. Those of this file also say beforehand how many
tokens there will be, and lay out many segments at once: readers then need no more than the segments they use.

Axes: N segments, T frames of one segment or of many end to end, K codebooks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..tokenizers.spec import StreamSpec

Codes = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment's id and codes `[K, T]` int64 of each stream."""

    id: str
    codes: dict[str, Tensor]


class Layout(Protocol):
    """Tokens of a segment, `[tokens]`, 0 or greater."""

    def __call__(self, segment: Segment, /) -> Tensor | Codes | Sequence[int]: ...


@runtime_checkable
class PlannedLayout(Protocol):
    """A layout that knows its sizes from frame counts, and lays out many segments at once."""

    @property
    def stream(self) -> str:
        """The stream that it reads."""
        ...

    def __call__(self, segment: Segment, /) -> Tensor: ...

    def tokens_per_frame(self, num_codebooks: int) -> int: ...

    def vocab_size(self, spec: StreamSpec, num_codebooks: int) -> int:
        """Tokens lie in `[0, vocab_size)`."""
        ...

    def lay(self, books: Sequence[Codes], spec: StreamSpec) -> Codes:
        """Tokens of frames end to end, `[T * tokens_per_frame]`, from K codebooks of `[T]` codes."""
        ...


@dataclass(frozen=True, slots=True)
class flatten:
    """All codebooks of a stream, frame by frame: code c of codebook k is token k x codebook_size + c.

    The coarse-to-fine flattening of AudioLM (Borsos et al. 2022) and of the "flattening pattern" of MusicGen (Copet et
    al. 2023), T x K tokens for T frames.
    """

    stream: str
    codebook_size: int | None = None  # None: the stream's, where a `TokenDataset` lays out

    def __call__(self, segment: Segment) -> Tensor:
        if self.codebook_size is None:
            raise ValueError("flatten of a single segment needs its codebook_size")
        codes_KT = segment.codes[self.stream]
        offsets_K1 = (np.arange(codes_KT.shape[0]) * self.codebook_size)[:, None]
        return (codes_KT + codes_KT.new_tensor(offsets_K1)).t().reshape(-1)

    def tokens_per_frame(self, num_codebooks: int) -> int:
        return num_codebooks

    def vocab_size(self, spec: StreamSpec, num_codebooks: int) -> int:
        return num_codebooks * (self.codebook_size or spec.codebook_size)

    def lay(self, books: Sequence[Codes], spec: StreamSpec) -> Codes:
        size = self.codebook_size or spec.codebook_size
        tokens_TK = np.empty((len(books[0]), len(books)), dtype=token_dtype(size * len(books)))
        for index, book_T in enumerate(books):
            np.add(book_T, index * size, out=tokens_TK[:, index], casting="unsafe")
        return tokens_TK.reshape(-1)


@dataclass(frozen=True, slots=True)
class semantic:
    """The first codebook of a stream, as it is: the units that textless language models train on."""

    stream: str

    def __call__(self, segment: Segment) -> Tensor:
        return segment.codes[self.stream][0]

    def tokens_per_frame(self, num_codebooks: int) -> int:
        return 1

    def vocab_size(self, spec: StreamSpec, num_codebooks: int) -> int:
        return spec.codebook_size

    def lay(self, books: Sequence[Codes], spec: StreamSpec) -> Codes:
        return books[0]


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The smallest type that holds these tokens."""
    return np.int16 if vocab_size <= 2**15 else np.int32


def largest_vocabulary(layout: object, specs: Mapping[str, StreamSpec], num_codebooks: Mapping[str, int]) -> int | None:
    """The vocabulary of a planned layout; None for other callables, which nobody can ask."""
    if not isinstance(layout, PlannedLayout):
        return None
    return layout.vocab_size(specs[layout.stream], num_codebooks[layout.stream])
