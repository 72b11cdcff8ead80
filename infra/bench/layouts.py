"""What each layout costs in the loader, against `flatten` on the same codes.

`make bench-layouts`. Every layout of the registry is read by `TokenDataset` with packing ([8, 4096] steps, end to
end), shuffled, over whole epochs, in one process without DataLoader workers, files in the page cache. A layout's codes
are all those of the streams that it reads; what they cost as they are is an epoch of `flatten` over each of these
streams alone. Numbers of a continuous stream cost what a code of the acoustic stream does. Bound: 2 times.

Synthetic streams, shards of an hour of segments of 5 to 15 s: acoustic 8 x 1,024 and semantic 1 x 500 at 50 Hz, text of
4 ids a second, three words a second with times, latents of 64 numbers at 12.5 Hz, a voice of 256 numbers a segment;
neighbours are a pair, and two talkers separated from one segment. Repeats are interleaved; ratios are medians over
them, by the clock and of processor time, which other work on the machine hardly moves. Prints a table and, last, one
JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from synthetic_tokens import synthetic_spec
from wavemill.pipelines.layouts.flat import flatten
from wavemill.pipelines.layouts.plan import NamedLayout
from wavemill.pipelines.layouts.registry import LAYOUTS, parse_layout
from wavemill.pipelines.layouts.timed import NUM_TIMES
from wavemill.storage.codes import open_corpus
from wavemill.storage.dataset import TokenDataset
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, code_columns, stream_schema
from wavemill.storage.selection import Pack
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import FrameRule, StreamSpec

HOURS, REPEATS, BATCH, LENGTH, BOUND = 16, 5, 8, 4_096, 2.0
IDS = 32_000
_FREE: dict[str, Any] = {"frame_rule": FrameRule.FREE}
_NUMBERS: dict[str, Any] = {"num_codebooks": 0, "codebook_size": 1}
SPECS = {
    "acoustic": synthetic_spec(8, 1_024),
    "semantic": synthetic_spec(1, 500),
    "text": replace(synthetic_spec(1, IDS), tokenizer="text-tokens", **_FREE),
    "words": replace(synthetic_spec(1, IDS + 1 + NUM_TIMES), tokenizer="word-tokens", **_FREE),
    "latents": replace(synthetic_spec(1, 1, hop_length=1_280), dim=64, **_NUMBERS),
    "voice": replace(synthetic_spec(1, 1), dim=256, frame_rule=FrameRule.ONE, **_NUMBERS),
}
# of others the example in the registry
ASKED = {
    "coarse": "coarse:semantic=semantic,acoustic=acoustic,codebooks=4",
    "fine": "fine:acoustic=acoustic,coarse=4",
    "stages": "stages:semantic=semantic,acoustic=acoustic,coarse=4",
    "flatten": "flatten:stream=acoustic",
    "parallel": "parallel:stream=acoustic",
    "delay": "delay:stream=acoustic",
    "vall-e-nar": "vall-e-nar:text=text,acoustic=acoustic",
    "soundstorm": "soundstorm:semantic=semantic,acoustic=acoustic",
    "interleaved": "interleaved:text=words,units=semantic",
    "moshi": "moshi:text=words,audio=acoustic",
    "factorized": "factorized:reasoning=semantic,reconstruction=acoustic",
    "speakers": "speakers:stream=acoustic",
    "conditioned": "conditioned:stream=voice,layout=delay:stream=acoustic",
}
Codes = dict[str, int]  # by stream, of one codebook, or numbers
Took = dict[Any, list[np.ndarray]]  # by run, of each repeat seconds `[2]` by the clock and of the processor


def make_streams(root: Root, hours: int) -> Codes:
    """A root with all of `SPECS`; says how many codes (numbers) each codebook of each holds."""
    create_table(root, "corpus", schema=CORPUS_SCHEMA, metadata={})
    seconds = [np.random.default_rng(shard).integers(5, 16, 360).astype(np.int64) for shard in range(hours)]
    TableWriter(root, "corpus").commit(
        [write_shard(root, "corpus", shard, corpus_table(shard, len(each_N))) for shard, each_N in enumerate(seconds)]
    )
    held = {}
    for name, spec in SPECS.items():
        folder = f"streams/{name}"
        metadata = {"spec": spec.to_json(), "corpus": open_corpus(root).table_id}
        create_table(root, folder, schema=stream_schema(spec), metadata=metadata)
        receipts, held[name] = [], 0
        for shard, seconds_N in enumerate(seconds):
            table = stream_table(name, spec, shard, seconds_N)
            held[name] += sum(table["num_frames"].to_pylist()) * max(1, spec.dim)
            receipts.append(
                write_shard(root, folder, shard, table, codebook_size=0 if spec.dim else spec.codebook_size)
            )
        TableWriter(root, folder).commit(receipts)
    return held


def ids_of(shard: int, count: int) -> list[str]:
    return [f"{shard:06d}-{row:06d}" for row in range(count)]


def corpus_table(shard: int, count: int) -> pa.Table:
    pairs = [f"{shard}-{row // 2}" for row in range(count)]
    filled: dict[str, Any] = {"id": ids_of(shard, count), "shard": [shard] * count, "pair": pairs, "parent": pairs}
    filled["separated"] = [row % 2 for row in range(count)]
    for field in CORPUS_SCHEMA:
        empty: Any = None if field.nullable else "" if field.type == pa.string() else 0
        filled.setdefault(field.name, [empty] * count)
    return pa.Table.from_pydict(filled, schema=CORPUS_SCHEMA)


def stream_table(name: str, spec: StreamSpec, shard: int, seconds_N: np.ndarray) -> pa.Table:
    """A shard's rows of so many seconds each."""
    rng = np.random.default_rng([shard, len(name)])
    if name == "words":
        codes = [words_of(int(seconds), rng) for seconds in seconds_N]
        frames_N, books = np.array([len(each) for each in codes]), [np.concatenate(codes)]
    else:
        rate = {"text": 4, "voice": 0}.get(name, spec.frame_rate)
        frames_N = np.array([int(seconds * rate) or 1 for seconds in seconds_N.tolist()])
        books = [rng.integers(0, spec.codebook_size, frames_N.sum()) for _ in range(spec.num_codebooks)]
    schema, count = stream_schema(spec), len(seconds_N)
    columns: dict[str, Any] = {"id": ids_of(shard, count), "shard": [shard] * count, "num_frames": frames_N}
    columns |= {"error": [None] * count, "error_message": [None] * count}
    splits = np.cumsum(frames_N)[:-1]
    for column, book in zip(code_columns(spec.num_codebooks), books, strict=True):
        columns[column] = np.split(book, splits)
    if spec.dim:
        frames_TD = rng.standard_normal((frames_N.sum(), spec.dim)).astype("<f2")
        columns["frames"] = [each.tobytes() for each in np.split(frames_TD, splits)]
    return pa.Table.from_pydict(columns, schema=schema)


