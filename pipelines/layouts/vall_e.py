"""VALL-E: text, then a first codebook to be continued, or all codebooks to be filled in.

Axes: N segments, T frames or text ids end to end, S steps end to end, Q codebooks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from ...storage.layouts import Codes, Ints, Laid, StreamRows
from ...tokenizers.spec import StreamSpec, UserError
from .sequence import Mark, Run, SequencePlan, put
from .vocabulary import Block, Vocabulary, books_of, require_distinct, special, stream_taken


@dataclass(frozen=True, slots=True)
class vall_e:
    """Text ids and `<sep>`, given, then the first codebook of a segment and `<eos>`, to be predicted.

    The autoregressive model of VALL-E (Wang et al. 2023), whose text is phones: any stream of ids does. An acoustic
    prompt is nothing of its own but the beginning of the codes: to generate, the text is that of the prompt and of what
    is to be said, and the codes go on from the prompt's. With `prompt_s`, training does likewise: the first seconds of
    the segment's own codes are given, too.
    """

    text: str
    acoustic: str
    prompt_s: float = 0.0

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.text: 1, self.acoustic: 1}

    def plan(self, specs: Mapping[str, StreamSpec]) -> SequencePlan:
        require_distinct("vall-e", self.text, self.acoustic)
        text, acoustic = (stream_taken("vall-e", specs, stream) for stream in (self.text, self.acoustic))
        prompt = _frames("vall-e", self.acoustic, acoustic, self.prompt_s)
        parts = (
            Run(self.text, (0,), is_predicted=False),
            Mark("<sep>", is_predicted=False),
            Run(self.acoustic, (0,), prompt=prompt),
            Mark("<eos>"),
        )
        blocks = [*books_of(self.text, text, [0]), *books_of(self.acoustic, acoustic, [0])]
        return SequencePlan(parts, Vocabulary.of([*blocks, *special("<sep>", "<eos>")]))


@dataclass(frozen=True, slots=True)
class vall_e_nar:
    """Text ids and `<sep>`, given, then a step for each frame with all its codebooks.

    What the second, non-autoregressive model of VALL-E (Wang et al. 2023) is trained on. The first column has the text
    and the first codebook, each other column its codebook, and `<pad>` where the text stands. Which codebook is
    predicted from the coarser ones is drawn by the training. The frames of the first `prompt_s` seconds are given.
    """

    text: str
    acoustic: str
    codebooks: int | None = None  # None: all that are read
    prompt_s: float = 0.0

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.text: 1, self.acoustic: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> "TextFirstPlan":
        require_distinct("vall-e-nar", self.text, self.acoustic)
        text = stream_taken("vall-e-nar", specs, self.text)
        acoustic = stream_taken("vall-e-nar", specs, self.acoustic, self.codebooks)
        num = acoustic.num_codebooks if self.codebooks is None else self.codebooks
        if num < 2:
            raise UserError(
                f"Layout vall-e-nar fills in codebooks after the first; of stream {self.acoustic!r} 1 is read. Read "
                "2 or more."
            )
        first = [*books_of(self.text, text, [0]), *books_of(self.acoustic, acoustic, [0]), *special("<sep>")]
        others = [[*books_of(self.acoustic, acoustic, [book]), *special("<pad>")] for book in range(1, num)]
        return TextFirstPlan(
            text=self.text,
            acoustic=self.acoustic,
            num_codebooks=num,
            prompt=_frames("vall-e-nar", self.acoustic, acoustic, self.prompt_s),
            vocabulary=Vocabulary.of(first, *others),
        )


@dataclass(frozen=True, kw_only=True)
class TextFirstPlan:
    """A `LayoutPlan` of text in the first column, then of frames with their codebooks side by side."""

    text: str
    acoustic: str
    num_codebooks: int
    prompt: int  # frames that are given
    vocabulary: Vocabulary
    frame_tokens: Mapping[str, int] = field(default_factory=dict)
    read_to_plan: tuple[str, ...] = ()

    @property
    def column_sizes(self) -> Sequence[int]:
        return self.vocabulary.column_sizes

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        return rows[self.text].counts_N + 1 + rows[self.acoustic].counts_N

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        text, acoustic, steps_N = rows[self.text], rows[self.acoustic], self.num_steps(rows)
        place_N = np.cumsum(steps_N) - steps_N
        tokens_SQ = np.empty((int(steps_N.sum()), self.num_codebooks), dtype=self.vocabulary.dtype)
        sep_N = place_N + text.counts_N
        tokens_SQ[sep_N] = self._mark()
        place_T = np.arange(int(text.counts_N.sum())) + np.repeat(place_N - text.begins_N, text.counts_N)
        tokens_SQ[place_T] = self._mark()
        tokens_SQ[place_T, 0] = text.books[0]
        put(tokens_SQ, sep_N + 1, self._side_by_side(acoustic), acoustic.counts_N)
        given_N = np.minimum(acoustic.counts_N, self.prompt)
        runs_N = [text.counts_N + 1 + given_N, acoustic.counts_N - given_N]
        loss_S = np.repeat(np.tile([False, True], len(steps_N)), np.stack(runs_N, axis=1).reshape(-1))
        return Laid(tokens_SQ, loss_S)

    def invert(self, laid: Laid) -> dict[str, StreamRows]:
        if laid.tokens.ndim != 2 or laid.tokens.shape[1] != self.num_codebooks:
            raise ValueError(f"tokens {list(laid.tokens.shape)} of {self.num_codebooks} columns")
        tokens_QS = laid.tokens.T
        marks = np.flatnonzero(tokens_QS[0] == self._mark()[0])
        if len(marks) != 1:
            raise ValueError(f"{len(marks)} times <sep>, which stands once")
        sep = int(marks[0])
        if (laid.tokens[: sep + 1, 1:] != self._mark()[1:]).any():
            raise ValueError("codes beside the text")
        text_T = _codes(tokens_QS[0, :sep], self.vocabulary.block(self.text))
        books = [_codes(tokens_QS[block.column, sep + 1 :], block) for block in self._blocks()]
        return {
            self.text: StreamRows(np.array([sep], dtype=np.int64), [text_T]),
            self.acoustic: StreamRows(np.array([len(books[0])], dtype=np.int64), books),
        }

    def _blocks(self) -> list[Block]:
        return [self.vocabulary.block(self.acoustic, book, book) for book in range(self.num_codebooks)]

    def _mark(self) -> Codes:
        """A step of `<sep>`; beside text, all but its first token."""
        pads = [self.vocabulary.token("<pad>", column) for column in range(1, self.num_codebooks)]
        return np.array([self.vocabulary.token("<sep>"), *pads])

    def _side_by_side(self, acoustic: StreamRows) -> Codes:
        dtype = self.vocabulary.dtype
        codes_TQ = np.empty((int(acoustic.counts_N.sum()), self.num_codebooks), dtype=dtype)
        for block, book_T in zip(self._blocks(), acoustic.books, strict=False):
            np.add(book_T, block.offset, out=codes_TQ[:, block.column], dtype=dtype, casting="unsafe")
        return codes_TQ


def _frames(layout: str, stream: str, spec: StreamSpec, length_s: float) -> int:
    """Whole frames of so many seconds. Raises `UserError`."""
    if not 0 <= length_s < math.inf:
        raise UserError(f"Layout {layout} is given a prompt of {length_s} s; it must have 0 s or more.")
    if length_s and not spec.has_clock:
        raise UserError(
            f"Layout {layout} is given a prompt of {length_s:g} s; stream {stream!r} ({spec.tokenizer}) has no clock "
            "that says how many frames these are. Leave out prompt_s."
        )
    return math.floor(Fraction(str(length_s)) * spec.frame_rate)


def _codes(tokens_T: Codes, block: Block) -> Codes:
    """Codes of a block's tokens. Raises `ValueError` for others."""
    codes_T = tokens_T.astype(np.int64) - block.offset
    if ((codes_T < 0) | (codes_T >= block.size)).any():
        raise ValueError(f"tokens in column {block.column} that are not of {block.name}")
    return codes_T
