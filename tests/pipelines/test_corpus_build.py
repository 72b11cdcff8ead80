"""Building and growing a corpus: what gets an id, what is added, what is left alone."""

import gc
import itertools
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from wavemill.jobs.corpus import BuildResult, build_corpus
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, segment_id
from wavemill.storage.table import read_snapshot
from wavemill.tokenizers.spec import UserError

Row = dict[str, Any]
RATE = 16_000


def record(path: Path, seconds: float = 0.5, *, rate: int = RATE, value: float = 0.1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * rate), value), rate)


def build(root: Path, *sources: str | Path, window_s: float | None = None, shard_hours: float = 1.0) -> BuildResult:
    arguments = [str(source) for source in sources]
    return build_corpus(Root(root), arguments, CorpusPolicy(window_s=window_s), shard_hours=shard_hours)


def rows_of(root: Path) -> list[Row]:
    corpus = open_corpus(Root(root))
    tables = [read_parquet(Root(root), corpus.path(shard), schema=CORPUS_SCHEMA) for shard in corpus.files]
    return [row for table in tables for row in table.to_pylist()]


def ids_of(root: Path) -> list[str]:
    return [row["id"] for row in rows_of(root)]


def shard_files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "corpus").glob("*.parquet")}


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A tree of six recordings of growing length."""
    for number, name in enumerate(("a/1.wav", "a/2.wav", "b/1.wav", "b/c/3.wav", "d.wav", "e.wav")):
        record(tmp_path / "speech" / name, 0.5 + 0.1 * number)
    return tmp_path / "speech"


# Ids


def test_the_same_tree_under_another_mount_has_the_same_ids(speech: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "deep" / "speech"
    shutil.copytree(speech, other)
    build(tmp_path / "one", speech)
    build(tmp_path / "two", other)
    assert ids_of(tmp_path / "one") == ids_of(tmp_path / "two")
    assert len(set(ids_of(tmp_path / "one"))) == 6


def test_an_id_says_where_a_segment_is_and_not_what_it_sounds_like(speech: Path, tmp_path: Path) -> None:
    build(tmp_path / "one", speech)
    for path in speech.rglob("*.wav"):
        record(path, soundfile.info(path).frames / RATE, value=-0.3)
    build(tmp_path / "two", speech)
    assert ids_of(tmp_path / "one") == ids_of(tmp_path / "two")
    build(tmp_path / "three", f"other={speech}")
    (speech / "a").rename(speech / "A")
    build(tmp_path / "four", speech)
    assert not set(ids_of(tmp_path / "one")) & set(ids_of(tmp_path / "three"))
    assert len(set(ids_of(tmp_path / "one")) & set(ids_of(tmp_path / "four"))) == 4


def test_an_id_is_the_documented_hash_of_its_place(speech: Path, tmp_path: Path) -> None:
    build(tmp_path / "root", speech, window_s=0.2)
    for row in rows_of(tmp_path / "root"):
        place = {name: row[name] for name in ("channel", "start_sample", "num_samples")}
        assert row["id"] == segment_id("speech", row["path"], member="", **place)
        assert len(row["id"]) == 26
        assert set(row["id"]) <= set("abcdefghijklmnopqrstuvwxyz234567")


def test_sources_in_another_order_give_the_same_ids(speech: Path, tmp_path: Path) -> None:
    record(tmp_path / "music" / "a" / "1.wav")
    build(tmp_path / "one", speech, tmp_path / "music")
    build(tmp_path / "two", tmp_path / "music", speech)
    assert len(ids_of(tmp_path / "one")) == 7
    assert sorted(ids_of(tmp_path / "one")) == sorted(ids_of(tmp_path / "two"))


def test_one_go_or_two_give_the_same_ids(speech: Path, tmp_path: Path) -> None:
    record(tmp_path / "music" / "a.wav")
    build(tmp_path / "one", speech, tmp_path / "music")
    part = tmp_path / "part" / "speech"
    shutil.copytree(speech / "b", part / "b")
    build(tmp_path / "two", part)
    shutil.rmtree(part)
    shutil.copytree(speech, part)
    build(tmp_path / "two", tmp_path / "music", part)
    assert len(ids_of(tmp_path / "two")) == 7
    assert sorted(ids_of(tmp_path / "one")) == sorted(ids_of(tmp_path / "two"))


def test_shards_of_any_size_hold_the_same_rows(speech: Path, tmp_path: Path) -> None:
    found, num_shards = [], []
    for shard_hours in (1.0, 0.0003, 0.0001):
        root = tmp_path / f"root-{shard_hours}"
        num_shards.append(build(root, speech, window_s=0.2, shard_hours=shard_hours).num_shards)
        assert num_shards[-1] == len(open_corpus(Root(root)).files)
        found.append([{**row, "shard": None} for row in rows_of(root)])
    assert found[0] == found[1] == found[2]
    assert 1 == num_shards[0] < num_shards[1] < num_shards[2]


def test_every_row_of_every_shard_has_its_shards_number(speech: Path, tmp_path: Path) -> None:
    build(tmp_path / "root", speech, window_s=0.1, shard_hours=0.0002)
    record(speech / "f.wav", 3.0)
    build(tmp_path / "root", speech, window_s=0.1, shard_hours=0.0002)
    root = Root(tmp_path / "root")
    corpus = open_corpus(root)
    assert list(corpus.files) == list(range(len(corpus.files)))
    assert len(corpus.files) > 5
    for shard, file in corpus.files.items():
        table = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA)
        assert set(table["shard"].to_pylist()) == {shard}
        assert table.num_rows == file.num_rows > 0


# Windows


@pytest.mark.parametrize("window_s", [0.1, 0.25, 0.3333, 1.0, 100.0])
def test_windows_cover_each_recording_exactly(window_s: float, tmp_path: Path) -> None:
    rates = (8_000, 11_025, 16_000, 44_100)
    for rate in rates:
        for seconds in (0.05, 0.25, 1.0, 1.7):
            record(tmp_path / "s" / f"{rate}-{seconds}.wav", seconds, rate=rate)
    build(tmp_path / "root", tmp_path / "s", window_s=window_s)
    by_path: dict[str, list[Row]] = {}
    for row in rows_of(tmp_path / "root"):
        by_path.setdefault(row["path"], []).append(row)
    assert len(by_path) == 16
    for path, rows in by_path.items():
        assert rows[0]["start_sample"] == 0
        for row, following in itertools.pairwise(rows):
            assert row["start_sample"] + row["num_samples"] == following["start_sample"]
            assert row["num_samples"] == round(window_s * row["sample_rate"])
        assert sum(row["num_samples"] for row in rows) == rows[0]["recording_samples"]
        assert rows[0]["recording_samples"] == soundfile.info(tmp_path / "s" / path).frames
        assert 0 < rows[-1]["num_samples"] <= round(window_s * rows[-1]["sample_rate"])
        assert all(row["duration_s"] == row["num_samples"] / row["sample_rate"] for row in rows)


def test_other_windows_on_the_same_root_are_refused_and_change_nothing(speech: Path, tmp_path: Path) -> None:
    build(tmp_path / "root", speech, window_s=0.2)
    before = shard_files(tmp_path / "root")
    record(speech / "new.wav")
    for window_s in (None, 0.3):
        with pytest.raises(UserError, match=r"was built with 0\.2 s windows"):
            build(tmp_path / "root", speech, window_s=window_s)
    assert shard_files(tmp_path / "root") == before
    build(tmp_path / "whole", speech)
    with pytest.raises(UserError, match="was built with whole recordings"):
        build(tmp_path / "whole", speech, window_s=0.2)


def test_a_recording_too_long_for_one_segment_is_an_error_and_in_windows_it_is_not(tmp_path: Path) -> None:
    """Thirteen hours of 8-bit silence at 4 kHz, in a file with a hole."""
    (tmp_path / "s").mkdir()
    soundfile.write(tmp_path / "s" / "a.wav", np.zeros(1), 4_000, subtype="ULAW")
    content = bytearray((tmp_path / "s" / "a.wav").read_bytes())
    place, size = content.index(b"data") + 4, 13 * 3_600 * 4_000
    content[place : place + 4] = size.to_bytes(4, "little")
    with (tmp_path / "s" / "a.wav").open("wb") as file:
        file.write(content)
        file.truncate(place + 4 + size)
    build(tmp_path / "whole", tmp_path / "s")
    assert [(row["error"], row["duration_s"]) for row in rows_of(tmp_path / "whole")] == [("too-long", 0.0)]
    build(tmp_path / "cut", tmp_path / "s", window_s=1_800.0)
    assert [(row["error"], row["duration_s"]) for row in rows_of(tmp_path / "cut")] == [(None, 1_800.0)] * 26


# Growing


def test_a_second_build_adds_nothing(speech: Path, tmp_path: Path) -> None:
    first = build(tmp_path / "root", speech)
    version, files = open_corpus(Root(tmp_path / "root")).version, shard_files(tmp_path / "root")
    second = build(tmp_path / "root", speech)
    assert (first.counts.new, first.counts.known, first.num_shards) == (6, 0, 1)
    assert (second.counts.new, second.counts.known, second.num_shards) == (0, 6, 0)
    assert open_corpus(Root(tmp_path / "root")).version == version
    assert shard_files(tmp_path / "root") == files


def test_new_files_are_added_in_new_shards_and_old_shards_stay_byte_for_byte(speech: Path, tmp_path: Path) -> None:
    build(tmp_path / "root", speech, shard_hours=0.0005)
    before, old = shard_files(tmp_path / "root"), open_corpus(Root(tmp_path / "root"))
    record(speech / "a" / "0.wav")
    record(speech / "z.wav")
    result = build(tmp_path / "root", speech, shard_hours=0.0005)
    assert (result.counts.new, result.counts.known, result.counts.errors) == (2, 6, 0)
    after, new = shard_files(tmp_path / "root"), open_corpus(Root(tmp_path / "root"))
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + result.num_shards
    assert {shard: new.files[shard] for shard in old.files} == old.files
    assert [row["path"] for row in rows_of(tmp_path / "root")][6:] == ["a/0.wav", "z.wav"]


def test_an_old_snapshot_stays_as_it_was_when_the_corpus_grows(speech: Path, tmp_path: Path) -> None:
    build(tmp_path / "root", speech)
    old = open_corpus(Root(tmp_path / "root"))
    record(speech / "z.wav")
    build(tmp_path / "root", speech)
    assert read_snapshot(Root(tmp_path / "root"), "corpus", version=old.version) == old
    assert open_corpus(Root(tmp_path / "root")).num_rows == 7


def test_a_broken_file_that_was_mended_is_added_by_the_next_build(speech: Path, tmp_path: Path) -> None:
    whole = (speech / "d.wav").read_bytes()
    (speech / "d.wav").write_bytes(whole[:1_000])
    first = build(tmp_path / "root", speech)
    assert (first.counts.new, first.counts.errors) == (6, 1)
    assert build(tmp_path / "root", speech).counts.known == 6
    (speech / "d.wav").write_bytes(whole)
    mended = build(tmp_path / "root", speech)
    assert (mended.counts.new, mended.counts.known, mended.counts.errors) == (1, 5, 0)
    found = [(row["path"], row["error"]) for row in rows_of(tmp_path / "root") if row["path"] == "d.wav"]
    assert found == [("d.wav", "truncated"), ("d.wav", None)]
    assert build(tmp_path / "root", speech).counts.new == 0


def test_a_file_that_appears_later_is_added_after_it_was_missing(tmp_path: Path) -> None:
    record(tmp_path / "a.wav")
    (tmp_path / "list.jsonl").write_text('{"audio_filepath": "a.wav"}\n{"audio_filepath": "b.wav"}\n')
    assert build(tmp_path / "root", tmp_path / "list.jsonl").counts.errors == 1
    record(tmp_path / "b.wav")
    later = build(tmp_path / "root", tmp_path / "list.jsonl")
    assert (later.counts.new, later.counts.errors) == (1, 0)


def test_replaced_files_of_the_same_length_are_counted_and_their_rows_stay(speech: Path, tmp_path: Path) -> None:
    build(tmp_path / "root", speech)
    before = rows_of(tmp_path / "root")
    samples = soundfile.read(speech / "d.wav")[0]
    soundfile.write(speech / "d.wav", samples, RATE, subtype="PCM_24")
    result = build(tmp_path / "root", speech)
    assert (result.counts.new, result.counts.known, result.counts.replaced) == (0, 5, 1)
    assert rows_of(tmp_path / "root") == before


def test_a_replaced_file_of_another_length_is_a_new_segment(speech: Path, tmp_path: Path) -> None:
    build(tmp_path / "root", speech)
    record(speech / "d.wav", 2.0)
    result = build(tmp_path / "root", speech)
    assert (result.counts.new, result.counts.known) == (1, 5)
    lengths = [row["num_samples"] for row in rows_of(tmp_path / "root") if row["path"] == "d.wav"]
    assert lengths == [round(0.9 * RATE), 2 * RATE]


def test_what_a_source_no_longer_has_stays_in_the_corpus(speech: Path, tmp_path: Path) -> None:
    build(tmp_path / "root", speech)
    shutil.rmtree(speech / "a")
    result = build(tmp_path / "root", speech)
    assert (result.counts.new, result.counts.known) == (0, 4)
    assert len(rows_of(tmp_path / "root")) == 6


def test_two_trees_under_one_name_are_refused_even_in_two_builds(speech: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "speech"
    record(other / "a.wav")
    build(tmp_path / "root", speech)
    before = shard_files(tmp_path / "root")
    with pytest.raises(UserError, match="stands for"):
        build(tmp_path / "root", other)
    with pytest.raises(UserError, match="Two sources are called"):
        build(tmp_path / "root", speech, other)
    assert shard_files(tmp_path / "root") == before
    assert build(tmp_path / "root", f"other={other}").counts.new == 1


def test_what_a_manifest_names_twice_is_in_once(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", 1.0)
    lines = [{"audio_filepath": "a.wav"}, {"audio_filepath": "a.wav", "offset": 0.5}] * 3
    lines += [{"audio_filepath": "gone.wav"}] * 2
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = build(tmp_path / "root", tmp_path / "list.jsonl")
    assert (result.counts.new, result.counts.twice, result.counts.known) == (3, 5, 0)
    assert len(set(ids_of(tmp_path / "root"))) == len(ids_of(tmp_path / "root")) == 3
    again = build(tmp_path / "root", tmp_path / "list.jsonl")
    assert again.counts.new == 0


def test_every_entry_is_counted_once_as_new_known_replaced_or_twice(speech: Path, tmp_path: Path) -> None:
    build(tmp_path / "root", speech)
    soundfile.write(speech / "d.wav", soundfile.read(speech / "d.wav")[0], RATE, subtype="FLOAT")
    (speech / "bad.mp3").write_bytes(b"")
    record(speech / "z.wav")
    names = [str(path.relative_to(speech)) for path in speech.rglob("*.*")]
    lines = [{"audio_filepath": name} for name in [*names, "z.wav", "bad.mp3"]]
    (speech / "speech.jsonl").write_text("\n".join(map(json.dumps, lines)))
    counts = build(tmp_path / "root", speech / "speech.jsonl").counts
    assert (counts.new, counts.known, counts.replaced, counts.twice, counts.errors) == (2, 5, 1, 2, 1)
    assert counts.duration_s == 0.5


def test_an_empty_source_makes_no_table(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.txt").write_text("hello")
    result = build(tmp_path / "root", tmp_path / "s")
    assert (result.counts.new, result.num_shards, result.skipped) == (0, 0, {".txt": 1})
    assert not (tmp_path / "root").exists()


def test_each_build_commits_all_its_shards(tmp_path: Path) -> None:
    """More shards than one commit takes."""
    for number in range(70):
        record(tmp_path / "s" / f"{number:02d}.wav", 0.1)
    seen: list[int] = []
    result = build_corpus(
        Root(tmp_path / "root"),
        [str(tmp_path / "s")],
        CorpusPolicy(),
        shard_hours=0.1 / 3600,
        on_shard=lambda table: seen.append(table.num_rows),
    )
    assert result.num_shards == len(seen) == len(open_corpus(Root(tmp_path / "root")).files) == 70
    assert [row["path"] for row in rows_of(tmp_path / "root")] == [f"{number:02d}.wav" for number in range(70)]


@pytest.mark.slow
def test_thousands_of_files_are_built_in_flat_memory(tmp_path: Path) -> None:
    record(tmp_path / "one.wav", 0.01)
    content = (tmp_path / "one.wav").read_bytes()
    build(tmp_path / "root", tmp_path / "one.wav")  # what is allocated once is allocated now
    peaks = []
    for count in (200, 2_000):
        # kept, so that pathlib's interned names need no larger table while memory is watched
        files = [tmp_path / f"s{count}" / f"{number // 100}" / f"{number}.wav" for number in range(count)]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        gc.collect()
        tracemalloc.start()
        result = build(tmp_path / f"root-{count}", tmp_path / f"s{count}", shard_hours=1.0 / 3600)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert result.counts.new == len(files) == count
        assert result.num_shards == count // 100
    assert peaks[1] - peaks[0] < 1_800 * 1_000  # bytes: the ids of what is known are kept, rows and tables are not
    assert peaks[1] < 5_000_000
