"""Bytes a code takes in a shard, the cost of reading three of eight codebooks, and the speed of writing.

`make bench-storage`. Codes are uniform: nothing can take them below log2 of the codebook's size. The target is counted
against whole bits, ceil(log2(size)) / 8 bytes a code, with ids, frame counts, footer and all; segments last 5 to 15 s,
or 5 s each. Reading takes what a loader takes: the footer, frame counts, ids and codebooks, from the page cache; bytes
are those that are asked of the file. Peers store the same shard: a tar of [K, T] uint16 .npy (WebDataset), JSON lines,
a .pt of int64 for each segment; they read all to have three. Repeats are interleaved, one thread; ratios are medians
over them. Prints tables and, last, one JSON object.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset
from synthetic_tokens import STREAM, segments, shard_table, synthetic_spec, write_tar
from wavemill.storage.codes import open_stream, stream_folder
from wavemill.storage.parquet import ParquetShard, parquet_bytes
from wavemill.storage.root import Root
from wavemill.storage.schema import code_columns, stream_schema
from wavemill.storage.table import Snapshot, create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import StreamSpec

SIZE_TARGET, PART_TARGET, WRITE_TARGET_MTOK = 1.02, 0.40, 50.0
WANTED, BOOKS, BOOK_SIZE, REPEATS = 3, 8, 1_024, 5
SEGMENTS_S = {"5-15 s": (5.0, 15.0), "5 s": (5.0, 5.0)}


@dataclass(frozen=True, slots=True)
class Case:
    """A stream and the hours of a shard; the target holds from 50 Hz and an hour on."""

    spec: StreamSpec
    hours: float
    target: float | None


CASES = {
    "8 x 1,024, 50 Hz, 1 h": Case(synthetic_spec(BOOKS, BOOK_SIZE), 1, SIZE_TARGET),
    "1 x 500, 50 Hz, 1 h": Case(synthetic_spec(1, 500), 1, SIZE_TARGET),
    "1 x 65,536, 50 Hz, 1 h": Case(synthetic_spec(1, 65_536), 1, SIZE_TARGET),
    "8 x 2,048, 12.5 Hz, 1 h": Case(synthetic_spec(8, 2_048, hop_length=1_280), 1, None),
    "8 x 2,048, 12.5 Hz, 10 h": Case(synthetic_spec(8, 2_048, hop_length=1_280), 10, None),
}


class CountingRoot(Root):
    """A root that counts the bytes that are asked of its files."""

    num_bytes = 0

    def read_ranges(self, relative: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.num_bytes += sum(end - begin for begin, end in ranges)
        return super().read_ranges(relative, ranges)


def bench_size(case: Case, segment_s: tuple[float, float]) -> dict[str, float]:
    table = shard_table(case.spec, 0, hours=case.hours, segment_s=segment_s)
    num_codes = count_codes(table, case.spec)
    bytes_per_code = len(parquet_bytes(table, codebook_size=case.spec.codebook_size)) / num_codes
    least = math.ceil(math.log2(case.spec.codebook_size)) / 8
    return {"bytes_per_code": round(bytes_per_code, 4), "ratio": round(bytes_per_code / least, 4)}


def count_codes(table: pa.Table, spec: StreamSpec) -> int:
    return sum(table["num_frames"].to_pylist()) * spec.num_codebooks


def read_ours(root: Root, snapshot: Snapshot, *, books: int) -> list[np.ndarray]:
    """Codes of the first codebooks, `[frames]` each, read as a loader reads them."""
    path, size_bytes = snapshot.path(0), snapshot.files[0].size_bytes
    file = ParquetShard(root, path, size_bytes, schema=stream_schema(synthetic_spec(BOOKS, BOOK_SIZE)))
    file.read(["num_frames"])
    columns = code_columns(books)
    table = file.read(["id", *columns])
    return [table[column].combine_chunks().values.to_numpy() for column in columns]


def read_tar(folder: Path) -> list[np.ndarray]:
    rows = webdataset.WebDataset(str(folder / "shard.tar"), shardshuffle=False).decode().to_tuple("npy")
    return joined([codes_KT[:WANTED] for (codes_KT,) in rows])


def write_json(codes: list[tuple[str, np.ndarray]], folder: Path) -> None:
    lines = [json.dumps({"id": id_, "codes": codes_KT.tolist()}) for id_, codes_KT in codes]
    (folder / "shard.jsonl").write_text("\n".join(lines))


def read_json(folder: Path) -> list[np.ndarray]:
    with open(folder / "shard.jsonl") as lines:
        return joined([np.array(json.loads(line)["codes"][:WANTED], dtype=np.int16) for line in lines])


def write_pt(codes: list[tuple[str, np.ndarray]], folder: Path) -> None:
    for id_, codes_KT in codes:
        torch.save(torch.from_numpy(codes_KT.astype(np.int64)), folder / f"{id_}.pt")


def read_pt(folder: Path) -> list[np.ndarray]:
    return joined([torch.load(path)[:WANTED].numpy() for path in sorted(folder.glob("*.pt"))])


def joined(codes: list[np.ndarray]) -> list[np.ndarray]:
    return list(np.concatenate(codes, axis=1))


PEERS = {
    "webdataset .npy uint16": (lambda codes, folder: write_tar(codes, folder / "shard.tar"), read_tar),
    "JSON lines": (write_json, read_json),
    ".pt int64": (write_pt, read_pt),
}


def write_stream(root: Root, table: pa.Table) -> Snapshot:
    spec = synthetic_spec(BOOKS, BOOK_SIZE)
    folder = stream_folder(STREAM)
    metadata = {"spec": spec.to_json(), "corpus": "synthetic"}
    create_table(root, folder, schema=stream_schema(spec), metadata=metadata)
    TableWriter(root, folder).commit([write_shard(root, folder, 0, table, codebook_size=BOOK_SIZE)])
    return open_stream(root, STREAM)


def timed(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of a call, by the clock and of the processor."""
    runs = []
    for _ in range(repeats):
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        work()
        runs.append((time.perf_counter() - started_s, time.process_time() - started_cpu_s))
    return statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)


