"""VALL-E's two models: text before the first codebook, text before all of them."""

from typing import Any

import numpy as np
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
    spec,
    text_spec,
)
from wavemill.pipelines.layouts.vall_e import vall_e, vall_e_nar
from wavemill.storage.layouts import Laid
from wavemill.tokenizers.spec import FrameRule, UserError

STREAMS = {"text": text_spec(30), "acoustic": spec(3, 10)}
# "hi" and three frames; a segment without a transcript
TWO = rows(STREAMS, text=[[7, 8], []], acoustic=[[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[9], [9], [9]]])
PROMPT_S = st.sampled_from([0.0, 0.02, 0.05, 1])  # no frame, one, two, more than there are


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_text_and_the_first_codebook_come_back_from_the_first_model(data: st.DataObject) -> None:
    plan = vall_e("text", "acoustic", data.draw(PROMPT_S)).plan(STREAMS)
    require_invertible(plan, data.draw(rows_of_streams(STREAMS)), held={"text": [0], "acoustic": [0]})


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_text_and_codes_come_back_from_the_second_model(data: st.DataObject) -> None:
    num = data.draw(st.sampled_from([None, 2, 3]))
    plan = vall_e_nar("text", "acoustic", num, data.draw(PROMPT_S)).plan(STREAMS)
    require_invertible(plan, data.draw(rows_of_streams(STREAMS)), held={"text": [0], "acoustic": range(num or 3)})


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_steps_that_no_segment_gives_are_refused(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from([vall_e("text", "acoustic"), vall_e_nar("text", "acoustic")]))
    plan = layout.plan(STREAMS)
    made = data.draw(rows_of_streams(STREAMS, max_segments=1))
    require_refused_or_true(plan, data.draw(disturbed(plan, plan.lay(made).tokens)))


def test_the_first_model_is_given_the_text_and_says_when_it_ends() -> None:
    laid = vall_e("text", "acoustic").plan(STREAMS).lay(TWO)
    sep, eos = 40, 41
    assert laid.tokens.tolist() == [7, 8, sep, 30, 31, 32, eos, sep, 39, eos]
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False, False, False, True, True, True, True, False, True, True]


def test_a_prompt_is_the_first_whole_frames_of_the_codes() -> None:
    # 50 frames a second: 0.05 s are two whole ones, and 0.06 s three, though 0.06 * 50 is not 3 in binary
    for prompt_s, given_frames in ((0.05, 2), (0.06, 3), (0.28, 3)):
        laid = vall_e("text", "acoustic", prompt_s).plan(STREAMS).lay(TWO)
        assert laid.loss_S is not None
        first = [False] * (3 + given_frames) + [True] * (4 - given_frames)
        assert laid.loss_S.tolist() == [*first, False, False, True]


def test_the_second_model_has_the_text_in_its_first_column_and_the_codebooks_side_by_side() -> None:
    laid = vall_e_nar("text", "acoustic", prompt_s=0.02).plan(STREAMS).lay(TWO)
    sep, pad = 40, 10
    assert laid.tokens.tolist() == [
        [7, pad, pad],
        [8, pad, pad],
        [sep, pad, pad],
        [30, 3, 6],
        [31, 4, 7],
        [32, 5, 8],
        [sep, pad, pad],
        [39, 9, 9],
    ]
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False, False, False, False, True, True, False, False]


def test_large_alphabets_do_not_overflow_the_integers_that_codes_are_stored_in() -> None:
    streams = {"text": text_spec(150_000), "acoustic": spec(2, 20_000)}
    made = rows(streams, text=[[149_999]], acoustic=[[[19_999], [19_999]]])
    for layout, held in ((vall_e("text", "acoustic"), [0]), (vall_e_nar("text", "acoustic"), [0, 1])):
        require_invertible(layout.plan(streams), made, held={"text": [0], "acoustic": held})


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([[7, 10, 10], [30, 3, 6]], "0 times <sep>"),
        ([[40, 10, 10], [40, 10, 10]], "2 times <sep>"),
        ([[7, 3, 10], [40, 10, 10]], "codes beside the text"),
        ([[30, 10, 10], [40, 10, 10]], "tokens in column 0 that are not of text"),
        ([[40, 10, 10], [30, 3, 10]], "tokens in column 2 that are not of acoustic"),
        ([40, 30], r"tokens \[2\] of 3 columns"),
    ],
)
def test_what_is_wrong_with_steps_is_said(tokens: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        vall_e_nar("text", "acoustic").plan(STREAMS).invert(Laid(np.array(tokens)))


@pytest.mark.parametrize("stream", ["text", "acoustic"])
@pytest.mark.parametrize("kind", ["numbers", "chunks", "missing"])
@pytest.mark.parametrize("layout", [vall_e("text", "acoustic"), vall_e_nar("text", "acoustic")])
def test_both_models_say_which_streams_they_cannot_take(layout: Any, stream: str, kind: str) -> None:
    name = type(layout).__name__.replace("_", "-")
    with pytest.raises(UserError, match=rf"^Layout {name} takes .*'{stream}'.*\.$"):
        layout.plan(refused_kinds(STREAMS, stream)[kind])


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (vall_e("text", "text"), "vall-e takes 2 different streams; 'text' is named twice."),
        (vall_e_nar("text", "acoustic", 4), "vall-e-nar takes 4 codebook(s) of stream 'acoustic', of which 3 are read"),
        (vall_e_nar("text", "acoustic", 1), "vall-e-nar fills in codebooks after the first; of stream 'acoustic' 1 is"),
        (vall_e("text", "acoustic", -1.0), "vall-e is given a prompt of -1.0 s; it must have 0 s or more."),
        (vall_e("text", "acoustic", float("nan")), "vall-e is given a prompt of nan s"),
        (vall_e_nar("text", "acoustic", prompt_s=float("inf")), "vall-e-nar is given a prompt of inf s"),
    ],
)
def test_options_that_do_not_fit_are_refused(layout: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        layout.plan(STREAMS)
    assert str(caught.value).startswith(f"Layout {expected}")


def test_a_prompt_in_seconds_needs_a_clock() -> None:
    units = {"text": text_spec(), "acoustic": spec(1, frame_rule=FrameRule.FREE, durations=True)}
    assert vall_e("text", "acoustic").plan(units)
    with pytest.raises(UserError, match=r"stream 'acoustic' \(toy\) has no clock that says how many frames"):
        vall_e("text", "acoustic", 3.0).plan(units)
