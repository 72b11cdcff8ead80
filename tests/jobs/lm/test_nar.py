"""VALL-E's second model: which codebooks it is given, and which it is asked for."""

import numpy as np
import pytest
import torch
from objectives_made import draws, objective, packed, rows
from wavemill.jobs.lm.masked import HiddenTokens
from wavemill.pipelines.layouts.vall_e import vall_e_nar

COUNTS = {"text": [4, 3, 2], "acoustic": [30, 0, 21]}


def test_a_segment_asks_for_one_codebook_of_all_frames_behind_its_prompt():
    layout = vall_e_nar("text", "acoustic")
    found, batch = objective(layout), packed(layout, rows(np.random.default_rng(0), COUNTS))
    assert isinstance(found, HiddenTokens)
    assert found.hideable.columns == [1, 2]
    levels, prompts = set[int](), list[float]()
    for seed in range(60):
        seen_BLC, asked_BLC = found.draw(batch, draws(seed))
        for segment, num_text, num_frames in ((1, 4, 30), (3, 2, 21)):
            inside_L = (batch.segment_ids == segment)[0]
            (level,) = asked_BLC[0, inside_L].any(dim=0).nonzero().flatten().tolist()
            levels.add(level)
            is_asked_T = asked_BLC[0, inside_L, level][num_text + 1 :]
            prompt = num_frames - int(is_asked_T.sum())
            prompts.append(prompt / num_frames)
            assert is_asked_T.tolist() == [False] * prompt + [True] * (num_frames - prompt)
            is_hidden_TC = (seen_BLC == torch.tensor(found.hideable.tokens))[0, inside_L][num_text + 1 :]
            assert is_hidden_TC[prompt:].all(dim=0).tolist() == [each >= level for each in range(2)]
            assert not is_hidden_TC[:prompt].any()
    assert levels == {0, 1}
    assert min(prompts) < 0.1
    assert 0.4 < max(prompts) <= 0.5


def test_all_frames_behind_what_the_layout_gives_are_asked_for_without_a_drawn_prompt():
    layout = vall_e_nar("text", "acoustic", prompt_s=0.1)  # 5 frames
    found, batch = objective(layout, prompt="0"), packed(layout, rows(np.random.default_rng(0), COUNTS))
    assert isinstance(found, HiddenTokens)
    for seed in range(5):
        asked_BL = found.draw(batch, draws(seed)).asked_BLC.any(dim=-1)
        assert torch.equal(asked_BL, batch.loss_mask)
        assert int(asked_BL.sum()) == 25 + 16


def test_parts_of_the_loss_are_the_codebooks_after_the_first():
    layout = vall_e_nar("text", "acoustic")
    found, batch = objective(layout), packed(layout, rows(np.random.default_rng(0), COUNTS))
    parts = {name for seed in range(20) for name in found.loss(batch, draws(seed)).parts}
    assert parts == {"acoustic.1", "acoustic.2"}


def test_a_codebook_that_follows_from_a_coarser_one_is_learnt():
    torch.manual_seed(0)
    layout, rng = vall_e_nar("text", "acoustic", codebooks=2), np.random.default_rng(0)
    found = objective(layout, prompt="0").train()
    optimizer = torch.optim.AdamW(found.parameters(), lr=2e-2)
    losses = []
    for step in range(40):
        segments = rows(rng, {"text": [3, 2], "acoustic": [20, 30]})
        segments["acoustic"].books[1][:] = (3 * segments["acoustic"].books[0] + 1) % 10  # type: ignore[index]
        loss = found.loss(packed(layout, segments), draws(step))
        losses.append(loss.nats / loss.num_targets)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert losses[0] > 2
    assert np.mean(losses[-5:]) < 0.5


@pytest.mark.parametrize("seed", range(3))
def test_the_same_generator_gives_the_same_draws(seed: int):
    layout = vall_e_nar("text", "acoustic")
    found, batch = objective(layout), packed(layout, rows(np.random.default_rng(0), COUNTS))
    assert isinstance(found, HiddenTokens)
    first, again = found.draw(batch, draws(seed)), found.draw(batch, draws(seed))
    assert torch.equal(first.seen_BLC, again.seen_BLC)
    assert torch.equal(first.asked_BLC, again.asked_BLC)
