"""Small objectives and packed batches for tests of what they learn."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from toy_numbers import write_table
from wavemill.jobs.lm.model import ModelConfig
from wavemill.jobs.lm.objectives import Objective, ObjectiveContext
from wavemill.jobs.lm.registry import make_objective, objective_of
from wavemill.storage.batches import PackedBatch
from wavemill.storage.codes import open_corpus
from wavemill.storage.layouts import StreamRows
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, code_columns, stream_schema
from wavemill.storage.statistics import KEY as STATISTICS
from wavemill.storage.statistics import Statistics
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import FrameRule, StreamSpec

_CODES = StreamSpec(
    tokenizer="toy",
    sample_rate=16_000,
    decode_sample_rate=0,
    hop_length=320,
    window_length=320,
    frame_rule=FrameRule.FLOOR,
    num_codebooks=1,
    codebook_size=10,
)
SPECS = {
    "semantic": replace(_CODES, codebook_size=7),
    "acoustic": replace(_CODES, num_codebooks=3),
    "text": replace(_CODES, tokenizer="text-tokens", codebook_size=12, frame_rule=FrameRule.FREE),
    "latents": replace(_CODES, num_codebooks=0, codebook_size=0, dim=3),
    "voice": replace(_CODES, num_codebooks=0, codebook_size=0, dim=2, frame_rule=FrameRule.ONE),
}
MODEL = ModelConfig(dim=16, num_layers=1, num_heads=2)


def objective(layout: Any, name: str | None = None, **options: str) -> Objective:
    torch.manual_seed(0)
    plan = layout.plan(SPECS)
    context = ObjectiveContext(plan, SPECS, MODEL, "", layout, options)
    return make_objective(name or objective_of(layout, plan), context).eval()


def rows(rng: np.random.Generator, counts: Mapping[str, Sequence[int]]) -> dict[str, StreamRows]:
    """Random codes and numbers of segments with so many frames."""
    found = {}
    for stream, counts_N in counts.items():
        spec, total = SPECS[stream], sum(counts_N)
        books = [rng.integers(0, spec.codebook_size, total) for _ in range(spec.num_codebooks)]
        frames_TD = rng.normal(1.0, 3.0, (total, spec.dim)).astype(np.float16) if spec.dim else None
        found[stream] = StreamRows(np.array(counts_N, dtype=np.int64), books, frames_TD)
    return found


def packed(layout: Any, segments: Mapping[str, StreamRows], *, padding: int = 3) -> PackedBatch:
    """All segments in one sequence, with padding behind."""
    plan = layout.plan(SPECS)
    laid, steps_N = plan.lay(segments), plan.num_steps(segments)
    numbers = np.append(np.repeat(np.arange(1, len(steps_N) + 1), steps_N), np.zeros(padding, dtype=np.int64))
    positions = np.append(np.concatenate([np.arange(0), *map(np.arange, steps_N)]), np.zeros(padding, dtype=np.int64))
    tokens = np.pad(laid.tokens.astype(np.int64), [(0, padding)] + [(0, 0)] * (laid.tokens.ndim - 1))
    loss_S = np.ones(len(laid.tokens), dtype=bool) if laid.loss_S is None else laid.loss_S
    return PackedBatch(
        tokens=torch.from_numpy(tokens)[None],
        segment_ids=torch.from_numpy(numbers.astype(np.int32))[None],
        positions=torch.from_numpy(positions.astype(np.int32))[None],
        loss_mask=torch.from_numpy(np.append(loss_S, np.zeros(padding, dtype=bool)))[None],
        frames={stream: torch.from_numpy(frames_MD) for stream, frames_MD in laid.frames.items()},
        ids=[[str(number) for number in range(len(steps_N))]],
        state={},
    )


def make_root(root: Root, *, num_shards: int = 3, words: str = "", constant: bool = False) -> None:
    """A dataset of random codes, text and latents (`constant`: all alike), with `words` in the text's fingerprint."""
    rng, spans = np.random.default_rng(0), [range(4 * shard, 4 * shard + 4) for shard in range(num_shards)]
    ids = [[f"{number:026d}" for number in span] for span in spans]
    write_table(root, "corpus", CORPUS_SCHEMA, {}, [{"id": each} for each in ids])
    corpus = open_corpus(root).table_id
    for name in ("semantic", "acoustic", "text", "latents"):
        spec, receipts = SPECS[name], []
        metadata = {"spec": spec.to_json(), "corpus": corpus, "fingerprint": {"words": words}}
        create_table(root, f"streams/{name}", schema=stream_schema(spec), metadata=metadata)
        for shard, each in enumerate(ids):
            counts_N = rng.integers(5, 20, len(each))
            columns: dict[str, Any] = {"id": each, "shard": [shard] * len(each), "num_frames": counts_N}
            columns |= {"error": [None] * len(each), "error_message": [None] * len(each)}
            if not spec.dim:
                for column in code_columns(spec.num_codebooks):
                    columns[column] = [rng.integers(0, spec.codebook_size, count) for count in counts_N]
            else:
                frames = [rng.normal(1.0, 3.0, (count, spec.dim)).astype(np.float16) for count in counts_N]
                frames = [np.full_like(frames_TD, 2.0) if constant else frames_TD for frames_TD in frames]
                columns["frames"] = [frames_TD.tobytes() for frames_TD in frames]
            table = pa.Table.from_pydict(columns, schema=stream_schema(spec))
            if spec.dim:
                table = table.replace_schema_metadata({STATISTICS: Statistics.of(frames, spec.dim).to_json()})
            receipts.append(write_shard(root, f"streams/{name}", shard, table, codebook_size=spec.codebook_size))
        TableWriter(root, f"streams/{name}").commit(receipts)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
