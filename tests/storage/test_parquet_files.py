"""Shard files: deterministic bytes, bits that cost what they should, damage that is always noticed."""

import math
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wavemill.storage.parquet import CorruptFile, parquet_bytes, read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import code_columns, stream_schema
from wavemill.storage.table import write_shard
from wavemill.tokenizers.spec import FrameRule, StreamSpec

FOLDER = "streams/toy"


def make_spec(*, num_codebooks: int, codebook_size: int) -> StreamSpec:
    return StreamSpec(
        tokenizer="toy",
        sample_rate=16_000,
        decode_sample_rate=0,
        hop_length=320,
        window_length=400,
        frame_rule=FrameRule.FLOOR,
        num_codebooks=num_codebooks,
        codebook_size=codebook_size,
    )


def codes_table(spec: StreamSpec, *, num_rows: int, num_frames: int, seed: int = 0) -> pa.Table:
    """Rows of uniform codes; every tenth row has an error, every tenth no frames."""
    rng = np.random.default_rng(seed)
    frames = [None if row % 10 == 9 else 0 if row % 10 == 8 else num_frames for row in range(num_rows)]
    columns: dict[str, list] = {
        "id": [f"{row:026d}" for row in range(num_rows)],
        "shard": [3] * num_rows,
        "num_frames": frames,
        "error": ["truncated" if count is None else None for count in frames],
        "error_message": ["it ends early" if count is None else None for count in frames],
    }
    for name in code_columns(spec.num_codebooks):
        columns[name] = [None if count is None else rng.integers(0, spec.codebook_size, count) for count in frames]
    return pa.Table.from_pydict(columns, schema=stream_schema(spec))


SMALL = make_spec(num_codebooks=2, codebook_size=100)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


def put(root: Root, table: pa.Table, spec: StreamSpec) -> str:
    """The path of a shard's file, relative to the root."""
    receipt = write_shard(root, FOLDER, 3, table, codebook_size=spec.codebook_size)
    return f"{FOLDER}/{receipt.file_name}"


@pytest.mark.parametrize("codebook_size", [2, 100, 1024, 4_096, 4_097, 32_768, 32_769, 65_536])
def test_what_is_read_is_what_was_written(root: Root, codebook_size: int) -> None:
    spec = make_spec(num_codebooks=3, codebook_size=codebook_size)
    table = codes_table(spec, num_rows=25, num_frames=120)
    edges = [0, codebook_size - 1] * 60
    table = table.set_column(5, "codes_00", pa.array([edges] * 25, type=table.schema.field("codes_00").type))
    again = read_parquet(root, put(root, table, spec), schema=stream_schema(spec))
    assert again.equals(table)
    assert again.schema.field("codes_00").type.value_type == (pa.int16() if codebook_size <= 32_768 else pa.int32())


def test_a_shard_without_rows_survives(root: Root) -> None:
    table = codes_table(SMALL, num_rows=0, num_frames=0)
    again = read_parquet(root, put(root, table, SMALL), schema=stream_schema(SMALL))
    assert again.equals(table)


def test_equal_tables_give_equal_bytes() -> None:
    table = codes_table(SMALL, num_rows=500, num_frames=40)
    copy = codes_table(SMALL, num_rows=500, num_frames=40)
    in_pieces = pa.concat_tables([table.slice(0, 33), table.slice(33, 1), table.slice(34)])
    from_a_larger = pa.concat_tables([table, table]).slice(500, 500)
    content = parquet_bytes(table, codebook_size=100)
    for other in (copy, in_pieces, from_a_larger):
        assert other.equals(table)
        assert parquet_bytes(other, codebook_size=100) == content
    changed = codes_table(SMALL, num_rows=500, num_frames=40, seed=1)
    assert parquet_bytes(changed, codebook_size=100) != content


def test_a_file_is_named_by_its_shard_and_its_content(root: Root) -> None:
    one = put(root, codes_table(SMALL, num_rows=5, num_frames=10), SMALL)
    again = put(root, codes_table(SMALL, num_rows=5, num_frames=10), SMALL)
    other = put(root, codes_table(SMALL, num_rows=5, num_frames=10, seed=1), SMALL)
    assert one == again != other
    assert one.startswith(f"{FOLDER}/shard-000003-")


