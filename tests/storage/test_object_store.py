"""A dataset in an object store is the local one, byte for byte: made there, read there, looked after there."""

import io
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from conftest import STREAMS
from object_store import Swift
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from toy_stream import SPEC
from typer.main import get_command
from wavemill.jobs.cli import app
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.layouts.flat import flatten
from wavemill.storage import vacuum as vacuuming
from wavemill.storage.batches import PackedBatch, TokenBatch
from wavemill.storage.codes import list_streams, open_corpus, open_stream
from wavemill.storage.dataset import TokenDataset
from wavemill.storage.pins import list_pins, pin, read_pin, unpin
from wavemill.storage.root import Root
from wavemill.storage.schema import code_columns, stream_schema
from wavemill.storage.selection import Pack
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter

Wavemill = Callable[..., CompletedProcess[str]]

# every command that takes a dataset, with what it needs besides; {x} is filled in below
COMMANDS = {
    "codebook fit": "mfcc-kmeans --name second --size 50 --budget 1MB",
    "codebook export": "second --to {folder}/second.npy --json",
    "codebook import": "{centroids} mfcc-kmeans --name third",
    "codebook report": "second --json",
    "corpus show": "--json",
    "decode": "--to {remote}/sound --limit 2 --json",
    "doctor": "--json",
    "export": "--view plain --json",
    "inspect": "--json",
    "layout show": "delay:stream=acoustic {root} --json",
    "phones": "--labels {labels} --json",
    "pin": "base --json",
    "pins": "--json",
    "quarantine": "--json",
    "repair": "--engine inline --json",
    "tokenize": "--engine inline --json",
    "train lm": "--layout semantic:stream=semantic --to {folder}/run --steps 2 --length 32 --dim 16 --heads 1",
    "units fit": "semantic --size 110 --json",
    "unpin": "base",
    "vacuum": "--dry-run --json",
    "verify": "--sample 2 --json",
}


def kept(content: dict[str, bytes]) -> dict[str, bytes]:
    """What is to be the same wherever it was made: all but the logs, which hold times and names of drivers."""
    return {name: each for name, each in content.items() if "_delta_log" not in name}


def committed(root: Root) -> dict[str, Any]:
    """The files that each table names."""
    snapshots = {name: open_stream(root, name) for name in list_streams(root)}
    return {name: snapshot.files for name, snapshot in {**snapshots, "corpus": open_corpus(root)}.items()}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def epoch(batches: Iterable[TokenBatch | PackedBatch]) -> list[Any]:
    """What the batches hold, but for what a reader needs to go on behind them."""
    found: list[Any] = []
    for batch in batches:
        tensors = {name: each for name, each in asdict(batch).items() if name != "state"}
        found.append(tree_map(lambda each: each.tolist() if isinstance(each, torch.Tensor) else each, tensors))
    return found


@pytest.fixture
def remote(on_swift: Swift, finished_root: Path) -> str:
    """A copy of the finished dataset for a test to change."""
    return on_swift.upload(finished_root, f"s3://{on_swift.bucket()}/data/set")


def test_a_dataset_that_is_made_in_the_store_is_byte_for_byte_the_local_one(
    on_swift: Swift, made_in_store: str, finished_root: Path
):
    ours = on_swift.content(made_in_store)
    assert kept(ours) == kept(on_disk(finished_root))
    assert len(kept(ours)) == 32  # ten shards of a corpus and of two streams, two codebooks
    assert committed(Root(made_in_store)) == committed(Root(finished_root))
    assert tokenize(Root(made_in_store), STREAMS, InlineEngine, TokenizeOptions()).shards == 0
    assert on_swift.content(made_in_store) == ours


@pytest.mark.parametrize(
    "options",
    [
        {"streams": ["semantic", "acoustic"]},
        pytest.param({"streams": {"acoustic": 1}}, marks=pytest.mark.slow),
        pytest.param({"streams": ["acoustic"], "where": [("language", "==", "en")]}, marks=pytest.mark.slow),
        {"streams": ["semantic"], "pack": Pack(flatten("semantic"), 256)},
    ],
)
def test_the_trainers_dataset_reads_it_as_it_reads_the_local_one(
    options: dict[str, Any], on_swift: Swift, made_in_store: str, finished_root: Path
):
    local, remote = (
        TokenDataset(str(root), **options, seed=3, batch_size=4) for root in (finished_root, made_in_store)
    )
    undisturbed = epoch(local)
    assert len(undisturbed) >= 10
    assert epoch(remote) == undisturbed
    # this process has the store open and its threads running: workers that are forked must open it anew
    forked = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "fork"}
    assert epoch(DataLoader(remote, **forked)) == epoch(DataLoader(local, **forked))


@pytest.mark.slow
def test_a_state_goes_on_from_the_disk_to_the_store_and_back(remote: str, finished_root: Path):
    def dataset(root: object) -> TokenDataset:
        return TokenDataset(str(root), ["semantic", "acoustic"], seed=5, batch_size=7)

    expected = epoch(dataset(finished_root))
    for first, second in ((finished_root, remote), (remote, finished_root)):
        *began, last = islice(dataset(first), 6)
        resumed = dataset(second)
        resumed.load_state_dict(json.loads(json.dumps(last.state)))
        assert epoch([*began, last]) + epoch(resumed) == expected


