"""Every other family learns: in about two minutes it knows more of held-out speech than a bigram, or than the mean."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
import weights_text
from test_unified_lm import save_model
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.lm.model import ModelConfig
from wavemill.jobs.lm.settings import TrainSettings
from wavemill.jobs.lm.train import Means
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.jobs.train_lm import train_lm
from wavemill.pipelines.streams import StreamConfig
from wavemill.storage.root import Root
from wavemill.tokenizers.tokenizer import Output, TokenizerConfig

MakeOnce = Callable[[str, Callable[[Path], None]], Path]
_MOST_S = 150  # of one core


@pytest.fixture(scope="module")
def spoken_root(made_once: MakeOnce, finished_root: Path, samples: Path) -> Path:
    """The samples' root with transcripts as ids, log-mels, and a small text language model beside it."""

    def make(path: Path) -> None:
        shutil.copytree(finished_root, path / "root")
        lines = (samples / "manifest.jsonl").read_text().splitlines()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights_text, "TEXTS", tuple(json.loads(line)["text"] for line in lines))
            words = weights_text.make_text_tokenizer(path / "model", size=200)
        save_model(words, vocabulary=len(transformers.AutoTokenizer.from_pretrained(words)), width=128, tied=True)
        streams = [
            StreamConfig(name="text", tokenizer=TokenizerConfig(tokenizer="text-tokens", weights=str(words))),
            StreamConfig(name="mel", tokenizer=TokenizerConfig(tokenizer="mel-rvq", output=Output.FEATURES)),
        ]
        tokenize(Root(path / "root"), streams, InlineEngine, TokenizeOptions(max_error_share=0.9))

    return made_once("families", make)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("layout", "objective", "options", "dropout", "steps"),
    [
        ("masked:stream=semantic", "masked", {"starts": "0.3", "span": "1"}, 0.2, 600),
        ("soundstorm:semantic=semantic,acoustic=acoustic,codebooks=4", "soundstorm", {}, 0.1, 300),
        ("vall-e-nar:text=text,acoustic=acoustic,codebooks=4", "nar", {}, 0.1, 300),
        ("continuous:stream=mel", "continuous", {}, 0.1, 300),
        ("unified:tasks=tts,text=text,audio=semantic", "unified", {"model": "model"}, 0.0, 300),
    ],
    ids=lambda value: value if isinstance(value, str) and ":" not in value else "",
)
def test_held_out_loss_gets_under_the_baseline(
    layout: str,
    objective: str,
    options: dict[str, str],
    dropout: float,
    steps: int,
    spoken_root: Path,
    tmp_path: Path,
):
    settings = TrainSettings(
        root=str(spoken_root / "root"),
        layout=layout,
        objective=objective,
        options={key: str(spoken_root / value) if key == "model" else value for key, value in options.items()},
        model=ModelConfig(dim=128, num_layers=2, num_heads=4, dropout=dropout),
        steps=steps,
        batch_size=8,
        length=256,
        learning_rate=3e-3,
        warmup=30,
        evaluate_every=50,
    )
    began = time.process_time()
    report = train_lm(settings, str(tmp_path / "run"), Means())
    print({name: report[name] for name in ("best_held_out_loss", "best_step", "baseline", "baseline_loss")})
    assert report["best_held_out_loss"] < report["baseline_loss"] - 0.05
    assert time.process_time() - began < _MOST_S
