"""What each token of a layout stands for: sizes, offsets and special tokens, column by column, to and from JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...storage.layouts import Codes, token_dtype
from ...storage.selection import whole
from ...tokenizers.spec import StreamSpec, UserError, did_you_mean


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens `[offset, offset + size)` of a column: the codes of a codebook, or one special token such as `<bos>`."""

    name: str  # of a stream, or of what shares its codebooks; of a special token itself
    codebook: int | None  # None: a special token
    column: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class Vocabulary:
    """The blocks of each column, without gaps: a column's tokens lie in `[0, size)`."""

    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, *columns: Iterable[tuple[str, int | None, int]]) -> "Vocabulary":
        """Of columns as lists of (name, codebook, size), in which every token follows the one before."""
        blocks = []
        for number, column in enumerate(columns):
            offset = 0
            for name, codebook, size in column:
                blocks.append(Block(name, codebook, number, offset, size))
                offset += size
        return cls(tuple(blocks))

    @cached_property
    def _by_name(self) -> dict[tuple[str, int | None, int], Block]:
        return {(block.name, block.codebook, block.column): block for block in self.blocks}

    @cached_property
    def column_sizes(self) -> tuple[int, ...]:
        num_columns = 1 + max(block.column for block in self.blocks)
        return tuple(max(block.end for block in self.blocks if block.column == number) for number in range(num_columns))

    @property
    def dtype(self) -> type[np.integer]:
        """The smallest type that holds all tokens."""
        return token_dtype(max(self.column_sizes))

    def block(self, name: str, codebook: int | None = 0, column: int = 0) -> Block:
        """Raises `UserError` if there is none."""
        try:
            return self._by_name[name, codebook, column]
        except KeyError:
            there = ", ".join(dict.fromkeys(block.name for block in self.blocks))
            book = "" if codebook is None else f", codebook {codebook}"
            raise UserError(f"The vocabulary has no {name}{book} in column {column}; it has {there}.") from None

    def token(self, special: str, column: int = 0) -> int:
        """The number of a special token. Raises `UserError` if there is none."""
        return self.block(special, None, column).offset

    def has(self, special: str, column: int = 0) -> bool:
        return (special, None, column) in self._by_name

    def said(self, token: int, column: int = 0) -> str:
        """A token as people read it: `acoustic.2:17`, `<bos>`."""
        for block in self.blocks:
            if block.column == column and block.offset <= token < block.end:
                if block.codebook is None:
                    return block.name
                return f"{block.name}.{block.codebook}:{token - block.offset}"
        raise ValueError(f"token {token} of a column of {self.column_sizes[column]}")

    def specials(self, column: int = 0) -> dict[str, int]:
        return {block.name: block.offset for block in self.blocks if block.codebook is None and block.column == column}

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(block) for block in self.blocks]

    @classmethod
    def from_json(cls, blocks: Sequence[dict[str, Any]]) -> "Vocabulary":
        """Raises `UserError` for blocks that overlap or leave gaps."""
        made = cls(tuple(Block(**block) for block in blocks))
        ends: dict[int, int] = {}
        for block in made.blocks:
            if block.offset != ends.get(block.column, 0) or block.size < 1:
                raise UserError(
                    f"The vocabulary is damaged: {block.name} begins at {block.offset} in column {block.column}, "
                    f"expected {ends.get(block.column, 0)}. Take it from the dataset or the checkpoint again."
                )
            ends[block.column] = block.end
        return made


def books_of(name: str, spec: StreamSpec, books: Iterable[int] | None = None) -> list[tuple[str, int | None, int]]:
    """Blocks for the codebooks of a stream, for `Vocabulary.of`."""
    return [(name, book, spec.codebook_size) for book in (range(spec.num_codebooks) if books is None else books)]


def special(*names: str) -> list[tuple[str, int | None, int]]:
    """Blocks for special tokens, for `Vocabulary.of`."""
    return [(name, None, 1) for name in names]


def require_codebooks(layout: str, stream: str, spec: StreamSpec, needed: int) -> None:
    """Raise `UserError` unless a stream has codes, and so many codebooks are read of it."""
    if spec.dim:
        raise UserError(f"Layout {layout} takes codes; stream {stream!r} holds frames of {spec.dim} numbers.")
    if spec.chunk_length:
        raise UserError(
            f"Layout {layout} takes no chunks that overlap, of which stream {stream!r} is made: frames of two stand "
            "for the same samples. Name another stream."
        )
    if whole(needed, f"The number of codebooks of stream {stream!r}") < 1:
        raise UserError(f"Layout {layout} takes 1 codebook of stream {stream!r} or more; {needed} were asked for.")
    if spec.num_codebooks < needed:
        raise UserError(
            f"Layout {layout} takes {needed} codebook(s) of stream {stream!r}, of which {spec.num_codebooks} "
            f"{'is' if spec.num_codebooks == 1 else 'are'} read. Read more, or name another stream."
        )


def stream_taken(layout: str, specs: Mapping[str, StreamSpec], stream: str, needed: int | None = 1) -> StreamSpec:
    """The spec of a stream of which a layout needs so many codebooks (None: all that are read).

    Raises `UserError` unless the stream is there, has codes, a frame every hop, and so many codebooks are read of it.
    """
    if stream not in specs:
        there = ", ".join(specs) or "none"
        raise UserError(f"Layout {layout} takes stream {stream!r}; there are: {there}.{did_you_mean(stream, specs)}")
    require_codebooks(layout, stream, specs[stream], max(specs[stream].num_codebooks, 1) if needed is None else needed)
    return specs[stream]


def require_distinct(layout: str, *streams: str) -> None:
    """Raise `UserError` if a layout is given one stream for two."""
    for stream in streams:
        if streams.count(stream) > 1:
            raise UserError(f"Layout {layout} takes {len(streams)} different streams; {stream!r} is named twice.")


def offset_codes(book: Codes, offset: int, dtype: type[np.integer]) -> Codes:
    """Codes as tokens of a block."""
    return book.astype(dtype, copy=False) if offset == 0 else np.add(book, offset, dtype=dtype, casting="unsafe")
