"""What a layout gives of each segment is what trainers get, whatever packs, cuts, shares and stops the epoch.

Axes: see storage/layouts.py; B rows of a batch, L steps of a sequence.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from toy_numbers import SPECS, first_column, good, make_root, rows
from wavemill.pipelines.layouts.conditioned import conditioned
from wavemill.pipelines.layouts.continuous import continuous
from wavemill.pipelines.layouts.flat import flatten, semantic
from wavemill.pipelines.layouts.grid import delay
from wavemill.pipelines.layouts.plan import rows_of
from wavemill.pipelines.layouts.speakers import speakers
from wavemill.storage.batches import PackedBatch, TokenBatch
from wavemill.storage.dataset import MixedDataset, Pack, TokenDataset
from wavemill.storage.layouts import Laid, Segment, StreamRows
from wavemill.storage.parquet import CorruptFile
from wavemill.tokenizers.spec import StreamSpec, UserError

Feed = TokenDataset | MixedDataset

LENGTH = 24  # steps of a sequence; segments have up to 62
EVEN = [("speaker", "==", "even")]
LAYOUTS: dict[str, Any] = {
    "flatten": flatten("acoustic"),
    "delay": delay("acoustic"),
    "continuous": continuous("latents"),
    "with a prefix": continuous("latents", prefix="acoustic"),
    "bare": continuous("merged", ends=False),
    "conditioned": conditioned("vector", delay("acoustic")),
    "two streams": conditioned("vector", continuous("latents", prefix="acoustic")),
}


@pytest.fixture(scope="session")
def roots(made_once: Callable[[str, Callable[[Path], None]], Path]) -> tuple[str, str]:
    first = made_once("numbers-first", partial(make_root, place="first", num_shards=9))
    return str(first), str(made_once("numbers-second", partial(make_root, place="second", num_shards=6)))


def laid_alone(layout: Any, segment: Segment) -> Laid:
    return layout.plan(SPECS).lay(rows_of(segment))


Piece = tuple[list[Any], list[bool], dict[str, list[Any]]]  # tokens, which of them are predicted, and frames


def pieces_of(batch: PackedBatch, layout: Any) -> dict[str, list[Piece]]:
    """By segment what a batch holds of it, in order."""
    found: dict[str, list[Piece]] = defaultdict(list)
    tokens_by_stream, first_BL = layout.plan(SPECS).frame_tokens, first_column(batch)
    begins = dict.fromkeys(tokens_by_stream, 0)
    assert not batch.loss_mask[batch.segment_ids == 0].any()
    assert not batch.tokens[batch.segment_ids == 0].any()
    assert batch.frames.keys() == tokens_by_stream.keys()
    for row, ids in enumerate(batch.ids):
        for number, id_ in enumerate(ids, 1):
            inside_L = batch.segment_ids[row] == number
            assert batch.positions[row][inside_L].tolist() == list(range(int(inside_L.sum())))
            frames = {}
            for stream, token in tokens_by_stream.items():
                count = int((first_BL[row][inside_L] == token).sum())
                frames[stream] = batch.frames[stream][begins[stream] : begins[stream] + count].tolist()
                begins[stream] += count
            piece = batch.tokens[row][inside_L].tolist(), batch.loss_mask[row][inside_L].tolist(), frames
            found[id_].append(piece)
    assert begins == {stream: len(frames_MD) for stream, frames_MD in batch.frames.items()}
    return found


def together(layout: Any, pieces: list[Piece]) -> Laid:
    """A segment's steps, of which packing made pieces."""
    frames = {
        stream: np.array([frame for piece in pieces for frame in piece[2][stream]], dtype=np.float16).reshape(-1, dim)
        for stream, dim in ((name, SPECS[name].dim) for name in layout.plan(SPECS).frame_tokens)
    }
    tokens = np.array([token for piece in pieces for token in piece[0]], dtype=np.int64)
    return Laid(tokens, np.array([loss for piece in pieces for loss in piece[1]]), frames)


