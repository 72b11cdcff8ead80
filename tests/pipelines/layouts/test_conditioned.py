"""Numbers in front of what any other layout gives."""

from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams_made import Rows, random_rows, require_invertible, rows_of_streams, spec
from timed_made import TEXT, said, text_rows
from wavemill.pipelines.layouts.conditioned import conditioned
from wavemill.pipelines.layouts.continuous import continuous
from wavemill.pipelines.layouts.flat import flatten, semantic
from wavemill.pipelines.layouts.grid import delay
from wavemill.pipelines.layouts.interleaved import interleaved
from wavemill.pipelines.layouts.moshi import moshi
from wavemill.pipelines.layouts.plan import NamedLayout
from wavemill.storage.layouts import GroupBy, Grouping, Laid, StreamRows
from wavemill.tokenizers.spec import FrameRule, StreamSpec, UserError

SPECS = {
    "vector": spec(0, 0, dim=4, frame_rule=FrameRule.ONE),
    "other": spec(0, 0, dim=2, frame_rule=FrameRule.ONE),
    "features": spec(0, 0, dim=3),
    "acoustic": spec(3, 5),
}
LAYOUTS: dict[str, NamedLayout] = {
    "one column": conditioned("vector", flatten("acoustic", ends=True)),
    "several columns": conditioned("vector", delay("acoustic")),
    "numbers behind it": conditioned("vector", continuous("features", prefix="acoustic")),
    "two conditions": conditioned("other", conditioned("vector", delay("acoustic"))),
    "many frames": conditioned("features", semantic("acoustic")),
}


def taken(layout: NamedLayout) -> dict[str, StreamSpec]:
    return {name: SPECS[name] for name in layout.streams}


@pytest.mark.parametrize("name", LAYOUTS)
@given(st.data())
def test_what_went_in_comes_out(name: str, data: st.DataObject) -> None:
    specs = taken(LAYOUTS[name])
    rows = data.draw(rows_of_streams(specs))
    books = 1 if name in ("many frames", "numbers behind it") else 3
    held = {stream: range(0 if specs[stream].dim else books) for stream in specs}
    laid = require_invertible(LAYOUTS[name].plan(specs), rows, held)
    for stream, frames_TD in laid.frames.items():
        np.testing.assert_array_equal(frames_TD, rows[stream].frames_TD)


def toy_rows(acoustic: list[int], vector: list[int], stream: str = "vector") -> Rows:
    rng = np.random.default_rng(0)
    return {
        stream: random_rows(SPECS[stream], vector, rng),
        "acoustic": random_rows(SPECS["acoustic"], acoustic, rng),
    }


def test_each_segment_begins_with_its_condition_and_one_without_begins_as_ever() -> None:
    rows = toy_rows([2, 1], [1, 0])
    plan, inner = (layout.plan(SPECS) for layout in (conditioned("vector", flatten("acoustic")), flatten("acoustic")))
    tokens = inner.lay(rows).tokens.tolist()
    laid = plan.lay(rows)
    assert plan.vocabulary.said(15) == "<condition>"
    assert laid.tokens.tolist() == [15, *tokens]
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False] + [True] * 9
    assert plan.frame_tokens == {"vector": 15}
    assert plan.num_steps(rows).tolist() == [7, 3]
    assert plan.column_sizes == (16,)
    assert [block.offset for block in inner.vocabulary.blocks] == [0, 5, 10]  # the old tokens are what they were


def test_a_class_or_what_is_no_layout_is_refused_in_a_sentence() -> None:
    for found, words in ((flatten, "write flatten(...), with its streams."), (len, "takes another layout behind")):
        with pytest.raises(UserError) as caught:
            conditioned("vector", found)  # pyright: ignore[reportArgumentType]
        assert words in str(caught.value)


def test_what_the_layout_behind_it_holds_of_a_segment_is_what_it_holds() -> None:
    """Of text with times the ids without them."""
    specs = {"voice": SPECS["vector"], "text": TEXT, "units": spec(1, 5)}
    laid_rows = text_rows([said((0, 10, [3]), (12, 20, [4, 1]))])
    laid_rows["units"] = random_rows(specs["units"], [30], np.random.default_rng(0))
    laid_rows["voice"] = random_rows(specs["voice"], [1], np.random.default_rng(0))
    for layout in (moshi("text", "units"), interleaved("text", "units")):
        plan = conditioned("voice", layout).plan(specs)
        held, inverted = plan.held(laid_rows), plan.invert(plan.lay(laid_rows))
        assert held.keys() == inverted.keys() == specs.keys()
        for stream in ("text", "units"):
            np.testing.assert_array_equal(held[stream].books[0], inverted[stream].books[0])
        np.testing.assert_array_equal(held["voice"].frames_TD, inverted["voice"].frames_TD)