def test_a_reader_of_one_codebook_fetches_only_its_bytes(on_swift: Swift):
    root = Root(f"s3://{on_swift.bucket()}")
    random, spec = np.random.default_rng(0), replace(SPEC, num_codebooks=8, codebook_size=1024)
    created = create_table(
        root, "streams/toy", schema=stream_schema(spec), metadata={"spec": spec.to_json(), "corpus": ""}
    )
    columns: dict[str, Any] = {
        "id": [f"{number:026d}" for number in range(50)],
        "shard": [0] * 50,
        "num_frames": [2_000] * 50,
        "error": [None] * 50,
        "error_message": [None] * 50,
        **{name: list(random.integers(0, 1024, (50, 2_000))) for name in code_columns(8)},
    }
    table = pa.Table.from_pydict(columns, schema=stream_schema(spec))
    receipt = write_shard(root, created.folder, 0, table, codebook_size=1024)
    TableWriter(root, created.folder).commit([receipt])
    fetched = {}
    for codebooks in (1, 8):
        dataset = TokenDataset(root.uri, {"toy": codebooks}, batch_size=50)
        on_swift.clear()
        [batch] = dataset
        assert batch.codes["toy"].shape == (50, codebooks, 2_000)
        shard = on_swift.requests("GET", match=receipt.file_name)
        assert all(request.range for request in shard)
        assert len(shard) <= 5  # the footer, the lengths and errors, the ids, the codes
        fetched[codebooks] = sum(request.bytes_out for request in shard)
    assert fetched[1] < receipt.size_bytes / 8 + 20_000
    assert fetched[8] < receipt.size_bytes + 20_000


@pytest.mark.slow
def test_pins_hold_in_the_store(remote: str):
    root = Root(remote)
    versions = pin(root, "base")
    assert list_pins(root) == ["base"]
    assert {name: table.version for name, table in read_pin(root, "base").items()} == versions
    assert TokenDataset(remote, ["semantic"], pin="base").versions == {"semantic": versions["semantic"]}
    unpin(root, "base")
    assert list_pins(root) == []


@pytest.mark.slow
def test_vacuum_removes_old_leftovers_from_the_store_and_nothing_else(
    on_swift: Swift, remote: str, monkeypatch: pytest.MonkeyPatch
):
    before = on_swift.content(remote)
    leftover = "streams/semantic/shard-000003-0123456789abcdef.parquet"
    on_swift.put(f"{remote}/{leftover}", b"of a run that was killed")
    root = Root(remote)
    assert vacuuming.vacuum(root, older_than_h=2, dry_run=False) == []  # it may belong to a run that goes on
    monkeypatch.setattr(vacuuming, "time", SimpleNamespace(time=lambda: time.time() + 3 * 3600))
    assert [each.path for each in vacuuming.vacuum(root, older_than_h=2, dry_run=True)] == [leftover]
    assert sorted(on_swift.content(remote)) == sorted({**before, leftover: b""})
    assert [each.path for each in vacuuming.vacuum(root, older_than_h=2, dry_run=False)] == [leftover]
    assert on_swift.content(remote) == before


@pytest.mark.slow
def test_every_command_that_takes_a_dataset_takes_one_in_the_store(
    in_process: Wavemill,
    on_swift: Swift,
    remote: str,
    finished_root: Path,
    copy_root: Callable[[Path], Path],
    tmp_path: Path,
):
    centroids, labels = tmp_path / "centroids.npy", tmp_path / "labels.csv"
    np.save(centroids, np.random.default_rng(0).normal(size=(20, 39)).astype(np.float32))
    labels.write_text("file,start_s,end_s,phone\nspeech/de_frieda_01.mp3,0,1,a\nspeech/de_frieda_02.flac,0,1,b\n")
    assert sorted(_commands_with_root(get_command(app))) == sorted(COMMANDS)
    for command, options in COMMANDS.items():
        given = options if "{root}" in options else f"{{root}} {options}"
        given = given.format(root=remote, centroids=centroids, labels=labels, remote=remote, folder=tmp_path)
        done = in_process(*command.split(), *given.split())
        assert done.returncode == 0, (command, done.stderr)
    exported = json.loads(on_swift.get(f"{remote}/webdataset/plain/index.json"))
    local = in_process("export", copy_root(finished_root), "--json")
    assert exported["tars"] == json.loads(local.stdout)["tars"]  # with their SHA-256
    sounds = [key for key in on_swift.keys(remote) if key.startswith("sound/")]
    assert len(sounds) == 2
    assert all(soundfile.info(io.BytesIO(on_swift.get(f"{remote}/{key}"))).duration > 1 for key in sounds)


def _commands_with_root(command: Any, name: str = "") -> list[str]:
    if hasattr(command, "commands"):
        return [
            found for word, each in command.commands.items() for found in _commands_with_root(each, f"{name} {word}")
        ]
    return [name.strip()] if any(parameter.name == "root" for parameter in command.params) else []