def require_same(found: Laid, expected: Laid) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    all_predicted = np.ones(len(expected.tokens), dtype=bool)
    np.testing.assert_array_equal(found.loss_S, all_predicted if expected.loss_S is None else expected.loss_S)
    for stream, frames_TD in expected.frames.items():
        np.testing.assert_array_equal(found.frames[stream], frames_TD)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (number + place) % 3 == 0 else pytest.mark.slow)
        for number, name in enumerate(LAYOUTS)
        for place, method in enumerate(("concatenate", "single", "best-fit"))
    ],
)
def test_each_segment_has_its_steps_losses_and_frames_wherever_it_was_cut(
    name: str, method: str, roots: tuple[str, str]
) -> None:
    layout = LAYOUTS[name]
    length = 70 if method == "best-fit" else LENGTH  # pieces of segments that are cut may then lie in any order
    dataset = TokenDataset(roots[0], pack=Pack(layout, length, method), batch_size=5, seed=2, window_bytes=4_000)
    found: dict[str, list[Piece]] = defaultdict(list)
    for batch in dataset:
        assert isinstance(batch, PackedBatch)
        for id_, pieces in pieces_of(batch, layout).items():
            found[id_] += pieces
    segments = good(tuple(layout.streams))
    expected = {id_: laid_alone(layout, segment) for id_, segment in segments.items()}
    expected = {id_: laid for id_, laid in expected.items() if len(laid.tokens)}  # nothing is packed as nothing
    assert found.keys() == expected.keys()
    assert method == "best-fit" or any(len(pieces) > 1 for pieces in found.values())
    for id_, laid in expected.items():
        laid_again = together(layout, found[id_])
        require_same(laid_again, laid)
        for stream, held in layout.plan(SPECS).invert(laid_again).items():
            segment = segments[id_]
            if SPECS[stream].dim:
                assert torch.equal(torch.from_numpy(held.frames_TD), segment.frames[stream])
            else:
                np.testing.assert_array_equal(np.stack(held.books), segment.codes[stream][: len(held.books)])


def test_segments_that_a_filter_leaves_have_their_own_frames(roots: tuple[str, str]) -> None:
    layout = LAYOUTS["two streams"]
    dataset = TokenDataset(roots[0], pack=Pack(layout, 200, "single"), where=EVEN)
    expected = {id_: segment for id_, segment in good(tuple(layout.streams)).items() if int(id_[-2:]) % 2 == 0}
    found = 0
    for batch in dataset:
        assert isinstance(batch, PackedBatch)
        for id_, pieces in pieces_of(batch, layout).items():
            require_same(together(layout, pieces), laid_alone(layout, expected[id_]))
            found += 1
    assert found == len(expected) > 10


def test_batches_that_are_not_packed_have_frames_padded_behind_each_segment(roots: tuple[str, str]) -> None:
    expected, seen = good(tuple(SPECS)), 0
    for batch in TokenDataset(roots[0], list(SPECS), batch_size=6, seed=1):
        assert isinstance(batch, TokenBatch)
        assert batch.codes.keys() == {"acoustic"}
        assert batch.durations.keys() == {"merged"}
        assert batch.durations["merged"].dtype == torch.int32
        for name, frames_BTD in batch.frames.items():
            num_B = batch.num_frames[name]
            assert frames_BTD.shape == (6, int(num_B.max()), SPECS[name].dim)
            assert frames_BTD.dtype == torch.float16
            for row, id_ in enumerate(batch.ids):
                num = int(num_B[row])
                assert not frames_BTD[row, num:].any()
                assert torch.equal(frames_BTD[row, :num], expected[id_].frames[name] if id_ else frames_BTD[row, :0])
        for row, id_ in enumerate(batch.ids):
            num = int(batch.num_frames["merged"][row])
            assert not batch.durations["merged"][row, num:].any()
            if id_:
                assert torch.equal(batch.durations["merged"][row, :num], expected[id_].durations["merged"])
                seen += 1
    assert seen == len(expected)


def build(roots: tuple[str, ...], name: str | None, method: str | None, **options: Any) -> Feed:
    """A dataset of the one root, or a mixture of both."""
    pack = None if name is None else Pack(LAYOUTS[name], LENGTH, method)  # pyright: ignore[reportArgumentType]
    streams = list(SPECS) if name is None else None
    parts = [TokenDataset(root, streams, pack=pack, seed=3, window_bytes=4_000, **options) for root in roots]
    return parts[0] if len(parts) == 1 else MixedDataset(parts, [0.7, 0.3], **options)


