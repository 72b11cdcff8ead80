"""Tables with audio in them: what `datasets` writes, and what people write with pyarrow."""

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Value
from wavemill.pipelines.entries import Entry
from wavemill.pipelines.source_footer import null_counts
from wavemill.pipelines.sources import open_source
from wavemill.tokenizers.spec import UserError

NOWHERE = "/nowhere/at/all"
HF_AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def sound(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.random.default_rng(seed).standard_normal(1_600), 16_000, format="WAV")
    return buffer.getvalue()


def listed(path: Path | str, **options: Any) -> list[Entry]:
    return list(open_source(str(path), exclude=NOWHERE, **options).entries)


def members(path: Path | str, **options: Any) -> list[tuple[str, str, str | None]]:
    return [(entry.path, entry.member, entry.error.kind if entry.error else None) for entry in listed(path, **options)]


@pytest.fixture
def speech(tmp_path: Path) -> Dataset:
    """Five recordings on disk, as a dataset of Hugging Face's."""
    for number in range(5):
        (tmp_path / f"{number}.wav").write_bytes(sound(number))
    rows = {
        "audio": [str(tmp_path / f"{number}.wav") for number in range(5)],
        "text": [f"text {number}" for number in range(5)],
        "speaker_id": list(range(5)),
        "language": [0, 1, 0, 1, 0],
        "duration": [0.1] * 5,
    }
    dataset = Dataset.from_dict(rows).cast_column("audio", Audio())
    return dataset.cast_column("language", ClassLabel(names=["en", "de"])).cast_column("text", Value("large_string"))


def said(entries: list[Entry]) -> list[tuple[str | None, ...]]:
    return [(entry.text, entry.speaker, entry.language) for entry in entries]


SAID = [(f"text {number}", str(number), ["en", "de"][number % 2]) for number in range(5)]


def test_parquet_that_datasets_writes_has_the_paths_of_its_files(tmp_path: Path, speech: Dataset) -> None:
    speech.to_parquet(tmp_path / "data.parquet")
    entries = listed(tmp_path / "data.parquet")
    assert said(entries) == SAID
    assert [(entry.path, entry.member) for entry in entries] == [(f"{number}.wav", "") for number in range(5)]
    assert {entry.duration_s for entry in entries} == {0.1}


def test_folders_that_datasets_saves_hold_the_bytes(tmp_path: Path, speech: Dataset) -> None:
    speech.save_to_disk(tmp_path / "saved", num_shards=2)
    source = open_source(str(tmp_path / "saved"), exclude=NOWHERE)
    entries = list(source.entries)
    assert said(entries) == SAID
    assert source.name == "saved"
    names = sorted(path.name for path in (tmp_path / "saved").glob("*.arrow"))
    assert [(entry.path, entry.member) for entry in entries] == [
        *((names[0], f"audio/{row}") for row in range(3)),
        *((names[1], f"audio/{row}") for row in range(2)),
    ]
    DatasetDict({"train": speech, "test": speech}).save_to_disk(tmp_path / "splits")
    entries = listed(tmp_path / "splits")
    assert said(entries) == SAID * 2
    assert [entry.path.partition("/")[0] for entry in entries] == ["test"] * 5 + ["train"] * 5


