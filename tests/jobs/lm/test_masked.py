"""What objectives of hidden tokens hide, ask for, and are compared with.

Axes: B sequences, L steps, C columns that may be hidden.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from objectives_made import draws, objective, packed, rows
from torch import Tensor
from wavemill.jobs.lm.masked import HiddenTokens
from wavemill.pipelines.layouts.conditioned import conditioned
from wavemill.pipelines.layouts.flat import flatten
from wavemill.pipelines.layouts.grid import delay
from wavemill.pipelines.layouts.masks import masked
from wavemill.pipelines.layouts.soundstorm import soundstorm
from wavemill.pipelines.layouts.vall_e import vall_e_nar
from wavemill.storage.batches import PackedBatch
from wavemill.tokenizers.spec import UserError

COUNTS = {
    "semantic": [40, 0, 25],
    "acoustic": [40, 0, 23],
    "text": [4, 3, 6],
    "voice": [1, 1, 1],
}
LAYOUTS = [
    masked("semantic"),
    masked("acoustic"),
    soundstorm("semantic", "acoustic"),
    vall_e_nar("text", "acoustic"),
    conditioned("voice", masked("acoustic")),
    conditioned("voice", vall_e_nar("text", "acoustic", prompt_s=0.1)),
]


def made(layout: Any, **options: str) -> HiddenTokens:
    found = objective(layout, **options)
    assert isinstance(found, HiddenTokens)
    return found


def batch_of(layout: Any, seed: int = 0) -> PackedBatch:
    segments = rows(np.random.default_rng(seed), {stream: COUNTS[stream] for stream in layout.streams})
    return packed(layout, segments)


def columns(batch: PackedBatch, of: HiddenTokens) -> Tensor:
    tokens = batch.tokens if batch.tokens.ndim == 3 else batch.tokens[..., None]
    return tokens[..., of.hideable.columns]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_what_is_asked_for_is_a_code_that_is_not_given_and_is_the_target(layout: Any):
    found, batch = made(layout), batch_of(layout)
    for seed in range(20):
        seen_BLC, asked_BLC = found.draw(batch, draws(seed))
        codes_BLC = columns(batch, found)
        assert asked_BLC.any()
        assert (codes_BLC[asked_BLC] < found.hideable.codebook_size).all()
        assert not asked_BLC[~batch.loss_mask].any()
        changed_BLC = seen_BLC != codes_BLC
        hidden_C = torch.tensor(found.hideable.tokens)
        assert (seen_BLC[asked_BLC] == hidden_C.expand_as(seen_BLC)[asked_BLC]).all()
        assert not changed_BLC[~batch.loss_mask].any()
        assert found.loss(batch, draws(seed)).num_targets == int(asked_BLC.sum())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_the_loss_does_not_know_what_is_asked_for(layout: Any):
    """Other codes in the places that are hidden: the same hidden vectors, so a loss that only the targets change."""
    found, batch = made(layout), batch_of(layout)
    seen_BLC = found.draw(batch, draws()).seen_BLC
    tokens = batch.tokens.clone() if batch.tokens.ndim == 3 else batch.tokens[..., None].clone()
    is_hidden_BLC = seen_BLC == torch.tensor(found.hideable.tokens)
    is_code_BLC = columns(batch, found) < found.hideable.codebook_size
    other_BLC = torch.where(is_hidden_BLC & is_code_BLC, (columns(batch, found) + 1) % 7, columns(batch, found))
    tokens[..., found.hideable.columns] = other_BLC
    other = dataclasses.replace(batch, tokens=tokens.reshape(batch.tokens.shape))
    assert not torch.equal(other.tokens, batch.tokens)
    given: list[Tensor] = []
    found.model.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    loss, changed = found.loss(batch, draws()), found.loss(other, draws())
    assert torch.equal(*given)
    assert loss.num_targets == changed.num_targets
    assert loss.nats != changed.nats


def test_spans_hide_all_codebooks_of_a_frame_and_bert_replaces_some():
    layout = masked("acoustic")
    batch = batch_of(layout)
    seen_BLC, asked_BLC = made(layout).draw(batch, draws())
    assert torch.equal(asked_BLC[..., 0], asked_BLC[..., 2])
    assert 0.3 < asked_BLC[..., 0].sum() / batch.loss_mask.sum() < 0.9
    bert = made(layout, starts="0.5", span="1", random="0.4", kept="0.3")
    kept, replaced, hidden = 0, 0, 0
    for seed in range(40):
        seen_BLC, asked_BLC = bert.draw(batch, draws(seed))
        seen, codes = seen_BLC[asked_BLC], columns(batch, bert)[asked_BLC]
        is_mask = seen == torch.tensor(bert.hideable.tokens).expand_as(seen_BLC)[asked_BLC]
        hidden += int(is_mask.sum())
        kept += int((seen == codes).sum())
        replaced += int((~is_mask & (seen != codes)).sum())
    shares = np.array([hidden, kept, replaced]) / (hidden + kept + replaced)
    assert np.abs(shares - [0.3, 0.3 + 0.4 * 0.1, 0.4 * 0.9]).max() < 0.03  # a random code of ten may be the same


def test_soundstorm_asks_for_one_level_of_a_segment_and_hides_the_finer_ones():
    layout = soundstorm("semantic", "acoustic")
    found, batch, levels = made(layout), batch_of(layout), set[int]()
    for seed in range(30):
        seen_BLC, asked_BLC = found.draw(batch, draws(seed))
        for segment in (1, 3):
            inside_L = (batch.segment_ids == segment)[0]
            asked_LC = asked_BLC[0, inside_L]
            (level,) = asked_LC.any(dim=0).nonzero().flatten().tolist()
            levels.add(level)
            is_changed_LC = (seen_BLC != columns(batch, found))[0, inside_L]
            assert not is_changed_LC[:, :level].any()
            assert all(is_changed_LC[asked_LC[:, level], level:].flatten().tolist())
    assert levels == {0, 1, 2}
    assert found.draw(batch, draws(1))[0].equal(found.draw(batch, draws(1))[0])
    first_L = [made(layout, prompt="false").draw(batch, draws(seed)).asked_BLC[0, 0].any() for seed in range(30)]
    assert any(first_L)


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=lambda layout: type(layout).__name__)
def test_the_baseline_asks_a_bigram_for_the_very_tokens_of_an_evaluation(layout: Any):
    found, held_out = made(layout), [batch_of(layout, seed) for seed in (1, 2)]
    train = [batch_of(layout, seed) for seed in range(3, 6)]
    baseline = found.baseline(train, held_out, draws(7))
    generator = draws(7)
    losses = [found.loss(batch, generator) for batch in held_out]
    assert baseline.num_targets == sum(loss.num_targets for loss in losses)
    every = sum(len(pairs.targets_M) for batch in held_out for pairs in found.pairs(batch))
    assert 0 < baseline.num_targets < every


def test_the_token_before_is_that_of_the_same_column_and_segment():
    layout = masked("semantic")
    batch, found = packed(layout, rows(np.random.default_rng(0), {"semantic": [3, 2]})), made(layout)
    (pairs,) = found.pairs(batch)
    tokens = batch.tokens[0].tolist()
    (mask,) = found.hideable.tokens
    assert pairs.before_M.tolist() == [mask, *tokens[:2], mask, tokens[3]]
    assert pairs.targets_M.tolist() == tokens[:5]


def test_nothing_but_padding_has_no_targets():
    for layout in LAYOUTS[:4]:
        counts = {stream: [0] for stream in layout.streams}
        loss = made(layout).loss(packed(layout, rows(np.random.default_rng(0), counts)), draws())
        assert (loss.nats, loss.num_targets) == (0, 0)
        loss.total.backward()


@pytest.mark.parametrize(
    ("layout", "name", "options", "told"),
    [
        (flatten("acoustic"), "masked", {}, "no <mask> in its vocabulary"),
        (delay("acoustic"), "soundstorm", {}, "no <mask> in its vocabulary"),
        (delay("acoustic"), "nar", {}, "take layout vall-e-nar"),
        (flatten("acoustic"), "nar", {}, "take layout vall-e-nar"),
        (masked("semantic"), "masked", {"starts": "x"}, "'x'; expected a number from 0 to 1"),
        (masked("semantic"), "masked", {"span": "0"}, "'0'; expected a number from 1 to 10000"),
        (masked("semantic"), "masked", {"random": "0.6", "kept": "0.6"}, "'0.6'; expected a number from 0 to 0.4"),
        (soundstorm("semantic", "acoustic"), "soundstorm", {"prompt": "yes"}, "expected true or false"),
        (masked("semantic"), "masked", {"spn": "3"}, "Did you mean 'span'"),
        (vall_e_nar("text", "acoustic"), "nar", {"prompt": "nan"}, "'nan'; expected a number"),
    ],
)
def test_layouts_and_options_that_do_not_fit_are_told(layout: Any, name: str, options: dict[str, str], told: str):
    with pytest.raises(UserError, match=told):
        objective(layout, name, **options)