def words_of(seconds: int, rng: np.random.Generator) -> np.ndarray:
    """Three words a second, of an id or two, between their times."""
    codes: list[int] = []
    for word in range(3 * seconds):
        start = word * 50 // 3
        ids = rng.integers(0, IDS, rng.integers(1, 3)).tolist()
        codes += [IDS + 1 + start, *ids, IDS + 1 + start + 12]
    return np.array(codes)


def epoch(dataset: TokenDataset, number: int) -> None:
    dataset.set_epoch(number)
    for _ in dataset:
        pass


def dataset_of(root: Root, layout: NamedLayout) -> TokenDataset:
    return TokenDataset(root.uri, pack=Pack(layout, length=LENGTH), batch_size=BATCH, seed=1)


def books_read(layout: NamedLayout) -> dict[str, int]:
    """By stream how many of its codebooks a layout reads; of streams of numbers 0."""
    return {
        stream: SPECS[stream].num_codebooks if books is None else min(books, SPECS[stream].num_codebooks)
        for stream, books in layout.streams.items()
    }


def bench(root: Root, held: Codes, names: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Figures of each layout."""
    layouts = {name: parse_layout(ASKED.get(name, LAYOUTS[name].example)) for name in names}
    plain = {("acoustic", 8), *(item for layout in layouts.values() for item in books_read(layout).items())}
    runs: dict[Any, Callable[[int], None]] = {
        item: partial(epoch, dataset_of(root, flatten(*item))) for item in sorted(plain) if item[1]
    }
    runs |= {name: partial(epoch, dataset_of(root, layout)) for name, layout in layouts.items()}
    took: Took = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            started = np.array([time.perf_counter(), time.process_time()])
            run(repeat)
            if repeat:  # the first round warms up
                took[name].append(np.array([time.perf_counter(), time.process_time()]) - started)
    figures = {}
    for name, layout in layouts.items():
        read = books_read(layout)
        codes = sum(held[stream] * (books or 1) for stream, books in read.items())
        ratios_RC = np.array(
            [
                took_C / sum(plain_s(took, held, item, repeat) for item in read.items())
                for repeat, took_C in enumerate(took[name])
            ]
        )
        ratio, core_ratio = np.median(ratios_RC, axis=0).round(2).tolist()
        figures[name] = {
            "mcodes_s": round(codes / statistics.median(wall_s for wall_s, _ in took[name]) / 1e6, 1),
            "ratio": ratio,
            "spread": [round(float(bound(ratios_RC[:, 0])), 2) for bound in (min, max)],
            "core_ratio": core_ratio,
        }
    return figures


def plain_s(took: Took, held: Codes, item: tuple[str, int], repeat: int) -> np.ndarray:
    """Seconds `[2]` that a stream's codes take as they are; its numbers, at the price of codes."""
    if item[1]:
        return took[item][repeat]
    return took["acoustic", 8][repeat] * held[item[0]] / (8 * held["acoustic"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="of layouts; default: all")
    parser.add_argument("--hours", type=int, default=HOURS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Root(folder)
        held = make_streams(root, asked.hours)
        figures = bench(root, held, asked.names or list(LAYOUTS), asked.repeats)
    print(f"{'layout':18}{'Mcodes/s':>10}{'x flatten':>11}{'of a core':>11}  spread")
    for name, row in figures.items():
        late = "  over the bound" if row["ratio"] > BOUND else ""
        print(f"{name:18}{row['mcodes_s']:10.1f}{row['ratio']:11.2f}{row['core_ratio']:11.2f}  {row['spread']}{late}")
    worst = max(row["ratio"] for row in figures.values())
    told = {"name": "layouts", "ratio": worst, "bound": BOUND, "peer": "flatten", "n": asked.repeats}
    print(json.dumps({**told, "hours": asked.hours, "all": figures}))


if __name__ == "__main__":
    main()