def test_parquet_with_embedded_bytes_is_read_without_reading_them(tmp_path: Path) -> None:
    blob = np.random.default_rng(0).bytes(1 << 20)
    rows = [{"audio": {"bytes": blob, "path": "x.wav"}, "sentence": f"text {number}"} for number in range(64)]
    table = pa.Table.from_pylist(rows, schema=pa.schema({"audio": HF_AUDIO, "sentence": pa.string()}))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=16, use_dictionary=False)
    del table, rows
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        entries = listed(tmp_path / "a.parquet")
        peak = tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().bytes_allocated() - before
    finally:
        tracemalloc.stop()
    assert [(entry.path, entry.member, entry.text) for entry in entries] == [
        ("a.parquet", f"audio/{number}", f"text {number}") for number in range(64)
    ]
    assert peak < 4 << 20


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "file.arrow"])
def test_rows_with_bytes_a_path_both_or_neither(tmp_path: Path, statistics: bool, name: str) -> None:
    audio: list[Any] = [
        {"bytes": b"RIFF", "path": None},
        {"bytes": None, "path": "sub/x.wav"},
        {"bytes": b"RIFF", "path": "named.wav"},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "/far/y.wav"},
        {"bytes": None, "path": "https://example.org/z.wav"},
        {"bytes": b"", "path": None},
    ]
    table = pa.table({"audio": pa.array(audio, HF_AUDIO), "speaker": pa.array(range(8))})
    (tmp_path / "t").mkdir()
    path = tmp_path / "t" / name
    if name.endswith("parquet"):
        pq.write_table(table, path, row_group_size=3, write_statistics=statistics)
    else:
        opened = pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream
        with opened(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    expected = [
        (name, "audio/0", None),
        ("sub/x.wav", "", None),
        (name, "audio/2", None),
        (name, "audio/3", "empty"),
        (name, "audio/4", "empty"),
        ("/far/y.wav", "", None),
        (name, "audio/6", "bad-row"),
        (name, "audio/7", None),
    ]
    assert members(path) == expected
    assert [entry.speaker for entry in listed(path) if entry.error is None] == ["0", "1", "2", "5", "7"]
    # in a folder, a table is not the list that somebody gave: it names nothing outside
    expected[5] = ("/far/y.wav", "", "outside-source")
    inside = [(f"t/{p}" if p in (name, "sub/x.wav") else p, member, error) for p, member, error in expected]
    assert members(tmp_path) == inside


def test_plain_bytes_and_paths_are_found_under_any_usual_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x"], "wav_bytes": [b"RIFF"], "lang": ["en"]}), tmp_path / "a.parquet")
    assert members(tmp_path / "a.parquet") == [("a.parquet", "wav_bytes/0", None)]
    pq.write_table(pa.table({"id": ["x"], "content": pa.array([b"RIFF"], pa.large_binary())}), tmp_path / "b.parquet")
    assert members(tmp_path / "b.parquet") == [("b.parquet", "content/0", None)]
    pq.write_table(pa.table({"id": ["x"], "file": ["../b.wav"], "start": [0.5], "end": [1.0]}), tmp_path / "c.parquet")
    assert listed(tmp_path / "c.parquet") == [Entry(path="../b.wav", offset_s=0.5, duration_s=0.5)]


def test_several_columns_of_audio_need_a_word(tmp_path: Path) -> None:
    table = pa.table({"mix": [b"1"], "voice": [b"2"], "Text": ["hello"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"several columns of audio \(mix, voice\)"):
        listed(tmp_path / "a.parquet")
    [entry] = listed(tmp_path / "a.parquet", audio_column="voice", text_column="Text")
    assert (entry.member, entry.text) == ("voice/0", "hello")
    with pytest.raises(UserError, match="no column 'x'; it has 'mix', 'voice', 'Text'"):
        listed(tmp_path / "a.parquet", audio_column="x")


def test_tables_without_audio_are_told_or_passed_over_in_a_folder(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "note": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column of audio: it has 'id', 'note'"):
        listed(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "c.arrow").write_bytes(b"ARROW1")
    (tmp_path / "d.arrow").write_bytes(b"\xff" * 100)
    for name in ("b.parquet", "c.arrow", "d.arrow"):
        with pytest.raises(UserError, match="Cannot read"):
            listed(tmp_path / name)
    source = open_source(str(tmp_path), exclude=NOWHERE)
    assert list(source.entries) == []
    assert source.skipped == {".parquet": 2, ".arrow": 2}
    with pytest.raises(UserError, match="save_to_disk"):
        listed(tmp_path, kind="parquet")


def test_a_table_damaged_in_its_middle_gives_what_came_before_and_says_so(tmp_path: Path) -> None:
    table = pa.table({"audio": [b"RIFF"] * 3_000, "text": [f"a text {number}" for number in range(3_000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1_000, write_page_checksum=True, use_dictionary=False)
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(1)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    (tmp_path / "a.parquet").write_bytes(content)
    found = members(tmp_path / "a.parquet")
    assert len(found) == 1_001
    assert found[-1][2] == "corrupt"
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=1_000)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[: len(content) // 2])
    found = members(tmp_path / "a.arrow")
    assert found[-1][2] == "corrupt"
    assert [error for _, _, error in found[:-1]] == [None] * 1_000


def test_extension_types_are_read_as_what_they_are_stored_as(tmp_path: Path) -> None:
    """pyarrow once unpickled `arrow.py_extension_type`: whoever opened the file ran its code (CVE-2023-47248)."""
    field = pa.field("audio", pa.binary()).with_metadata(
        {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": b"cposix\nabort\n(tR."}
    )
    table = pa.table([pa.array([b"RIFF"])], schema=pa.schema([field]))
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert members(tmp_path / "a.parquet") == [("a.parquet", "audio/0", None)]
    assert members(tmp_path / "a.arrow") == [("a.arrow", "audio/0", None)]


def test_text_that_is_not_utf8_stops_nobody(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"\xff\xfe"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    table = pa.table({"audio": [b"1", b"2"], "text": text})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    pq.write_table(table, tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        assert [entry.text for entry in listed(tmp_path / name)] == ["ok", "\ufffd\ufffd"]


def test_a_state_that_names_files_elsewhere_is_no_saved_dataset(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    source = open_source(str(tmp_path / "s"), exclude=NOWHERE)
    assert list(source.entries) == []


def test_the_footer_says_as_many_nulls_as_pyarrow_reads_from_it(tmp_path: Path) -> None:
    audio = [{"bytes": None if number % 3 else b"RIFF", "path": "x"} for number in range(50)]
    table = pa.table({"audio": pa.array(audio, HF_AUDIO), "blob": [b"1", None] * 25, "wide": [[1.5, None]] * 50})
    for options in ({}, {"version": "1.0"}, {"compression": "zstd", "write_page_index": True}):
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=7, **options)
        metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
        for leaf, index in (("audio.bytes", 0), ("audio.path", 1), ("blob", 2)):
            groups = [metadata.row_group(group).column(index) for group in range(metadata.num_row_groups)]
            assert {group.path_in_schema for group in groups} == {leaf}
            with open(tmp_path / "a.parquet", "rb") as file:
                assert null_counts(file, leaf) == [group.statistics.null_count for group in groups]
    pq.write_table(table, tmp_path / "a.parquet", write_statistics=False)
    with open(tmp_path / "a.parquet", "rb") as file:
        assert null_counts(file, "audio.bytes") == [None]
    assert null_counts(io.BytesIO(b"PAR1" * 4), "audio.bytes") == []
