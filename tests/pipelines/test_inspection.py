"""A dataset's figures against a naive count over its files with pyarrow and numpy."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wavemill.jobs.corpus import build_corpus
from wavemill.pipelines.inspection import describe_corpus, describe_streams
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.quarantine import quarantined
from wavemill.storage.codes import open_corpus
from wavemill.storage.root import Root

FRAMES_PER_SECOND = 50
SHAPES = {"semantic": (1, 100), "acoustic": (8, 64)}


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in files_of(folder) for row in pq.read_table(path).to_pylist()]


def naive_entropy(values: list[int]) -> float:
    counts = Counter(values)
    return -sum(n / len(values) * math.log2(n / len(values)) for n in counts.values())


@pytest.fixture(scope="module")
def described(finished_root: Path) -> dict[str, dict[str, Any]]:
    root = Root(finished_root)
    return {stream["stream"]: stream for stream in describe_streams(root, open_corpus(root))}


def test_the_corpus_is_counted_as_a_naive_reader_counts_it(finished_root: Path) -> None:
    root = Root(finished_root)
    rows = rows_of(finished_root / "corpus")
    found = describe_corpus(root, open_corpus(root))
    assert found["segments"] == len(rows) == 112
    assert found["recordings"] == len({(row["source"], row["path"]) for row in rows})
    assert found["shards"] == len(files_of(finished_root / "corpus"))
    assert found["hours"] == pytest.approx(sum(row["duration_s"] for row in rows) / 3600)
    assert found["speakers"] == len({row["speaker"] for row in rows} - {None}) == 9
    for key, column in (
        ("sources", "source"),
        ("formats", "format"),
        ("languages", "language"),
        ("errors_by_class", "error"),
    ):
        assert found[key] == Counter(row[column] for row in rows if row[column] is not None)
    assert found["sample_rates"] == Counter(str(row["sample_rate"]) for row in rows if row["sample_rate"])
    assert found["errors"] == sum(row["error"] is not None for row in rows) == 3
    assert CorpusPolicy.from_json(found["policy"]) == CorpusPolicy()
    json.dumps(found)


def test_interleaved_parts_of_two_recordings_are_two_recordings(samples: Path, tmp_path: Path) -> None:
    names = [f"{samples}/speech/de_frieda_02.flac", f"{samples}/speech/de_jonas_01.flac"] * 2
    lines = [{"audio_filepath": name, "offset": place * 0.25} for place, name in enumerate(names)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    root = Root(tmp_path / "root")
    build_corpus(root, [str(tmp_path / "list.jsonl")], CorpusPolicy(), shard_hours=1)
    found = describe_corpus(root, open_corpus(root))
    assert (found["segments"], found["recordings"]) == (4, 2)


@pytest.mark.parametrize("name", SHAPES)
def test_the_use_of_each_codebook_is_as_a_naive_reader_counts_it(
    name: str, finished_root: Path, described: dict[str, dict[str, Any]]
) -> None:
    num_codebooks, size = SHAPES[name]
    rows = rows_of(finished_root / "streams" / name)
    found = described[name]
    assert (found["num_codebooks"], found["codebook_size"]) == (num_codebooks, size)
    entropies = []
    for book in found["codebooks"]:
        values = [code for row in rows for code in row[f"codes_{book['codebook']:02d}"] or ()]
        assert book["used_codes"] == len(set(values))
        entropies.append(naive_entropy(values))
        assert book["entropy_bits"] == pytest.approx(entropies[-1])
        assert 0 < book["entropy_bits"] <= math.log2(size)
    assert [book["codebook"] for book in found["codebooks"]] == list(range(num_codebooks))
    assert found["entropy_bits_per_second"] == pytest.approx(sum(entropies) * FRAMES_PER_SECOND)


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_rates_and_hours_are_as_a_naive_reader_counts_them(
    name: str, finished_root: Path, described: dict[str, dict[str, Any]]
) -> None:
    num_codebooks, size = SHAPES[name]
    files = files_of(finished_root / "streams" / name)
    rows = rows_of(finished_root / "streams" / name)
    found = described[name]
    frames = sum(row["num_frames"] or 0 for row in rows)
    size_bytes = sum(path.stat().st_size for path in files)
    assert found["frame_rate"] == "50"
    assert found["frames"] == frames
    assert found["hours"] == pytest.approx(frames / FRAMES_PER_SECOND / 3600)
    assert found["size_bytes"] == size_bytes
    assert found["bytes_per_code"] == pytest.approx(size_bytes / (frames * num_codebooks))
    assert found["bits_per_second"] == pytest.approx(FRAMES_PER_SECOND * num_codebooks * math.log2(size))
    assert found["segments"] == len(rows) == 112
    assert (found["shards"], found["shards_missing"], found["shards_looked_at"]) == (len(files), 0, len(files))
    assert found["errors"] == sum(row["error"] is not None for row in rows) == 4
    assert found["errors_by_class"] == Counter(row["error"] for row in rows if row["error"] is not None)
    assert found["segments"] == found["errors"] + sum(row["num_frames"] is not None for row in rows)
    json.dumps(found)


def test_shards_of_the_corpus_that_a_stream_lacks_are_counted(
    fitted_root: Path, finished_root: Path, samples: Path, copy_root: Any
) -> None:
    root = Root(copy_root(finished_root))
    build_corpus(root, [f"more={samples / 'speech' / 'en_anna_11.flac'}"], CorpusPolicy(), shard_hours=1)
    corpus = open_corpus(root)
    assert corpus.num_rows == 113
    for stream in describe_streams(root, corpus):
        assert stream["shards_missing"] == 1
    assert describe_streams(Root(fitted_root), open_corpus(Root(fitted_root))) == []


def test_a_stream_says_what_it_was_made_with(finished_root: Path, described: dict[str, dict[str, Any]]) -> None:
    for name, found in described.items():
        [action] = [
            json.loads(line)["metaData"]
            for line in (finished_root / "streams" / name / "_delta_log" / f"{0:020d}.json").read_text().splitlines()
            if "metaData" in line
        ]
        written = json.loads(action["description"])
        assert found["fingerprint"] == written["fingerprint_hash"]
        assert found["fingerprint_parts"] == written["fingerprint"]
        assert found["numerics"] == written["numerics"]


# Quarantine


def test_quarantine_lists_exactly_the_broken_files_with_their_classes(finished_root: Path) -> None:
    root = Root(finished_root)
    found = quarantined(root, open_corpus(root))
    assert {(entry["source"], entry["path"], entry["error"]) for entry in found} == {
        ("broken", "cut_short.wav", "truncated"),
        ("broken", "empty.mp3", "empty"),
        ("broken", "error_page.mp3", "not-audio"),
        ("broken", "not_numbers.wav", "non-finite"),
    }
    assert len(found) == 4
    said_by = {entry["path"]: sorted(entry["found_in"]) for entry in found}
    assert said_by.pop("not_numbers.wav") == ["acoustic", "semantic"]  # a fine header; only decoding finds it
    assert set(map(tuple, said_by.values())) == {("acoustic", "corpus", "semantic")}


def test_quarantine_agrees_with_the_files(finished_root: Path) -> None:
    corpus = {row["id"]: row for row in rows_of(finished_root / "corpus")}
    stream = {row["id"]: row for row in rows_of(finished_root / "streams" / "semantic")}
    root = Root(finished_root)
    found = quarantined(root, open_corpus(root))
    assert {entry["id"] for entry in found} == {segment for segment, row in stream.items() if row["error"] is not None}
    for entry in found:
        row = corpus[entry["id"]]
        assert (entry["shard"], entry["start_sample"]) == (row["shard"], row["start_sample"])
        assert entry["error_message"] == stream[entry["id"]]["error_message"]


def test_quarantine_can_be_asked_for_one_class(finished_root: Path) -> None:
    root = Root(finished_root)
    corpus = open_corpus(root)
    assert [entry["path"] for entry in quarantined(root, corpus, kind="empty")] == ["empty.mp3"]
    assert [entry["path"] for entry in quarantined(root, corpus, kind="non-finite")] == ["not_numbers.wav"]
    assert quarantined(root, corpus, kind="no such class") == []


def test_quarantine_knows_the_corpus_before_any_stream_is_made(fitted_root: Path) -> None:
    root = Root(fitted_root)
    found = quarantined(root, open_corpus(root))
    assert sorted(entry["path"] for entry in found) == ["cut_short.wav", "empty.mp3", "error_page.mp3"]
    assert {tuple(entry["found_in"]) for entry in found} == {("corpus",)}


def test_rows_with_an_error_have_null_codes_and_all_others_have_as_many_as_frames(finished_root: Path) -> None:
    for name, (num_codebooks, size) in SHAPES.items():
        for path in files_of(finished_root / "streams" / name):
            table: pa.Table = pq.read_table(path)
            for row in table.to_pylist():
                books = [row[f"codes_{book:02d}"] for book in range(num_codebooks)]
                if row["error"] is not None:
                    assert row["num_frames"] is None
                    assert row["error_message"]
                    assert books == [None] * num_codebooks
                else:
                    assert {len(book) for book in books} == {row["num_frames"]}
                    assert np.min(books) >= 0
                    assert np.max(books) < size