@pytest.mark.parametrize(
    ("name", "method", "num_roots"),
    [
        (None, None, 1),
        ("with a prefix", "best-fit", 2),
        ("conditioned", "concatenate", 1),
        pytest.param(None, None, 2, marks=pytest.mark.slow),
        pytest.param("continuous", "concatenate", 2, marks=pytest.mark.slow),
        pytest.param("two streams", "single", 2, marks=pytest.mark.slow),
    ],
)
def test_frames_go_on_where_any_number_of_ranks_stopped(
    name: str | None, method: str | None, num_roots: int, roots: tuple[str, str]
) -> None:
    layout = LAYOUTS.get(name or "")
    make_dataset = partial(build, roots[:num_roots], name, method, batch_size=2)
    expected = [row for batch in make_dataset() for row in rows(batch, layout)]
    found, state = [], None
    for world_size, num_steps in ((1, 3), (3, 1), (2, 2), (4, None)):
        ranks = []
        for rank in range(world_size):
            dataset = make_dataset(rank=rank, world_size=world_size)
            if state is not None:
                dataset.load_state_dict(json.loads(json.dumps(state)))
            ranks.append(list(islice(dataset, num_steps)))
        for step in zip(*ranks, strict=True):
            found += [row for batch in step for row in rows(batch, layout)]
            state = step[0].state
            assert all(batch.state == state for batch in step)
    assert len(expected) > 20
    assert found == expected


def test_workers_give_the_frames_that_one_reader_gives(roots: tuple[str, str]) -> None:
    layout = LAYOUTS["two streams"]
    dataset = build(roots[:1], "two streams", "concatenate", batch_size=3)
    expected = [rows(batch, layout) for batch in dataset]
    loaded = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [rows(batch, layout) for batch in loaded] == expected


@pytest.mark.parametrize("name", ["conditioned", "continuous"])
def test_a_rank_without_a_sequence_has_the_same_shapes(name: str, roots: tuple[str, str]) -> None:
    num_sequences = build(roots[:1], name, "concatenate").count_sequences()
    world_size = next(size for size in range(2, 9) if 0 < num_sequences % (3 * size) <= 3 * (size - 1))

    def last(rank: int) -> PackedBatch:
        *_, batch = build(roots[:1], name, "concatenate", batch_size=3, rank=rank, world_size=world_size)
        assert isinstance(batch, PackedBatch)
        return batch

    full, empty = last(0), last(world_size - 1)
    assert full.ids[0]
    assert not any(empty.ids)
    for field in ("tokens", "segment_ids", "positions", "loss_mask"):
        assert getattr(full, field).shape == getattr(empty, field).shape
        assert getattr(full, field).dtype == getattr(empty, field).dtype
        assert not getattr(empty, field).any()
    for stream, frames_MD in full.frames.items():
        assert empty.frames[stream].shape == (0, frames_MD.shape[1])
        assert empty.frames[stream].dtype == frames_MD.dtype == torch.float16
    assert full.tokens.shape == ((3, LENGTH, 2) if name == "conditioned" else (3, LENGTH))


def test_frames_move_with_the_batch(roots: tuple[str, str]) -> None:
    for name in (None, "two streams"):
        batch = next(iter(build(roots[:1], name, "single" if name else None))).to("meta")
        assert batch.frames
        assert {tensor.device.type for tensor in batch.frames.values()} == {"meta"}


class counted:
    """A layout whose sizes depend on codes: the first codebook, in which runs of odd and even codes become one."""

    streams: Mapping[str, int | None] = {"acoustic": 1}
    read_to_plan = ("acoustic",)
    column_sizes = (2,)
    frame_tokens: Mapping[str, int] = {}

    def plan(self, specs: Mapping[str, StreamSpec]) -> "counted":
        return self

    def _begins(self, rows: Mapping[str, StreamRows]) -> np.ndarray:
        odd_T, begins_N = rows["acoustic"].books[0] % 2, rows["acoustic"].begins_N
        begins_T = np.diff(odd_T, prepend=-1) != 0
        begins_T[begins_N[rows["acoustic"].counts_N > 0]] = True
        return begins_T

    def num_steps(self, rows: Mapping[str, StreamRows]) -> np.ndarray:
        before_T = np.concatenate([[0], np.cumsum(self._begins(rows))])
        begins_N = rows["acoustic"].begins_N
        return before_T[begins_N + rows["acoustic"].counts_N] - before_T[begins_N]

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        return Laid((rows["acoustic"].books[0] % 2)[self._begins(rows)])


@pytest.mark.parametrize("where", [None, EVEN])
def test_a_layout_whose_sizes_depend_on_codes_is_given_them_to_plan(where: Any, roots: tuple[str, str]) -> None:
    found: dict[str, list[int]] = {}
    for batch in TokenDataset(roots[0], pack=Pack(counted(), 40, "single"), where=where):
        assert isinstance(batch, PackedBatch)
        for row, ids in enumerate(batch.ids):
            for id_ in ids:
                found[id_] = batch.tokens[row][batch.loss_mask[row]].tolist()
    expected = {}
    for id_, segment in good(("acoustic",)).items():
        odd = (segment.codes["acoustic"][0] % 2).tolist()
        runs = [code for place, code in enumerate(odd) if not place or odd[place - 1] != code]
        if runs and (where is None or int(id_[-2:]) % 2 == 0):
            expected[id_] = runs
    assert found == expected


