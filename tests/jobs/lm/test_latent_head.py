"""Frames of numbers from those before: what is asked for, what is reported, and what is drawn.

Axes: M steps that hold a frame, D numbers of a frame.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from objectives_made import draws, make_root, objective, packed, rows
from torch import Tensor
from wavemill.jobs.lm.latent_head import FlowHead, NextFrame
from wavemill.jobs.lm.model import ModelConfig
from wavemill.jobs.lm.settings import TrainSettings
from wavemill.jobs.lm.train import Means
from wavemill.jobs.train_lm import load_run, train_lm
from wavemill.pipelines.layouts.conditioned import conditioned
from wavemill.pipelines.layouts.continuous import continuous
from wavemill.pipelines.layouts.flat import flatten
from wavemill.storage.batches import PackedBatch
from wavemill.storage.codes import open_stream
from wavemill.storage.root import Root
from wavemill.storage.statistics import stream_statistics
from wavemill.tokenizers.spec import UserError

COUNTS = {"latents": [5, 0, 3], "text": [2, 4, 1], "voice": [1, 1, 1]}


def made(layout: object, **options: str) -> NextFrame:
    found = objective(layout, **options)
    assert isinstance(found, NextFrame)
    for parameter in found.parameters():  # wide enough that what is seen shows
        torch.nn.init.normal_(parameter, std=0.3)
    return found


def batch_of(layout: object, seed: int = 0) -> PackedBatch:
    counts = {stream: COUNTS[stream] for stream in layout.streams}  # type: ignore[attr-defined]
    return packed(layout, rows(np.random.default_rng(seed), counts))


def test_each_frame_with_a_step_before_it_is_a_target():
    for layout, num_frames, num_tokens in (
        (continuous("latents"), 8, 8 + 3),  # and the <eos> of each segment
        (continuous("latents", ends=False), 8 - 2, 8 - 2),
        (continuous("latents", prefix="text"), 8, 8 + 3),
        (conditioned("voice", continuous("latents")), 8, 8 + 3 + 3),  # and <bos>, behind the condition
    ):
        loss = made(layout).loss(batch_of(layout), draws())
        assert loss.num_targets == num_frames
        assert {name: num for name, (_, num) in loss.parts.items()} == {
            "mean": num_frames,
            "flow": num_frames,
            "tokens": num_tokens,
        }
        assert loss.nats == loss.parts["mean"][0]


def test_the_reported_error_is_that_of_the_frame_that_is_drawn_without_noise_in_one_step():
    layout = continuous("latents")
    found, batch = made(layout), batch_of(layout)
    hidden_BLH = found(batch.tokens, batch.segment_ids, batch.positions, batch.frames)
    is_frame_L = batch.tokens[0] == found.frame_token
    before_MH = hidden_BLH[0][is_frame_L.roll(-1)]
    drawn_MD = found.sample(before_MH, draws(), num_steps=1, temperature=0)
    error = (drawn_MD - batch.frames["latents"].float()).square().mean(dim=1).sum()
    assert found.loss(batch, draws()).nats == pytest.approx(error.item(), rel=1e-4)


def test_the_loss_is_of_frames_behind_the_ones_that_are_seen():
    """A frame moves what is expected of those behind it in its segment, and of no other."""
    layout = continuous("latents")
    found, batch = made(layout), batch_of(layout)

    def expected(frames_MD: Tensor) -> Tensor:
        hidden = found(batch.tokens, batch.segment_ids, batch.positions, {"latents": frames_MD})
        return hidden[0, batch.tokens[0] == found.frame_token]

    frames_MD = batch.frames["latents"]
    other_MD = frames_MD.clone()
    other_MD[2] += 5
    moved = (expected(frames_MD) - expected(other_MD)).abs().amax(dim=1) > 1e-4
    assert moved.tolist() == [False, False, True, True, True, False, False, False]


def test_batches_without_frames_have_no_targets():
    layout = continuous("latents", ends=False)
    found = made(layout)
    loss = found.loss(packed(layout, rows(np.random.default_rng(0), {"latents": [0]})), draws())
    assert (loss.nats, loss.num_targets, loss.parts) == (0, 0, {})
    loss.total.backward()


def test_the_baseline_is_the_error_of_the_training_frames_mean():
    layout = continuous("latents", ends=True)
    found, train, held_out = made(layout), [batch_of(layout, 1), batch_of(layout, 2)], [batch_of(layout, 3)]
    baseline = found.baseline(train, held_out, draws())
    mean_D = torch.cat([batch.frames["latents"] for batch in train]).double().mean(dim=0)
    expected = (held_out[0].frames["latents"].double() - mean_D).square().mean()
    assert baseline.nats == pytest.approx(expected.item(), rel=1e-5)
    assert (baseline.name, baseline.num_targets) == ("predicting the mean", 8)


def test_the_head_draws_what_may_come_and_expects_its_mean():
    """A number that is 1 or -1 whatever came before: the mean is 0, but no draw is."""
    torch.manual_seed(0)
    found, rng = objective(continuous("latents"), draws="8", layers="2"), np.random.default_rng(0)
    assert isinstance(found, NextFrame)
    optimizer = torch.optim.AdamW(found.head.parameters(), lr=1e-2)
    hidden_MH = torch.ones(128, found.model.config.dim)
    for step in range(160):
        signs_M = torch.from_numpy(rng.choice([-1.0, 1.0], 128)).float()
        frames_MD = signs_M[:, None] * torch.tensor([1.0, 1.0, -1.0])
        optimizer.zero_grad()
        found._errors(hidden_MH, frames_MD, draws(step)).mean().backward()
        optimizer.step()
    drawn_MD = found.sample(hidden_MH, draws(), num_steps=16)
    assert (drawn_MD.abs() - 1).abs().mean() < 0.2
    assert 0.35 < (drawn_MD[:, 0] > 0).float().mean() < 0.65
    assert (drawn_MD[:, 0] * drawn_MD[:, 2] < 0).float().mean() > 0.9
    assert found.sample(hidden_MH[:1], draws(), num_steps=1, temperature=0).abs().max() < 0.25
    assert torch.equal(found.sample(hidden_MH, draws(3)), found.sample(hidden_MH, draws(3)))


def test_the_velocity_is_zero_at_first_whatever_the_condition():
    torch.manual_seed(0)
    head = FlowHead(3, 4, 8, 2)
    assert not head(torch.randn(5, 3), torch.rand(5, 1), torch.randn(5, 4)).any()


def test_a_run_normalizes_by_the_streams_statistics_and_keeps_them(tmp_path: Path):
    make_root(Root(tmp_path / "root"))
    settings = TrainSettings(
        root=str(tmp_path / "root"),
        layout="continuous:stream=latents",
        model=ModelConfig(dim=16, num_layers=1, num_heads=2),
        steps=3,
        batch_size=4,
        length=32,
    )
    report = train_lm(settings, str(tmp_path / "run"), Means())
    assert (report["objective"], report["baseline"]) == ("continuous", "predicting the mean")
    assert report["baseline_loss"] == pytest.approx(1.0, abs=0.3)
    _, mean_D, variance_D = stream_statistics(Root(tmp_path / "root"), "latents")
    shutil.rmtree(tmp_path / "root")
    _, found = load_run(str(tmp_path / "run"))
    assert isinstance(found, NextFrame)
    assert np.allclose(found.mean_D, mean_D, rtol=1e-6)
    assert np.allclose(found.deviation_D, np.sqrt(variance_D), rtol=1e-6)


def test_numbers_that_never_change_become_zeros(tmp_path: Path):
    root = Root(tmp_path / "root")
    make_root(root, constant=True)
    found = objective(continuous("latents"))
    assert isinstance(found, NextFrame)
    found.prepare(root, {"latents": open_stream(root, "latents").version})
    assert found.normalized(torch.full((1, 3), 2.0)).tolist() == [[0.0] * 3]


@pytest.mark.parametrize(
    ("layout", "options", "told"),
    [
        (flatten("acoustic"), {}, "take layout continuous"),
        (continuous("latents"), {"draws": "1"}, "'1'; expected a number from 2 to 64"),
        (continuous("latents"), {"steps": "1"}, "has no option 'steps'"),
    ],
)
def test_layouts_and_options_that_do_not_fit_are_told(layout: object, options: dict[str, str], told: str):
    with pytest.raises(UserError, match=told):
        objective(layout, "continuous", **options)
