"""Streams read without wavemill: by DuckDB and Polars, from the files that the table's log names."""

import json
from pathlib import Path

import duckdb
import polars as pl
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from wavemill.storage.codes import open_stream, read_codes
from wavemill.storage.dataset import TokenDataset
from wavemill.storage.root import Root

BOOKS = {"semantic": 1, "acoustic": 8}
Rows = dict[str, tuple]  # by id: frames, error, then a list per codebook


def columns(stream: str) -> list[str]:
    return ["id", "num_frames", "error", *(f"codes_{book:02d}" for book in range(BOOKS[stream]))]


def files_of_the_log(table: Path) -> list[str]:
    """What a reader of the Delta protocol finds: the files added and not removed, by the JSON commits."""
    files: dict[str, None] = {}
    for commit in sorted((table / "_delta_log").glob("*.json")):
        for line in commit.read_text().splitlines():
            action = json.loads(line)
            if "add" in action:
                files[action["add"]["path"]] = None
            if "remove" in action:
                files.pop(action["remove"]["path"], None)
    return [str(table / name) for name in files]


def rows_by_wavemill(root: Path, stream: str) -> Rows:
    place = Root(root)
    snapshot = open_stream(place, stream)
    rows: Rows = {}
    for shard in snapshot.files:
        part = read_codes(place, snapshot, shard)
        for row, id_ in enumerate(part.ids):
            codes_KT = part.codes(row)
            books = [None] * BOOKS[stream] if codes_KT is None else codes_KT.tolist()
            rows[id_] = (part.num_frames[row], part.errors[row], *books)
    assert len(rows) == snapshot.num_rows
    return rows


def rows_by_duckdb(files: list[str], stream: str) -> Rows:
    listed = duckdb.sql(f"select {', '.join(columns(stream))} from read_parquet({files!r})").fetchall()
    return {row[0]: tuple(row[1:]) for row in listed}


def rows_of_frame(frame: pl.DataFrame, stream: str) -> Rows:
    return {row[0]: row[1:] for row in frame.select(columns(stream)).rows()}


@pytest.mark.parametrize("stream", BOOKS)
def test_duckdb_reads_a_stream_as_wavemill_does(finished_root: Path, stream: str) -> None:
    expected = rows_by_wavemill(finished_root, stream)
    table = finished_root / "streams" / stream
    assert rows_by_duckdb(files_of_the_log(table), stream) == expected
    assert rows_by_duckdb(DeltaTable(table).file_uris(), stream) == expected


@pytest.mark.parametrize("stream", BOOKS)
def test_polars_reads_a_stream_as_wavemill_does(finished_root: Path, stream: str) -> None:
    expected = rows_by_wavemill(finished_root, stream)
    table = str(finished_root / "streams" / stream)
    assert rows_of_frame(pl.read_delta(table), stream) == expected
    assert rows_of_frame(pl.scan_delta(table).collect(), stream) == expected
    assert rows_of_frame(pl.read_parquet(files_of_the_log(Path(table))), stream) == expected


def test_polars_finds_the_quarantine_through_the_tables_statistics(finished_root: Path) -> None:
    expected = {id_ for id_, (_, error, *_) in rows_by_wavemill(finished_root, "acoustic").items() if error is not None}
    lazy = pl.scan_delta(str(finished_root / "streams" / "acoustic"))
    assert set(lazy.filter(pl.col("error").is_not_null()).collect()["id"]) == expected
    total = lazy.select(pl.len()).collect().item()
    assert lazy.filter(pl.col("error").is_null()).select(pl.len()).collect().item() == total - len(expected)


@pytest.mark.parametrize("stream", BOOKS)
def test_the_tables_counts_are_those_of_its_files(finished_root: Path, stream: str) -> None:
    snapshot = open_stream(Root(finished_root), stream)
    files = files_of_the_log(finished_root / "streams" / stream)
    ((rows, errors),) = duckdb.sql(f"select count(*), count(error) from read_parquet({files!r})").fetchall()
    assert (snapshot.num_rows, snapshot.num_errors) == (rows, errors)
    assert sum(pq.read_metadata(file).num_rows for file in files) == rows
    assert errors > 0


def test_duckdb_and_the_dataset_agree_on_a_join_of_streams(finished_root: Path) -> None:
    semantic, acoustic = (files_of_the_log(finished_root / "streams" / stream) for stream in BOOKS)
    joined = duckdb.sql(
        f"""select s.id, s.codes_00, a.codes_00, a.codes_01
        from read_parquet({semantic!r}) s join read_parquet({acoustic!r}) a using (shard, id)
        where s.error is null and a.error is null"""
    ).fetchall()
    expected = {id_: (units, [coarse, second]) for id_, units, coarse, second in joined}
    batches = list(TokenDataset(str(finished_root), {"semantic": None, "acoustic": 2}, batch_size=1))
    assert len(batches) == len(expected)
    for batch in batches:
        units, books = expected[batch.ids[0]]
        assert batch.codes["semantic"][0].tolist() == [units]
        assert batch.codes["acoustic"][0].tolist() == books


def test_polars_joins_a_stream_with_the_corpus(finished_root: Path) -> None:
    corpus = pl.read_delta(str(finished_root / "corpus"))
    stream = pl.read_delta(str(finished_root / "streams" / "semantic"))
    joined = corpus.join(stream, on=["shard", "id"], suffix="_of_stream")
    assert len(joined) == len(corpus) == len(stream)
    spoken = joined.filter(pl.col("text").is_not_null() & pl.col("error_of_stream").is_null())
    assert len(spoken) > 100
    assert (spoken["codes_00"].list.len() == spoken["num_frames"]).all()