def test_a_function_is_given_frames_and_durations(roots: tuple[str, str]) -> None:
    def told(segment: Segment) -> list[int]:
        durations_T, frames_TD = segment.durations["merged"], segment.frames["merged"]
        assert frames_TD.shape == (len(durations_T), 2)
        assert frames_TD.dtype == torch.float16
        assert not segment.codes
        return durations_T.tolist()

    found = Counter()
    for batch in TokenDataset(roots[0], ["merged"], pack=Pack(told, 40)):
        assert isinstance(batch, PackedBatch)
        found.update(batch.tokens[batch.loss_mask].tolist())
    segments = good(("merged",)).values()
    assert found == Counter(duration for segment in segments for duration in segment.durations["merged"].tolist())


def test_a_condition_in_front_of_a_group_is_that_of_its_first_member(roots: tuple[str, str]) -> None:
    layout = conditioned("vector", speakers("acoustic"))
    dataset = TokenDataset(roots[0], pack=Pack(layout, 300, "single"), batch_size=4)
    plan = dataset.selection.plan
    assert plan is not None
    seen, segments = 0, good(tuple(layout.streams))
    for batch in dataset:
        assert isinstance(batch, PackedBatch)
        assert list(batch.frames) == ["vector@0"]
        first_BL = first_column(batch)
        has_condition = (first_BL[:, 0] == plan.frame_tokens["vector@0"]).tolist()
        firsts = [ids[0] for ids, there in zip(batch.ids, has_condition, strict=True) if there]
        expected = [segments[id_].frames["vector"] for id_ in firsts]
        assert torch.equal(batch.frames["vector@0"], torch.cat(expected))
        seen += len(firsts)
    assert seen > 10


def test_datasets_whose_frames_are_not_the_same_are_not_mixed(roots: tuple[str, str]) -> None:
    def dataset(streams: Any = None, layout: Any = None) -> TokenDataset:
        return TokenDataset(roots[0], streams, pack=layout and Pack(layout, LENGTH))

    for one, other, words in (
        (
            dataset(["latents"]),
            dataset(["merged"]),
            r"latents \(3 numbers\), another streams merged \(2 numbers, durations\)",
        ),
        (
            dataset(layout=continuous("latents")),
            dataset(layout=continuous("merged")),
            r"frames of merged \(2 numbers\)",
        ),
        (
            dataset(layout=continuous("latents")),
            dataset(layout=continuous("latents", prefix="acoustic")),
            "at token 1, .* at token 50",
        ),
    ):
        with pytest.raises(UserError, match=words):
            MixedDataset([one, other], [1, 1])


def test_the_state_of_another_layout_is_refused(roots: tuple[str, str]) -> None:
    def dataset(layout: Any) -> TokenDataset:
        return TokenDataset(roots[0], {"acoustic": None, "latents": None, "vector": None}, pack=Pack(layout, LENGTH))

    asked = [conditioned("vector", delay("acoustic", late)) for late in ((0, 1), (0, 2))]
    asked += [continuous("latents"), continuous("latents", ends=False)]
    states = [next(iter(dataset(layout))).state for layout in asked]
    for ours, layout in enumerate(asked):
        for theirs, state in enumerate(states):
            if ours == theirs:
                dataset(layout).load_state_dict(state)
            else:
                with pytest.raises(UserError, match="packs otherwise"):
                    dataset(layout).load_state_dict(state)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (flatten, r"layout flatten was given without what it takes: write flatten\(\.\.\.\)"),
        (continuous("acoustic"), r"'acoustic' \(toy\) holds codes"),
        (semantic("latents"), "'latents' holds frames of 3 numbers"),
        (conditioned("vectors", semantic("acoustic")), "'vectors'.* Did you mean 'vector'"),
    ],
)
def test_a_layout_that_cannot_be_is_one_sentence(layout: Any, words: str, roots: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=words) as caught:
        TokenDataset(roots[0], None if not isinstance(layout, type) else ["acoustic"], pack=Pack(layout, LENGTH))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["frames", "durations"])
def test_rows_with_other_frames_than_they_say_are_damage(column: str, tmp_path: Path) -> None:
    def shortened(name: str, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if name == "merged":
            columns[column] = [None if each is None else each[:-1] for each in columns[column]]
        return columns

    make_root(tmp_path, "first", 1, change=shortened)
    with pytest.raises(CorruptFile, match=r"streams/merged/.*rows with fewer or more"):
        list(TokenDataset(str(tmp_path), ["merged"]))
