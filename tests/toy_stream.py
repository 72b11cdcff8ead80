"""Two small roots of toy codes, and the epochs that one reader finds in them when nobody stops it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from wavemill.pipelines.layouts.flat import flatten
from wavemill.storage.batches import PackedBatch, TokenBatch
from wavemill.storage.codes import open_corpus
from wavemill.storage.dataset import MixedDataset, TokenDataset
from wavemill.storage.layouts import Segment
from wavemill.storage.packing import PackingMethod
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, code_columns, stream_schema
from wavemill.storage.selection import Pack
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import FrameRule, StreamSpec

Feed = TokenDataset | MixedDataset
Row = tuple[Any, ...]
MakeOnce = Callable[[str, Callable[[Path], None]], Path]

SPEC = StreamSpec(
    tokenizer="toy",
    sample_rate=16_000,
    decode_sample_rate=0,
    hop_length=320,
    window_length=400,
    frame_rule=FrameRule.FLOOR,
    num_codebooks=2,
    codebook_size=50,
)
LENGTH = 40  # tokens of a packed sequence; segments have up to 80
PACKINGS = (None, "concatenate", "best-fit", "single", "backwards")
EVEN = (("speaker", "==", "even"),)  # rows 0, 2, 4, ... of each shard


def backwards(segment: Segment) -> list[int]:
    """A layout of a trainer's own: nobody knows its sizes beforehand."""
    return [*segment.codes["toy"][0].flip(0).tolist(), 50]


def segments_by_shard(place: str, num_shards: int) -> dict[int, dict[str, np.ndarray | None]]:
    """Codes `[K, T]` of each segment by id; None where there is an error, as everywhere in shard 4."""
    rng = np.random.default_rng(num_shards)
    shards: dict[int, dict[str, np.ndarray | None]] = {}
    for shard in range(num_shards):
        shards[shard] = {}
        for row in range(int(rng.integers(8, 24))):
            num_frames = int(rng.integers(1, 41)) * (row % 10 != 8)
            codes_KT = rng.integers(0, SPEC.codebook_size, (SPEC.num_codebooks, num_frames))
            shards[shard][f"{place}-{shard:02d}-{row:02d}"] = None if row % 10 == 7 or shard == 4 else codes_KT
    return shards


def make_root(path: Path, place: str, num_shards: int) -> None:
    root, shards = Root(path), segments_by_shard(place, num_shards)
    create_table(root, "corpus", schema=CORPUS_SCHEMA, metadata={})
    receipts = []
    for shard, segments in shards.items():
        count = len(segments)
        filled = {
            "id": list(segments),
            "shard": [shard] * count,
            "duration_s": [1.0] * count,
            "speaker": ["even" if row % 2 == 0 else "odd" for row in range(count)],
        }
        for field in CORPUS_SCHEMA:
            empty: Any = None if field.nullable else "" if field.type == pa.string() else 0
            filled.setdefault(field.name, [empty] * count)
        receipts.append(write_shard(root, "corpus", shard, pa.Table.from_pydict(filled, schema=CORPUS_SCHEMA)))
    TableWriter(root, "corpus").commit(receipts)
    metadata = {"spec": SPEC.to_json(), "corpus": open_corpus(root).table_id}
    create_table(root, "streams/toy", schema=stream_schema(SPEC), metadata=metadata)
    receipts = []
    for shard, segments in shards.items():
        errors = ["truncated" if codes is None else None for codes in segments.values()]
        columns: dict[str, list[Any]] = {
            "id": list(segments),
            "shard": [shard] * len(segments),
            "num_frames": [None if codes is None else codes.shape[1] for codes in segments.values()],
            "error": errors,
            "error_message": errors,
        }
        for book, name in enumerate(code_columns(SPEC.num_codebooks)):
            columns[name] = [None if codes is None else codes[book] for codes in segments.values()]
        table = pa.Table.from_pydict(columns, schema=stream_schema(SPEC))
        receipts.append(write_shard(root, "streams/toy", shard, table, codebook_size=SPEC.codebook_size))
    TableWriter(root, "streams/toy").commit(receipts)


def make_roots(made_once: MakeOnce) -> tuple[str, str]:
    """A root of twelve shards and one of seven, each with a corpus and its stream "toy"."""
    first = made_once("toy-first", lambda path: make_root(path, "first", 12))
    return str(first), str(made_once("toy-second", lambda path: make_root(path, "second", 7)))


@dataclass(frozen=True)
class Build:
    """What decides the order of an epoch."""

    roots: tuple[str, ...]  # more than one: a mixture
    weights: tuple[float, ...] = (1.0,)
    packing: str | None = None
    where: tuple[tuple[str, str, Any], ...] | None = None
    seed: int = 0
    window_bytes: int = 1
    epoch: int = 0

    def dataset(self, *, rank: int = 0, world_size: int = 1, batch_size: int = 1, tail: str = "pad") -> Feed:
        shared: dict[str, Any] = {"rank": rank, "world_size": world_size, "batch_size": batch_size, "tail": tail}
        pack = None
        if self.packing == "backwards":
            pack = Pack(backwards, LENGTH)
        elif self.packing is not None:
            pack = Pack(flatten("toy"), LENGTH, PackingMethod(self.packing))
        parts = [
            TokenDataset(
                root,
                ["toy"],
                pack=pack,
                where=self.where and list(self.where),
                seed=self.seed + part,
                window_bytes=self.window_bytes,
                **shared,
            )
            for part, root in enumerate(self.roots)
        ]
        dataset = parts[0] if len(parts) == 1 else MixedDataset(parts, self.weights, **shared)
        dataset.set_epoch(self.epoch)
        return dataset


def rows(batch: TokenBatch | PackedBatch) -> list[Row | None]:
    """A batch's sequences with their ids; None for padding, which must weigh nothing."""
    found: list[Row | None] = []
    for row, ids in enumerate(batch.ids):
        if isinstance(batch, PackedBatch):
            content = batch.tokens[row], batch.segment_ids[row], batch.positions[row], batch.loss_mask[row]
            weight = int(batch.loss_mask[row].sum())
        else:
            weight = int(batch.num_frames["toy"][row])
            content = (batch.codes["toy"][row, :, :weight],)
        if not ids:
            assert weight == 0
        found.append((ids, *(tensor.tolist() for tensor in content)) if ids else None)
    return found


@cache
def undisturbed(build: Build) -> list[Row]:
    """The rows of one rank that is never stopped."""
    return [row for batch in build.dataset(batch_size=3) for row in rows(batch) if row is not None]
