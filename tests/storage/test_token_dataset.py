"""The trainer's dataset: every good segment once an epoch, in an order that only seed and epoch decide."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader
from wavemill.storage.batches import TokenBatch
from wavemill.storage.codes import open_stream, read_codes, stream_spec
from wavemill.storage.dataset import TokenDataset
from wavemill.storage.layouts import Segment
from wavemill.storage.parquet import CorruptFile, read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import stream_schema
from wavemill.storage.table import Receipt, create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import UserError

BOTH = {"semantic": None, "acoustic": None}


def good_ids(root: Path) -> list[str]:
    """Ids without an error in either stream, as DuckDB finds them in the files."""
    rows = duckdb.sql(
        f"""select s.id from read_parquet('{root}/streams/semantic/*.parquet') s
        join read_parquet('{root}/streams/acoustic/*.parquet') a using (shard, id)
        where s.error is null and a.error is null"""
    ).fetchall()
    return sorted(row[0] for row in rows)


def order(dataset: TokenDataset, epoch: int = 0) -> list[str]:
    dataset.set_epoch(epoch)
    return [segment.id for segment in segments(dataset)]


def segments(dataset: TokenDataset) -> list[Segment]:
    """What the batches hold, without their padding."""
    found = []
    for batch in dataset:
        assert isinstance(batch, TokenBatch)
        for row, id_ in enumerate(batch.ids):
            lengths = {name: int(frames[row]) for name, frames in batch.num_frames.items()}
            for name, codes_BKT in batch.codes.items():
                assert (codes_BKT[row, :, lengths[name] :] == -1).all()
            if id_:
                codes = {name: codes_BKT[row, :, : lengths[name]] for name, codes_BKT in batch.codes.items()}
                found.append(Segment(id_, codes))
            else:
                assert set(lengths.values()) == {0}
    return found


def require_sentence(error: BaseException, *words: str) -> None:
    message = str(error)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message


def copy_stream(
    root: Root, source: str, target: str, shards: Sequence[int], *, reverse_rows: bool = False
) -> list[Receipt]:
    """Files of some shards of a stream in the folder of another stream's new, still empty table."""
    snapshot = open_stream(root, source)
    spec = stream_spec(snapshot)
    folder = f"streams/{target}"
    create_table(root, folder, schema=stream_schema(spec), metadata=snapshot.metadata)
    receipts = []
    for shard in shards:
        table = read_parquet(root, snapshot.path(shard), schema=stream_schema(spec))
        if reverse_rows:
            table = table.take(pa.array(range(table.num_rows - 1, -1, -1)))
        receipts.append(write_shard(root, folder, shard, table, codebook_size=spec.codebook_size))
    return receipts


def test_an_epoch_is_every_segment_without_an_error_exactly_once(finished_root: Path) -> None:
    expected = good_ids(finished_root)
    dataset = TokenDataset(str(finished_root), BOTH, seed=1)
    assert 0 < len(expected) < dataset.num_rows  # the corpus holds broken files too
    for epoch in range(3):
        assert sorted(order(dataset, epoch)) == expected
    assert sorted(order(TokenDataset(str(finished_root), BOTH, shuffle=False))) == expected


def test_seed_and_epoch_decide_the_order_and_nothing_else_does(finished_root: Path) -> None:
    first = order(TokenDataset(str(finished_root), BOTH, seed=1), epoch=5)
    other = TokenDataset(str(finished_root), BOTH, seed=1)
    order(other, epoch=2)
    assert order(other, epoch=5) == first
    assert order(TokenDataset(str(finished_root), ["acoustic"], seed=1), epoch=5) == first
    assert order(other, epoch=6) != first
    assert order(TokenDataset(str(finished_root), BOTH, seed=2), epoch=5) != first


def test_the_order_mixes_shards_and_rows(finished_root: Path) -> None:
    shard_of = dict(
        duckdb.sql(f"select id, shard from read_parquet('{finished_root}/streams/semantic/*.parquet')").fetchall()
    )
    unshuffled = order(TokenDataset(str(finished_root), BOTH, shuffle=False))
    shuffled = order(TokenDataset(str(finished_root), BOTH, seed=1))
    assert [shard_of[id_] for id_ in unshuffled] == sorted(shard_of[id_] for id_ in unshuffled)
    shards = list(dict.fromkeys(shard_of[id_] for id_ in shuffled))
    assert shards != sorted(shards)
    for shard in shards[:3]:
        rows = [id_ for id_ in shuffled if shard_of[id_] == shard]
        assert rows != [id_ for id_ in unshuffled if shard_of[id_] == shard]


def test_unshuffled_epochs_are_in_the_order_of_the_corpus(finished_root: Path) -> None:
    dataset = TokenDataset(str(finished_root), BOTH, shuffle=False)
    assert order(dataset, epoch=0) == order(dataset, epoch=1)