def bench_reading(folder: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """Bytes a code, and what three of eight codebooks cost: of ours against all eight, of the peers' against ours."""
    root = CountingRoot(folder / "wavemill")
    table = shard_table(synthetic_spec(BOOKS, BOOK_SIZE), 0)
    snapshot = write_stream(root, table)
    num_codes = count_codes(table, synthetic_spec(BOOKS, BOOK_SIZE))
    codes = list(segments(root, snapshot, 0))
    reads: dict[str, Callable[[], object]] = {
        "wavemill, 8": partial(read_ours, root, snapshot, books=BOOKS),
        "wavemill, 3": partial(read_ours, root, snapshot, books=WANTED),
    }
    asked, sizes = {}, {"wavemill, 8": snapshot.files[0].size_bytes, "wavemill, 3": snapshot.files[0].size_bytes}
    for name, read in reads.items():
        root.num_bytes = 0
        read()
        asked[name] = root.num_bytes
    expected = np.stack(read_ours(root, snapshot, books=WANTED))
    for name, (write, read) in PEERS.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        write(codes, place)
        sizes[name] = asked[name] = sum(path.stat().st_size for path in place.iterdir())
        reads[name] = partial(read, place)
        if np.sort(np.stack(read(place))).tobytes() != np.sort(expected.astype(read(place)[0].dtype)).tobytes():
            raise SystemExit(f"{name} gives other codes")
    times: dict[str, list[float]] = {name: [] for name in reads}
    for repeat in range(repeats + 1):
        for name, read in reads.items():
            taken_s, _ = timed(read, 9)
            if repeat:  # the first round warms up
                times[name].append(taken_s)
    figures = {}
    print(f"{'3 of 8 codebooks':26}{'bytes/code':>12}{'MB asked':>10}{'ms':>9}{'of all 8':>10}  spread")
    for name in reads:
        ratios = [part / whole for part, whole in zip(times[name], times["wavemill, 8"], strict=True)]
        figures[name] = {
            "bytes_per_code": round(sizes[name] / num_codes, 3),
            "bytes_ratio": round(asked[name] / asked["wavemill, 8"], 4),
            "ratio": round(statistics.median(ratios), 3),
            "spread": [round(min(ratios), 3), round(max(ratios), 3)],
            "ms": round(statistics.median(times[name]) * 1e3, 2),
        }
        row = figures[name]
        print(
            f"{name:26}{row['bytes_per_code']:12.3f}{asked[name] / 1e6:10.3f}{row['ms']:9.2f}{row['ratio']:10.3f}"
            f"  {row['spread']}"
        )
    return figures


def bench_writing(folder: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """Codes a second: the bytes of a shard, and the shard written and synced to the disk."""
    root = Root(folder / "written")
    spec = synthetic_spec(BOOKS, BOOK_SIZE)
    table = shard_table(spec, 0)
    work: dict[str, Callable[[], object]] = {
        "parquet_bytes": partial(parquet_bytes, table, codebook_size=BOOK_SIZE),
        "write_shard": partial(write_shard, root, stream_folder(STREAM), 0, table, codebook_size=BOOK_SIZE),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, write in work.items():
            wall_s, cpu_s = timed(write, 3)
            if repeat:
                rates[name].append((count_codes(table, spec) / wall_s / 1e6, count_codes(table, spec) / cpu_s / 1e6))
    figures = {}
    for name, runs in rates.items():
        per_core = [core for _, core in runs]
        figures[name] = {
            "mtok_s": round(statistics.median(wall for wall, _ in runs), 1),
            "mtok_core_s": round(statistics.median(per_core), 1),
            "target": WRITE_TARGET_MTOK,
            "spread": [round(min(per_core), 1), round(max(per_core), 1)],
        }
        print(f"writing, {name:20}" + "  ".join(f"{key} {value}" for key, value in figures[name].items()))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes: dict[str, dict[str, Any]] = {}
    print(f"{'bytes a code':26}" + "".join(f"{told:>12}{'ratio':>8}" for told in SEGMENTS_S) + f"{'target':>8}")
    for name, case in CASES.items():
        own = {told: bench_size(case, lengths_s) for told, lengths_s in SEGMENTS_S.items()}
        sizes[name] = {"target": case.target, **own}
        columns = "".join(f"{figures['bytes_per_code']:12.4f}{figures['ratio']:8.4f}" for figures in own.values())
        print(f"{name:26}{columns}{case.target or '':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        reading = bench_reading(Path(folder), arguments.repeats)
        writing = bench_writing(Path(folder), arguments.repeats)
    ratios = [figures["ratio"] for figures in (sizes["8 x 1,024, 50 Hz, 1 h"][told] for told in SEGMENTS_S)]
    print(
        json.dumps(
            {
                "name": "storage",
                "ratio": ratios[0],
                "target": SIZE_TARGET,
                "spread": [min(ratios), max(ratios)],
                "peer": f"ceil(log2 K) / 8 bytes; beside it webdataset {version('webdataset')} .npy uint16",
                "peer_bytes_per_code": {name: reading[name]["bytes_per_code"] for name in PEERS},
                "sizes": sizes,
                "three_of_eight": {"target": PART_TARGET, **reading},
                "writing": writing,
                "threads": 1,
            }
        )
    )


if __name__ == "__main__":
    main()
