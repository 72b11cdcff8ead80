"""What a model learns from packed sequences: objectives, their loss, and what a bigram says of the same tokens.

An objective owns its model: it is what is trained, evaluated and kept. jobs/lm/registry.py names them all.

Axes: B sequences, L steps, D width, Q columns, V tokens of a column, M targets.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...pipelines.layouts.plan import LayoutPlan
from ...pipelines.layouts.vocabulary import Block, Vocabulary
from ...storage.batches import PackedBatch
from ...storage.root import Root
from ...tokenizers.spec import StreamSpec, UserError, did_you_mean
from .bigram import Baseline, Pairs, bigram_baseline
from .model import ModelConfig, TokenModel

SPECIAL = "special"  # what all special tokens are counted under


@dataclass(frozen=True, slots=True)
class ObjectiveContext:
    """What an objective is built from. `options` are its own, by name, as `--objective NAME,KEY=VALUE` gives them."""

    plan: LayoutPlan
    specs: Mapping[str, StreamSpec]  # as they are read
    model: ModelConfig
    root: str
    layout: Any
    options: Mapping[str, str] = field(default_factory=dict)

    def option(self, name: str, default: str | None = None) -> str | None:
        return self.options.get(name, default)

    def number(self, name: str, default: float, *, least: float = 0.0, most: float = 1.0) -> float:
        """An option that is a number. Raises `UserError` for other text, and numbers outside [least, most]."""
        told = self.options.get(name)
        try:
            found = default if told is None else float(told)
        except ValueError:
            found = math.nan
        if not least <= found <= most:
            raise UserError(
                f"Option {name} of the objective is {told!r}; expected a number from {least:g} to {most:g}."
            )
        return found

    def require_options(self, objective: str, *known: str) -> None:
        """Raise `UserError` for an option that the objective does not have."""
        for name in self.options:
            if name not in known:
                there = f"there are: {', '.join(known)}" if known else "it has none"
                raise UserError(f"Objective {objective} has no option {name!r}; {there}.{did_you_mean(name, known)}")


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a batch. `parts` has by name the nats and targets of what a report tells apart."""

    total: Tensor  # mean nats of a target, to go back from; 0 without targets
    nats: float  # of all targets
    num_targets: int
    parts: dict[str, tuple[float, int]] = field(default_factory=dict)


class Objective(nn.Module):
    """A model and what it learns. Randomness comes from the given generator (dropout aside), so that steps repeat."""

    def loss(self, batch: PackedBatch, generator: torch.Generator) -> Loss:
        raise NotImplementedError

    def pairs(self, batch: PackedBatch) -> list[Pairs]:
        """The targets of a batch, each with the token before it in its column: what `baseline` counts."""
        raise NotImplementedError

    def prepare(self, root: Root, versions: Mapping[str, int]) -> None:
        """Take from the dataset what a new model needs of it; one from a checkpoint has it. Raises `UserError`."""

    def baseline(
        self,
        train_batches: Iterable[PackedBatch],
        held_out_batches: Iterable[PackedBatch],
        generator: torch.Generator,
    ) -> Baseline:
        """What predicts the held-out targets without a model, counted on the training batches.

        The generator is that of an evaluation: objectives that draw their targets have the same ones here.
        """
        return bigram_baseline(map(self.pairs, train_batches), map(self.pairs, held_out_batches))


class MakeObjective(Protocol):
    def __call__(self, context: ObjectiveContext, /) -> Objective: ...


