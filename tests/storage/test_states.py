"""States: small, as JSON, refused where they do not belong, and good from epoch to epoch."""

import copy
import json
import pickle
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader
from toy_stream import EVEN, Build, Feed, MakeOnce, make_roots, rows, undisturbed
from wavemill.pipelines.layouts.flat import flatten
from wavemill.storage.dataset import MixedDataset, Pack, TokenDataset
from wavemill.storage.identity import layout_name
from wavemill.storage.layouts import Segment
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.spec import UserError


@pytest.fixture(scope="session")
def roots(made_once: MakeOnce) -> tuple[str, str]:
    return make_roots(made_once)


def test_a_state_is_small_and_survives_json(roots: tuple[str, str]) -> None:
    parts = [TokenDataset(root, {"toy": 2}, seed=seed, where=EVEN) for seed in (0, 2**62) for root in roots]
    batches = list(MixedDataset(parts, [0.1, 0.2, 0.3, 0.4], batch_size=4))
    for batch in batches:
        assert json.loads(json.dumps(batch.state)) == batch.state
        assert len(json.dumps(batch.state)) < 1024
    assert len({json.dumps(batch.state) for batch in batches}) == len(batches)


def refuse(dataset: Feed, state: dict[str, Any]) -> str:
    before = [rows(batch) for batch in islice(dataset, 3)]
    with pytest.raises(UserError) as caught:
        dataset.load_state_dict(state)
    assert [rows(batch) for batch in islice(dataset, 3)] == before
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def state_of(dataset: Feed) -> dict[str, Any]:
    return next(iter(dataset)).state


def test_the_state_of_other_versions_is_refused(roots: tuple[str, str]) -> None:
    state = state_of(TokenDataset(roots[0], ["toy"]))
    state = json.loads(json.dumps(state).replace('"toy": 2', '"toy": 1'))
    message = refuse(TokenDataset(roots[0], ["toy"]), state)
    assert "versions {'toy': 2}" in message
    assert "{'toy': 1}" in message


def test_the_state_of_another_seed_is_refused(roots: tuple[str, str]) -> None:
    message = refuse(TokenDataset(roots[0], ["toy"], seed=1), state_of(TokenDataset(roots[0], ["toy"], seed=41)))
    assert "seed 1," in message
    assert "seed 41" in message


@pytest.mark.parametrize(
    "other",
    [
        {"packing": "best-fit"},
        {"packing": None},
        {"where": EVEN},
        {"window_bytes": 2},
        {"roots": "second"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_state_of_another_order_is_refused(other: dict[str, Any], roots: tuple[str, str]) -> None:
    build = Build(roots[:1], packing="concatenate")
    changed = replace(build, **({"roots": roots[1:]} if "roots" in other else other))
    for ours, theirs in ((build, changed), (changed, build)):
        refuse(ours.dataset(), state_of(theirs.dataset()))


@dataclass(frozen=True)
class parameter:
    """A layout with a parameter of any kind."""

    given: Any

    def __call__(self, segment: Segment) -> list[int]:
        return [0]


class slotted:
    __slots__ = ("given",)

    def __init__(self, given: Any) -> None:
        self.given = given

    def __call__(self, segment: Segment) -> list[int]:
        return [0]


FIRST, SECOND = np.arange(6), np.arange(6)[::-1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.float32(1), np.float32(2)),
        (FIRST, SECOND),
        (FIRST, FIRST.reshape(2, 3)),
        (FIRST, FIRST.astype(np.int32)),
        (torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)),
        (b"one", b"two"),
        (b"one", "one"),
        ({1, 2}, {1, 3}),
        ({1: "a"}, {"1": "a"}),
        pytest.param(slotted(1), slotted(2), id="objects with slots"),
        pytest.param(slotted(1).__call__, slotted(2).__call__, id="their methods"),
    ],
    ids=str,
)
def test_layouts_with_other_parameters_are_others_and_with_the_same_the_same(one: Any, other: Any) -> None:
    for kind in (parameter, slotted):
        assert json.dumps(layout_name(kind(one))) == json.dumps(layout_name(kind(copy.deepcopy(one))))
        assert json.dumps(layout_name(kind(one))) != json.dumps(layout_name(kind(other)))


def test_the_order_of_a_set_tells_no_layouts_apart() -> None:
    one, other = {8, 16}, {16, 8}
    assert list(one) != list(other)
    assert layout_name(parameter(one)) == layout_name(parameter(other))


