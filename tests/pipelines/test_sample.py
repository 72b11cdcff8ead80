"""Frames to fit a codebook on: how many, from where, and what the choice may not depend on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_at import read_rows
from wavemill.jobs.corpus import build_corpus
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.sample import Sample, sample_frames
from wavemill.pipelines.tokenize import Work
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.registry import load_features
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
    *,
    budget_bytes: int = 1 << 30,
    seed: int = 0,
    leave_out: frozenset[str] = frozenset(),
    threads: int = 1,
    ahead_bytes: int = 1 << 26,
    heard: list[tuple[float, bool]] | None = None,
) -> Sample:
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
    return sample_frames(
        root,
        corpus,
        features,
        work,
        budget_bytes=budget_bytes,
        seed=seed,
        leave_out=leave_out,
        on_segment=lambda duration_s, failed: (heard if heard is not None else []).append((duration_s, failed)),
    )


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


def test_a_budget_for_all_takes_every_frame_once(small_root: Path, features: Features) -> None:
    sample = take(small_root, features)
    expected_ND = every_frame(small_root, features)
    assert sample.frames_ND.dtype == np.float32
    assert sample.frames_ND.shape == expected_ND.shape
    assert sorted(map(bytes, sample.frames_ND)) == sorted(map(bytes, expected_ND))
    assert (sample.num_segments, sample.num_speakers) == (24, 2)
    assert sample.num_errors == 1  # not_numbers.wav, which only decoding finds out


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_the_sample_keeps_within_its_budget_and_uses_most_of_it(
    share: float, small_root: Path, features: Features
) -> None:
    all_frames = as_set(every_frame(small_root, features))
    budget_bytes = int(share * len(all_frames) * FRAME_BYTES)
    sample = take(small_root, features, budget_bytes=budget_bytes)
    assert sample.frames_ND.nbytes <= budget_bytes
    assert sample.frames_ND.nbytes > 0.4 * budget_bytes
    assert as_set(sample.frames_ND) <= all_frames


def test_a_small_budget_still_hears_many_segments(small_root: Path, features: Features) -> None:
    num_frames = len(every_frame(small_root, features))
    assert take(small_root, features, budget_bytes=num_frames * FRAME_BYTES // 10).num_segments >= 12


def test_a_budget_below_one_frame_gives_at_most_one(small_root: Path, features: Features) -> None:
    assert len(take(small_root, features, budget_bytes=1).frames_ND) <= 1


def test_shards_threads_and_memory_change_no_frame(
    small_root: Path, samples: Path, features: Features, tmp_path: Path
) -> None:
    _build(tmp_path / "many", samples, shard_hours=0.002)
    assert len(open_corpus(Root(tmp_path / "many")).files) > 5
    budget_bytes = 500 * FRAME_BYTES
    first = take(small_root, features, budget_bytes=budget_bytes).frames_ND
    assert len(first) > 200
    for root, threads, ahead_bytes in (
        (small_root, 3, 1 << 26),
        (tmp_path / "many", 1, 1 << 30),
        (tmp_path / "many", 2, 300_000),
    ):
        again = take(root, features, budget_bytes=budget_bytes, threads=threads, ahead_bytes=ahead_bytes).frames_ND
        assert np.array_equal(again, first)


def test_the_seed_decides_the_sample(small_root: Path, features: Features) -> None:
    budget_bytes = 500 * FRAME_BYTES
    first = take(small_root, features, budget_bytes=budget_bytes, seed=1).frames_ND
    assert np.array_equal(take(small_root, features, budget_bytes=budget_bytes, seed=1).frames_ND, first)
    other = take(small_root, features, budget_bytes=budget_bytes, seed=2).frames_ND
    assert len(as_set(first) & as_set(other)) < 0.5 * len(first)


def test_speakers_left_out_leave_no_frame(small_root: Path, features: Features) -> None:
    sample = take(small_root, features, leave_out=frozenset({"en_anna"}))
    assert as_set(sample.frames_ND) == as_set(every_frame(small_root, features, leave_out="en_anna"))
    assert (sample.num_segments, sample.num_speakers) == (12, 1)
    nobody = take(small_root, features, leave_out=frozenset({"en_anna", "de_jonas"}))
    assert (nobody.frames_ND.shape, nobody.num_segments) == ((0, 39), 0)


def test_segments_with_an_error_are_passed_over_and_told(small_root: Path, features: Features) -> None:
    heard: list[tuple[float, bool]] = []
    sample = take(small_root, features, heard=heard)
    assert [failed for _, failed in heard].count(True) == sample.num_errors == 1
    assert len(heard) == 25
    assert sample.duration_s == pytest.approx(sum(duration_s for duration_s, _ in heard))
