"""Times the trainer's dataset against the loaders that people use, and opens the table of a very large stream.

`make bench-loader`. All give packed batches of the same tokens: [8, 4096] int64, 8 codebooks of 1,024 flattened frame
by frame. One process, no DataLoader workers, files in the page cache; each loader reads with the threads of its own
that it has by default. Ours shuffles the segments of windows, saves its state with each batch and is timed over whole
epochs, their beginning and end included; the others from the first batch of an epoch to its middle, again and again.
Repeats are interleaved; ratios are medians over them. What the others store, and how they shuffle:

- webdataset: a tar an hour of [K, T] uint16 .npy; shards and a buffer of 1,000 segments, then end to end
- hf-streaming: Parquet, a file an hour, of [K, T] lists of int16, read as NumPy arrays; files and a buffer of 1,000
  segments, then end to end. hf-streaming-flat: lists of tokens that were flattened when they were written
- mosaicml-streaming: MDS of [K, T] uint16; its own shuffle, then end to end
- litdata: tokens end to end, cut into blocks of 4,096 once and for all (`TokensLoader`), int64; litdata-uint16 the same
- memmap: sequences of one uint16 array at random places, as nanoGPT reads: the limit

Opening is timed in fresh processes. Prints tables and, last, one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from synthetic_tokens import STREAM, flattened, make_metadata, make_stream, segments, synthetic_spec, write_tar
from torch import Tensor
from wavemill.pipelines.layouts.flat import flatten
from wavemill.storage.codes import open_stream
from wavemill.storage.dataset import TokenDataset
from wavemill.storage.root import Root
from wavemill.storage.selection import Pack
from wavemill.storage.table import Snapshot
from wavemill.storage.windows import WindowReader

BATCH, LENGTH, BUFFER, CHUNK_BLOCKS, HOURS, REPEATS, MIN_S = 8, 4_096, 1_000, 2_048, 100, 5, 2.0
BOOKS, BOOK_SIZE = 8, 1_024
TARGETS = {"webdataset": 5.0, "hf-streaming": 10.0, "litdata": 1.0, "memmap": 0.15}
DISK_TARGET = 6.0  # times fewer bytes than litdata
OPEN_SHARDS, SHARD_SEGMENTS, OPEN_TARGET_S, OPEN_TARGET_MB = 100_000, 1_000, 5.0, 1_000


@dataclass(frozen=True, slots=True)
class Loader:
    """A way to store tokens and to read them: `write` fills a folder, `epoch` gives the batches of an epoch."""

    package: str
    write: Callable[[Root, Snapshot, Path], None]
    epoch: Callable[[Path, int], Iterator[Tensor]]


Pace = tuple[float, float]  # million tokens a second, and a second of processor time of all threads


def packed(runs: Iterable[np.ndarray]) -> Iterator[Tensor]:
    """Runs of tokens end to end, cut into batches; the last, short one is left out."""
    held, size = [], 0
    for run in runs:
        held.append(run)
        size += len(run)
        while size >= BATCH * LENGTH:
            tokens = np.concatenate(held)
            yield torch.from_numpy(tokens[: BATCH * LENGTH].astype(np.int64)).view(BATCH, LENGTH)
            held, size = [tokens[BATCH * LENGTH :]], size - BATCH * LENGTH


def stacked(sequences: Iterable[Tensor]) -> Iterator[Tensor]:
    """Sequences in batches."""
    held = []
    for sequence_L in sequences:
        held.append(sequence_L)
        if len(held) == BATCH:
            yield torch.stack(held).long()
            held = []


def write_webdataset(root: Root, snapshot: Snapshot, folder: Path) -> None:
    for shard in snapshot.files:
        write_tar(segments(root, snapshot, shard), folder / f"{shard:06d}.tar")


def webdataset_epoch(folder: Path, epoch: int) -> Iterator[Tensor]:
    import webdataset

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=epoch).shuffle(BUFFER).decode().to_tuple("npy")
    return packed(flattened(codes_KT, BOOK_SIZE) for (codes_KT,) in dataset)


def write_hf(root: Root, snapshot: Snapshot, folder: Path, *, flat: bool) -> None:
    for shard in snapshot.files:
        ids, codes = zip(*segments(root, snapshot, shard), strict=True)
        if flat:
            tokens = [flattened(codes_KT, BOOK_SIZE).astype(np.int16) for codes_KT in codes]
            column = pa.array(tokens, pa.list_(pa.int16()))
        else:
            column = pa.array([list(codes_KT) for codes_KT in codes], pa.list_(pa.list_(pa.int16())))
        pq.write_table(pa.table({"id": pa.array(ids), "codes": column}), folder / f"{shard:06d}.parquet")


def hf_epoch(folder: Path, epoch: int, *, flat: bool) -> Iterator[Tensor]:
    import datasets

    files = sorted(str(path) for path in folder.glob("*.parquet"))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, columns=["codes"])
    rows = dataset.with_format("numpy").shuffle(seed=epoch, buffer_size=BUFFER)
    return packed(row["codes"] if flat else flattened(np.stack(row["codes"]), BOOK_SIZE) for row in rows)


def write_mds(root: Root, snapshot: Snapshot, folder: Path) -> None:
    import streaming

    with streaming.MDSWriter(out=str(folder), columns={"id": "str", "codes": "ndarray:uint16"}) as sink:
        for shard in snapshot.files:
            for id_, codes_KT in segments(root, snapshot, shard):
                sink.write({"id": id_, "codes": codes_KT.astype(np.uint16)})


def mds_epoch(folder: Path, epoch: int) -> Iterator[Tensor]:
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=1 + epoch, batch_size=BATCH)
    return packed(flattened(row["codes"], BOOK_SIZE) for row in dataset)


def write_litdata(root: Root, snapshot: Snapshot, folder: Path, *, dtype: type[np.integer]) -> None:
    import litdata

    tokens = partial(shard_tokens, root.uri, dtype=dtype)
    chunks = {"chunk_size": CHUNK_BLOCKS * LENGTH, "item_loader": litdata.TokensLoader(block_size=LENGTH)}
    litdata.optimize(tokens, list(snapshot.files), str(folder), num_workers=1, verbose=False, **chunks)


def shard_tokens(root_uri: str, shard: int, *, dtype: type[np.integer]) -> Iterator[Tensor]:
    root = Root(root_uri)
    snapshot = open_stream(root, STREAM)
    for _, codes_KT in segments(root, snapshot, shard):
        yield torch.from_numpy(flattened(codes_KT, BOOK_SIZE).astype(dtype))


def litdata_epoch(folder: Path, epoch: int) -> Iterator[Tensor]:
    import litdata

    blocks = litdata.TokensLoader(block_size=LENGTH)
    dataset = litdata.StreamingDataset(str(folder), item_loader=blocks, shuffle=True, seed=1)
    dataset.set_epoch(epoch + 1)
    return stacked(dataset)


def write_memmap(root: Root, snapshot: Snapshot, folder: Path) -> None:
    with open(folder / "tokens.bin", "wb") as file:
        for shard in snapshot.files:
            for tokens in shard_tokens(root.uri, shard, dtype=np.uint16):
                file.write(tokens.numpy().tobytes())


def memmap_epoch(folder: Path, epoch: int) -> Iterator[Tensor]:
    tokens = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
    places = np.random.default_rng(epoch).permutation(len(tokens) // LENGTH)
    for first in range(0, len(places) - BATCH + 1, BATCH):
        windows = [tokens[place * LENGTH : (place + 1) * LENGTH] for place in places[first : first + BATCH]]
        yield torch.from_numpy(np.stack(windows).astype(np.int64))


PEERS = {
    "webdataset": Loader("webdataset", write_webdataset, webdataset_epoch),
    "hf-streaming": Loader("datasets", partial(write_hf, flat=False), partial(hf_epoch, flat=False)),
    "hf-streaming-flat": Loader("datasets", partial(write_hf, flat=True), partial(hf_epoch, flat=True)),
    "mosaicml-streaming": Loader("mosaicml-streaming", write_mds, mds_epoch),
    "litdata": Loader("litdata", partial(write_litdata, dtype=np.int64), litdata_epoch),
    "litdata-uint16": Loader("litdata", partial(write_litdata, dtype=np.uint16), litdata_epoch),
    "memmap": Loader("numpy", write_memmap, memmap_epoch),
}


def pace(num_tokens: int, wall_s: float, cpu_s: float) -> Pace:
    return num_tokens / wall_s / 1e6, num_tokens / cpu_s / 1e6


def our_epochs(dataset: TokenDataset, num_tokens: int, first_epoch: int) -> Pace:
    """Whole epochs, as many as take `MIN_S` seconds."""
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    for epoch in count(first_epoch):
        dataset.set_epoch(epoch)
        for _ in dataset:
            pass
        wall_s = time.perf_counter() - started_s
        if wall_s >= MIN_S:
            return pace(num_tokens * (epoch + 1 - first_epoch), wall_s, time.process_time() - started_cpu_s)


def peer_epochs(loader: Loader, folder: Path, num_tokens: int, first_epoch: int) -> Pace:
    """Epochs to their middle, without the wait for the first batch, until `MIN_S` seconds of reading."""
    batches, wall_s, cpu_s = 0, 0.0, 0.0
    for epoch in count(first_epoch):
        reading = loader.epoch(folder, epoch)
        next(reading)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        for _ in islice(reading, num_tokens // (2 * BATCH * LENGTH)):
            batches += 1
            if wall_s + time.perf_counter() - started_s >= MIN_S:
                break
        wall_s += time.perf_counter() - started_s
        cpu_s += time.process_time() - started_cpu_s
        reading.close()
        if wall_s >= MIN_S:
            return pace(batches * BATCH * LENGTH, wall_s, cpu_s)


def require_right(name: str, tokens_BL: Tensor) -> None:
    """Raise unless this is a batch of flattened tokens."""
    books_BL = torch.arange(LENGTH) % BOOKS
    right = tokens_BL.shape == (BATCH, LENGTH) and tokens_BL.dtype == torch.int64
    if not right or not torch.equal(tokens_BL // BOOK_SIZE, books_BL.expand(BATCH, LENGTH)):
        raise SystemExit(f"{name} gives other tokens")


def bench_reading(folder: Path, hours: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Figures of each loader, ours first."""
    root = Root(folder / "wavemill")
    num_tokens = make_stream(root, synthetic_spec(BOOKS, BOOK_SIZE), hours=hours)
    for name, loader in PEERS.items():
        (folder / name).mkdir()
        loader.write(root, open_stream(root, STREAM), folder / name)
        reading = loader.epoch(folder / name, 0)
        require_right(name, next(reading))
        reading.close()
    pack = Pack(flatten(STREAM), length=LENGTH)
    dataset = TokenDataset(root.uri, [STREAM], pack=pack, batch_size=BATCH, seed=1)
    require_right("wavemill", next(iter(dataset)).tokens)
    paces: dict[str, list[Pace]] = {name: [] for name in ("wavemill", *PEERS)}
    for repeat in range(repeats + 1):
        epoch = 1_000 * repeat
        found = {"wavemill": our_epochs(dataset, num_tokens, epoch)}
        for name, loader in PEERS.items():
            found[name] = peer_epochs(loader, folder / name, num_tokens, epoch)
        for name, own in found.items():
            if repeat:  # the first round warms up
                paces[name].append(own)
    return {
        name: {
            "mtok_s": [wall for wall, _ in own],
            "mtok_core_s": statistics.median(core for _, core in own),
            "bytes_per_token": sum(path.stat().st_size for path in (folder / name).rglob("*.*")) / num_tokens,
        }
        for name, own in paces.items()
    }


