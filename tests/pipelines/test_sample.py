"""Frames to fit a codebook on: how many, from where, and what the choice may not depend on."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from audio_at import read_rows
from numpy.typing import NDArray
from wavemill.jobs.corpus import build_corpus
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.resample import resampled_length
from wavemill.pipelines.sample import SampleWork
from wavemill.pipelines.sample_plan import _number, equal_shares, plan_sample
from wavemill.pipelines.sampled import Sampled
from wavemill.pipelines.tokenize import ShardTask, Work
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.registry import load_features
from wavemill.tokenizers.spec import num_frames
from wavemill.tokenizers.tokenizer import Features, TokenizerConfig

FRAME_BYTES = 4 * 39


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the job that fits codebooks has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def features() -> Features:
    return load_features(TokenizerConfig(tokenizer="mfcc-kmeans"))


@pytest.fixture(scope="module")
def small_root(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips of two speakers and the broken files, in one shard."""
    path = tmp_path_factory.mktemp("small") / "root"
    _build(path, samples, shard_hours=1.0)
    return path


def _build(path: Path, samples: Path, *, shard_hours: float) -> None:
    lines = [
        line
        for line in (samples / "manifest.jsonl").read_text().splitlines()
        if '"en_anna"' in line or '"de_jonas"' in line
    ]
    manifest = path.parent / f"{path.name}.jsonl"
    manifest.write_text("\n".join(lines).replace('"speech/', f'"{samples}/speech/'))
    sources = [f"speech={manifest}", f"broken={samples / 'broken'}"]
    build_corpus(Root(path), sources, CorpusPolicy(), shard_hours=shard_hours)


