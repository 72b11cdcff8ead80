"""Synthetic token datasets for benches: uniform random codes, without any audio. Uniform codes compress worst.

Axes: K codebooks, T frames.
"""

import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import webdataset
from deltalake import DeltaTable
from numpy.typing import NDArray
from wavemill.storage.codes import read_codes, stream_folder
from wavemill.storage.root import Root
from wavemill.storage.schema import code_columns, segment_id, stream_schema
from wavemill.storage.table import Receipt, Snapshot, create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import FrameRule, StreamSpec, num_frames

STREAM = "acoustic"
SAMPLE_RATE = 16_000
SEGMENT_S = (5.0, 15.0)


def synthetic_spec(num_codebooks: int, codebook_size: int, *, hop_length: int = 320) -> StreamSpec:
    """A stream of 50 Hz by default; a hop of 1,280 samples gives Mimi's 12.5 Hz."""
    return StreamSpec(
        tokenizer="synthetic",
        sample_rate=SAMPLE_RATE,
        decode_sample_rate=0,
        hop_length=hop_length,
        window_length=hop_length,
        frame_rule=FrameRule.CEIL,
        num_codebooks=num_codebooks,
        codebook_size=codebook_size,
    )


def shard_table(
    spec: StreamSpec, shard: int, *, hours: float = 1.0, segment_s: tuple[float, float] = SEGMENT_S
) -> pa.Table:
    """One shard's rows: `hours` of segments, their lengths uniform in `segment_s`."""
    rng = np.random.default_rng(shard)
    shortest, longest = (int(bound_s * SAMPLE_RATE) for bound_s in segment_s)
    count = round(hours * 3600 * SAMPLE_RATE * 2 / (shortest + longest))
    samples = rng.integers(shortest, longest + 1, count).tolist()
    frames = [num_frames(length, spec) for length in samples]
    offsets = pa.array(np.cumsum([0, *frames]), pa.int32())
    schema = stream_schema(spec)
    books = []
    for name in code_columns(spec.num_codebooks):
        type_ = schema.field(name).type
        codes_T = rng.integers(0, spec.codebook_size, sum(frames), dtype=type_.value_type.to_pandas_dtype())
        books.append(pa.ListArray.from_arrays(offsets, pa.array(codes_T), type=type_))
    ids = [
        segment_id("synthetic", f"{shard}/{row}.wav", member="", channel="mix", start_sample=0, num_samples=length)
        for row, length in enumerate(samples)
    ]
    missing = pa.nulls(count, pa.string())
    columns = [pa.array(ids), pa.array([shard] * count, pa.int32()), pa.array(frames, pa.int32()), missing, missing]
    return pa.Table.from_arrays([*columns, *books], schema=schema)


def make_stream(root: Root, spec: StreamSpec, *, hours: int) -> int:
    """A stream with one shard an hour; says how many codes it holds."""
    folder = stream_folder(STREAM)
    _create(root, spec)
    receipts, codes = [], 0
    for shard in range(hours):
        table = shard_table(spec, shard)
        codes += sum(table["num_frames"].to_pylist()) * spec.num_codebooks
        receipts.append(write_shard(root, folder, shard, table, codebook_size=spec.codebook_size))
    TableWriter(root, folder).commit(receipts)
    return codes


def make_metadata(root: Root, spec: StreamSpec, *, shards: int, segments: int, commits: int) -> None:
    """The table of a large stream, checkpointed, whose files are not there."""
    folder = stream_folder(STREAM)
    _create(root, spec)
    rows = segments // shards
    size_bytes = rows * 5_000  # 10 s of 8 codebooks at 50 Hz, 10 bits a code
    names = [f"shard-{shard:06d}-{secrets.token_hex(8)}.parquet" for shard in range(shards)]
    receipts = [
        Receipt(shard=shard, file_name=name, size_bytes=size_bytes, num_rows=rows, num_errors=0)
        for shard, name in enumerate(names)
    ]
    writer = TableWriter(root, folder)
    for first in range(commits):
        writer.commit(receipts[first::commits])
    DeltaTable(root.join(folder)).create_checkpoint()


def segments(root: Root, snapshot: Snapshot, shard: int) -> Iterator[tuple[str, NDArray[np.integer]]]:
    """Id and codes `[K, T]` of each segment of a shard."""
    rows = read_codes(root, snapshot, shard)
    for row, id_ in enumerate(rows.ids):
        codes_KT = rows.codes(row)
        assert codes_KT is not None
        yield id_, codes_KT


def write_tar(codes: Iterable[tuple[str, NDArray[np.integer]]], path: Path) -> None:
    """Segments as WebDataset's writer stores them: a [K, T] uint16 .npy each."""
    with webdataset.TarWriter(str(path)) as sink:
        for id_, codes_KT in codes:
            sink.write({"__key__": id_, "npy": codes_KT.astype(np.uint16)})


def flattened(codes_KT: NDArray[np.integer], codebook_size: int) -> NDArray[np.int64]:
    """The tokens of the layout `flatten`: frame by frame, code c of codebook k as k x codebook_size + c."""
    offsets_K1 = np.arange(len(codes_KT))[:, None] * codebook_size
    return (codes_KT + offsets_K1).T.reshape(-1)


def _create(root: Root, spec: StreamSpec) -> None:
    metadata = {"spec": spec.to_json(), "corpus": "synthetic"}
    create_table(root, stream_folder(STREAM), schema=stream_schema(spec), metadata=metadata)