def require_found(root: Root, path: str, spec: StreamSpec, flips: list[tuple[int, int]]) -> None:
    """Each flip alone makes the file corrupt, or changes nothing of what is read."""
    whole = read_parquet(root, path, schema=stream_schema(spec))
    content = root.read_bytes(path)
    file = Path(root.join(path))
    silent = []
    for position, bit in flips:
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        file.write_bytes(damaged)
        try:
            again = read_parquet(root, path, schema=stream_schema(spec))
        except CorruptFile:
            continue
        if not again.equals(whole):
            silent.append((position, bit))
    assert silent == [], f"of {len(content)} bytes"


def test_a_flipped_bit_anywhere_in_a_file_is_never_other_codes(root: Root) -> None:
    path = put(root, codes_table(SMALL, num_rows=40, num_frames=200), SMALL)
    rng = np.random.default_rng(0)
    size = len(root.read_bytes(path))
    flips = [(int(position), int(bit)) for position, bit in rng.integers(0, (size, 8), (200, 2))]
    require_found(root, path, SMALL, flips)


@pytest.mark.slow
def test_a_flipped_bit_in_the_header_of_any_page_is_never_other_codes(root: Root) -> None:
    path = put(root, codes_table(SMALL, num_rows=12, num_frames=40), SMALL)
    group = pq.read_metadata(root.join(path)).row_group(0)
    begins = {group.column(column).data_page_offset for column in range(group.num_columns)}
    begins |= {group.column(column).dictionary_page_offset for column in range(group.num_columns)} - {None}
    flips = [(begin + byte, bit) for begin in sorted(begins) for byte in range(24) for bit in range(8)]
    require_found(root, path, SMALL, flips)


@pytest.mark.slow
def test_a_flipped_bit_in_the_footer_is_never_other_rows_or_codes(root: Root) -> None:
    spec = make_spec(num_codebooks=1, codebook_size=100)
    path = put(root, codes_table(spec, num_rows=12, num_frames=40), spec)
    size = len(root.read_bytes(path))
    footer = pq.read_metadata(root.join(path)).serialized_size + 8
    require_found(root, path, spec, [(position, bit) for position in range(size - footer, size) for bit in range(8)])


