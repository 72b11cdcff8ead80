"""Reasoning tokens before reconstruction tokens."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams_made import (
    disturbed,
    refused_kinds,
    require_invertible,
    require_refused_or_true,
    rows,
    rows_of_streams,
    specs,
)
from wavemill.pipelines.layouts.factorized import factorized
from wavemill.tokenizers.spec import UserError

STREAMS = specs(reason=(2, 10), codec=(3, 20))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_both_streams_come_back(data: st.DataObject) -> None:
    first, second = data.draw(st.sampled_from([None, 1, 2])), data.draw(st.sampled_from([None, 1, 3]))
    plan = factorized("reason", "codec", first, second, given=data.draw(st.booleans())).plan(STREAMS)
    held = {"reason": range(first or 2), "codec": range(second or 3)}
    require_invertible(plan, data.draw(rows_of_streams(STREAMS)), held=held)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_steps_that_no_segment_gives_are_refused(data: st.DataObject) -> None:
    plan = factorized("reason", "codec").plan(STREAMS)
    made = data.draw(rows_of_streams(STREAMS, max_segments=1))
    require_refused_or_true(plan, data.draw(disturbed(plan, plan.lay(made).tokens)))


def test_reasoning_tokens_stand_first_between_marks() -> None:
    made = rows(STREAMS, reason=[[[1], [2]]], codec=[[[3, 4], [5, 6], [7, 8]]])
    layout = factorized("reason", "codec", codebooks=2)
    plan = layout.plan(STREAMS)
    laid = plan.lay(made)
    assert [plan.vocabulary.said(token) for token in laid.tokens.tolist()] == [
        *["<reason>", "reason.0:1", "reason.1:2", "<reconstruct>"],
        *["codec.0:3", "codec.1:5", "codec.0:4", "codec.1:6", "<eos>"],
    ]
    assert laid.loss_S is None
    given_first = factorized("reason", "codec", codebooks=2, given=True).plan(STREAMS).lay(made)
    assert given_first.loss_S is not None
    assert given_first.loss_S.tolist() == [False] * 4 + [True] * 5


@pytest.mark.parametrize("kind", ["numbers", "chunks", "missing"])
@pytest.mark.parametrize("stream", ["reason", "codec"])
def test_streams_that_it_cannot_take_are_named(stream: str, kind: str) -> None:
    with pytest.raises(UserError, match=rf"^Layout factorized takes .*'{stream}'.*\.$"):
        factorized("reason", "codec").plan(refused_kinds(STREAMS, stream)[kind])


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (factorized("reason", "codec", 3), "takes 3 codebook(s) of stream 'reason', of which 2 are read."),
        (factorized("reason", "codec", None, 4), "takes 4 codebook(s) of stream 'codec', of which 3 are read."),
        (factorized("codec", "codec"), "takes 2 different streams; 'codec' is named twice."),
    ],
)
def test_codebooks_that_are_not_read_are_refused(layout: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        layout.plan(STREAMS)
    assert said in str(caught.value)
