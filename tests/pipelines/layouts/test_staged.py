"""AudioLM's stages: the second, the third, and all in one sequence."""

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
    require_same_laid,
    rows,
    rows_of_streams,
    specs,
)
from wavemill.pipelines.layouts.staged import coarse, fine, stages
from wavemill.tokenizers.spec import UserError

STREAMS = specs(semantic=(1, 10), acoustic=(3, 10))
# two semantic tokens and three frames, as the paper's figure has twice as many frames
ONE = rows(STREAMS, semantic=[[1, 2]], acoustic=[[[0, 1, 2], [3, 4, 5], [6, 7, 8]]])


def said(layout: Any, tokens: Any) -> list[str]:
    return [layout.plan(STREAMS).vocabulary.said(token) for token in tokens.tolist()]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_both_streams_come_back_from_the_second_stage(data: st.DataObject) -> None:
    num = data.draw(st.integers(1, 3))
    layout = coarse("semantic", "acoustic", num, given=data.draw(st.booleans()), ends=data.draw(st.booleans()))
    made = data.draw(rows_of_streams(STREAMS))
    require_invertible(layout.plan(STREAMS), made, held={"semantic": [0], "acoustic": range(num)})


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_codes_come_back_from_the_third_stage_whole_or_in_pieces(data: st.DataObject) -> None:
    first, num = data.draw(st.sampled_from([(1, None), (2, None), (2, 3), (1, 2)]))
    layout = fine("acoustic", first, num, piece=data.draw(st.none() | st.integers(1, 7)))
    made = data.draw(rows_of_streams(STREAMS))
    require_invertible(layout.plan(STREAMS), made, held={"acoustic": range(num or 3)})


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_both_streams_come_back_from_all_stages(data: st.DataObject) -> None:
    first, num = data.draw(st.sampled_from([(1, None), (2, None), (1, 2)]))
    layout = stages("semantic", "acoustic", first, num, ends=data.draw(st.booleans()))
    made = data.draw(rows_of_streams(STREAMS))
    require_invertible(layout.plan(STREAMS), made, held={"semantic": [0], "acoustic": range(num or 3)})


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_steps_that_no_segment_gives_are_refused(data: st.DataObject) -> None:
    layout = data.draw(
        st.sampled_from(
            [
                coarse("semantic", "acoustic", 2, ends=True),
                fine("acoustic", 1, piece=2),
                fine("acoustic", 2),
                stages("semantic", "acoustic", 1),
            ]
        )
    )
    plan = layout.plan(STREAMS)
    made = data.draw(st.just(ONE) | rows_of_streams(STREAMS, max_segments=1))
    require_refused_or_true(plan, data.draw(disturbed(plan, plan.lay(made).tokens)))


def test_the_second_stage_is_semantic_tokens_and_then_coarse_ones_frame_by_frame() -> None:
    laid = coarse("semantic", "acoustic", 2).plan(STREAMS).lay(ONE)
    assert laid.tokens.tolist() == [1, 2, 10, 23, 11, 24, 12, 25]
    assert laid.loss_S is None  # AudioLM's model learns both
    given = coarse("semantic", "acoustic", 2, given=True, ends=True).plan(STREAMS).lay(ONE)
    assert given.tokens.tolist() == [30, 1, 2, 10, 23, 11, 24, 12, 25, 31]
    assert given.loss_S is not None
    assert given.loss_S.tolist() == [False] * 3 + [True] * 7


def test_the_third_stage_is_given_the_coarse_tokens() -> None:
    laid = fine("acoustic", 1).plan(STREAMS).lay(ONE)
    assert laid.tokens.tolist() == [0, 1, 2, 13, 26, 14, 27, 15, 28]
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False] * 3 + [True] * 6


def test_the_third_stage_in_pieces_is_that_of_each_piece() -> None:
    laid = fine("acoustic", 1, piece=2).plan(STREAMS).lay(ONE)
    assert laid.tokens.tolist() == [0, 1, 13, 26, 14, 27, 2, 15, 28]
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False, False, True, True, True, True, False, True, True]
    require_same_laid(fine("acoustic", 1, piece=3).plan(STREAMS).lay(ONE), fine("acoustic", 1).plan(STREAMS).lay(ONE))


def test_all_stages_stand_in_one_sequence_with_marks_between() -> None:
    layout = stages("semantic", "acoustic", 2, ends=True)
    assert said(layout, layout.plan(STREAMS).lay(ONE).tokens) == [
        *["<bos>", "semantic.0:1", "semantic.0:2", "<coarse>"],
        *["acoustic.0:0", "acoustic.1:3", "acoustic.0:1", "acoustic.1:4", "acoustic.0:2", "acoustic.1:5"],
        *["<fine>", "acoustic.2:6", "acoustic.2:7", "acoustic.2:8", "<eos>"],
    ]


def test_fine_tokens_of_more_frames_than_there_are_coarse_ones_are_refused() -> None:
    plan = fine("acoustic", 1).plan(STREAMS)
    laid = plan.lay(ONE)
    laid.tokens[2] = 13  # the last coarse token is now the first of the fine ones
    with pytest.raises(ValueError, match="tokens at step 2"):
        plan.invert(laid)
    with pytest.raises(ValueError, match="3 and 2 frames of acoustic"):
        plan.invert(type(laid)(np.array([0, 1, 2, 13, 26, 14, 27])))


@pytest.mark.parametrize("kind", ["numbers", "chunks", "missing"])
@pytest.mark.parametrize(
    ("layout", "stream"),
    [
        (coarse("semantic", "acoustic", 2), "semantic"),
        (coarse("semantic", "acoustic", 2), "acoustic"),
        (fine("acoustic", 2), "acoustic"),
        (stages("semantic", "acoustic", 2), "semantic"),
        (stages("semantic", "acoustic", 2), "acoustic"),
    ],
)
def test_stages_say_which_streams_they_cannot_take(layout: Any, stream: str, kind: str) -> None:
    with pytest.raises(UserError, match=rf"^Layout {type(layout).__name__} takes .*'{stream}'.*\.$"):
        layout.plan(refused_kinds(STREAMS, stream)[kind])


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (coarse("semantic", "acoustic", 4), "takes 4 codebook(s) of stream 'acoustic', of which 3 are read"),
        (coarse("semantic", "acoustic", 0), "takes 1 codebook of stream 'acoustic' or more; 0 were asked for"),
        (coarse("acoustic", "acoustic", 1), "takes 2 different streams; 'acoustic' is named twice"),
        (stages("acoustic", "acoustic", 1), "takes 2 different streams; 'acoustic' is named twice"),
        (fine("acoustic"), "takes 4 coarse codebook(s) of stream 'acoustic' and finer ones after them, of 3 in all"),
        (fine("acoustic", 3), "takes 3 coarse codebook(s) of stream 'acoustic' and finer ones after them, of 3 in all"),
        (fine("acoustic", 0), "takes 0 coarse codebook(s)"),
        (fine("acoustic", 1, 4), "takes 4 codebook(s) of stream 'acoustic', of which 3 are read"),
        (fine("acoustic", 1, piece=0), "is given pieces of 0 frames; they must have 1 or more"),
        (stages("semantic", "acoustic", 2, 2), "takes 2 coarse codebook(s) of stream 'acoustic'"),
    ],
)
def test_codebooks_and_pieces_that_make_no_stage_are_refused(layout: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        layout.plan(STREAMS)
    assert str(caught.value).startswith(f"Layout {type(layout).__name__} {expected}")