@pytest.mark.parametrize("kept", [0, 1, 4, 100, -1, -8, -100])
def test_a_file_cut_short_is_named(root: Root, kept: int) -> None:
    path = put(root, codes_table(SMALL, num_rows=40, num_frames=40), SMALL)
    file = Path(root.join(path))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CorruptFile) as caught:
        read_parquet(root, path, schema=stream_schema(SMALL))
    assert root.join(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_with_bytes_of_another_in_the_middle_is_named(root: Root) -> None:
    path = put(root, codes_table(SMALL, num_rows=40, num_frames=200), SMALL)
    file = Path(root.join(path))
    content = bytearray(file.read_bytes())
    content[1_000:1_512] = bytes(512)  # a sector that was never written
    file.write_bytes(content)
    with pytest.raises(CorruptFile, match="is damaged"):
        read_parquet(root, path, schema=stream_schema(SMALL))


def test_a_file_in_the_place_of_another_is_named(root: Root) -> None:
    path = put(root, codes_table(SMALL, num_rows=40, num_frames=40), SMALL)
    other = put(root, codes_table(SMALL, num_rows=40, num_frames=40, seed=1), SMALL)
    Path(root.join(other)).replace(root.join(path))
    with pytest.raises(CorruptFile) as caught:
        read_parquet(root, path, schema=stream_schema(SMALL))
    assert root.join(path) in str(caught.value)


def test_a_missing_file_is_named(root: Root) -> None:
    path = put(root, codes_table(SMALL, num_rows=4, num_frames=4), SMALL)
    Path(root.join(path)).unlink()
    with pytest.raises(CorruptFile, match="is not there") as caught:
        read_parquet(root, path, schema=stream_schema(SMALL))
    assert root.join(path) in str(caught.value)


def test_a_reader_of_coarse_codes_gets_those_columns_and_no_others(root: Root) -> None:
    table = codes_table(SMALL, num_rows=40, num_frames=40)
    coarse = read_parquet(
        root, put(root, table, SMALL), schema=stream_schema(SMALL), columns=["id", "num_frames", "codes_00"]
    )
    assert coarse.equals(table.select(["id", "num_frames", "codes_00"]))


@pytest.mark.parametrize(("num_codebooks", "codebook_size"), [(1, 100), (8, 1024), (2, 4_096)])
def test_a_code_of_a_small_codebook_costs_its_bits_and_no_more(num_codebooks: int, codebook_size: int) -> None:
    spec = make_spec(num_codebooks=num_codebooks, codebook_size=codebook_size)
    num_rows, num_frames = 1_000, 500
    values = np.random.default_rng(0).integers(0, codebook_size, (num_codebooks, num_rows * num_frames))
    code_type = stream_schema(spec).field("codes_00").type.value_type
    offsets = pa.array(np.arange(num_rows + 1) * num_frames, type=pa.int32())
    table = codes_table(make_spec(num_codebooks=0, codebook_size=codebook_size), num_rows=num_rows, num_frames=0)
    for name, book in zip(code_columns(num_codebooks), values, strict=True):
        table = table.append_column(name, pa.ListArray.from_arrays(offsets, pa.array(book, type=code_type)))
    content = parquet_bytes(table, codebook_size=codebook_size)
    bytes_per_code = len(content) / values.size
    assert bytes_per_code <= 1.06 * math.ceil(math.log2(codebook_size)) / 8


def test_a_codebook_of_65536_entries_is_byte_stream_split_int32(root: Root) -> None:
    spec = make_spec(num_codebooks=2, codebook_size=65_536)
    table = codes_table(spec, num_rows=400, num_frames=500)
    path = put(root, table, spec)
    group = pq.read_metadata(root.join(path)).row_group(0)
    columns = [group.column(column) for column in range(group.num_columns)]
    codes = [column for column in columns if column.path_in_schema.startswith("codes_")]
    assert len(codes) == 2
    for column in codes:
        assert "BYTE_STREAM_SPLIT" in column.encodings
        assert not any("DICTIONARY" in encoding for encoding in column.encodings)
        assert (column.physical_type, column.compression) == ("INT32", "ZSTD")
    assert len(root.read_bytes(path)) <= 1.06 * 2 * 2 * 400 * 500 * 0.8  # two bytes a code, in four rows of five
    again = read_parquet(root, path, schema=stream_schema(spec))
    assert again.equals(table)
    assert again["codes_01"].type.value_type == pa.int32()


def test_small_codebooks_are_dictionary_pages_to_the_last(root: Root) -> None:
    spec = make_spec(num_codebooks=1, codebook_size=4_096)
    path = put(root, codes_table(spec, num_rows=500, num_frames=500), spec)
    column = pq.read_metadata(root.join(path)).row_group(0).column(5)
    pages = duckdb.sql(f"select encodings from parquet_metadata('{root.join(path)}') where column_id = 5").fetchall()
    assert column.has_dictionary_page
    assert "RLE_DICTIONARY" in column.encodings
    assert len(pages) == 1
    assert column.total_uncompressed_size < 1.05 * 400 * 500 * 12 / 8 + 4 * 4_096  # none fell back to plain int32


@pytest.mark.parametrize("codebook_size", [100, 65_536])
def test_duckdb_polars_and_pyarrow_read_what_was_written(root: Root, codebook_size: int) -> None:
    spec = make_spec(num_codebooks=2, codebook_size=codebook_size)
    table = codes_table(spec, num_rows=50, num_frames=40)
    path = root.join(put(root, table, spec))
    expected = table.to_pylist()
    relation = duckdb.sql(f"select * from read_parquet('{path}')")
    assert [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()] == expected
    assert pl.read_parquet(path).to_dicts() == expected
    assert pq.read_table(path).to_pylist() == expected
