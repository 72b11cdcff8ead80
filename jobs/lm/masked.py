"""Objectives of hidden tokens, predicted from both sides: units under spans, codebooks level by level.

Axes: B sequences, L steps, Q columns, C columns that may be hidden, M targets or segments of a sequence.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ...pipelines.layouts.masks import hide, soundstorm_masks, span_masks
from ...pipelines.layouts.vocabulary import Vocabulary
from ...storage.batches import PackedBatch
from ...tokenizers.spec import UserError
from .bigram import Baseline, Pairs, bigram_baseline
from .model import TokenModel
from .objectives import Loss, Objective, ObjectiveContext, cross_entropy


class Drawn(NamedTuple):
    """`[B, L, C]`: the codes as the model sees them, and which of them it is asked for."""

    seen_BLC: Tensor
    asked_BLC: Tensor


@dataclass(frozen=True, slots=True)
class Hideable:
    """Columns whose codes, tokens `[0, codebook_size)`, may be hidden behind a special token of each."""

    columns: list[int]
    tokens: list[int]
    codebook_size: int

    @classmethod
    def behind(cls, special: str, vocabulary: Vocabulary) -> Self | None:
        """All columns that have a special token; None if there are none."""
        columns = [column for column in range(len(vocabulary.column_sizes)) if vocabulary.has(special, column)]
        if not columns:
            return None
        first = next(block for block in vocabulary.blocks if block.column == columns[0])
        return cls(columns, [vocabulary.token(special, column) for column in columns], first.size)


# from codes, segment ids that are 0 where nothing may be hidden, positions
Draw = Callable[[Tensor, Tensor, Tensor, torch.Generator], Drawn]


class HiddenTokens(Objective):
    """Codes that are drawn to be hidden, each predicted from all else in its segment; a head for each column.

    Nothing is hidden that the layout gives, nor special tokens.

    The baseline is the bigram of each column, counted on all training tokens, on the very tokens that an evaluation
    asks for. It knows the token before, though that be hidden from the model; of a segment's first steps the hidden
    token is the one before.
    """

    def __init__(self, context: ObjectiveContext, hideable: Hideable, draw: Draw) -> None:
        super().__init__()
        plan = context.plan
        self.vocabulary = plan.vocabulary
        self.hideable = hideable
        dims = {stream: context.specs[stream].dim for stream in plan.frame_tokens}
        self.model = TokenModel(context.model, plan.column_sizes, plan.frame_tokens, dims)
        self._draw = draw

    def draw(self, batch: PackedBatch, generator: torch.Generator) -> Drawn:
        codes_BLC = _columns(batch.tokens)[..., self.hideable.columns]
        is_code_BL = (codes_BLC < self.hideable.codebook_size).all(dim=-1)
        ids_BL = batch.segment_ids * (is_code_BL & batch.loss_mask)
        return self._draw(codes_BLC, ids_BL, batch.positions, generator)

    def loss(self, batch: PackedBatch, generator: torch.Generator) -> Loss:
        tokens_BLQ, drawn = _columns(batch.tokens), self.draw(batch, generator)
        seen_BLQ = tokens_BLQ.clone()
        seen_BLQ[..., self.hideable.columns] = drawn.seen_BLC
        hidden_BLD = self.model(seen_BLQ, batch.segment_ids, batch.positions, batch.frames, causal=False)
        columns = []
        for column, asked_BL in zip(self.hideable.columns, drawn.asked_BLC.unbind(-1), strict=True):
            logits_MV = self.model.logits(hidden_BLD[asked_BL], column)
            columns.append((column, logits_MV, tokens_BLQ[..., column][asked_BL]))
        return cross_entropy(columns, self.vocabulary)

    def pairs(self, batch: PackedBatch) -> list[Pairs]:
        """All codes of a batch, not only those that a draw would ask for."""
        is_code_BLC = _columns(batch.tokens)[..., self.hideable.columns] < self.hideable.codebook_size
        return self._pairs(batch, is_code_BLC & (batch.segment_ids > 0)[..., None])

    def baseline(
        self,
        train_batches: Iterable[PackedBatch],
        held_out_batches: Iterable[PackedBatch],
        generator: torch.Generator,
    ) -> Baseline:
        asked = (self._pairs(batch, self.draw(batch, generator).asked_BLC) for batch in held_out_batches)
        return bigram_baseline(map(self.pairs, train_batches), asked)

    def _pairs(self, batch: PackedBatch, asked_BLC: Tensor) -> list[Pairs]:
        found = []
        for column, hidden, asked_BL in zip(
            self.hideable.columns, self.hideable.tokens, asked_BLC.unbind(-1), strict=True
        ):
            tokens_BL = _columns(batch.tokens)[..., column]
            before_BL = torch.where(batch.positions == 0, hidden, tokens_BL.roll(1, dims=1))
            before_M, targets_M = (each[asked_BL].cpu().numpy() for each in (before_BL, tokens_BL))
            found.append(Pairs(column, self.vocabulary.column_sizes[column], before_M, targets_M))
        return found


def masked_units(context: ObjectiveContext) -> HiddenTokens:
    """Spans of masked units, all codebooks of a frame together: HuBERT (Hsu et al. 2021), over layout `masked`.

    Options: `starts`, the share of steps that spans begin at (0.08), and `span`, their length (10): see `span_masks`;
    `random` and `kept`, shares of the hidden codes that are replaced by others, or left as they are (0; BERT's
    `starts=0.15,span=1,random=0.1,kept=0.1`, Devlin et al. 2019). Raises `UserError`.
    """
    context.require_options("masked", "starts", "span", "random", "kept")
    starts, span = context.number("starts", 0.08), int(context.number("span", 10, least=1, most=10_000))
    random = context.number("random", 0.0)
    kept = context.number("kept", 0.0, most=1 - random)
    hideable, shares = _masked("masked", context), (1 - random - kept, random, kept)

    def draw(codes_BLC: Tensor, ids_BL: Tensor, positions_BL: Tensor, generator: torch.Generator) -> Drawn:
        asked_BL = span_masks(ids_BL, generator, share_of_starts=starts, span=span)
        seen = [
            hide(codes_BL, asked_BL, token, hideable.codebook_size, generator, shares=shares)
            for codes_BL, token in zip(codes_BLC.unbind(-1), hideable.tokens, strict=True)
        ]
        return Drawn(torch.stack(seen, dim=-1), asked_BL[..., None].expand_as(codes_BLC))

    return HiddenTokens(context, hideable, draw)


def soundstorm_levels(context: ObjectiveContext) -> HiddenTokens:
    """A part of one codebook from semantic tokens and coarser codebooks: SoundStorm (Borsos et al. 2023).

    Over layout `soundstorm`: each segment draws a codebook, and the frames of it that are hidden and asked for; finer
    codebooks are hidden, too (`soundstorm_masks`). With option `prompt=false` no beginning of a segment is given. The
    paper's Conformer is a Transformer here. Raises `UserError`.
    """
    context.require_options("soundstorm", "prompt")
    told = context.option("prompt", "true")
    if told not in ("true", "false"):
        raise UserError(f"Option prompt of the objective is {told!r}; expected true or false.")
    hideable = _masked("soundstorm", context)

    def draw(codes_BLC: Tensor, ids_BL: Tensor, positions_BL: Tensor, generator: torch.Generator) -> Drawn:
        num_levels, is_prompted = len(hideable.columns), told == "true"
        masks = soundstorm_masks(ids_BL, positions_BL, num_levels, generator, prompt=is_prompted)
        masks_C = torch.tensor(hideable.tokens).to(codes_BLC)
        return Drawn(torch.where(masks.hidden_BLQ, masks_C, codes_BLC), masks.asked_BLQ)

    return HiddenTokens(context, hideable, draw)


def _masked(objective: str, context: ObjectiveContext) -> Hideable:
    """Raises `UserError` for a layout without `<mask>`."""
    hideable = Hideable.behind("<mask>", context.plan.vocabulary)
    if hideable is None:
        raise UserError(
            f"Objective {objective} masks codes, and the layout has no <mask> in its vocabulary: take layout masked or "
            "soundstorm, or another objective."
        )
    return hideable


def _columns(tokens: Tensor) -> Tensor:
    """Tokens `[B, L, Q]`."""
    return tokens[..., None] if tokens.ndim == 2 else tokens