def test_the_condition_stands_in_every_column() -> None:
    rows = toy_rows([1], [1])
    plan, inner = (layout.plan(SPECS) for layout in (conditioned("vector", delay("acoustic")), delay("acoustic")))
    laid = plan.lay(rows)
    assert [plan.vocabulary.said(token, column) for column, token in enumerate(laid.tokens[0])] == ["<condition>"] * 3
    np.testing.assert_array_equal(laid.tokens[1:], inner.lay(rows).tokens)


def test_what_the_layout_behind_it_gives_is_still_given() -> None:
    layout = conditioned("vector", continuous("features", prefix="acoustic"))
    rng = np.random.default_rng(0)
    counts = {"vector": [1], "features": [2], "acoustic": [3]}
    laid = layout.plan(SPECS).lay({name: random_rows(SPECS[name], count, rng) for name, count in counts.items()})
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False] * 5 + [True] * 3


def test_a_second_condition_has_a_name_of_its_own() -> None:
    plan = LAYOUTS["two conditions"].plan(SPECS)
    assert list(plan.vocabulary.specials(2)) == ["<pad>", "<condition>", "<condition other>"]
    assert plan.frame_tokens["vector"] == plan.vocabulary.token("<condition>")
    assert plan.frame_tokens["other"] == plan.vocabulary.token("<condition other>")


def test_the_first_member_of_a_group_gives_the_condition() -> None:
    class pairs:
        grouping = Grouping(GroupBy.PAIR, 2)
        streams = MappingProxyType({"acoustic": 1})
        takes_chunks = True

        def plan(self, specs: dict[str, StreamSpec]):
            return semantic("acoustic@1").plan(specs)

    layout = conditioned("vector", pairs())
    assert layout.grouping == pairs.grouping
    assert layout.takes_chunks
    assert not conditioned("vector", semantic("acoustic")).takes_chunks
    specs = {f"{name}@{index}": SPECS[name] for name in ("vector", "acoustic") for index in range(2)}
    assert dict(layout.plan(specs).frame_tokens) == {"vector@0": 5}


@pytest.mark.parametrize(
    ("tokens", "num_frames"),
    [
        ([0, 15, 5, 10], 1),  # behind a code
        ([15, 0, 5, 10], 0),
        ([0, 5, 10], 1),
        ([15, 15, 0, 5, 10], 1),
        ([15, 5, 0, 10], 1),  # what is behind it is no segment
    ],
)
def test_steps_that_no_segment_gives_are_refused(tokens: list[int], num_frames: int) -> None:
    plan = conditioned("vector", flatten("acoustic")).plan(SPECS)
    frames = {"vector": np.zeros((num_frames, 4), dtype=np.float16)}
    with pytest.raises(ValueError, match=r"\w"):
        plan.invert(Laid(np.array(tokens, dtype=np.int64), None, frames))


def test_a_mistake_in_the_streams_is_a_sentence() -> None:
    for layout, words in (
        (conditioned("acoustic", flatten("acoustic")), "has 'acoustic', too"),
        (conditioned("acoustic", continuous("features")), r"'acoustic' \(toy\) holds codes"),
        (conditioned("vectors", flatten("acoustic")), "Did you mean 'vector'"),
        (conditioned("vector", flatten("acoustic", 4)), "takes 4 codebook"),
    ):
        with pytest.raises(UserError, match=words):
            layout.plan(SPECS)


def test_a_segment_without_anything_is_still_one() -> None:
    plan = conditioned("vector", flatten("acoustic")).plan(SPECS)
    found = plan.invert(plan.lay(toy_rows([0], [0])))
    assert {name: rows.counts_N.tolist() for name, rows in found.items()} == {"vector": [0], "acoustic": [0]}
    assert found["vector"].frames_TD is not None
    assert found["vector"].frames_TD.shape == (0, 4)
    assert isinstance(found["acoustic"], StreamRows)
