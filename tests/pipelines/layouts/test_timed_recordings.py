"""Words that people aligned with real recordings, through every layout that uses their times."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import weights_text
from wavemill.jobs.arguments import parse_streams
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.layouts.interleaved import interleaved
from wavemill.pipelines.layouts.moshi import moshi
from wavemill.pipelines.layouts.plan import rows_of
from wavemill.pipelines.layouts.transcript import transcript
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.dataset import Pack, TokenDataset
from wavemill.storage.layouts import Segment
from wavemill.storage.root import Root

STREAMS = ("semantic=mfcc-kmeans", "acoustic=mel-rvq", "runs=deduplicate,of=semantic", "words=word-tokens,weights={}")


@pytest.fixture(scope="module")
def spoken(dev_recordings: Path, fitted_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recordings, one of which has the times of its words."""
    place, audio = tmp_path_factory.mktemp("spoken"), tmp_path_factory.mktemp("audio")
    for name in ("mary.wav", "mary.TextGrid", "bobby.wav"):
        shutil.copy(dev_recordings / "praatio" / name, audio)
    root = Root(place)
    shutil.copytree(fitted_root / "codebooks", place / "codebooks")
    words = weights_text.make_text_tokenizer(tmp_path_factory.mktemp("words"))
    build_corpus(root, [f"spoken={audio}"], CorpusPolicy(), shard_hours=1.0)
    tokenize(root, parse_streams([each.format(words) for each in STREAMS]), InlineEngine, TokenizeOptions())
    return place


@pytest.mark.parametrize(
    "layout",
    [
        interleaved("words", "semantic", words=2, first="text"),
        interleaved("words", "runs", words=1, first="speech"),
        moshi("words", "acoustic", acoustic_delay=2),
        transcript("words", "acoustic", None),
    ],
    ids=["interleaved", "interleaved runs", "moshi", "transcript"],
)
def test_real_words_and_codes_come_back_exactly(layout: Any, spoken: Path) -> None:
    [batch] = TokenDataset(str(spoken), dict(layout.streams), batch_size=2)
    plan = layout.plan(TokenDataset(str(spoken), dict(layout.streams)).specs)
    num_steps, with_words = 0, 0
    for row, segment_id in enumerate(batch.ids):
        counts = {name: int(count[row]) for name, count in batch.num_frames.items()}
        codes = {name: codes[row][:, : counts[name]] for name, codes in batch.codes.items()}
        durations = {name: each[row][: counts[name]] for name, each in batch.durations.items()}
        rows = rows_of(Segment(segment_id, codes, durations=durations))
        laid = plan.lay(rows)
        found, expected = plan.invert(laid), rows if isinstance(layout, transcript) else plan.held(rows)
        for name, each in expected.items():
            assert [book.tolist() for book in found[name].books] == [book.tolist() for book in each.books]
        num_steps += len(laid.tokens)
        with_words += len(found["words"].books[0]) > 0
    assert with_words == 1
    packed = TokenDataset(str(spoken), pack=Pack(layout, 64), batch_size=1)
    assert sum(int((each.segment_ids > 0).sum()) for each in packed) == num_steps