def test_codes_are_those_that_duckdb_reads(finished_root: Path) -> None:
    columns = ", ".join(f"codes_{book:02d}" for book in range(8))
    rows = duckdb.sql(
        f"select id, {columns} from read_parquet('{finished_root}/streams/acoustic/*.parquet')"
    ).fetchall()
    expected = {row[0]: row[1:] for row in rows}
    seen = 0
    for sample in segments(TokenDataset(str(finished_root), BOTH)):
        acoustic_KT = sample.codes["acoustic"]
        assert acoustic_KT.dtype == torch.int64
        assert acoustic_KT.tolist() == list(expected[sample.id])
        seen += 1
    assert seen == len(good_ids(finished_root))


def test_codes_are_those_of_the_shard_files(finished_root: Path) -> None:
    root = Root(finished_root)
    snapshot = open_stream(root, "semantic")
    expected = {}
    for shard in snapshot.files:
        part = read_codes(root, snapshot, shard)
        expected |= {id_: part.codes(row) for row, id_ in enumerate(part.ids)}
    for sample in segments(TokenDataset(str(finished_root), ["semantic"])):
        np.testing.assert_array_equal(sample.codes["semantic"].numpy(), expected[sample.id])


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_first_codebooks_alone_can_be_read(finished_root: Path, count: int) -> None:
    whole = {part.id: part.codes["acoustic"] for part in segments(TokenDataset(str(finished_root), ["acoustic"]))}
    coarse = TokenDataset(str(finished_root), {"acoustic": count, "semantic": None})
    for sample in segments(coarse):
        assert list(sample.codes) == ["acoustic", "semantic"]
        assert torch.equal(sample.codes["acoustic"], whole[sample.id][:count])


