"""Pins and vacuum: what somebody trains on stays, what nobody needs goes."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from wavemill.storage.codes import open_stream, stream_spec
from wavemill.storage.dataset import TokenDataset
from wavemill.storage.parquet import read_parquet
from wavemill.storage.pins import list_pins, pin, read_pin, unpin
from wavemill.storage.root import Root
from wavemill.storage.schema import stream_schema
from wavemill.storage.table import Snapshot, create_table, read_snapshot, write_shard
from wavemill.storage.vacuum import vacuum
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import UserError

DAY_S = 24 * 3600


@pytest.fixture
def root(finished_root: Path, copy_root: Callable[[Path], Path]) -> Root:
    return Root(copy_root(finished_root))


def grow(root: Root, name: str, shards: range) -> None:
    """Make a stream of shards of `semantic`, two commits, as another run would."""
    source = open_stream(root, "semantic")
    schema = _schema(source)
    if not root.exists(f"streams/{name}/_delta_log"):
        create_table(root, f"streams/{name}", schema=schema, metadata=source.metadata)
    writer = TableWriter(root, f"streams/{name}")
    writer.commit([write_shard(root, f"streams/{name}", shard, _table(root, source, shard)) for shard in shards])


def _schema(source: Snapshot) -> pa.Schema:
    return stream_schema(stream_spec(source))


def _table(root: Root, source: Snapshot, shard: int) -> pa.Table:
    return read_parquet(root, source.path(shard), schema=_schema(source))


def make_old(root: Root, relative: str, age_s: float) -> None:
    written = time.time() - age_s
    os.utime(root.join(relative), (written, written))


def test_a_pinned_dataset_is_what_it_was_when_it_was_pinned(root: Root) -> None:
    grow(root, "growing", range(4))
    versions = pin(root, "base")
    before = [batch.ids for batch in TokenDataset(root.uri, ["growing"], seed=1)]
    grow(root, "growing", range(4, 10))
    pinned = TokenDataset(root.uri, ["growing"], seed=1, pin="base")
    assert [batch.ids for batch in pinned] == before
    assert pinned.versions == {"growing": versions["growing"]}
    assert TokenDataset(root.uri, ["growing"], seed=1).num_rows > pinned.num_rows
    assert {name: table.version for name, table in read_pin(root, "base").items()} == versions
    assert set(versions) == {"corpus", "acoustic", "growing", "semantic"}


def test_an_older_version_can_be_pinned_and_filters_read_the_pinned_corpus(root: Root) -> None:
    grow(root, "growing", range(4))
    version = open_stream(root, "growing").version
    grow(root, "growing", range(4, 10))
    versions = pin(root, "old", {"growing": version})
    dataset = TokenDataset(root.uri, ["growing"], where=[("duration_s", ">", 0)], pin="old")
    assert dataset.versions == {"growing": version, "corpus": versions["corpus"]}


def test_a_pin_is_listed_until_it_is_taken_away(root: Root) -> None:
    assert list_pins(root) == []
    pin(root, "one")
    pin(root, "two")
    assert list_pins(root) == ["one", "two"]
    unpin(root, "one")
    assert list_pins(root) == ["two"]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda root: pin(root, "base"), ["'base'", "already", "unpin"]),
        (lambda root: pin(root, "Base"), ["'Base'", "small letter"]),
        (lambda root: pin(root, "new", {"sematnic": 1}), ["'sematnic'", "'semantic'"]),
        (lambda root: pin(root, "new", {"semantic": 99}), ["99"]),
        (lambda root: unpin(root, "bass"), ["'bass'", "base"]),
        (lambda root: TokenDataset(root.uri, ["semantic"], pin="bass"), ["'bass'", "base"]),
        (lambda root: TokenDataset(root.uri, ["semantic"], pin="base", versions={"semantic": 1}), ["leave out"]),
    ],
)
def test_a_slip_is_one_sentence(root: Root, act: Callable[[Root], object], words: list[str]) -> None:
    pin(root, "base")
    with pytest.raises(UserError) as caught:
        act(root)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_stream_that_the_pin_does_not_hold_is_refused(root: Root) -> None:
    pin(root, "base")
    for shard in range(10):  # more versions than the other has
        grow(root, "later", range(shard, shard + 1))
    with pytest.raises(UserError, match="Pin 'base' names no stream 'later'"):
        TokenDataset(root.uri, ["semantic", "later"], pin="base")
    shutil.rmtree(root.join("streams/semantic"))
    shutil.move(root.join("streams/later"), root.join("streams/semantic"))
    with pytest.raises(UserError, match="another table than the one that pin 'base' names"):
        TokenDataset(root.uri, ["semantic"], pin="base")


def test_a_pin_that_was_tampered_with_is_named(root: Root) -> None:
    pin(root, "base")
    Path(root.join("pins/base.json")).write_text("{")
    with pytest.raises(UserError, match=r"pins/base\.json cannot be read as a pin"):
        read_pin(root, "base")


def orphan(root: Root, stream: str, age_s: float) -> str:
    """A shard file that a run left in a stream's folder and did not commit."""
    source = open_stream(root, stream)
    receipt = write_shard(root, source.folder, 77, _table(root, source, 0))
    relative = f"{source.folder}/{receipt.file_name}"
    make_old(root, relative, age_s)
    return relative


def files(root: Root) -> set[str]:
    return {str(path.relative_to(root.uri)) for path in Path(root.uri).rglob("*") if path.is_file()}


def test_vacuum_removes_old_files_of_killed_runs_and_nothing_else(root: Root) -> None:
    for path in files(root):
        make_old(root, path, 10 * DAY_S)
    Path(root.join("streams/semantic/notes.txt")).write_text("mine")
    before = files(root)
    old, young = orphan(root, "semantic", 3 * DAY_S), orphan(root, "acoustic", 1 * DAY_S)
    torn = f"streams/semantic/.{Path(old).name}-k3xq2a.tmp"
    Path(root.join(torn)).write_bytes(b"PAR1")
    make_old(root, torn, 3 * DAY_S)
    listed = vacuum(root, older_than_h=48, dry_run=True)
    assert {leftover.path for leftover in listed} == {old, torn}
    assert files(root) == before | {old, young, torn}
    vacuum(root, older_than_h=48, dry_run=False)
    assert files(root) == before | {young}
    assert vacuum(root, older_than_h=48, dry_run=False) == []


def test_vacuum_leaves_what_a_pinned_snapshot_needs_though_the_newest_does_not(root: Root) -> None:
    """As after a repair: the newest version names another file for a shard."""
    grow(root, "growing", range(3))
    pin(root, "base")
    snapshot = open_stream(root, "growing")
    DeltaTable(root.join("streams/growing")).delete()  # other tools can: the newest version is empty
    for file in snapshot.files.values():
        make_old(root, f"streams/growing/{file.file_name}", 10 * DAY_S)
    assert vacuum(root, older_than_h=48, dry_run=False) == []
    assert TokenDataset(root.uri, ["growing"], pin="base").num_rows == snapshot.num_rows
    unpin(root, "base")
    removed = vacuum(root, older_than_h=48, dry_run=False)
    assert len(removed) == 3
    newest = read_snapshot(root, "streams/growing")
    assert newest is not None
    assert newest.files == {}


def test_vacuum_refuses_to_touch_what_a_run_may_be_writing(root: Root, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 hours may belong to a run"):
        vacuum(root, older_than_h=1, dry_run=False)
    with pytest.raises(UserError, match="There is no corpus"):
        vacuum(Root(tmp_path / "empty"), older_than_h=48, dry_run=False)