def test_a_layout_that_moved_within_the_package_and_a_corpus_with_more_columns_change_no_state(
    roots: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity() -> Any:
        pack = Pack(flatten("toy"), 8)
        return TokenDataset(roots[0], pack=pack, where=[("speaker", "==", "id")]).selection.identity()

    before = identity()
    monkeypatch.setattr(flatten, "__module__", "wavemill.pipelines.elsewhere")
    wider = CORPUS_SCHEMA.insert(0, pa.field("more", pa.string()))
    monkeypatch.setattr("wavemill.storage.selection.CORPUS_SCHEMA", wider)
    assert identity() == before


def test_the_state_of_another_long_list_of_segments_is_refused(roots: tuple[str, str]) -> None:
    # pyarrow prints the ends of a long list only
    ids = [f"first-{shard:02d}-{row:02d}" for shard in range(12) for row in range(8)]
    ours = Build(roots[:1], where=(("id", "in", (*ids[:40], *ids[50:])),))
    theirs = Build(roots[:1], where=(("id", "in", (*ids[:30], *ids[40:])),))
    refuse(ours.dataset(), state_of(theirs.dataset()))


def test_the_state_of_other_codebooks_or_without_a_shuffle_is_refused(roots: tuple[str, str]) -> None:
    dataset = TokenDataset(roots[0], ["toy"])
    refuse(dataset, state_of(TokenDataset(roots[0], {"toy": 1})))
    refuse(dataset, state_of(TokenDataset(roots[0], ["toy"], shuffle=False)))


def test_the_state_of_another_mixture_is_refused(roots: tuple[str, str]) -> None:
    mixed = Build(roots, weights=(0.7, 0.3))
    one = replace(mixed, roots=roots[:1], weights=(1.0,))
    reweighed = replace(mixed, weights=(0.3, 0.7))
    turned = replace(mixed, roots=roots[::-1])
    for ours, theirs in ((mixed, reweighed), (mixed, one), (one, mixed), (mixed, turned)):
        refuse(ours.dataset(), state_of(theirs.dataset()))
    refuse(mixed.dataset(), {})
    reseeded = state_of(replace(mixed, seed=3).dataset())
    reseeded["datasets"][0] = state_of(mixed.dataset())["datasets"][0]
    assert "Dataset 1 of the mixture" in refuse(mixed.dataset(), reseeded)


def test_the_state_of_an_epochs_last_batch_begins_the_next(roots: tuple[str, str]) -> None:
    for build in (Build(roots[:1], packing="single", epoch=3), Build(roots, weights=(0.5, 0.5), epoch=3)):
        for tail in ("pad", "drop"):
            *_, last = build.dataset(batch_size=7, tail=tail)
            dataset = build.dataset(batch_size=2)
            dataset.load_state_dict(last.state)
            assert dataset.epoch == 4
            dataset.set_epoch(4)
            found = [row for batch in dataset for row in rows(batch) if row is not None]
            assert found == undisturbed(replace(build, epoch=4))


def test_setting_the_epoch_that_was_loaded_keeps_the_place_and_any_other_begins(roots: tuple[str, str]) -> None:
    build = Build(roots[:1], epoch=2)
    batches = list(build.dataset(batch_size=5))
    dataset = build.dataset(batch_size=5)
    dataset.set_epoch(0)
    dataset.load_state_dict(batches[3].state)
    assert dataset.epoch == 2
    dataset.set_epoch(2)
    assert [rows(batch) for batch in dataset] == [rows(batch) for batch in batches[4:]]
    for epoch in (3, 2):
        dataset.set_epoch(epoch)
        found = [row for batch in dataset for row in rows(batch) if row is not None]
        assert found == undisturbed(replace(build, epoch=epoch))


def test_a_dataset_says_where_its_own_last_batch_left_it(roots: tuple[str, str]) -> None:
    dataset = Build(roots[:1]).dataset(batch_size=5)
    begin = dataset.state_dict()
    for batch in islice(dataset, 4):
        assert dataset.state_dict() == batch.state
    dataset.set_epoch(1)
    assert dataset.state_dict() == {**begin, "cursors": [[1, 0, 0]]}  # the epoch that was left stays left
    dataset.load_state_dict(begin)
    assert dataset.state_dict() == begin


def copied(dataset: Feed, how: str) -> Feed:
    return pickle.loads(pickle.dumps(dataset)) if how == "pickle" else copy.deepcopy(dataset)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_the_workers_of_a_copied_dataset_see_each_new_epoch(how: str, roots: tuple[str, str]) -> None:
    build = Build(roots[:1])
    dataset = copied(build.dataset(batch_size=20), how)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context="fork", persistent_workers=True
    )
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        found = [row for batch in loader for row in rows(batch) if row is not None]
        assert found == undisturbed(replace(build, epoch=epoch))


def test_a_copied_dataset_goes_on_where_the_first_stood_and_they_part_there(roots: tuple[str, str]) -> None:
    build = Build(roots[:1])
    batches = list(build.dataset(batch_size=20))
    first = build.dataset(batch_size=20)
    first.load_state_dict(batches[2].state)
    for how in ("pickle", "deepcopy"):
        second = copied(first, how)
        assert [rows(batch) for batch in second] == [rows(batch) for batch in batches[3:]]
        second.set_epoch(4)
        assert (first.epoch, second.epoch) == (0, 4)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_that_live_on_see_each_new_epoch_and_each_loaded_state(context: str, roots: tuple[str, str]) -> None:
    build = Build(roots[:1], window_bytes=6_000)
    dataset = build.dataset(batch_size=5)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context=context, persistent_workers=True
    )
    for epoch in (0, 5, 1):
        dataset.set_epoch(epoch)
        batches = list(loader)
        found = [row for batch in batches for row in rows(batch) if row is not None]
        assert found == undisturbed(replace(build, epoch=epoch))
    dataset.load_state_dict(batches[6].state)
    assert [rows(batch) for batch in loader] == [rows(batch) for batch in batches[7:]]
