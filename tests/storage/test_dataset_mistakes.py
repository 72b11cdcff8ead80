"""What is wrong with a dataset or with what is asked of it is told by name, and never is an epoch silently shorter."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from torch.utils.data import DataLoader
from wavemill.pipelines.layouts.flat import flatten, semantic
from wavemill.storage.codes import open_stream, stream_spec
from wavemill.storage.dataset import MixedDataset, Pack, TokenDataset
from wavemill.storage.parquet import CorruptFile, read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import stream_schema
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import UserError


def refuse(act: Callable[[], object], *words: str) -> None:
    """`act` raises one sentence that holds the words."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    for word in words:
        assert word in message


@pytest.fixture
def root(finished_root: Path, copy_root: Callable[[Path], Path]) -> Root:
    return Root(copy_root(finished_root))


def copy_stream(root: Root, source: str, target: str, *, rows: slice = slice(None), **metadata: Any) -> None:
    """A stream of the same shards under another name, with `rows` of each."""
    snapshot = open_stream(root, source)
    schema, folder = stream_schema(stream_spec(snapshot)), f"streams/{target}"
    create_table(root, folder, schema=schema, metadata={**snapshot.metadata, **metadata})
    receipts = []
    for shard in snapshot.files:
        table = read_parquet(root, snapshot.path(shard), schema=schema)
        kept = range(table.num_rows)[rows]
        receipts.append(write_shard(root, folder, shard, table.slice(kept.start, len(kept))))
    TableWriter(root, folder).commit(receipts)


def test_streams_over_different_corpora_are_refused(root: Root) -> None:
    copy_stream(root, "semantic", "elsewhere", corpus="another-table")
    refuse(lambda: TokenDataset(root.uri, ["acoustic", "elsewhere"]), "'acoustic'", "'elsewhere'", "different corpora")
    refuse(lambda: TokenDataset(root.uri, ["elsewhere"], where=[("duration_s", ">", 1)]), "'elsewhere'", "corpus")


def test_streams_with_other_numbers_of_segments_are_refused_by_shard(root: Root) -> None:
    copy_stream(root, "semantic", "short", rows=slice(1, None))
    refuse(lambda: TokenDataset(root.uri, ["acoustic", "short"]), "'acoustic'", "'short'", "shard 0")


def test_a_vocabulary_that_is_too_small_is_refused(finished_root: Path) -> None:
    def build(books: int, vocab_size: int) -> TokenDataset:
        pack = Pack(flatten("acoustic"), length=64, vocab_size=vocab_size)
        return TokenDataset(str(finished_root), {"acoustic": books}, pack=pack)

    assert next(iter(build(4, 256))).tokens.max() < 256
    refuse(lambda: build(5, 256), "320 different tokens", "5 codebook(s) of 64", "'acoustic'", "256")
    units = Pack(semantic("semantic"), length=64, vocab_size=99)
    refuse(lambda: TokenDataset(str(finished_root), ["semantic"], pack=units), "100 different tokens", "99")


@pytest.mark.parametrize(("token", "told"), [(-1, "token -1"), (256, "token 256")])
def test_a_layout_that_leaves_the_vocabulary_is_named_with_the_segment(
    finished_root: Path, token: int, told: str
) -> None:
    pack = Pack(lambda segment: [token, 1], length=64, vocab_size=256)
    refuse(lambda: list(TokenDataset(str(finished_root), ["semantic"], pack=pack)), told, "segment", "0 to 255")


def test_a_filter_that_leaves_nothing_is_an_error_before_the_first_step(finished_root: Path) -> None:
    dataset = TokenDataset(str(finished_root), ["semantic"], where=[("duration_s", ">", 1e6)])
    refuse(lambda: next(iter(dataset)), "epoch is empty", "filter")
    assert dataset.count_sequences() == 0


def test_more_ranks_than_sequences_is_an_error_on_every_rank(finished_root: Path) -> None:
    pack = Pack(semantic("semantic"), length=1 << 20)
    for rank in (0, 7):
        dataset = TokenDataset(str(finished_root), ["semantic"], pack=pack, rank=rank, world_size=8)
        refuse(lambda dataset=dataset: next(iter(dataset)), "1 sequence(s)", "8 rank(s)")
    dropping = TokenDataset(str(finished_root), ["semantic"], batch_size=500, tail="drop")
    refuse(lambda: next(iter(dropping)), "need 500", "tail='pad'")


