"""Layouts of several parts in packed batches: what a trainer gets is what the layout gives of each segment."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streams_made import Rows, random_rows, segment_of, spec, text_spec, write_root
from toy_stream import MakeOnce
from wavemill.pipelines.layouts.factorized import factorized
from wavemill.pipelines.layouts.flat import flatten
from wavemill.pipelines.layouts.staged import coarse, fine, stages
from wavemill.pipelines.layouts.unified import unified
from wavemill.pipelines.layouts.vall_e import vall_e, vall_e_nar
from wavemill.storage.batches import PackedBatch, TokenBatch
from wavemill.storage.dataset import TokenDataset
from wavemill.storage.layouts import StreamRows
from wavemill.storage.packing import PackingMethod
from wavemill.storage.selection import Pack

STREAMS = {"text": text_spec(30), "semantic": spec(1, 10), "acoustic": spec(4, 10)}
LAYOUTS = [
    flatten("acoustic", 3, ends=True),
    coarse("semantic", "acoustic", 2, given=True, ends=True),
    fine("acoustic", 2, 3),
    fine("acoustic", 2, piece=3),
    stages("semantic", "acoustic", 2),
    vall_e("text", "acoustic", prompt_s=0.05),
    vall_e_nar("text", "acoustic", 3, prompt_s=0.05),
    unified(("asr",), "text", "semantic", language="English"),
    factorized("semantic", "acoustic", codebooks=2),
]
LONGEST = 200  # steps: more than any segment has


def shards() -> list[Rows]:
    """Nine segments in three shards, some of them without a frame in one or all streams."""
    rng = np.random.default_rng(1)
    counts = [
        {"text": [3, 0, 2], "semantic": [7, 4, 5], "acoustic": [14, 8, 10]},
        {"text": [0, 4], "semantic": [0, 1], "acoustic": [0, 3]},
        {"text": [1, 5, 0, 2], "semantic": [9, 0, 3, 6], "acoustic": [18, 1, 6, 12]},
    ]
    return [{name: random_rows(STREAMS[name], each[name], rng) for name in STREAMS} for each in counts]


@pytest.fixture
def root(made_once: MakeOnce) -> str:
    return str(made_once("layouts-of-parts", lambda path: write_root(Path(path), STREAMS, shards())))


def by_segment(batches: Iterable[Any]) -> dict[str, tuple[list[Any], list[bool]]]:
    """Tokens and losses of each segment, those of its pieces one after the other."""
    found: dict[str, tuple[list[Any], list[bool]]] = {}
    for batch in batches:
        assert isinstance(batch, PackedBatch)
        for row, ids in enumerate(batch.ids):
            for number, id_ in enumerate(ids, 1):
                is_piece_L = batch.segment_ids[row] == number
                tokens, losses = found.setdefault(id_, ([], []))
                tokens += batch.tokens[row][is_piece_L].tolist()
                losses += batch.loss_mask[row][is_piece_L].tolist()
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
@pytest.mark.parametrize(("method", "length"), [(PackingMethod.CONCATENATE, 13), (PackingMethod.BEST_FIT, LONGEST)])
def test_packed_batches_hold_what_the_layout_gives_of_each_segment(
    root: str, layout: Any, method: PackingMethod, length: int
) -> None:
    dataset = TokenDataset(root, pack=Pack(layout, length, method), batch_size=3, seed=1)
    found = by_segment(dataset)
    plan = dataset.selection.plan
    assert plan is not None
    segments = [segment_of(rows, index) for rows in shards() for index in range(len(rows["text"].counts_N))]
    expected = {}
    for number, segment in enumerate(segments):
        laid = plan.lay(segment)
        if len(laid.tokens):
            losses = [True] * len(laid.tokens) if laid.loss_S is None else laid.loss_S.tolist()
            expected[f"segment-{number:04d}"] = laid.tokens.tolist(), losses
    assert found == expected


def test_training_goes_on_where_it_stopped(root: str) -> None:
    pack = Pack(vall_e_nar("text", "acoustic", prompt_s=0.05), 7)
    whole = list(TokenDataset(root, pack=pack, batch_size=2, seed=3))
    *_, last = islice(TokenDataset(root, pack=pack, batch_size=2, seed=3), 3)
    again = TokenDataset(root, pack=pack, batch_size=2, seed=3)
    again.load_state_dict(json.loads(json.dumps(last.state)))
    rest = list(again)
    assert len(rest) == len(whole) - 3 > 1
    for one, other in zip(rest, whole[3:], strict=True):
        assert isinstance(one, PackedBatch)
        assert isinstance(other, PackedBatch)
        assert one.ids == other.ids
        assert one.tokens.shape == (2, 7, 4)
        for name in ("tokens", "segment_ids", "positions", "loss_mask"):
            assert getattr(one, name).equal(getattr(other, name))


def test_codes_of_real_recordings_come_back(finished_root: Path) -> None:
    layouts = [
        flatten("acoustic", ends=True),
        coarse("semantic", "acoustic", 3),
        fine("acoustic", 3, piece=50),
        stages("semantic", "acoustic", 3),
        factorized("semantic", "acoustic"),
    ]
    dataset = TokenDataset(str(finished_root), ["semantic", "acoustic"], batch_size=1, shuffle=False)
    plans = [layout.plan(dataset.specs) for layout in layouts]
    seen = 0
    for batch in islice(dataset, 40):
        assert isinstance(batch, TokenBatch)
        codes = {name: codes_BKT[0].numpy() for name, codes_BKT in batch.codes.items()}
        rows = {name: StreamRows(np.array([each.shape[1]]), list(each)) for name, each in codes.items()}
        for plan in plans:
            for name, found in plan.invert(plan.lay(rows)).items():
                np.testing.assert_array_equal(np.stack(found.books), codes[name][: len(found.books)])
        seen += codes["acoustic"].size
    assert seen > 10_000
