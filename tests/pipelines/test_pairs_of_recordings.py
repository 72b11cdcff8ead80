"""Pairs: every kind of manifest may name them, rows of one stay in one shard, and what is torn apart is told."""

import io
import json
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from wavemill.jobs.corpus import build_corpus
from wavemill.pipelines.corpus import shards
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.sources import open_source
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA

RATE = 8_000


def record(path: Path, num_samples: int = 400, num_channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full((num_samples, num_channels), 0.1), RATE)
    return path


def pairs_of(path: Path) -> list[str | None]:
    return [entry.pair for entry in open_source(str(path), exclude="/nowhere/at/all").entries]


def built(root: Path, source: Path, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The corpus's rows, and the warnings of the build."""
    told: list[str] = []
    shard_hours = options.pop("shard_hours", 1.0)
    build_corpus(Root(root), [str(source)], CorpusPolicy(**options), shard_hours=shard_hours, on_warning=told.append)
    corpus = open_corpus(Root(root))
    tables = [read_parquet(Root(root), corpus.path(shard), schema=CORPUS_SCHEMA) for shard in corpus.files]
    return [row for table in tables for row in table.to_pylist()], told


# Where pairs are named


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "path,pair\na.wav,7\nb.wav,\nc.wav,x y\n"),
        ("a.tsv", "path\tPair_ID\na.wav\t7\nb.wav\t\nc.wav\tx y\n"),
        (
            "a.jsonl",
            '{"path": "a.wav", "pair": 7}\n{"path": "b.wav", "pair": ""}\n{"path": "c.wav", "pair": "x y"}\n',
        ),
    ],
)
def test_lists_name_pairs_by_any_text_or_number(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert pairs_of(tmp_path / name) == ["7", None, "x y"]


def test_tables_name_pairs(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.wav", "b.wav", "c.wav"], "pair": [7, None, 7]}), tmp_path / "a.parquet")
    assert pairs_of(tmp_path / "a.parquet") == ["7", None, "7"]


def test_json_beside_a_recording_names_its_pair(tmp_path: Path) -> None:
    sound = record(tmp_path / "speech" / "a.wav").read_bytes()
    (tmp_path / "speech" / "a.json").write_text('{"pair": "p"}')
    assert pairs_of(tmp_path / "speech") == ["p"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("a.wav", sound), ("a.json", b'{"pair": 3}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert pairs_of(tmp_path / "a.tar") == ["3"]


def test_kaldis_pairs_stand_in_utt2pair(tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("a a.wav\nb b.wav\nc c.wav\n")
    (tmp_path / "utt2pair").write_text("a p1\nc p1\n")
    assert pairs_of(tmp_path) == ["p1", None, "p1"]


def test_lhotses_pairs_are_a_custom_field_of_cuts_or_of_supervisions_that_agree(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", 8_000)
    recording = Recording.from_file(tmp_path / "a.wav", recording_id="a")

    def said(start: float, **custom: Any) -> SupervisionSegment:
        return SupervisionSegment(id=f"s{start}", recording_id="a", start=start, duration=0.1, custom=custom or None)

    def cut(name: str, custom: dict[str, Any] | None, *supervisions: SupervisionSegment) -> MonoCut:
        return MonoCut(
            id=name,
            start=0,
            duration=0.5,
            channel=0,
            recording=recording,
            supervisions=list(supervisions),
            custom=custom,
        )

    cuts = [
        cut("own", {"pair": 7}, said(0, pair="other")),
        cut("theirs", None, said(0, pair="p"), said(0.2, pair="p"), said(0.3)),
        cut("disagreed", {"other": 1}, said(0, pair="p"), said(0.2, pair="q")),
        cut("none", None),
    ]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    assert pairs_of(tmp_path / "cuts.jsonl") == ["7", "p", None, None]
    (tmp_path / "apart").mkdir()
    RecordingSet.from_recordings([recording]).to_file(tmp_path / "apart" / "recordings.jsonl")
    SupervisionSet.from_segments([said(0, pair="p"), said(0.2)]).to_file(tmp_path / "apart" / "supervisions.jsonl")
    assert pairs_of(tmp_path / "apart" / "recordings.jsonl") == ["p", None]


# Which rows have one


def test_a_recording_of_several_segments_has_no_pair(tmp_path: Path) -> None:
    record(tmp_path / "long.wav", 2_000)
    record(tmp_path / "short.wav", 600)
    record(tmp_path / "stereo.wav", 600, num_channels=2)
    (tmp_path / "list.csv").write_text("path,pair,channel\nlong.wav,1,\nshort.wav,1,\nstereo.wav,2,\nstereo.wav,3,1\n")
    rows, _ = built(tmp_path / "root", tmp_path / "list.csv", window_s=0.1, channels="split")
    assert [(row["path"], row["pair"]) for row in rows] == [
        *[("long.wav", None)] * 3,
        ("short.wav", "1"),
        *[("stereo.wav", None)] * 2,  # the third row is the second channel again, and in already
    ]


def test_a_row_with_an_error_keeps_its_pair(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,pair\nnowhere.wav,1\n")
    [row], _ = built(tmp_path / "root", tmp_path / "list.csv")
    assert (row["error"], row["pair"]) == ("missing", "1")


# Shards

ROWS = st.lists(
    st.tuples(st.sampled_from(["s", "t"]), st.sampled_from([None, "1", "2"]), st.integers(0, 2), st.integers(0, 4)),
    max_size=30,
)


@given(drawn=ROWS)
def test_neighbours_that_belong_together_are_never_cut_apart(drawn: list[tuple[str, str | None, int, int]]) -> None:
    """Rows as (source, pair, separated children, seconds), in shards of three seconds."""
    rows: list[dict[str, Any]] = []
    for number, (source, pair, num_children, seconds) in enumerate(drawn):
        row = {name: "" for name in CORPUS_SCHEMA.names if CORPUS_SCHEMA.field(name).type == pa.string()}
        row |= {"source": source, "error": None, "duration_s": float(seconds), "start_sample": 0, "num_samples": 1}
        rows.append({**row, "id": f"{number}", "pair": pair, "parent": None})
        rows += [
            {**row, "id": f"{number}/{child}", "pair": None, "parent": f"{number}", "separated": child}
            for child in range(num_children)
        ]
    tables = list(shards(rows, first=3, shard_hours=3 / 3600))
    assert [id_ for table in tables for id_ in table["id"].to_pylist()] == [row["id"] for row in rows]
    assert [table["shard"].unique().to_pylist() for table in tables] == [[3 + place] for place in range(len(tables))]
    shard_of = {id_: place for place, table in enumerate(tables) for id_ in table["id"].to_pylist()}
    seconds_of = {row["id"]: row["duration_s"] for row in rows}
    parents = [row for row in rows if row["parent"] is None]
    for row in rows:
        assert row["parent"] is None or shard_of[row["parent"]] == shard_of[row["id"]]
    for before, row in pairwise(parents):
        is_cut = shard_of[before["id"]] != shard_of[row["id"]]
        if before["pair"] is not None and (before["source"], before["pair"]) == (row["source"], row["pair"]):
            assert not is_cut
        else:  # and nothing else keeps a full shard open
            filled = tables[shard_of[before["id"]]]
            own = [name for name in filled["id"].to_pylist() if int(name.split("/")[0]) < int(row["id"])]
            assert is_cut == (sum(seconds_of[name] for name in own) >= 3)


def test_a_pair_without_end_does_not_make_a_shard_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wavemill.pipelines.corpus._MAX_SHARD_SEGMENTS", 5)
    row = {name: "" for name in CORPUS_SCHEMA.names if CORPUS_SCHEMA.field(name).type == pa.string()}
    row |= {"duration_s": 0.0, "start_sample": 0, "num_samples": 1, "parent": None}
    rows = [{**row, "id": f"{number}", "pair": "p"} for number in range(23)]
    assert [table.num_rows for table in shards(rows, first=0, shard_hours=1)] == [10, 10, 3]


def test_a_build_tells_how_many_segments_lie_apart_from_their_pairs(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    for number, name in enumerate(names):
        record(tmp_path / f"{name}.wav", 400 + number)
    lines = [{"path": f"{name}.wav", "pair": pair} for name, pair in zip(names, "11221", strict=True)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines[:4])))
    shard_hours = 400 / RATE / 3600
    rows, told = built(tmp_path / "root", tmp_path / "list.jsonl", shard_hours=shard_hours)
    assert ([row["shard"] for row in rows], told) == ([0, 0, 1, 1], [])
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, told = built(tmp_path / "root", tmp_path / "list.jsonl", shard_hours=shard_hours)
    assert [row["shard"] for row in rows] == [0, 0, 1, 1, 2]
    [warning] = told
    assert warning.startswith("1 segment(s) lie in other shards than the first of their pairs, which trainers")
    assert warning.endswith(".")
