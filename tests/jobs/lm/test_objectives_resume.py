"""Runs of every objective that draws or carries something of its own: stopped and gone on with, bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from objectives_made import make_root
from safetensors.torch import load_file
from test_unified_lm import save_model
from wavemill.jobs.lm.model import ModelConfig
from wavemill.jobs.lm.settings import TrainSettings
from wavemill.jobs.lm.train import Means
from wavemill.jobs.train_lm import train_lm
from wavemill.storage.root import Root
from wavemill.tokenizers.hub import files_sha256
from wavemill.tokenizers.spec import UserError


@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        ("continuous:stream=latents", None),
        pytest.param("masked:stream=semantic", None, marks=pytest.mark.slow),
        pytest.param("soundstorm:semantic=semantic,acoustic=acoustic", None, marks=pytest.mark.slow),
        pytest.param("vall-e-nar:text=text,acoustic=acoustic", None, marks=pytest.mark.slow),
        pytest.param("unified:tasks=tts,text=text,audio=semantic", "unified", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(layout: str, objective: str | None, tmp_path: Path):
    model = save_model(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    make_root(Root(tmp_path / "root"), words=files_sha256([model / "tokenizer.json"]))
    settings = TrainSettings(
        root=str(tmp_path / "root"),
        layout=layout,
        objective=objective,
        options={"model": str(model)} if objective else {},
        model=ModelConfig(dim=16, num_layers=1, num_heads=2, dropout=0.1),
        steps=4,
        batch_size=4,
        length=48,
        evaluate_every=2,
    )
    whole = train_lm(settings, str(tmp_path / "whole"), Means())
    times: Iterator[float] = iter([0.0, 0.0, 1e9])
    stopped = train_lm(settings, str(tmp_path / "parts"), Means(minutes=1.0, clock=lambda: next(times)))
    assert stopped["steps"] == 2
    assert train_lm(settings, str(tmp_path / "parts"), Means()) == whole
    for file in ("model", "optimizer"):
        one, other = (
            load_file(tmp_path / run / "checkpoints" / "step-00000004" / f"{file}.safetensors")
            for run in ("whole", "parts")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_held_out_part_of_nothing_but_given_steps_is_told(tmp_path: Path):
    make_root(Root(tmp_path / "root"))
    settings = TrainSettings(
        root=str(tmp_path / "root"),
        layout="fine:acoustic=acoustic,coarse=2,codebooks=3",
        model=ModelConfig(dim=16, num_layers=1, num_heads=2),
        packing="concatenate",
        batch_size=1,
        length=4,
        held_out_batches=1,
    )
    with pytest.raises(UserError, match=r"at most one step, or sequences of --length 4 hold none but steps that are"):
        train_lm(settings, str(tmp_path / "run"), Means())
