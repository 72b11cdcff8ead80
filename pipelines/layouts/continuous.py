"""Layouts of frames of numbers, one a step.

Axes: N segments, T frames end to end, D numbers of a frame, S steps end to end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...storage.layouts import Halves, Ints, Laid, StreamRows
from ...tokenizers.spec import StreamSpec, UserError, did_you_mean
from .sequence import put
from .vocabulary import Vocabulary, books_of, special, stream_taken

_FRAME = "<frame>"


@dataclass(frozen=True)
class ContinuousPlan:
    """A `LayoutPlan` of the frames of a stream of numbers, perhaps behind the codes of another stream."""

    stream: str
    prefix: str | None
    ends: bool
    vocabulary: Vocabulary
    read_to_plan: tuple[str, ...] = ()

    @property
    def column_sizes(self) -> Sequence[int]:
        return self.vocabulary.column_sizes

    @property
    def frame_tokens(self) -> Mapping[str, int]:
        return {self.stream: self.vocabulary.token(_FRAME)}

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        return self._given(rows) + rows[self.stream].counts_N + int(self.ends)

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        frames_TD = rows[self.stream].frames_TD
        assert frames_TD is not None
        steps_N, given_N = self.num_steps(rows), self._given(rows)
        begin_N, rest_N = np.cumsum(steps_N) - steps_N, steps_N - given_N
        tokens_S = np.full(int(steps_N.sum()), self.frame_tokens[self.stream], dtype=self.vocabulary.dtype)
        if self.prefix is not None:
            prefix = rows[self.prefix]
            put(tokens_S, begin_N, prefix.books[0], prefix.counts_N)
        if self.ends:
            tokens_S[begin_N + given_N - 1] = self.vocabulary.token("<bos>")
            tokens_S[begin_N + steps_N - 1] = self.vocabulary.token("<eos>")
        loss_S = None
        if self.prefix is not None:
            loss_S = np.repeat(np.tile([False, True], len(steps_N)), np.stack([given_N, rest_N], axis=1).reshape(-1))
        return Laid(tokens_S, loss_S, {self.stream: frames_TD})

    def invert(self, laid: Laid) -> dict[str, StreamRows]:
        if self.stream not in laid.frames:
            raise ValueError(f"no frames of {self.stream}")
        frames_TD = laid.frames[self.stream]
        if (num := int((laid.tokens == self.frame_tokens[self.stream]).sum())) != len(frames_TD):
            raise ValueError(f"{len(frames_TD)} frames for {num} steps of {_FRAME}")
        found = {self.stream: _rows(len(frames_TD), frames_TD=frames_TD)}
        if self.prefix is not None:
            size = self.vocabulary.block(self.prefix).size
            codes_T = laid.tokens[(laid.tokens >= 0) & (laid.tokens < size)]
            found[self.prefix] = _rows(len(codes_T), [codes_T])
        if not np.array_equal(self.lay(found).tokens, laid.tokens):
            raise ValueError("steps in another order than any segment gives")
        return found

    def _given(self, rows: Mapping[str, StreamRows]) -> Ints:
        """Steps before the first frame."""
        bos_N = np.full_like(rows[self.stream].counts_N, int(self.ends))
        return bos_N if self.prefix is None else bos_N + rows[self.prefix].counts_N


def _rows(count: int, books: Sequence[np.ndarray] = (), frames_TD: Halves | None = None) -> StreamRows:
    return StreamRows(np.array([count], dtype=np.int64), books, frames_TD)


@dataclass(frozen=True, slots=True)
class continuous:
    """The frames of a stream of numbers as they are, one a step: latents without a quantizer, features.

    What continuous audio language models train on (CALM: Rouard et al. 2025). The steps that hold numbers are those of
    the token `<frame>`; their numbers are in `Laid.frames`, and by that token one knows them from all others. With
    `ends`, `<bos>` before and `<eos>` behind each segment. `prefix` names a stream of codes (text, semantic units), of
    which the first codebook is given in front, with the `<bos>`, and not predicted.

    The numbers are those of the table. Models want them normalized: mean and variance of the whole stream are in the
    footers of its files (`wavemill.storage.statistics.stream_statistics`), and taking these is the trainer's part.
    """

    stream: str
    prefix: str | None = None
    ends: bool = True

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.stream: None} if self.prefix is None else {self.prefix: 1, self.stream: None}

    def plan(self, specs: Mapping[str, StreamSpec]) -> ContinuousPlan:
        require_numbers("continuous", specs, self.stream)
        blocks = special("<pad>")  # padding is 0, and no frame's token may be
        if self.prefix is not None:
            blocks = books_of(self.prefix, stream_taken("continuous", specs, self.prefix), [0])
        vocabulary = Vocabulary.of([*blocks, *special(_FRAME, *(["<bos>", "<eos>"] if self.ends else []))])
        return ContinuousPlan(self.stream, self.prefix, self.ends, vocabulary)


def require_numbers(layout: str, specs: Mapping[str, StreamSpec], stream: str) -> None:
    """Raise `UserError` unless a stream is there, has frames of numbers, and these have a clock or none at all."""
    if stream not in specs:
        there = ", ".join(specs) or "none"
        raise UserError(
            f"Layout {layout} takes stream {stream!r}, which is not among those that are read: {there}."
            f"{did_you_mean(stream, specs)}"
        )
    spec = specs[stream]
    if not spec.dim:
        raise UserError(
            f"Layout {layout} takes frames of numbers; stream {stream!r} ({spec.tokenizer}) holds codes. Name a stream "
            "of latents, features or embeddings."
        )
    if spec.chunk_length:
        raise UserError(
            f"Layout {layout} takes a frame every hop; stream {stream!r} is made of chunks that overlap, in which "
            "frames of two stand for the same samples. Name another stream."
        )
