"""Small roots of toy codes and toy numbers: frames of latents, a vector of each segment, merged frames with durations.

Axes: see storage/layouts.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from wavemill.storage.batches import PackedBatch, TokenBatch
from wavemill.storage.codes import open_corpus
from wavemill.storage.layouts import Segment
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, code_columns, stream_schema
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import FrameRule, StreamSpec

CLOCK: dict[str, Any] = {"tokenizer": "toy", "sample_rate": 16_000, "decode_sample_rate": 0, "hop_length": 320}
CODES = StreamSpec(**CLOCK, window_length=320, frame_rule=FrameRule.FLOOR, num_codebooks=2, codebook_size=50)
SPECS = {
    "acoustic": CODES,
    "latents": replace(CODES, num_codebooks=0, codebook_size=0, dim=3),
    "vector": replace(CODES, num_codebooks=0, codebook_size=0, dim=5, frame_rule=FrameRule.ONE),
    "merged": replace(CODES, num_codebooks=0, codebook_size=0, dim=2, durations=True, frame_rule=FrameRule.FREE),
}


def random_segment(rng: np.random.Generator, id_: str, row: int) -> Segment:
    num = int(rng.integers(0, 31))
    numbers = {"latents": num, "vector": min(num, 1), "merged": int(rng.integers(0, 33))}
    frames = {
        name: torch.from_numpy(rng.normal(size=(count, SPECS[name].dim)).astype(np.float16))
        for name, count in numbers.items()
    }
    durations = {"merged": torch.from_numpy(rng.integers(1, 9, numbers["merged"]).astype(np.int32))}
    for stream, (every, place) in {"latents": (7, 3), "vector": (11, 5), "merged": (13, 1)}.items():
        if row % every == place:
            del frames[stream]
            durations.pop(stream, None)
    return Segment(id_, {"acoustic": torch.from_numpy(rng.integers(0, 50, (2, num)))}, frames, durations)


@cache
def truth(place: str, num_shards: int) -> list[list[Segment]]:
    """Segments by shard, without the streams in which they are errors; none in shard 3."""
    rng = np.random.default_rng(num_shards)
    sizes = [0 if shard == 3 else int(rng.integers(8, 24)) for shard in range(num_shards)]
    return [
        [random_segment(rng, f"{place}-{shard:02d}-{row:02d}", row) for row in range(size)]
        for shard, size in enumerate(sizes)
    ]


def write_table(root: Root, folder: str, schema: pa.Schema, metadata: dict[str, Any], shards: list[Any]) -> None:
    """Columns that are missing are empty."""
    create_table(root, folder, schema=schema, metadata=metadata)
    receipts = []
    for shard, columns in enumerate(shards):
        count = len(columns["id"])
        filled = {"shard": [shard] * count, **columns}
        for field in schema:
            empty: Any = None if field.nullable else "" if field.type == pa.string() else 0
            filled.setdefault(field.name, [empty] * count)
        receipts.append(write_shard(root, folder, shard, pa.Table.from_pydict(filled, schema=schema)))
    TableWriter(root, folder).commit(receipts)


def stream_columns(name: str, segments: list[Segment]) -> dict[str, list[Any]]:
    there = [name in segment.codes or name in segment.frames for segment in segments]
    errors = [None if is_there else "truncated" for is_there in there]
    columns: dict[str, list[Any]] = {"id": [segment.id for segment in segments], "error": errors}
    columns["error_message"] = errors
    if SPECS[name].dim:
        columns["frames"] = [
            frames_TD.numpy().tobytes() if (frames_TD := segment.frames.get(name)) is not None else None
            for segment in segments
        ]
        columns["num_frames"] = [len(segment.frames[name]) if name in segment.frames else None for segment in segments]
    else:
        columns["num_frames"] = [segment.codes[name].shape[1] for segment in segments]
        for book, column in enumerate(code_columns(SPECS[name].num_codebooks)):
            columns[column] = [segment.codes[name][book].numpy() for segment in segments]
    if SPECS[name].durations:
        columns["durations"] = [
            durations_T.numpy() if (durations_T := segment.durations.get(name)) is not None else None
            for segment in segments
        ]
    return columns


def make_root(
    path: Path, place: str, num_shards: int, change: Callable[..., Any] = lambda name, columns: columns
) -> None:
    root, shards = Root(path), truth(place, num_shards)
    corpus = [
        {
            "id": [segment.id for segment in shard],
            "speaker": ["odd" if row % 2 else "even" for row in range(len(shard))],
            "parent": [f"parent-{row // 2}" for row in range(len(shard))],
            "separated": [row % 2 for row in range(len(shard))],
        }
        for shard in shards
    ]
    write_table(root, "corpus", CORPUS_SCHEMA, {}, corpus)
    for name, spec in SPECS.items():
        metadata = {"spec": spec.to_json(), "corpus": open_corpus(root).table_id}
        columns = [stream_columns(name, shard) for shard in shards]
        if change is not None:
            columns = [change(name, each) for each in columns]
        write_table(root, f"streams/{name}", stream_schema(spec), metadata, columns)


@cache
def good(streams: Iterable[str], place: str = "first", num_shards: int = 9) -> dict[str, Segment]:
    """A root's segments without an error in these streams (a tuple of them), by id."""
    segments = [segment for shard in truth(place, num_shards) for segment in shard]
    return {segment.id: segment for segment in segments if set(streams) <= {*segment.codes, *segment.frames}}


def first_column(batch: PackedBatch) -> Tensor:
    return batch.tokens if batch.tokens.ndim == 2 else batch.tokens[..., 0]


def rows(batch: TokenBatch | PackedBatch, layout: Any) -> list[Any]:
    """Sequences of a batch with all that they hold, without padding, as plain lists."""
    if isinstance(batch, TokenBatch):
        parts = batch.codes | {f"{name} frames": frames_BTD for name, frames_BTD in batch.frames.items()}
        parts |= {f"{name} durations": durations_BT for name, durations_BT in batch.durations.items()}
        held = {name: _without_padding(name, part, batch.num_frames[name.split()[0]]) for name, part in parts.items()}
        return [(id_, {name: held[name][row] for name in held}) for row, id_ in enumerate(batch.ids) if id_]
    found = []
    for row, ids in enumerate(batch.ids):
        only = _row(batch, row, layout)
        assert (batch.loss_mask[row].sum() == 0) or ids
        found += [(ids, only)] if ids else []
    return found


def _without_padding(name: str, part: Tensor, num_B: Tensor) -> list[Any]:
    return [
        (row[:, :num] if name in SPECS and not SPECS[name].dim else row[:num]).tolist()
        for row, num in zip(part, num_B.tolist(), strict=True)
    ]


def _row(batch: PackedBatch, row: int, layout: Any) -> Any:
    first_BL, frames = first_column(batch), {}
    for stream, token in layout.plan(SPECS).frame_tokens.items():
        before, num = int((first_BL[:row] == token).sum()), int((first_BL[row] == token).sum())
        frames[stream] = batch.frames[stream][before : before + num].tolist()
    tensors = (batch.tokens, batch.segment_ids, batch.positions, batch.loss_mask)
    return [tensor[row].tolist() for tensor in tensors], frames
