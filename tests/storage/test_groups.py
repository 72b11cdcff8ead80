"""Rows that belong together as one segment: pairs of a manifest, and separated children, on corpora that were built."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import soundfile
import torch
from torch.utils.data import DataLoader
from torchaudio.models import ConvTasNet
from toy_stream import SPEC, MakeOnce
from wavemill.jobs.corpus import build_corpus
from wavemill.pipelines.layouts.flat import flatten
from wavemill.pipelines.layouts.pairs import units_to_units
from wavemill.pipelines.layouts.speakers import speakers
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.batches import PackedBatch
from wavemill.storage.codes import open_corpus
from wavemill.storage.dataset import Pack, TokenDataset
from wavemill.storage.layouts import GroupBy, Grouping, Ints, Laid, PlannedLayout, Segment, StreamRows
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.rows import GroupCounts
from wavemill.storage.schema import CORPUS_SCHEMA, code_columns, stream_schema
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import StreamSpec, UserError

RATE = 8_000
NUM_PAIRS = 12
BROKEN = {"a/03-de.wav", "b/05-en.wav"}  # recordings that could not be tokenized
WHOLE = {(source, number) for source in "ab" for number in range(NUM_PAIRS)} - {("a", 3), ("b", 5)}
PACKINGS = ("concatenate", "best-fit", "single")


def codes_of(path: str, separated: int | None = None) -> np.ndarray:
    """The codes `[K, T]` of a recording, known by its name."""
    rng = np.random.default_rng([*path.encode(), 0 if separated is None else separated + 1])
    return rng.integers(0, SPEC.codebook_size, (SPEC.num_codebooks, int(rng.integers(0, 30))))


def write_stream(root: Root, name: str = "toy") -> None:
    """A stream over the corpus: `codes_of` each row, an error where the recording is one of `BROKEN`."""
    corpus = open_corpus(root)
    metadata = {"spec": SPEC.to_json(), "corpus": corpus.table_id}
    create_table(root, f"streams/{name}", schema=stream_schema(SPEC), metadata=metadata)
    receipts = []
    for shard in corpus.files:
        rows = rows_of(root, [shard])
        codes = [None if row["path"] in BROKEN else codes_of(row["path"], row["separated"]) for row in rows]
        errors = [None if found is not None else "truncated" for found in codes]
        columns: dict[str, list[Any]] = {
            "id": [row["id"] for row in rows],
            "shard": [shard] * len(rows),
            "num_frames": [None if found is None else found.shape[1] for found in codes],
            "error": errors,
            "error_message": errors,
        }
        for book, column in enumerate(code_columns(SPEC.num_codebooks)):
            columns[column] = [None if found is None else found[book] for found in codes]
        table = pa.Table.from_pydict(columns, schema=stream_schema(SPEC))
        receipts.append(write_shard(root, f"streams/{name}", shard, table, codebook_size=SPEC.codebook_size))
    TableWriter(root, f"streams/{name}").commit(receipts)


def rows_of(root: Root, shards: Iterable[int] | None = None) -> list[dict[str, Any]]:
    corpus = open_corpus(root)
    shards = corpus.files if shards is None else shards
    tables = [read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA) for shard in shards]
    return [row for table in tables for row in table.to_pylist()]


def record(path: Path, num_samples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(num_samples, 0.1), RATE)


def write_manifest(folder: Path, source: str) -> Path:
    """Pairs en, de of one source, by numbers that the other source has, too; among them what is no whole pair.

    The first row of the pair "far" is the manifest's first, the other its last.
    """
    names: list[tuple[str, Any]] = [("far-en", "far")]
    for number in range(NUM_PAIRS):
        names += [(f"{number:02d}-en", number), (f"{number:02d}-de", number)]
        names += [(f"{number:02d}-alone", None)] * (number % 3 == 0)
    names += [("three-en", "three"), ("three-de", "three"), ("three-fr", "three"), ("one-en", "one"), ("far-de", "far")]
    lines = []
    for place, (name, pair) in enumerate(names):
        record(folder / source / f"{name}.wav", 400 + place)
        fields = {"audio_filepath": f"{source}/{name}.wav", "language": name[-2:], "speaker": f"{source}-{place % 2}"}
        lines.append(json.dumps(fields | ({} if pair is None else {"pair": pair})))
    (folder / f"{source}.jsonl").write_text("\n".join(lines))
    return folder / f"{source}.jsonl"


def make_pairs(path: Path) -> None:
    manifests = [str(write_manifest(path / "sound", source)) for source in "ab"]
    build_corpus(Root(path / "root"), manifests, CorpusPolicy(), shard_hours=5 * 400 / RATE / 3600)
    write_stream(Root(path / "root"))


@pytest.fixture(scope="session")
def pairs(made_once: MakeOnce) -> Root:
    """Two manifests with pairs, in many shards."""
    return Root(made_once("pairs", make_pairs) / "root")


@dataclass(frozen=True)
class Read:
    """What a dataset gave for one group."""

    id: str
    codes: dict[str, list[list[int]]]  # by the names that the layout knows, [K][T]
    predicted: list[bool]


def dataset_of(root: Root, layout: Any = None, *, method: str = "single", **more: Any) -> TokenDataset:
    """Sequences that hold each segment whole, unless segments share them."""
    length = 512 if method == "single" else 61
    pack = Pack(layout or units_to_units("toy"), length, method)  # pyright: ignore[reportArgumentType]
    return TokenDataset(root.uri, pack=pack, **{"batch_size": 3, "seed": 7, "window_bytes": 1, **more})


def read(dataset: TokenDataset, batches: Iterable[Any] | None = None) -> list[Read]:
    """The groups of an epoch, of sequences of one segment, in their order."""
    plan: Any = dataset.selection.plan
    found = []
    for batch in dataset if batches is None else batches:
        assert isinstance(batch, PackedBatch)
        for row, ids in enumerate(batch.ids):
            if ids:
                inside = batch.segment_ids[row] > 0
                rows = plan.invert(Laid(batch.tokens[row][inside].numpy()))
                codes = {name: [book.tolist() for book in each.books] for name, each in rows.items()}
                found.append(Read(ids[0], codes, batch.loss_mask[row][inside].tolist()))
    return found


def said(root: Root, found: Sequence[Read]) -> set[tuple[str, int]]:
    """Source and number of pairs whose source and target both have their codes; no pair twice."""
    paths = {row["id"]: row["path"] for row in rows_of(root)}
    numbers = set()
    for each in found:
        path = paths[each.id]
        assert path.endswith("-en.wav"), "the first of a pair's rows is its source"
        assert each.codes["toy@0"] == codes_of(path)[:1].tolist()
        assert each.codes["toy@1"] == codes_of(path.replace("-en", "-de"))[:1].tolist()
        assert each.predicted == [False] * (codes_of(path).shape[1] + 1) + [True] * (len(each.codes["toy@1"][0]) + 1)
        numbers.add((path[0], int(path[2:4])))
    assert len(numbers) == len(found)
    return numbers


def require_sentence(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")
    assert all(word in str(error.value) for word in words)


# Pairs


def test_every_whole_pair_comes_once_an_epoch_with_its_source_in_front(pairs: Root) -> None:
    assert len(open_corpus(pairs).files) > 8
    for shuffle in (True, False):
        assert said(pairs, read(dataset_of(pairs, shuffle=shuffle))) == WHOLE


def test_pairs_that_are_not_whole_are_left_out_and_counted(pairs: Root) -> None:
    """Of each source one pair has an error, one three rows, one only one; the rows of one lie far apart."""
    assert dataset_of(pairs).count_groups() == GroupCounts(taken=2 * NUM_PAIRS - 2, refused=2, incomplete=4, apart=2)


def test_the_same_name_in_two_sources_is_two_pairs(tmp_path: Path) -> None:
    for source in ("x", "y"):
        for language in ("en", "de"):
            record(tmp_path / source / f"{language}.wav", 500)
        (tmp_path / f"{source}.csv").write_text(f"path,pair\n{source}/en.wav,1\n{source}/de.wav,1\n")
    sources = [str(tmp_path / f"{source}.csv") for source in ("x", "y")]
    root = Root(tmp_path / "root")
    build_corpus(root, sources, CorpusPolicy(), shard_hours=1)
    write_stream(root)
    assert len(open_corpus(root).files) == 1  # with all four rows
    paths = {row["id"]: row["path"] for row in rows_of(root)}
    found = {paths[each.id]: each.codes["toy@1"] for each in read(dataset_of(root))}
    assert found == {f"{source}/en.wav": codes_of(f"{source}/de.wav")[:1].tolist() for source in ("x", "y")}


@pytest.mark.parametrize("method", PACKINGS)
def test_pairs_are_packed_like_segments(pairs: Root, method: str) -> None:
    dataset = dataset_of(pairs, method=method)
    plan: Any = dataset.selection.plan
    whole: dict[str, list[int]] = {}
    for batch in dataset:
        assert isinstance(batch, PackedBatch)
        for row, ids in enumerate(batch.ids):
            for number, id_ in enumerate(ids, start=1):
                whole.setdefault(id_, []).extend(batch.tokens[row][batch.segment_ids[row] == number].tolist())
    paths = {row["id"]: row["path"] for row in rows_of(pairs)}
    assert {(paths[id_][0], int(paths[id_][2:4])) for id_ in whole} == WHOLE
    for id_, tokens in whole.items():
        rows = plan.invert(Laid(np.array(tokens)))
        assert rows["toy@0"].books[0].tolist() == codes_of(paths[id_])[0].tolist()
        assert rows["toy@1"].books[0].tolist() == codes_of(paths[id_].replace("-en", "-de"))[0].tolist()


def test_a_filter_must_choose_all_members(pairs: Root) -> None:
    assert said(pairs, read(dataset_of(pairs, where=[("source", "==", "b")]))) == {(s, n) for s, n in WHOLE if s == "b"}
    english = dataset_of(pairs, where=[("language", "==", "en")])
    with pytest.raises(UserError) as caught:
        list(english)
    require_sentence(caught, "nowhere in one shard are 2 segments", "by 'pair'", "count_groups()")
    counts = english.count_groups()
    assert (counts.taken, counts.refused) == (0, 2 * NUM_PAIRS)


def test_seed_and_epoch_decide_the_order_of_pairs(pairs: Root) -> None:
    dataset = dataset_of(pairs)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append([each.id for each in read(dataset)])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert [each.id for each in read(dataset_of(pairs, seed=8))] != orders[0]
    in_order = [each.id for each in read(dataset_of(pairs, shuffle=False))]
    places = {row["id"]: place for place, row in enumerate(rows_of(pairs))}
    assert in_order == sorted(in_order, key=lambda id_: places[id_])


@pytest.mark.parametrize("method", PACKINGS)
def test_a_state_goes_on_with_the_next_pair_on_any_number_of_ranks(pairs: Root, method: str) -> None:
    undisturbed = tokens_of(dataset_of(pairs, method=method))
    for stop in (1, 2, 4):
        *first, last = islice(dataset_of(pairs, method=method), stop)
        saved = json.loads(json.dumps(last.state))
        ranks = [dataset_of(pairs, method=method, rank=rank, world_size=2, batch_size=1) for rank in range(2)]
        for dataset in ranks:
            dataset.load_state_dict(saved)
        rest = [sequence for batches in zip(*ranks, strict=True) for sequence in tokens_of(batches)]
        assert tokens_of([*first, last]) + rest == undisturbed


def tokens_of(batches: Iterable[Any]) -> list[tuple[list[str], list[int]]]:
    found = []
    for batch in batches:
        found += [(ids, batch.tokens[row].tolist()) for row, ids in enumerate(batch.ids) if ids]
    return found


def test_workers_share_the_pairs_of_an_epoch(pairs: Root) -> None:
    batches = list(DataLoader(dataset_of(pairs), batch_size=None, num_workers=2))
    assert tokens_of(batches) == tokens_of(dataset_of(pairs))


def test_a_state_of_single_rows_is_none_of_pairs(pairs: Root) -> None:
    state = next(iter(dataset_of(pairs, flatten("toy", 1), where=[("duration_s", ">", 0)]))).state
    with pytest.raises(UserError, match="than the one that the state was saved with"):
        dataset_of(pairs, where=[("duration_s", ">", 0)]).load_state_dict(state)


def test_groups_are_counted_only_where_there_are_some(pairs: Root) -> None:
    with pytest.raises(UserError) as caught:
        dataset_of(pairs, flatten("toy")).count_groups()
    require_sentence(caught, "takes several rows together")


# Layouts of a trainer's own


@dataclass(frozen=True)
class changes:
    """The target of a pair where it changes: only its codes tell how many steps there are."""

    grouping = Grouping(GroupBy.PAIR, 2)

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {"toy": 1}

    def plan(self, specs: Mapping[str, StreamSpec]) -> Any:
        assert specs.keys() == {"toy@0", "toy@1"}
        return ChangesPlan()


class ChangesPlan:
    column_sizes = (SPEC.codebook_size,)
    frame_tokens: Mapping[str, int] = {}
    read_to_plan = ("toy@1",)

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        return np.array([keep.sum() for keep in self._keep(rows)], dtype=np.int64)

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        parts = np.split(rows["toy@1"].books[0], np.cumsum(rows["toy@1"].counts_N)[:-1])
        kept = [part[keep] for part, keep in zip(parts, self._keep(rows), strict=True)]
        return Laid(np.concatenate(kept).astype(np.int16))

    def _keep(self, rows: Mapping[str, StreamRows]) -> list[np.ndarray]:
        parts = np.split(rows["toy@1"].books[0], np.cumsum(rows["toy@1"].counts_N)[:-1])
        return [np.diff(part.astype(int), prepend=-1) != 0 for part in parts]


@dataclass(frozen=True)
class both_lengths:
    """A layout that cannot plan, of two rows."""

    grouping = Grouping(GroupBy.PAIR, 2)

    def __call__(self, segment: Segment) -> list[int]:
        return [segment.codes["toy@0"].shape[1], segment.codes["toy@1"].shape[1]]


def test_layouts_may_read_the_codes_of_members_to_plan_and_need_not_plan_at_all(pairs: Root) -> None:
    assert isinstance(changes(), PlannedLayout)
    paths = {row["id"]: row["path"] for row in rows_of(pairs)}
    seen = 0
    for ids, tokens in tokens_of(dataset_of(pairs, changes())):
        codes = codes_of(paths[ids[0]].replace("-en", "-de"))[0].tolist()
        expected = [code for place, code in enumerate(codes) if not place or code != codes[place - 1]]
        assert tokens == expected + [0] * (512 - len(expected))
        seen += 1
    empty = sum(not codes_of(f"{source}/{number:02d}-de.wav").size for source, number in WHOLE)
    assert seen == len(WHOLE) - empty  # of nothing no sequence is made
    for ids, tokens in tokens_of(dataset_of(pairs, both_lengths(), streams=["toy"])):
        path = paths[ids[0]]
        assert tokens[:2] == [codes_of(path).shape[1], codes_of(path.replace("-en", "-de")).shape[1]]


# Separated children


def make_children(path: Path) -> None:
    path.mkdir()
    torch.manual_seed(0)
    sizes = {"enc_num_feats": 8, "msk_num_feats": 4, "msk_num_hidden_feats": 4}
    model = ConvTasNet(num_sources=2, msk_num_stacks=2, msk_activate="relu", **sizes)
    safetensors.torch.save_file(model.state_dict(), path / "separator.safetensors")
    for number in range(20):
        record(path / "sound" / f"{number:02d}.wav", 400 + number)
    sources, policy = [f"a={path / 'sound'}"], CorpusPolicy()
    separate = str(path / "separator.safetensors")
    build_corpus(Root(path / "root"), sources, policy, shard_hours=2 * 400 / RATE / 3600, separate=separate)
    write_stream(Root(path / "root"))


@pytest.fixture(scope="session")
def children(made_once: MakeOnce) -> Root:
    """Twenty recordings, with two separated children each, in many shards."""
    return Root(made_once("children", make_children) / "root")


def test_separated_children_are_one_segment_in_their_order(children: Root) -> None:
    rows = {row["id"]: row for row in rows_of(children)}
    assert len(open_corpus(children).files) > 8
    dataset = dataset_of(children, speakers("toy", chunk=4))
    found = read(dataset)
    assert len(found) == 20 - sum(
        not codes_of(f"{n:02d}.wav", 0).size + codes_of(f"{n:02d}.wav", 1).size for n in range(20)
    )
    for each in found:
        path = rows[each.id]["path"]
        assert rows[each.id]["separated"] == 0
        assert each.codes == {f"toy@{index}": codes_of(path, index).tolist() for index in range(2)}
    assert dataset.count_groups() == GroupCounts(taken=20, refused=0, incomplete=0, apart=0)


def test_of_more_children_than_a_layout_takes_the_first_are_taken_and_of_fewer_none(children: Root) -> None:
    first = read(dataset_of(children, speakers("toy", num_speakers=1)))
    paths = {row["id"]: row["path"] for row in rows_of(children)}
    assert first
    assert all(each.codes == {"toy@0": codes_of(paths[each.id], 0).tolist()} for each in first)
    three = dataset_of(children, speakers("toy", num_speakers=3))
    with pytest.raises(UserError) as caught:
        list(three)
    require_sentence(caught, "nowhere in one shard are 3 segments", "by 'parent'")
    assert three.count_groups() == GroupCounts(taken=0, refused=0, incomplete=20, apart=0)


def test_a_corpus_without_pairs_says_that_there_are_none(children: Root) -> None:
    with pytest.raises(UserError, match="belong together by 'pair'"):
        list(dataset_of(children))


# Corpora from before there were pairs


def test_a_corpus_without_the_column_is_read_and_grows(tmp_path: Path) -> None:
    for name in ("old", "en", "de"):
        record(tmp_path / f"{name}.wav", 500)
    (tmp_path / "s.csv").write_text("path,speaker\nold.wav,anna\n")
    root = Root(tmp_path / "root")
    build_corpus(root, [str(tmp_path / "s.csv")], CorpusPolicy(), shard_hours=1)
    without = pa.schema([field for field in CORPUS_SCHEMA if field.name != "pair"])
    corpus = open_corpus(root)
    table = read_parquet(root, corpus.path(0), schema=CORPUS_SCHEMA).select(without.names)
    old = Root(tmp_path / "old")
    create_table(old, "corpus", schema=without, metadata={k: v for k, v in corpus.metadata.items() if k != "wavemill"})
    TableWriter(old, "corpus").commit([write_shard(old, "corpus", 0, table)])
    assert rows_of(old) == rows_of(root)
    (tmp_path / "s.csv").write_text("path,speaker,pair\nold.wav,anna,1\nen.wav,,1\nde.wav,,1\n")
    result = build_corpus(old, [str(tmp_path / "s.csv")], CorpusPolicy(), shard_hours=1)
    assert (result.counts.known, result.counts.new) == (1, 2)
    assert [row["pair"] for row in rows_of(old)] == [None, "1", "1"]
    write_stream(old)
    [found] = read(dataset_of(old))
    assert found.codes["toy@1"] == codes_of("de.wav")[:1].tolist()
