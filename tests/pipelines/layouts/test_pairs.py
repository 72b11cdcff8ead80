"""Units to units: the source of a pair is given, the target predicted, and both come back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams_made import (
    Rows,
    disturbed,
    refused_kinds,
    require_invertible,
    require_refused_or_true,
    rows,
    rows_of_streams,
    spec,
    specs,
)
from wavemill.pipelines.layouts.pairs import units_to_units
from wavemill.storage.layouts import Laid, PlannedLayout
from wavemill.tokenizers.spec import StreamSpec, UserError

ONE = specs(**{"units@0": (1, 5), "units@1": (1, 5)})
TWO = specs(**{"en@0": (1, 5), "en@1": (1, 5), "de@0": (1, 3), "de@1": (1, 3)})


def read_more(given: dict[str, StreamSpec]) -> dict[str, StreamSpec]:
    """The same streams with a codebook more, of which the layout takes the first."""
    return {name: spec(2, each.codebook_size) for name, each in given.items()}


@given(drawn=rows_of_streams(read_more(ONE)))
def test_both_sides_of_a_pair_come_back(drawn: Rows) -> None:
    laid = require_invertible(units_to_units("units").plan(read_more(ONE)), drawn, {"units@0": (0,), "units@1": (0,)})
    assert laid.loss_S is not None
    predicted = (drawn["units@1"].counts_N + 1).sum() if len(drawn["units@1"].counts_N) else 0
    assert laid.loss_S.sum() == predicted


@given(drawn=rows_of_streams(TWO))
def test_sides_in_two_streams_come_back(drawn: Rows) -> None:
    require_invertible(units_to_units("en", "de").plan(TWO), drawn, {"en@0": (0,), "de@1": (0,)})


def test_source_then_target_in_the_same_tokens_and_only_the_target_is_predicted() -> None:
    plan = units_to_units("units").plan(ONE)
    laid = plan.lay(rows(ONE, **{"units@0": [[4, 0, 4], []], "units@1": [[1, 2], [3]]}))
    sep, eos = plan.vocabulary.token("<sep>"), plan.vocabulary.token("<eos>")
    assert (sep, eos, plan.column_sizes) == (5, 6, (7,))
    assert laid.tokens.tolist() == [4, 0, 4, sep, 1, 2, eos, sep, 3, eos]
    assert laid.loss_S is not None
    assert laid.loss_S.astype(int).tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 1, 1]


def test_the_tokens_of_another_target_stream_come_behind() -> None:
    plan = units_to_units("en", "de").plan(TWO)
    laid = plan.lay(rows(TWO, **{"en@0": [[4]], "en@1": [[1, 1]], "de@0": [[2, 2]], "de@1": [[0, 2]]}))
    assert [plan.vocabulary.said(token) for token in laid.tokens.tolist()] == [
        "en.0:4",
        "<sep>",
        "de.0:0",
        "de.0:2",
        "<eos>",
    ]


def test_the_layout_takes_pairs_of_the_first_codebook() -> None:
    layout = units_to_units("units")
    assert isinstance(layout, PlannedLayout)
    assert (layout.grouping.by, layout.grouping.num_members) == ("pair", 2)
    assert dict(layout.streams) == {"units": 1}
    assert dict(units_to_units("en", "de").streams) == {"en": 1, "de": 1}


@given(data=st.data())
def test_tokens_that_no_pair_gives_are_refused(data: st.DataObject) -> None:
    plan = units_to_units("units").plan(ONE)
    tokens = plan.lay(rows(ONE, **{"units@0": [[4, 0, 4]], "units@1": [[1, 2]]})).tokens
    require_refused_or_true(plan, data.draw(disturbed(plan, tokens)))
    with pytest.raises(ValueError, match="<sep>"):
        plan.invert(Laid(np.array([1, 2, 6])))


@pytest.mark.parametrize("kind", ["numbers", "chunks", "missing"])
def test_streams_without_units_are_refused_in_a_sentence(kind: str) -> None:
    with pytest.raises(UserError, match=r"Layout units-to-units takes .*units@1.*[.?]$"):
        units_to_units("units").plan(refused_kinds(ONE, "units@1")[kind])