def compared(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures with our ratio to each, printed as a table."""
    ours = found["wavemill"]
    figures: dict[str, dict[str, Any]] = {}
    print(f"{'loader':20}{'Mtok/s':>10}{'per core':>10}{'bytes/token':>13}{'we, times':>11}{'target':>8}  spread")
    for name, each in found.items():
        ratios = [us / them for us, them in zip(ours["mtok_s"], each["mtok_s"], strict=True)]
        row = figures[name] = {
            "ratio": round(statistics.median(ratios), 3),
            "target": TARGETS.get(name),
            "spread": [round(min(ratios), 3), round(max(ratios), 3)],
            "mtok_s": round(statistics.median(each["mtok_s"]), 1),
            "mtok_core_s": round(each["mtok_core_s"], 1),
            "bytes_per_token": round(each["bytes_per_token"], 3),
        }
        print(
            f"{name:20}{row['mtok_s']:10.1f}{row['mtok_core_s']:10.1f}{row['bytes_per_token']:13.3f}{row['ratio']:11.2f}"
            f"{row['target'] or '':>8}  {row['spread']}"
        )
    return figures


def open_here(root: str) -> None:
    """Open a dataset and order its first epoch; says how long that took, and the memory."""
    imported_mb = memory_mb("VmRSS")
    started_s = time.perf_counter()
    pack = Pack(flatten(STREAM), length=LENGTH)
    dataset = TokenDataset(root, [STREAM], pack=pack, batch_size=BATCH, seed=1)
    opened_s = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        windows = WindowReader(dataset.selection, pool).num_windows(0)
    ordered_s = time.perf_counter()
    peak_mb = memory_mb("VmHWM")
    memory = {"imported_mb": imported_mb, "peak_mb": peak_mb, "peak_above_imports_mb": peak_mb - imported_mb}
    print(json.dumps({"s": opened_s - started_s, "order_s": ordered_s - opened_s, **memory, "windows": windows}))


def memory_mb(field: str) -> float:
    """Of this process: VmRSS is what it holds, VmHWM the most it held. (`getrusage` also counts the parent's.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def bench_opening(root: Root, repeats: int, shards: int) -> dict[str, Any]:
    num_segments = shards * SHARD_SEGMENTS
    make_metadata(root, synthetic_spec(BOOKS, BOOK_SIZE), shards=shards, segments=num_segments, commits=4)
    command = [sys.executable, __file__, "--open", root.uri]
    outputs = [subprocess.run(command, capture_output=True, check=True).stdout for _ in range(repeats)]
    runs = [json.loads(output) for output in outputs]
    figures = {
        "shards": shards,
        "segments": num_segments,
        **{name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]},
        "spread": [round(bound(run["s"] for run in runs), 2) for bound in (min, max)],
        "target_s": OPEN_TARGET_S,
        "target_mb": OPEN_TARGET_MB,
    }
    print("opening: " + "  ".join(f"{name} {value}" for name, value in figures.items()))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hours", type=int, default=HOURS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--shards", type=int, default=OPEN_SHARDS, help="of the table that is opened")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        open_here(arguments.open)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = compared(bench_reading(Path(folder), arguments.hours, arguments.repeats))
    with tempfile.TemporaryDirectory() as folder:
        opening = bench_opening(Root(folder), arguments.repeats, arguments.shards)
    print(
        json.dumps(
            {
                "name": "loader",
                **{key: figures["webdataset"][key] for key in ("ratio", "target", "spread")},
                "peer": f"webdataset {version('webdataset')}, shuffled and packed",
                "disk_ratio": round(figures["litdata"]["bytes_per_token"] / figures["wavemill"]["bytes_per_token"], 2),
                "disk_target": DISK_TARGET,
                "hours": arguments.hours,
                "versions": {loader.package: version(loader.package) for loader in PEERS.values()},
                "all": figures,
                "open": opening,
            }
        )
    )


if __name__ == "__main__":
    main()