def ids_and_batches(dataset: TokenDataset, **options: Any) -> tuple[list[str], list[TokenBatch]]:
    batches = list(DataLoader(dataset, batch_size=None, **options))
    return [id_ for batch in batches for id_ in batch.ids if id_], batches


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_dataloader_workers_share_an_epoch_and_keep_its_order(finished_root: Path, num_workers: int) -> None:
    dataset = TokenDataset(str(finished_root), {"semantic": None, "acoustic": 4}, batch_size=7, seed=3)
    alone = list(dataset)
    ids, batches = ids_and_batches(dataset, num_workers=num_workers)
    assert sorted(ids) == good_ids(finished_root)
    assert [batch.ids for batch in batches] == [batch.ids for batch in alone]
    for batch, expected in zip(batches, alone, strict=True):
        for name, codes_BKT in expected.codes.items():
            assert torch.equal(batch.codes[name], codes_BKT)
            assert torch.equal(batch.num_frames[name], expected.num_frames[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 12 worker")
def test_more_workers_than_batches_still_give_each_segment_once(finished_root: Path) -> None:
    dataset = TokenDataset(str(finished_root), ["semantic"], batch_size=20)
    ids, _ = ids_and_batches(dataset, num_workers=12)
    assert sorted(ids) == good_ids(finished_root)


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_spawned_workers_read_the_same_as_forked_ones(finished_root: Path, method: str) -> None:
    dataset = TokenDataset(str(finished_root), ["semantic"], seed=3)
    spawned, _ = ids_and_batches(dataset, num_workers=1, multiprocessing_context=method)
    assert spawned == order(dataset)


def test_a_batch_is_padded_behind_each_segments_frames(finished_root: Path) -> None:
    for batch in TokenDataset(str(finished_root), BOTH, batch_size=5):
        assert len(batch.ids) == 5
        for name, num_codebooks in (("semantic", 1), ("acoustic", 8)):
            assert batch.codes[name].shape == (5, num_codebooks, int(batch.num_frames[name].max()))
            assert batch.codes[name].dtype == batch.num_frames[name].dtype == torch.int64


def test_tensors_of_a_batch_move_together(finished_root: Path) -> None:
    batch = next(iter(TokenDataset(str(finished_root), BOTH)))
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in (*moved.codes.values(), *moved.num_frames.values())} == {"meta"}
    assert (moved.ids, moved.state) == (batch.ids, batch.state)


def test_a_pinned_dataset_does_not_change_when_the_table_grows(
    finished_root: Path, copy_root: Callable[[Path], Path]
) -> None:
    root = Root(copy_root(finished_root))
    receipts = copy_stream(root, "semantic", "growing", range(10))
    writer = TableWriter(root, "streams/growing")
    writer.commit(receipts[:5])
    early = TokenDataset(root.uri, ["growing"], seed=1)
    before, rows = order(early), early.num_rows
    writer.commit(receipts[5:])
    assert order(early) == before
    assert early.num_rows == rows
    newest = TokenDataset(root.uri, ["growing"], seed=1)
    assert sorted(order(newest)) == good_ids(finished_root)
    pinned = TokenDataset(root.uri, ["growing"], seed=1, versions=early.versions)
    assert order(pinned) == before
    assert pinned.versions == early.versions != newest.versions


def test_a_dataset_travels_by_pickle_without_looking_at_the_table_again(
    finished_root: Path, copy_root: Callable[[Path], Path]
) -> None:
    path = copy_root(finished_root)
    dataset = TokenDataset(str(path), BOTH, seed=4)
    expected = order(dataset, epoch=3)
    content = pickle.dumps(dataset)
    for log in path.glob("streams/*/_delta_log/*"):
        log.unlink()
    assert [segment.id for segment in segments(pickle.loads(content))] == expected


def test_a_relative_root_is_found_from_another_folder(
    finished_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(finished_root.parent)
    dataset = TokenDataset(finished_root.name, ["semantic"])
    monkeypatch.chdir(tmp_path)
    assert sorted(order(dataset)) == good_ids(finished_root)


def test_the_dataset_says_what_its_streams_are(finished_root: Path) -> None:
    specs = TokenDataset(str(finished_root), BOTH).specs
    assert (specs["semantic"].num_codebooks, specs["semantic"].codebook_size) == (1, 100)
    assert (specs["acoustic"].num_codebooks, specs["acoustic"].codebook_size) == (8, 64)


def refuse(root: Path | Root, streams: Any, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        TokenDataset(str(root), streams, **options)
    return caught.value


def test_no_stream_at_all_is_refused(finished_root: Path) -> None:
    require_sentence(refuse(finished_root, []), "at least one stream")


def test_a_stream_that_is_not_there_is_refused_with_those_that_are(finished_root: Path, tmp_path: Path) -> None:
    require_sentence(refuse(finished_root, ["phonetic"]), "'phonetic'", "acoustic, semantic")
    require_sentence(refuse(tmp_path, ["semantic"]), "'semantic'", "wavemill tokenize")


@pytest.mark.parametrize("count", [-1, 0, 9])
def test_codebooks_that_a_stream_does_not_have_are_refused(finished_root: Path, count: int) -> None:
    require_sentence(refuse(finished_root, {"acoustic": count}), "'acoustic'", "8 codebooks", str(count))


def test_a_version_that_is_not_there_is_refused(finished_root: Path) -> None:
    require_sentence(refuse(finished_root, ["semantic"], versions={"semantic": 99}), "semantic", "99")


def test_a_version_pinned_for_a_stream_that_is_not_read_is_refused(finished_root: Path) -> None:
    # a slip of the pen here would train on the newest version instead of the pinned one
    require_sentence(refuse(finished_root, ["semantic"], versions={"sematnic": 1}), "sematnic")


def test_a_stream_that_lacks_a_shard_is_refused_by_name_and_shard(
    finished_root: Path, copy_root: Callable[[Path], Path]
) -> None:
    root = Root(copy_root(finished_root))
    shards = [0, 1, 2, 4, 5, 6, 7, 8]
    receipts = copy_stream(root, "semantic", "partial", shards)
    TableWriter(root, "streams/partial").commit(receipts)
    for streams in (["partial", "acoustic"], ["acoustic", "partial"]):
        require_sentence(refuse(root, streams), "'partial'", "2 shard(s)", "being 3", "wavemill tokenize")
    assert len(order(TokenDataset(root.uri, ["partial"]))) < len(good_ids(finished_root))


def test_streams_of_another_order_of_segments_are_not_joined(
    finished_root: Path, copy_root: Callable[[Path], Path]
) -> None:
    root = Root(copy_root(finished_root))
    receipts = copy_stream(root, "semantic", "other", range(10), reverse_rows=True)
    TableWriter(root, "streams/other").commit(receipts)
    dataset = TokenDataset(root.uri, ["acoustic", "other"])
    with pytest.raises(UserError) as caught:
        list(dataset)
    require_sentence(caught.value, "'acoustic'", "'other'", "shard")


def test_a_damaged_file_stops_the_epoch_by_name(finished_root: Path, copy_root: Callable[[Path], Path]) -> None:
    path = copy_root(finished_root)
    dataset = TokenDataset(str(path), ["acoustic"])
    file = sorted((path / "streams" / "acoustic").glob("*.parquet"))[4]
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    with pytest.raises(CorruptFile, match=file.name):
        list(dataset)


def test_a_file_that_was_removed_stops_the_epoch_by_name(
    finished_root: Path, copy_root: Callable[[Path], Path]
) -> None:
    path = copy_root(finished_root)
    dataset = TokenDataset(str(path), ["acoustic"])
    file = sorted((path / "streams" / "acoustic").glob("*.parquet"))[4]
    file.unlink()
    with pytest.raises(CorruptFile, match=file.name):
        list(dataset)


def test_importing_the_dataset_brings_in_no_ray_no_faiss_and_no_models() -> None:
    script = "import sys, wavemill.storage.dataset; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    modules = set(done.stdout.split())
    assert {"torch", "deltalake"} <= modules
    assert modules.isdisjoint({"ray", "faiss", "transformers", "torchaudio", "webdataset", "av", "soundfile", "typer"})
