"""Codebooks filled in from both sides, all frames at once: SoundStorm's parallel decoding, VALL-E's second model.

Axes: S steps, Q columns, T frames, V tokens of a column, M hidden steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ...pipelines.layouts.grid import GridPlan
from ...pipelines.layouts.masks import most_confident, uncovered_by_iteration
from ...pipelines.layouts.vall_e import TextFirstPlan
from ...pipelines.layouts.vocabulary import Block, Vocabulary
from ...storage.layouts import Codes, StreamRows
from ...tokenizers.spec import UserError
from .continuing import Books, Stage, windows
from .drawing import Drawer, Sampling, legal_tokens

ITERATIONS = 16  # of the first codebook; of each other 1, as SoundStorm's (16, 1, ..., 1)


@dataclass(frozen=True, slots=True)
class _Level:
    """A column to be filled in: its codes, and the token that hides them."""

    codes: Block
    hidden: int
    iterations: int


@torch.inference_mode()
def fill_soundstorm(
    stage: Stage,
    plan: GridPlan,
    books: Books,
    total: int,
    drawer: Drawer,
    *,
    semantic: str,
    acoustic: str,
    iterations: int = ITERATIONS,
) -> None:
    """Draw the acoustic codes behind those in `books`, up to `total` frames, given all semantic ones.

    Codebook by codebook; of each, so many times, all that is hidden is drawn and the surest is kept, by the cosine
    schedule (Borsos et al. 2023, section 3.3). What does not fit into the model's steps is filled in window by window,
    with the last half of what is known before it.
    """
    rate = plan.rates[semantic]
    size = stage.length if total > stage.length else total
    grain = rate.denominator  # frames after which a semantic one begins with an acoustic one
    if size < total and size // 2 < grain:
        raise UserError(
            f"The {stage.name} run was trained on sequences of {stage.length:,} steps: too few to go on from. Train "
            "with a larger --length."
        )
    levels = [
        _Level(
            plan.vocabulary.block(acoustic, column.book, number),
            plan.vocabulary.token("<mask>", number),
            iterations if column.book == 0 else 1,
        )
        for number, column in enumerate(plan.columns)
        if column.stream == acoustic
    ]
    filler = _Filler(stage, plan.vocabulary, drawer, (total - len(books[acoustic][0])) * len(levels))
    for window in windows(len(books[acoustic][0]), total, size, grain=grain):
        num, known = window.end - window.begin, window.known - window.begin
        rows = {
            semantic: _cut(books[semantic], window.begin * rate, None if window.end == total else window.end * rate),
            acoustic: _placed(books[acoustic], window.begin, num),
        }
        # semantic frames that end later than the acoustic ones have steps of their own, which are padding here
        tokens_SQ = plan.lay(rows).tokens
        filler.fill(tokens_SQ, slice(known, num), levels)
        _take(books[acoustic], tokens_SQ[known:num], levels)


@torch.inference_mode()
def fill_finer(
    stage: Stage, plan: TextFirstPlan, books: Books, known: int, drawer: Drawer, *, text: str, acoustic: str
) -> None:
    """Draw the codebooks after the first behind the `known` frames of a prompt, given the text and all of the first.

    One codebook after the other, each the likeliest everywhere, as VALL-E has it (Wang et al. 2023, section 4.3).
    Raises `UserError` if they do not fit into the model's steps.
    """
    num, before = len(books[acoustic][0]), len(books[text][0]) + 1
    if before + num > stage.length:
        raise UserError(
            f"The {stage.name} run was trained on sequences of {stage.length:,} steps; text, prompt and what follows "
            f"take {before + num:,}. Ask for fewer --seconds, give a shorter prompt, or train with a larger --length."
        )
    levels = [
        _Level(plan.vocabulary.block(acoustic, book, book), plan.vocabulary.token("<pad>", book), 1)
        for book in range(1, plan.num_codebooks)
    ]
    rows = {text: _placed(books[text], 0, before - 1), acoustic: _placed(books[acoustic], 0, num)}
    tokens_SQ = plan.lay(rows).tokens
    likeliest = replace(drawer, sampling=Sampling(temperature=0.0))
    filler = _Filler(stage, plan.vocabulary, likeliest, (num - known) * len(levels))
    filler.fill(tokens_SQ, slice(before + known, before + num), levels)
    _take(books[acoustic][1:], tokens_SQ[before + known :], levels)


class _Filler:
    def __init__(self, stage: Stage, vocabulary: Vocabulary, drawer: Drawer, total: int) -> None:
        self._stage, self._sizes, self._drawer = stage, vocabulary.column_sizes, drawer
        self._total, self._done = total, 0

    def fill(self, tokens_SQ: Codes, steps: slice, levels: Sequence[_Level]) -> None:
        """Replace the tokens of a span of steps in the levels' columns."""
        for level in levels:
            tokens_SQ[steps, level.codes.column] = level.hidden
        tokens = torch.from_numpy(tokens_SQ.astype(np.int64))
        is_hidden_1S = torch.zeros(1, len(tokens), dtype=torch.bool)
        for level in levels:
            column, is_hidden_1S[0, steps] = level.codes.column, True
            legal_V = legal_tokens(self._sizes[column], [level.codes])
            for num in uncovered_by_iteration(steps.stop - steps.start, level.iterations):
                logits_MV = self._logits(tokens, column)[is_hidden_1S[0]]
                drawn_M = self._drawer.draw(logits_MV, legal_V)
                log_chances_MV = logits_MV.double().masked_fill(~legal_V, -torch.inf).log_softmax(-1)
                scores_1S = torch.full(is_hidden_1S.shape, -torch.inf, dtype=torch.float64)
                scores_1S[is_hidden_1S] = log_chances_MV.gather(1, drawn_M[:, None])[:, 0]
                kept_1S = most_confident(scores_1S, is_hidden_1S, torch.tensor([num]))
                tokens[kept_1S[0], column] = drawn_M[kept_1S[is_hidden_1S]]
                is_hidden_1S &= ~kept_1S
                self._done += num
                self._drawer.on_draw(self._stage.name, self._done, self._total)
        tokens_SQ[:] = tokens.numpy()

    def _logits(self, tokens_SQ: Tensor, column: int) -> Tensor:
        model = self._stage.model
        tokens_1SQ = tokens_SQ.to(next(model.parameters()).device)[None]
        positions_1S = torch.arange(tokens_1SQ.shape[1], device=tokens_1SQ.device)[None]
        hidden_1SD = model(tokens_1SQ, torch.ones_like(positions_1S), positions_1S, causal=False)
        return model.logits(hidden_1SD[0], column).float().cpu()


def _placed(books: Sequence[Sequence[int]], begin: int, num: int) -> StreamRows:
    """So many frames from one on, those that are not known yet as 0."""
    placed = [np.array(book[begin : begin + num], dtype=np.int64) for book in books]
    return StreamRows(np.array([num]), [np.pad(book_T, (0, num - len(book_T))) for book_T in placed])


def _cut(books: Sequence[Sequence[int]], begin: Fraction, end: Fraction | None) -> StreamRows:
    """Frames that begin in a span of time, counted in them."""
    span = slice(math.ceil(begin), None if end is None else math.ceil(end))
    taken = [np.array(book[span], dtype=np.int64) for book in books]
    return StreamRows(np.array([len(taken[0])]), taken)


def _take(books: Sequence[list[int]], tokens_TQ: Codes, levels: Sequence[_Level]) -> None:
    for book, level in zip(books, levels, strict=True):
        book += (tokens_TQ[:, level.codes.column].astype(np.int64) - level.codes.offset).tolist()