def take(
    path: Path,
    features: Features,
    scratch: Path,
    *,
    budget_bytes: int = 1 << 30,
    seed: int = 0,
    column: str | None = None,
    leave_out: frozenset[str] = frozenset(),
    threads: int = 1,
    ahead_bytes: int = 1 << 26,
    memory_bytes: int = 1 << 30,
    order: int = 1,
) -> tuple[Sampled, NDArray[np.float32]]:
    """The sample of all shards, and its frames; shards are sampled in one order or the other."""
    root = Root(path)
    corpus = open_corpus(root)
    work = Work(
        root_uri=root.uri,
        corpus=corpus,
        streams=(),
        device="cpu",
        source_roots={},
        decode_threads=threads,
        decode_ahead_bytes=ahead_bytes,
    )
    plan = plan_sample(
        root,
        corpus,
        features.spec,
        budget_frames=max(1, budget_bytes // FRAME_BYTES),
        seed=seed,
        column=column,
        leave_out=leave_out,
    )
    folder = f"tmp/{uuid4().hex}"
    config = TokenizerConfig(tokenizer="mfcc-kmeans")
    worker = SampleWork(work=work, config=config, layers=(None,), plan=plan, folder=folder).worker()
    for shard in plan.shards[::order]:
        worker.run([ShardTask(shard=shard, streams=())])
    worker.close()
    sampled = Sampled(root, folder, plan)
    frames_ND = sampled.frames(None, features.dim, memory_bytes=memory_bytes, scratch=scratch)
    root.below("tmp").remove_tree()
    return sampled, frames_ND


def every_frame(path: Path, features: Features, *, leave_out: str = "") -> np.ndarray:
    """All frames of all good segments, found without the sampler."""
    root = Root(path)
    corpus = open_corpus(root)
    frames = []
    for shard in corpus.files:
        rows = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
        good = [row for row in rows if row["error"] is None and row["speaker"] != leave_out]
        for result in read_rows(good, [16_000]):
            if isinstance(result, dict):
                frames.append(features.extract(result[16_000]).numpy())
    return np.concatenate(frames)


def as_set(frames_ND: np.ndarray) -> set[bytes]:
    return {frame.tobytes() for frame in frames_ND}


def test_a_budget_for_all_takes_every_frame_once(small_root: Path, features: Features, tmp_path: Path) -> None:
    sampled, frames_ND = take(small_root, features, tmp_path)
    expected_ND = every_frame(small_root, features)
    assert frames_ND.dtype == np.float32
    assert frames_ND.shape == expected_ND.shape
    assert sorted(map(bytes, frames_ND)) == sorted(map(bytes, expected_ND))
    assert (sampled.num_segments, sampled.num_speakers) == (24, 2)
    assert sampled.num_errors == 1  # not_numbers.wav, which only decoding finds out


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_the_sample_keeps_within_its_budget_and_uses_all_of_it(
    share: float, small_root: Path, features: Features, tmp_path: Path
) -> None:
    all_ND = every_frame(small_root, features)
    budget_bytes = int(share * len(all_ND)) * FRAME_BYTES
    _, frames_ND = take(small_root, features, tmp_path, budget_bytes=budget_bytes)
    assert frames_ND.nbytes == budget_bytes
    assert Counter(map(bytes, frames_ND)) <= Counter(map(bytes, all_ND))


def test_a_small_budget_still_hears_many_segments(small_root: Path, features: Features, tmp_path: Path) -> None:
    num_frames = len(every_frame(small_root, features))
    sampled, _ = take(small_root, features, tmp_path, budget_bytes=num_frames * FRAME_BYTES // 10)
    assert sampled.num_segments >= 12


@pytest.mark.parametrize("budget", [1, 200, 5_000, 10**6])
@pytest.mark.parametrize("prune_every", [0, 3, 50])
def test_planning_in_bounded_memory_chooses_what_sorting_all_segments_would(
    budget: int, prune_every: int, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _build(tmp_path / "root", samples, shard_hours=0.003)
    root = Root(tmp_path / "root")
    corpus, spec = open_corpus(root), load_features(TokenizerConfig(tokenizer="mfcc-kmeans")).spec
    monkeypatch.setattr("wavemill.pipelines.sample_plan._PRUNE_EVERY", prune_every)
    plan = plan_sample(root, corpus, spec, budget_frames=budget, seed=5, column="speaker")
    rows = [
        row
        for shard in corpus.files
        for row in read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
    ]
    for value, stratum in plan.strata.items():
        mine = [row for row in rows if row["error"] is None and plan.value_of(row) == value]
        frames = {
            row["id"]: num_frames(resampled_length(row["num_samples"], row["sample_rate"], 16_000), spec)
            for row in mine
        }
        assert stratum.num_frames == sum(frames.values())
        covered, last = 0, -1.0
        for row in sorted(mine, key=lambda row: _number(5, row["id"])):
            if covered < 8 * stratum.quota or budget == 10**6:
                covered, last = covered + frames[row["id"]], _number(5, row["id"])
        assert (stratum.covered, stratum.last) == (covered, last)
    assert set(plan.shards) == {row["shard"] for row in rows if plan.chooses(row)}


def test_a_budget_below_one_frame_gives_at_most_one(small_root: Path, features: Features, tmp_path: Path) -> None:
    assert len(take(small_root, features, tmp_path, budget_bytes=1)[1]) <= 1


def test_shards_order_threads_and_memory_change_no_frame(
    small_root: Path, samples: Path, features: Features, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    _build(many, samples, shard_hours=0.002)
    assert len(open_corpus(Root(many)).files) > 5
    budget_bytes = 500 * FRAME_BYTES
    _, first = take(small_root, features, tmp_path, budget_bytes=budget_bytes)
    assert len(first) > 400
    for how in (
        {"path": small_root, "threads": 3, "memory_bytes": 1},
        {"path": many, "ahead_bytes": 1 << 30},
        {"path": many, "threads": 2, "ahead_bytes": 300_000, "order": -1},
    ):
        _, again = take(features=features, scratch=tmp_path, budget_bytes=budget_bytes, **how)
        assert np.array_equal(again, first)
        assert isinstance(again, np.memmap) == ("memory_bytes" in how)


def test_samples_in_many_files_are_those_in_one(
    small_root: Path, features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = take(small_root, features, tmp_path, budget_bytes=500 * FRAME_BYTES)
    monkeypatch.setattr("wavemill.pipelines.sample._PART_BYTES", 100 * FRAME_BYTES)
    sampled, again = take(small_root, features, tmp_path, budget_bytes=500 * FRAME_BYTES)
    assert sampled.reports[0].parts >= 5
    assert np.array_equal(again, first)


def test_the_seed_decides_the_sample(small_root: Path, features: Features, tmp_path: Path) -> None:
    budget_bytes = 500 * FRAME_BYTES
    _, first = take(small_root, features, tmp_path, budget_bytes=budget_bytes, seed=1)
    assert np.array_equal(take(small_root, features, tmp_path, budget_bytes=budget_bytes, seed=1)[1], first)
    _, other = take(small_root, features, tmp_path, budget_bytes=budget_bytes, seed=2)
    assert len(as_set(first) & as_set(other)) < 0.5 * len(first)


def test_speakers_left_out_leave_no_frame(small_root: Path, features: Features, tmp_path: Path) -> None:
    sampled, frames_ND = take(small_root, features, tmp_path, leave_out=frozenset({"en_anna"}))
    assert as_set(frames_ND) == as_set(every_frame(small_root, features, leave_out="en_anna"))
    assert (sampled.num_segments, sampled.num_speakers) == (12, 1)
    nobody, frames_ND = take(small_root, features, tmp_path, leave_out=frozenset({"en_anna", "de_jonas"}))
    assert (frames_ND.shape, nobody.num_segments) == ((0, 39), 0)


def test_each_value_of_a_column_gets_the_same_number_of_frames(
    small_root: Path, features: Features, tmp_path: Path
) -> None:
    sampled, frames_ND = take(small_root, features, tmp_path, budget_bytes=902 * FRAME_BYTES, column="speaker")
    assert sampled.frames_by_value["en_anna"] == sampled.frames_by_value["de_jonas"] > 300
    assert sum(sampled.frames_by_value.values()) == len(frames_ND)
    of_anna = as_set(every_frame(small_root, features, leave_out="de_jonas"))
    first_half = [frame.tobytes() in of_anna for frame in frames_ND[: len(frames_ND) // 2]]
    assert 0.35 < np.mean(first_half) < 0.65  # the first so many are a sample of both


@pytest.mark.parametrize(
    ("there", "budget", "shares"),
    [
        ([10, 100, 100], 90, [10, 40, 40]),
        ([100, 10, 5], 30, [15, 10, 5]),
        ([3, 3], 100, [3, 3]),
        ([50, 50, 50], 100, [34, 33, 33]),
        ([7, 0, 7], 3, [2, 0, 1]),
        ([], 5, []),
    ],
)
def test_shares_are_equal_as_far_as_there_is_enough(there: list[int], budget: int, shares: list[int]) -> None:
    assert equal_shares(there, budget) == shares
