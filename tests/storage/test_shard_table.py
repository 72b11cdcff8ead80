"""Shard tables: what is committed is there once, whoever else writes and whatever answers are lost."""

import itertools
import json
import os
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction
from wavemill.storage.codes import read_codes
from wavemill.storage.root import Root
from wavemill.storage.schema import FORMAT_VERSION, stream_schema
from wavemill.storage.table import Receipt, Snapshot, create_table, read_snapshot, write_shard
from wavemill.storage.writer import StreamTaken, TableWriter
from wavemill.tokenizers.spec import FrameRule, RunFailed, StreamSpec, UserError

SPEC = StreamSpec(
    tokenizer="toy",
    sample_rate=16_000,
    decode_sample_rate=0,
    hop_length=320,
    window_length=400,
    frame_rule=FrameRule.FLOOR,
    num_codebooks=2,
    codebook_size=100,
)
FOLDER = "streams/toy"


def toy_rows(shard: int, *, num_rows: int = 3, num_errors: int = 1) -> pa.Table:
    good = num_rows - num_errors
    return pa.Table.from_pydict(
        {
            "id": [f"{shard}-{row}" for row in range(num_rows)],
            "shard": [shard] * num_rows,
            "num_frames": [2] * good + [None] * num_errors,
            "error": [None] * good + ["truncated"] * num_errors,
            "error_message": [None] * good + ["ends early"] * num_errors,
            "codes_00": [[shard % 100, 1]] * good + [None] * num_errors,
            "codes_01": [[7, shard % 100]] * good + [None] * num_errors,
        },
        schema=stream_schema(SPEC),
    )


def write(root: Root, shards: Sequence[int]) -> list[Receipt]:
    return [write_shard(root, FOLDER, shard, toy_rows(shard), codebook_size=100) for shard in shards]


def snapshot_of(root: Root, version: int | None = None) -> Snapshot:
    snapshot = read_snapshot(root, FOLDER, version=version)
    assert snapshot is not None
    return snapshot


def files_named_by_the_log(root: Root) -> list[str]:
    """The paths of every add action ever, straight from the JSON commits."""
    log = sorted(Path(root.join(FOLDER), "_delta_log").glob("*.json"))
    actions = [json.loads(line) for commit in log for line in commit.read_text().splitlines()]
    return [action["add"]["path"] for action in actions if "add" in action]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """A root with the empty table `FOLDER`."""
    root = Root(tmp_path / "root")
    create_table(root, FOLDER, schema=stream_schema(SPEC), metadata={"spec": SPEC.to_json()})
    return root


@pytest.fixture
def on_append(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Callable[[], None]], None]], None]:
    """Puts a step of the test around the next commit of deltalake, in the place where a network would fail."""
    real = DeltaTable.create_write_transaction

    def install(around: Callable[[Callable[[], None]], None]) -> None:
        def once(table: DeltaTable, *arguments: Any, **options: Any) -> None:
            monkeypatch.setattr(DeltaTable, "create_write_transaction", real)
            around(lambda: real(table, *arguments, **options))

        monkeypatch.setattr(DeltaTable, "create_write_transaction", once)

    return install


def test_a_new_table_is_empty_and_says_what_it_was_made_with(root: Root) -> None:
    snapshot = snapshot_of(root)
    assert (snapshot.files, snapshot.num_rows, snapshot.num_errors) == ({}, 0, 0)
    assert StreamSpec.from_json(snapshot.metadata["spec"]) == SPEC


def test_there_is_no_snapshot_where_there_is_no_table(tmp_path: Path) -> None:
    assert read_snapshot(Root(tmp_path), FOLDER) is None
    (tmp_path / "streams" / "toy").mkdir(parents=True)
    assert read_snapshot(Root(tmp_path), FOLDER) is None


def test_a_table_created_twice_is_created_once(root: Root) -> None:
    TableWriter(root, FOLDER).commit(write(root, [0]))
    again = create_table(root, FOLDER, schema=stream_schema(SPEC), metadata={"spec": SPEC.to_json()})
    assert list(again.files) == [0]
    assert again.version == snapshot_of(root).version


