"""Rows that are one segment together, in whichever shards they lie, and layouts that read the codes of several."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streams_made import Rows, random_rows, spec, write_root
from timed_made import TEXT, said
from wavemill.pipelines.layouts.closeup import differing, lay_out
from wavemill.pipelines.layouts.moshi import moshi
from wavemill.pipelines.layouts.pairs import units_to_units
from wavemill.pipelines.layouts.speakers import speakers
from wavemill.storage.codes import open_corpus
from wavemill.storage.dataset import MixedDataset, Pack, TokenDataset
from wavemill.storage.groups import pairs_apart
from wavemill.storage.root import Root
from wavemill.storage.rows import GroupCounts
from wavemill.tokenizers.spec import UserError

UNITS = spec(1, 50)
PAIRS = [["a", "a", "b", "c"], ["b", "b", "d"], ["d", "e", "e", None]]  # by shard, and ids in the order of rows


def write_units(path: Path, shards: Sequence[int], **corpus: Sequence[Any]) -> None:
    rng = np.random.default_rng(0)
    rows: list[Rows] = [{"units": random_rows(UNITS, [5] * count, rng)} for count in shards]
    write_root(path, {"units": UNITS}, rows, **corpus)


def pairs_dataset(path: Path, layout: Any = None, **more: Any) -> TokenDataset:
    pack = Pack(layout or units_to_units("units"), 64, "single")  # pyright: ignore[reportArgumentType]
    return TokenDataset(str(path), pack=pack, batch_size=1, **more)


def ids_of(dataset: TokenDataset) -> set[str]:
    return {id_ for batch in dataset for ids in batch.ids for id_ in ids}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    flat = [pair for shard in PAIRS for pair in shard]
    write_units(tmp_path / "root", [len(shard) for shard in PAIRS], pair=flat, source=["s"] * len(flat))
    return tmp_path / "root"


def test_no_two_rows_of_a_pair_are_taken_for_it_while_a_third_lies_in_another_shard(pairs: Path) -> None:
    """Of pair b one row is in the first shard and two are in the second; d's two are in two."""
    dataset = pairs_dataset(pairs)
    assert dataset.selection.pairs_apart == {("s", "b"), ("s", "d")}
    assert ids_of(dataset) == {"segment-0000", "segment-0008"}  # of a and e
    assert dataset.count_groups() == GroupCounts(taken=2, refused=0, incomplete=1, apart=2)


def test_a_corpus_of_no_shards_and_one_without_pairs_have_none_apart(tmp_path: Path) -> None:
    write_units(tmp_path / "root", [2, 2], source=["s"] * 4)
    root = Root(tmp_path / "root")
    corpus = open_corpus(root)
    assert pairs_apart(root, corpus) == pairs_apart(root, replace(corpus, files={})) == frozenset()


def test_separated_children_are_taken_if_their_numbers_are_there_each_once(tmp_path: Path) -> None:
    """Of p the second lies in another shard, q has the second twice, r lacks the first; s is whole, in any order."""
    children = [("p", 0), ("q", 0), ("q", 1), ("q", 1), ("p", 1), ("r", 1), ("r", 2), ("s", 1), ("s", 0), ("s", 2)]
    parents, numbers = zip(*children, strict=True)
    write_units(tmp_path / "root", [4, 6], parent=parents, separated=numbers)
    dataset = pairs_dataset(tmp_path / "root", speakers("units"))
    assert ids_of(dataset) == {"segment-0008"}
    assert dataset.count_groups() == GroupCounts(taken=1, refused=0, incomplete=2, apart=1)


def test_an_epoch_of_a_mixture_that_is_empty_names_the_dataset_that_is(pairs: Path) -> None:
    some, none = pairs_dataset(pairs), pairs_dataset(pairs, speakers("units"))
    with pytest.raises(UserError, match="2 segments that belong together by 'parent'"):
        list(MixedDataset([some, none], [1, 3]))


def test_a_filter_is_not_blamed_where_rows_cannot_be_grouped(pairs: Path, tmp_path: Path) -> None:
    write_units(tmp_path / "other", [4, 3, 4])
    (pairs / "corpus").rename(tmp_path / "old")
    (tmp_path / "other" / "corpus").rename(pairs / "corpus")
    with pytest.raises(UserError, match="which of its segments belong together by 'pair' cannot be told"):
        pairs_dataset(pairs)
    with pytest.raises(UserError, match="`where` cannot choose among its segments"):
        pairs_dataset(pairs, where=[("source", "==", "s")])


def test_a_layout_of_several_rows_that_plans_by_their_codes_shows_a_segment(tmp_path: Path) -> None:
    specs = {"text": TEXT, "units": UNITS}
    rng = np.random.default_rng(0)
    codes = [said((0, 10, [3]), (12, 20, [4, 1])), said((3, 9, [2]))]
    made = [np.array(each, dtype=np.int16) for each in codes]
    text = random_rows(TEXT, [len(each) for each in made], rng)
    text = replace(text, books=[np.concatenate(made)])
    rows = {"text": text, "units": random_rows(UNITS, [40, 40], rng)}
    write_root(tmp_path / "root", specs, [rows], parent=["p", "p"], separated=[0, 1])
    laid = lay_out(Root(tmp_path / "root"), moshi("text", "units", num_speakers=2))
    assert laid.ids == ("segment-0000", "segment-0001")
    assert differing(laid, laid.inverted()) == []
    assert len(laid.laid.tokens) > 20
