"""The reference model learns: in two minutes on the samples it knows more of held-out speech than a bigram does."""

import time
from pathlib import Path

import pytest
from wavemill.jobs.lm.model import ModelConfig
from wavemill.jobs.lm.settings import TrainSettings
from wavemill.jobs.lm.train import Means
from wavemill.jobs.train_lm import train_lm

_MOST_S = 120  # of one core


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("layout", "objective"),
    [("semantic:stream=semantic,ends=true", "next"), ("delay:stream=acoustic,codebooks=4", "parallel")],
)
def test_held_out_loss_gets_under_that_of_a_bigram(layout: str, objective: str, finished_root: Path, tmp_path: Path):
    settings = TrainSettings(
        root=str(finished_root),
        layout=layout,
        model=ModelConfig(dim=128, num_layers=2, num_heads=4, dropout=0.2),
        steps=160,
        batch_size=8,
        length=192,
        learning_rate=4e-3,
        warmup=20,
        evaluate_every=20,
    )
    began = time.process_time()
    report = train_lm(settings, str(tmp_path / "run"), Means())
    print({name: report[name] for name in ("best_held_out_loss", "best_step", "baseline", "baseline_loss")})
    assert report["objective"] == objective
    assert report["best_held_out_loss"] < report["baseline_loss"] - 0.05
    assert time.process_time() - began < _MOST_S
