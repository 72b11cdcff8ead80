"""What is a target and what is not, and that the loss of targets is their cross-entropy.

Axes: B sequences, L steps, Q columns.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from wavemill.jobs.lm.model import ModelConfig
from wavemill.jobs.lm.objectives import NextToken, ObjectiveContext, cross_entropy
from wavemill.jobs.lm.registry import make_objective, objective_of
from wavemill.pipelines.layouts.flat import flatten
from wavemill.pipelines.layouts.grid import delay
from wavemill.pipelines.layouts.vocabulary import Vocabulary, books_of, special
from wavemill.storage.batches import PackedBatch
from wavemill.tokenizers.spec import FrameRule, StreamSpec, UserError

SPEC = StreamSpec(
    tokenizer="toy",
    sample_rate=16_000,
    decode_sample_rate=0,
    hop_length=320,
    window_length=400,
    frame_rule=FrameRule.FLOOR,
    num_codebooks=2,
    codebook_size=10,
)
MODEL = ModelConfig(dim=16, num_layers=1, num_heads=2)
DRAWS = torch.Generator()


def objective(layout: Any, **options: str) -> NextToken:
    torch.manual_seed(0)
    plan = layout.plan({"toy": SPEC})
    made = make_objective(objective_of(layout, plan), ObjectiveContext(plan, {"toy": SPEC}, MODEL, "", layout, options))
    assert isinstance(made, NextToken)
    return made


def batch(tokens: list[Any], segment_ids: list[int], given: tuple[int, ...] = ()) -> PackedBatch:
    """One sequence."""
    ids, positions = torch.tensor([segment_ids]), []
    for place, number in enumerate(segment_ids):
        positions.append(positions[-1] + 1 if place and segment_ids[place - 1] == number else 0)
    loss_mask = ids > 0
    loss_mask[0, list(given)] = False
    return PackedBatch(
        tokens=torch.tensor([tokens]),
        segment_ids=ids,
        positions=torch.tensor([positions]),
        loss_mask=loss_mask,
        frames={},
        ids=[["a"]],
        state={},
    )


def targets(made: NextToken, packed: PackedBatch) -> list[list[tuple[int, int]]]:
    """By column, what is asked for after what."""
    return [list(zip(pairs.before_M.tolist(), pairs.targets_M.tolist(), strict=True)) for pairs in made.pairs(packed)]


def test_targets_lie_in_one_segment_and_are_neither_given_nor_padding():
    packed = batch([1, 2, 3, 4, 5, 6, 7, 0, 0], [1, 1, 1, 1, 2, 2, 2, 0, 0], given=(1, 6))
    assert targets(objective(flatten("toy")), packed) == [[(2, 3), (3, 4), (5, 6)]]


def test_pad_is_seen_but_no_target_in_any_column():
    made = objective(delay("toy"))
    pad = made.vocabulary.token("<pad>", 1)
    packed = batch([[1, pad], [2, 3], [4, 5], [pad, 6]], [1, 1, 1, 1])
    assert targets(made, packed) == [[(1, 2), (2, 4)], [(pad, 3), (3, 5), (5, 6)]]
    assert made.loss(packed, DRAWS).num_targets == 5


def by_hand(made: NextToken, packed: PackedBatch) -> Tensor:
    hidden = made.model(packed.tokens, packed.segment_ids, packed.positions)
    tokens = packed.tokens[..., None] if packed.tokens.ndim == 2 else packed.tokens
    pad = made.vocabulary.token("<pad>", 0) if made.vocabulary.has("<pad>") else -1
    nats = []
    for step in range(1, tokens.shape[1]):
        for column in range(tokens.shape[2]):
            target = tokens[0, step, column]
            if packed.segment_ids[0, step] == packed.segment_ids[0, step - 1] and target != pad:
                nats.append(functional.cross_entropy(made.model.logits(hidden[0, step - 1], column), target))
    return torch.stack(nats)


def test_the_loss_is_the_mean_over_targets_of_all_columns():
    for layout, tokens in ((flatten("toy"), [1, 12, 3, 14]), (delay("toy"), [[1, 10], [2, 3], [4, 5], [10, 6]])):
        made, packed = objective(layout), batch(tokens, [1, 1, 1, 1])
        loss, nats = made.loss(packed, DRAWS), by_hand(made, packed)
        assert loss.num_targets == len(nats)
        assert loss.total.item() == pytest.approx(nats.mean().item(), rel=1e-5)
        assert loss.nats == pytest.approx(nats.sum().item(), rel=1e-5)
        assert sum(count for _, count in loss.parts.values()) == loss.num_targets
        assert sum(part for part, _ in loss.parts.values()) == pytest.approx(loss.nats)
        assert set(loss.parts) == {"toy.0", "toy.1"}


def test_a_batch_of_padding_has_no_targets_and_moves_no_weight():
    made = objective(flatten("toy"))
    loss = made.loss(batch([0, 0, 0], [0, 0, 0]), DRAWS)
    assert (loss.nats, loss.num_targets, loss.total.item()) == (0, 0, 0)
    loss.total.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in made.parameters())


def test_parts_tell_codebooks_and_special_tokens_apart():
    vocabulary = Vocabulary.of([*books_of("toy", SPEC), *special("<bos>", "<eos>")])
    logits_MV = torch.zeros(4, 22)
    logits_MV[3, 21] = 5.0
    loss = cross_entropy([(0, logits_MV, torch.tensor([0, 9, 10, 21]))], vocabulary)
    assert {name: count for name, (_, count) in loss.parts.items()} == {"toy.0": 2, "toy.1": 1, "special": 1}
    assert loss.parts["toy.0"][0] == pytest.approx(2 * math.log(22))
    assert loss.parts["special"][0] < loss.parts["toy.1"][0]


def test_layouts_have_their_objectives_and_unknown_names_and_options_are_told():
    assert objective_of(flatten("toy"), flatten("toy").plan({"toy": SPEC})) == "next"
    assert objective_of(delay("toy"), delay("toy").plan({"toy": SPEC})) == "parallel"
    with pytest.raises(UserError, match=r"Objective next has no option 'depth'; it has none\."):
        objective(flatten("toy"), depth="3")
    context = ObjectiveContext(flatten("toy").plan({"toy": SPEC}), {"toy": SPEC}, MODEL, "", flatten("toy"))
    with pytest.raises(UserError, match=r"no objective 'nxt'; .* Did you mean 'next'\?"):
        make_objective("nxt", context)