@pytest.mark.parametrize("applied", [True, False], ids=["made", "not made"])
def test_a_table_whose_creation_had_no_answer_is_there_or_refused_in_a_sentence(
    applied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DeltaTable.create

    def no_answer(*arguments: Any, **options: Any) -> None:
        if applied:
            real(*arguments, **options)
        raise OSError("the connection was reset")

    monkeypatch.setattr(DeltaTable, "create", no_answer)
    root, metadata = Root(tmp_path), {"spec": SPEC.to_json()}
    if applied:
        assert create_table(root, FOLDER, schema=stream_schema(SPEC), metadata=metadata) == snapshot_of(root)
        return
    with pytest.raises(
        RunFailed, match=r"Cannot create the table .*toy: the connection was reset\. .*, then run again\.$"
    ):
        create_table(root, FOLDER, schema=stream_schema(SPEC), metadata=metadata)


def test_committed_shards_are_in_the_snapshot_with_their_rows_and_errors(root: Root) -> None:
    receipts = write(root, [4, 0, 2])
    writer = TableWriter(root, FOLDER)
    writer.commit(receipts)
    snapshot = snapshot_of(root)
    assert writer.snapshot == snapshot
    assert list(snapshot.files) == [0, 2, 4]
    assert {receipt.shard: receipt for receipt in receipts} == snapshot.files
    assert (snapshot.num_rows, snapshot.num_errors) == (9, 3)
    assert read_codes(root, snapshot, 4).ids == ["4-0", "4-1", "4-2"]
    codes_KT = read_codes(root, snapshot, 4).codes(0)
    assert codes_KT is not None
    assert codes_KT.tolist() == [[4, 1], [7, 4]]


def test_a_snapshot_travels_to_other_processes_whole(root: Root) -> None:
    TableWriter(root, FOLDER).commit(write(root, [0, 1]))
    assert pickle.loads(pickle.dumps(snapshot_of(root))) == snapshot_of(root)


def test_a_shard_written_twice_is_one_file(root: Root) -> None:
    first, second = write(root, [7]), write(root, [7])
    assert first == second
    assert len(list(Path(root.join(FOLDER)).glob("*.parquet"))) == 1


def test_committing_twice_adds_nothing(root: Root) -> None:
    receipts = write(root, [0, 1, 2])
    writer = TableWriter(root, FOLDER)
    writer.commit(receipts)
    version = snapshot_of(root).version
    writer.commit(receipts)
    writer.commit(receipts[:1])
    writer.commit([])
    assert snapshot_of(root).version == version
    resumed = TableWriter(root, FOLDER)
    resumed.commit(receipts)
    assert snapshot_of(root).version == version + 1  # its fence, nothing more
    assert sorted(files_named_by_the_log(root)) == [receipt.file_name for receipt in receipts]


def test_a_shard_made_again_with_other_content_does_not_replace_the_first(root: Root) -> None:
    first = write(root, [0])
    writer = TableWriter(root, FOLDER)
    writer.commit(first)
    other = write_shard(root, FOLDER, 0, toy_rows(0, num_errors=0), codebook_size=100)
    assert other.file_name != first[0].file_name
    writer.commit([other])
    TableWriter(root, FOLDER).commit([other])
    assert snapshot_of(root).files == {0: first[0]}


def test_two_receipts_of_one_shard_in_one_commit_add_it_once(root: Root) -> None:
    other = write_shard(root, FOLDER, 0, toy_rows(0, num_errors=0), codebook_size=100)
    TableWriter(root, FOLDER).commit([*write(root, [0]), other])
    assert snapshot_of(root).num_rows == 3
    assert len(files_named_by_the_log(root)) == 1


def test_the_order_of_commits_does_not_matter(tmp_path: Path) -> None:
    tables = []
    for number, order in enumerate(itertools.permutations(range(3))):
        root = Root(tmp_path / str(number))
        create_table(root, FOLDER, schema=stream_schema(SPEC), metadata={"spec": SPEC.to_json()})
        receipts = write(root, range(3))
        writer = TableWriter(root, FOLDER)
        for shard in order:
            writer.commit([receipts[shard]])
        tables.append(snapshot_of(root).files)
    assert all(files == tables[0] for files in tables)
    assert [list(files) for files in tables] == [[0, 1, 2]] * 6


def test_readers_of_a_version_see_no_later_commit(root: Root) -> None:
    writer = TableWriter(root, FOLDER)
    receipts = write(root, [0, 1])
    writer.commit(receipts[:1])
    version = snapshot_of(root).version
    writer.commit(receipts[1:])
    assert list(snapshot_of(root, version).files) == [0]
    assert list(snapshot_of(root).files) == [0, 1]


INTERLEAVINGS = [
    order
    for order in itertools.permutations(["A fences", "B fences", "A commits", "B commits"])
    if order.index("A fences") < order.index("A commits") and order.index("B fences") < order.index("B commits")
]


@pytest.mark.parametrize("order", INTERLEAVINGS, ids=", ".join)
def test_the_writer_who_fenced_last_goes_on_and_the_other_is_told(root: Root, order: tuple[str, ...]) -> None:
    receipts = write(root, range(4))
    writers: dict[str, TableWriter] = {}
    last = ""
    for step in order:
        name, act = step.split()
        if act == "fences":
            writers[name] = TableWriter(root, FOLDER)
            last = name
        elif name == last:
            writers[name].commit(receipts)
        else:
            with pytest.raises(StreamTaken, match="taken over by another run"):
                writers[name].commit(receipts)
    assert list(snapshot_of(root).files) == [0, 1, 2, 3]
    assert sorted(files_named_by_the_log(root)) == [receipt.file_name for receipt in receipts]


@pytest.mark.parametrize("then_commits", [False, True], ids=["fences", "fences and commits"])
def test_a_fence_between_a_writers_look_and_its_commit_stops_it(
    root: Root, on_append: Callable[..., None], then_commits: bool
) -> None:
    receipts = write(root, range(4))
    first = TableWriter(root, FOLDER)
    others: list[TableWriter] = []

    def another_run_comes_first(append: Callable[[], None]) -> None:
        others.append(TableWriter(root, FOLDER))
        if then_commits:
            others[0].commit(receipts[1:])
        append()

    on_append(another_run_comes_first)
    with pytest.raises(StreamTaken):
        first.commit(receipts)
    assert list(snapshot_of(root).files) == ([1, 2, 3] if then_commits else [])
    others[0].commit(receipts)
    assert list(snapshot_of(root).files) == [0, 1, 2, 3]
    assert len(files_named_by_the_log(root)) == 4


def test_of_two_writers_that_fence_the_same_epoch_one_survives(root: Root, on_append: Callable[..., None]) -> None:
    receipts = write(root, range(2))
    others: list[TableWriter] = []

    def another_run_comes_first(append: Callable[[], None]) -> None:
        others.append(TableWriter(root, FOLDER))  # opened the table as the first one did: before any fence
        append()

    on_append(another_run_comes_first)
    with pytest.raises(StreamTaken):
        TableWriter(root, FOLDER)
    assert snapshot_of(root).version == 1
    others[0].commit(receipts)
    assert list(snapshot_of(root).files) == [0, 1]


def applied_but_answer_lost(append: Callable[[], None]) -> None:
    append()
    raise CommitFailedError("the connection was reset")


def never_applied(append: Callable[[], None]) -> None:
    raise OSError("the server is not there")


def test_a_commit_whose_answer_was_lost_is_seen_to_have_landed(root: Root, on_append: Callable[..., None]) -> None:
    receipts = write(root, range(3))
    writer = TableWriter(root, FOLDER)
    version = snapshot_of(root).version
    on_append(applied_but_answer_lost)
    writer.commit(receipts)
    assert list(writer.snapshot.files) == [0, 1, 2]
    assert snapshot_of(root).version == version + 1
    assert len(files_named_by_the_log(root)) == 3


def test_a_commit_that_never_arrived_is_made_again(root: Root, on_append: Callable[..., None]) -> None:
    receipts = write(root, range(3))
    writer = TableWriter(root, FOLDER)
    on_append(never_applied)
    writer.commit(receipts)
    assert list(snapshot_of(root).files) == [0, 1, 2]
    assert len(files_named_by_the_log(root)) == 3


def test_a_fence_whose_answer_was_lost_is_seen_to_have_landed(root: Root, on_append: Callable[..., None]) -> None:
    version = snapshot_of(root).version
    on_append(applied_but_answer_lost)
    writer = TableWriter(root, FOLDER)
    assert snapshot_of(root).version == version + 1
    writer.commit(write(root, [0]))
    assert list(snapshot_of(root).files) == [0]


def test_a_fence_that_never_arrived_is_made_again(root: Root, on_append: Callable[..., None]) -> None:
    first = TableWriter(root, FOLDER)
    on_append(never_applied)
    second = TableWriter(root, FOLDER)
    with pytest.raises(StreamTaken):
        first.commit(write(root, [0]))
    second.commit(write(root, [0]))
    assert list(snapshot_of(root).files) == [0]


def test_a_writer_whose_answer_was_lost_still_yields_to_a_later_fence(
    root: Root, on_append: Callable[..., None]
) -> None:
    receipts = write(root, range(2))
    first = TableWriter(root, FOLDER)

    def lost_and_fenced(append: Callable[[], None]) -> None:
        append()
        TableWriter(root, FOLDER)
        raise CommitFailedError("the connection was reset")

    on_append(lost_and_fenced)
    with pytest.raises(StreamTaken):
        first.commit(receipts)
    assert list(snapshot_of(root).files) == [0, 1]
    assert len(files_named_by_the_log(root)) == 2


def test_a_commit_that_was_interrupted_as_it_landed_is_not_made_twice(
    root: Root, on_append: Callable[..., None]
) -> None:
    receipts = write(root, range(2))
    made_again = write_shard(root, FOLDER, 1, toy_rows(1, num_errors=0), codebook_size=100)
    writer = TableWriter(root, FOLDER)

    def interrupted(append: Callable[[], None]) -> None:
        append()
        raise KeyboardInterrupt

    on_append(interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.commit(receipts)
    writer.commit([receipts[0], made_again])
    assert list(snapshot_of(root).files.values()) == receipts
    assert sorted(files_named_by_the_log(root)) == [receipt.file_name for receipt in receipts]


def test_a_look_at_the_table_that_fails_is_taken_again(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    receipts = write(root, range(2))
    writer = TableWriter(root, FOLDER)
    real = DeltaTable.update_incremental

    def fails_once(table: DeltaTable) -> None:
        monkeypatch.setattr(DeltaTable, "update_incremental", real)
        raise OSError("the credentials have expired")

    monkeypatch.setattr(DeltaTable, "update_incremental", fails_once)
    writer.commit(receipts)
    assert list(snapshot_of(root).files) == [0, 1]


def test_a_table_that_is_gone_stops_its_writer_in_a_sentence(root: Root) -> None:
    receipts = write(root, [0])
    waits: list[float] = []
    writer = TableWriter(root, FOLDER, sleep=waits.append)
    Path(root.join(FOLDER), "_delta_log").rename(Path(root.join("elsewhere")))
    with pytest.raises(RunFailed, match=r"Cannot commit to .*toy after several tries: .*\. What was committed stays\."):
        writer.commit(receipts)
    assert waits == sorted(waits)
    assert len(waits) == 4


def test_a_shard_whose_file_was_removed_meanwhile_is_not_committed(root: Root) -> None:
    receipts = write(root, range(3))
    writer = TableWriter(root, FOLDER)
    writer.commit(receipts[:1])
    Path(root.join(FOLDER), receipts[2].file_name).unlink()
    with pytest.raises(RunFailed, match=rf"{receipts[2].file_name} was written, but is gone: .* Run the command again"):
        writer.commit(receipts)
    assert list(snapshot_of(root).files) == [0]
    TableWriter(root, FOLDER).commit(write(root, range(3)))
    assert list(snapshot_of(root).files) == [0, 1, 2]


def test_many_commits_of_one_writer_leave_it_with_the_tables_own_snapshot(root: Root) -> None:
    receipts = write(root, range(12))
    writer = TableWriter(root, FOLDER)
    for receipt in reversed(receipts):
        writer.commit([receipt])
        assert writer.snapshot == snapshot_of(root)


@pytest.fixture(scope="module")
def aged_master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten shards in a commit each, commits up to a checkpoint, all of the log 40 days old, then four shards more."""
    path = tmp_path_factory.mktemp("aged") / "root"
    root = Root(path)
    create_table(root, FOLDER, schema=stream_schema(SPEC), metadata={"spec": SPEC.to_json()})
    receipts = write(root, range(14))
    writer = TableWriter(root, FOLDER)
    for receipt in receipts[:10]:
        writer.commit([receipt])
    table = DeltaTable(root.join(FOLDER))
    for _ in range(100):
        table.create_write_transaction([], mode="append", schema=table.schema())
    log = path / FOLDER / "_delta_log"
    assert list(log.glob("*.checkpoint.parquet"))
    forty_days_ago = time.time() - 40 * 24 * 3600
    for file in log.iterdir():
        os.utime(file, (forty_days_ago, forty_days_ago))
    for receipt in receipts[10:]:
        writer.commit([receipt])
    return path


@pytest.fixture
def aged_root(aged_master: Path, copy_root: Callable[[Path], Path]) -> Root:
    return Root(copy_root(aged_master))  # with the times of its files


def require_all_history(root: Root) -> None:
    assert snapshot_of(root, 1).files == {}
    early = snapshot_of(root, 4)
    assert list(early.files) == [0, 1, 2]
    assert read_codes(root, early, 2).ids == ["2-0", "2-1", "2-2"]
    newest = snapshot_of(root)
    assert list(newest.files) == list(range(14))
    assert (newest.num_rows, newest.num_errors) == (42, 14)


@pytest.mark.slow
def test_a_version_40_days_old_still_opens_after_more_commits_and_checkpoints(aged_root: Root) -> None:
    require_all_history(aged_root)
    table = DeltaTable(aged_root.join(FOLDER))
    table.create_checkpoint()
    require_all_history(aged_root)
    # a commit by a stock writer, which cleans up after its checkpoints if the table lets it
    table.create_write_transaction([], mode="append", schema=table.schema())
    DeltaTable(aged_root.join(FOLDER)).create_checkpoint()
    require_all_history(aged_root)
    resumed = TableWriter(aged_root, FOLDER)
    assert list(resumed.snapshot.files) == list(range(14))


def test_a_version_40_days_old_survives_another_tools_clean_up_of_the_log(aged_root: Root) -> None:
    table = DeltaTable(aged_root.join(FOLDER))
    table.create_checkpoint()
    table.cleanup_metadata()
    require_all_history(aged_root)


def test_a_version_that_is_not_there_is_refused_in_a_sentence(root: Root) -> None:
    with pytest.raises(UserError, match=r"toy at version 99: .*\.$"):
        read_snapshot(root, FOLDER, version=99)


def test_a_table_of_another_format_is_refused_by_both_numbers(root: Root) -> None:
    description = json.loads(DeltaTable(root.join(FOLDER)).metadata().description)
    changed = json.dumps({**description, "wavemill": 1})
    DeltaTable(root.join(FOLDER)).alter.set_table_description(changed)
    with pytest.raises(UserError, match=rf"table format 1; this version reads format {FORMAT_VERSION}\. .*\.$"):
        read_snapshot(root, FOLDER)


@pytest.mark.parametrize("description", [None, "sales by month", "[1, 2]", "7", '{"kind": "stream"}'])
def test_a_delta_table_of_somebody_else_is_refused_and_left_alone(tmp_path: Path, description: str | None) -> None:
    root = Root(tmp_path)
    rows = pa.table({"a": [1, 2]})
    deltalake.write_deltalake(root.join(FOLDER), rows, description=description)
    with pytest.raises(UserError, match=r"not one of wavemill's\. .*\.$"):
        read_snapshot(root, FOLDER)
    with pytest.raises(UserError, match="not one of wavemill's"):
        create_table(root, FOLDER, schema=stream_schema(SPEC), metadata={"spec": SPEC.to_json()})
    table = DeltaTable(root.join(FOLDER))
    assert table.version() == 0
    assert table.to_pyarrow_table().equals(rows)


@pytest.mark.parametrize("description", ["sales by month", '{"wavemill": 2}'])
def test_a_writer_puts_no_fence_into_a_table_that_it_refuses(tmp_path: Path, description: str) -> None:
    root = Root(tmp_path)
    deltalake.write_deltalake(root.join(FOLDER), pa.table({"a": [1, 2]}), description=description)
    with pytest.raises(UserError):
        TableWriter(root, FOLDER)
    assert DeltaTable(root.join(FOLDER)).version() == 0


def test_a_compacted_table_is_refused_by_the_file_that_is_not_ours(root: Root) -> None:
    writer = TableWriter(root, FOLDER)
    receipts = write(root, range(5))
    writer.commit(receipts[:4])
    before = snapshot_of(root)
    DeltaTable(root.join(FOLDER)).optimize.compact()
    with pytest.raises(UserError, match=r"'part-.*', which wavemill did not put there.* Restore an earlier version"):
        read_snapshot(root, FOLDER)
    with pytest.raises(UserError, match="did not put there"):
        writer.commit(receipts[4:])
    assert snapshot_of(root, before.version) == before


def test_rows_appended_by_another_tool_are_refused(root: Root) -> None:
    TableWriter(root, FOLDER).commit(write(root, [0]))
    deltalake.write_deltalake(root.join(FOLDER), toy_rows(1), mode="append")
    with pytest.raises(UserError, match="which wavemill did not put there: expected one file per shard"):
        read_snapshot(root, FOLDER)


def test_a_writer_notices_rows_that_another_tool_appended_beside_its_commit(
    root: Root, on_append: Callable[..., None]
) -> None:
    receipts = write(root, range(3))
    writer = TableWriter(root, FOLDER)

    def another_tool_too(append: Callable[[], None]) -> None:
        append()
        deltalake.write_deltalake(root.join(FOLDER), toy_rows(9), mode="append")

    def commit_one_by_one() -> None:
        for receipt in receipts:
            writer.commit([receipt])

    on_append(another_tool_too)
    with pytest.raises(UserError, match="which wavemill did not put there"):
        commit_one_by_one()


def add_by_another_tool(root: Root, receipt: Receipt, statistics: dict[str, Any]) -> None:
    table = DeltaTable(root.join(FOLDER))
    add = AddAction(receipt.file_name, receipt.size_bytes, {}, 0, True, json.dumps(statistics))
    table.create_write_transaction([add], mode="append", schema=table.schema())


def test_a_second_file_of_a_shard_is_refused(root: Root) -> None:
    TableWriter(root, FOLDER).commit(write(root, [0]))
    other = write_shard(root, FOLDER, 0, toy_rows(0, num_errors=0), codebook_size=100)
    add_by_another_tool(root, other, {"numRecords": 3, "nullCount": {"error": 3}})
    with pytest.raises(UserError, match="one file per shard"):
        read_snapshot(root, FOLDER)


@pytest.mark.parametrize("statistics", [{}, {"numRecords": 3}], ids=["none", "rows only"])
def test_a_file_added_without_our_counts_is_refused(root: Root, statistics: dict[str, Any]) -> None:
    TableWriter(root, FOLDER).commit(write(root, [0]))
    add_by_another_tool(root, write(root, [1])[0], statistics)
    with pytest.raises(UserError, match="toy"):
        read_snapshot(root, FOLDER)