class NextToken(Objective):
    """Each step from those before it in its segment, column by column; `<pad>` is no target.

    So `next` learns layouts of one token a step (GSLM, AudioLM, VALL-E's first model) and `parallel` those of several,
    with a head for each column (MusicGen's patterns). A segment's first step has none before it, and is no target.
    What packing cut goes on as a segment of its own. Steps that are given are no targets, but are seen.
    """

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__()
        context.require_options("next")
        plan = context.plan
        dims = {stream: context.specs[stream].dim for stream in plan.frame_tokens}
        self.vocabulary = plan.vocabulary
        self.model = TokenModel(context.model, plan.column_sizes, plan.frame_tokens, dims)

    def loss(self, batch: PackedBatch, generator: torch.Generator) -> Loss:
        hidden_BLD = self.model(batch.tokens, batch.segment_ids, batch.positions, batch.frames)[:, :-1]
        columns = []
        for column, targets_BL, asked_BL in self._targets(batch):
            columns.append((column, self.model.logits(hidden_BLD[asked_BL], column), targets_BL[asked_BL]))
        return cross_entropy(columns, self.vocabulary)

    def pairs(self, batch: PackedBatch) -> list[Pairs]:
        tokens_BLQ = batch.tokens[..., None] if batch.tokens.ndim == 2 else batch.tokens
        found = []
        for column, targets_BL, asked_BL in self._targets(batch):
            before_BL = tokens_BLQ[:, :-1, column]
            size = self.vocabulary.column_sizes[column]
            found.append(Pairs(column, size, before_BL[asked_BL].cpu().numpy(), targets_BL[asked_BL].cpu().numpy()))
        return found

    def _targets(self, batch: PackedBatch) -> list[tuple[int, Tensor, Tensor]]:
        """By column the tokens of steps 1 and on, and which of them are asked for."""
        same_BL = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
        asked_BL = same_BL & (batch.segment_ids[:, 1:] > 0) & batch.loss_mask[:, 1:]
        tokens_BLQ = batch.tokens[..., None] if batch.tokens.ndim == 2 else batch.tokens
        found = []
        for column in range(tokens_BLQ.shape[-1]):
            targets_BL, asked = tokens_BLQ[:, 1:, column], asked_BL
            if self.vocabulary.has("<pad>", column):
                asked = asked & (targets_BL != self.vocabulary.token("<pad>", column))
            found.append((column, targets_BL, asked))
        return found


def cross_entropy(columns: Iterable[tuple[int, Tensor, Tensor]], vocabulary: Vocabulary) -> Loss:
    """The loss of logits `[M, V]` and targets `[M]` of columns, all targets alike; parts are codebooks."""
    total: Tensor | None = None
    parts: dict[str, tuple[float, int]] = {}
    for column, logits_MV, targets_M in columns:
        nats_M = functional.cross_entropy(logits_MV.float(), targets_M.long(), reduction="none")
        total = nats_M.sum() if total is None else total + nats_M.sum()
        for name, (nats, count) in _by_block(nats_M.detach(), targets_M, column, vocabulary).items():
            before, counted = parts.get(name, (0.0, 0))
            parts[name] = before + nats, counted + count
    assert total is not None, "a layout has a column"
    num_targets = sum(count for _, count in parts.values())
    nats = sum(nats for nats, _ in parts.values())
    return Loss(total / max(num_targets, 1), nats, num_targets, parts)


def _by_block(nats_M: Tensor, targets_M: Tensor, column: int, vocabulary: Vocabulary) -> dict[str, tuple[float, int]]:
    blocks = [block for block in vocabulary.blocks if block.column == column]
    ends = torch.tensor([block.end for block in blocks], device=targets_M.device)
    which_M = torch.bucketize(targets_M, ends, right=True)
    sums = torch.bincount(which_M, weights=nats_M.double(), minlength=len(blocks)).tolist()
    counts = torch.bincount(which_M, minlength=len(blocks)).tolist()
    found: dict[str, tuple[float, int]] = {}
    for block, nats, count in zip(blocks, sums, counts, strict=True):
        if count:
            before, counted = found.get(part_name(block), (0.0, 0))
            found[part_name(block)] = before + nats, counted + count
    return found


def part_name(block: Block) -> str:
    """What the tokens of a block are counted under: `acoustic.0`; all special tokens together."""
    return SPECIAL if block.codebook is None else f"{block.name}.{block.codebook}"