def test_errors_in_workers_reach_the_trainer(finished_root: Path) -> None:
    dataset = TokenDataset(str(finished_root), ["semantic"], where=[("duration_s", ">", 1e6)])
    with pytest.raises(UserError, match="epoch is empty"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"where": [("durations", ">", 1)]}, ["durations", "duration_s"]),
        ({"where": pc.field("language") + 1}, ["where"]),
        ({"where": pc.field("duration_s")}, ["true or false"]),
        ({"where": "duration_s > 1"}, ["where"]),
        ({"batch_size": 0}, ["batch_size is 0"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"window_bytes": 0}, ["window_bytes is 0"]),
        ({"tail": "drp"}, ["'drp'", "drop"]),
        ({"rank": 1}, ["both rank and world_size"]),
        ({"rank": 2, "world_size": 2}, ["Rank 2 of 2"]),
        ({"pack": Pack(semantic("semantic"), length=0)}, ["0 tokens"]),
        ({"pack": Pack(semantic("semantic"), length=8, method="bestfit")}, ["'bestfit'", "best-fit"]),
        ({"pack": Pack(semantic("acoustic"), length=8)}, ["'acoustic'", "semantic"]),
        ({"pack": Pack("semantic", length=8)}, ["cannot be called"]),
    ],
)
def test_a_slip_in_an_argument_is_one_sentence(finished_root: Path, options: Any, words: list[str]) -> None:
    refuse(lambda: TokenDataset(str(finished_root), ["semantic"], **options), *words)


def test_a_rank_is_not_guessed_under_torchrun(finished_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    refuse(lambda: TokenDataset(str(finished_root), ["semantic"]), "WORLD_SIZE is 4", "init_process_group")
    told = TokenDataset(str(finished_root), ["semantic"], batch_size=4, rank=1, world_size=4)
    assert len(next(iter(told)).ids) == 4


def test_datasets_that_do_not_fit_together_are_not_mixed(finished_root: Path) -> None:
    units, books = (TokenDataset(str(finished_root), [name]) for name in ("semantic", "acoustic"))
    packed = TokenDataset(str(finished_root), ["semantic"], pack=Pack(semantic("semantic"), length=8))
    refuse(
        lambda: MixedDataset([units, books], [1, 1]),
        "semantic (1 codebook(s) of 100)",
        "acoustic (8 codebook(s) of 64)",
    )
    refuse(lambda: MixedDataset([units, packed], [1, 1]), "8 tokens")
    refuse(lambda: MixedDataset([units, units], [1]), "2 datasets and 1 weights")
    refuse(lambda: MixedDataset([units, units], [1, 0]), "greater than 0")
    refuse(MixedDataset([units, units], [1, 1]).count_sequences, "one dataset")


def test_a_flipped_bit_or_a_cut_is_never_other_codes(root: Root) -> None:
    dataset = TokenDataset(root.uri, {"acoustic": 2}, shuffle=False, batch_size=200)
    [whole] = dataset
    file = Path(root.join(open_stream(root, "acoustic").path(3)))
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    told = []
    for position, bit in rng.integers(0, (len(content), 8), (150, 2)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        file.write_bytes(damaged if bit else content[:position])
        try:
            [batch] = dataset
        except CorruptFile as error:
            told.append(str(error))
            continue
        # the bit is in a codebook that is not read
        assert bit
        assert torch.equal(batch.codes["acoustic"], whole.codes["acoustic"])
    assert len(told) > 20
    assert all(file.name in message for message in told)


def test_a_code_outside_its_codebook_is_named(root: Root) -> None:
    snapshot = open_stream(root, "semantic")
    smaller = dataclasses.replace(stream_spec(snapshot), codebook_size=10)
    copy_stream(root, "semantic", "lying", spec=smaller.to_json())
    with pytest.raises(CorruptFile, match=r"streams/lying/shard-.*codes outside 0 to 9"):
        list(TokenDataset(root.uri, ["lying"]))
