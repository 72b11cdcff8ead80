"""Semantic tokens beside the codes of their frames, whatever the two frame rates."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams_made import disturbed, require_invertible, require_refused_or_true, rows, rows_of_streams, spec, text_spec
from wavemill.pipelines.layouts.soundstorm import soundstorm
from wavemill.tokenizers.spec import FrameRule, StreamSpec, UserError

LAYOUT = soundstorm("semantic", "acoustic")


def streams(
    semantic: int, acoustic: int, *, num_codebooks: int = 2, rule: FrameRule = FrameRule.CEIL
) -> dict[str, StreamSpec]:
    """A semantic and an acoustic stream of so many samples a frame, at one sample rate."""
    return {
        "semantic": spec(1, 7, hop_length=semantic, window_length=semantic + 80),
        "acoustic": spec(num_codebooks, 5, hop_length=acoustic, frame_rule=rule),
    }


def test_semantic_tokens_of_half_the_rate_stand_beside_two_frames_each() -> None:
    made = streams(640, 320)  # 25 and 50 Hz, as in the paper
    plan = LAYOUT.plan(made)
    assert plan.column_sizes == (8, 7, 7)
    _ = plan.vocabulary.token("<pad>")
    codes = rows(made, semantic=[[6, 6, 1]], acoustic=[[[0, 1, 2, 3, 4, 0, 1], [4, 3, 2, 1, 0, 4, 3]]])
    assert plan.lay(codes).tokens.T.tolist() == [
        [6, 6, 6, 6, 1, 1, _],
        [0, 1, 2, 3, 4, 0, 1],
        [4, 3, 2, 1, 0, 4, 3],
    ]


def test_semantic_tokens_of_four_times_the_rate_have_four_columns() -> None:
    made = streams(320, 1280, num_codebooks=1)  # HuBERT's 50 Hz beside Mimi's 12.5 Hz
    plan = LAYOUT.plan(made)
    _ = plan.vocabulary.token("<pad>")
    codes = rows(made, semantic=[[0, 1, 2, 3, 4, 5]], acoustic=[[2, 1]])
    assert plan.lay(codes).tokens.tolist() == [[0, 1, 2, 3, 2], [4, 5, _, _, 1]]


def test_a_stream_that_is_over_first_is_padded() -> None:
    made = streams(320, 320, num_codebooks=1)
    plan = LAYOUT.plan(made)
    pads = plan.vocabulary.token("<pad>", 0), plan.vocabulary.token("<pad>", 1)
    codes = rows(made, semantic=[[3, 4], [], [1, 2, 3]], acoustic=[[1, 2, 3], [4], []])
    laid = require_invertible(plan, codes)
    assert laid.tokens.tolist() == [
        [3, 1],
        [4, 2],
        [pads[0], 3],
        [pads[0], 4],
        [1, pads[1]],
        [2, pads[1]],
        [3, pads[1]],
    ]


@settings(max_examples=60)
@given(st.data(), st.sampled_from([64, 96, 160, 256, 320, 441, 640, 1280]), st.sampled_from([64, 160, 320, 512, 1024]))
def test_both_streams_come_back_at_any_two_rates(data: st.DataObject, semantic: int, acoustic: int) -> None:
    made = streams(semantic, acoustic, rule=data.draw(st.sampled_from([FrameRule.CEIL, FrameRule.FLOOR])))
    plan = LAYOUT.plan(made)
    codes = data.draw(rows_of_streams(made, clocked=data.draw(st.booleans()), max_frames=12))
    require_invertible(plan, codes)
    require_invertible(
        soundstorm("semantic", "acoustic", codebooks=1).plan(made), codes, {"semantic": [0], "acoustic": [0]}
    )


@given(st.data(), st.sampled_from([160, 320, 640]))
def test_steps_that_no_segment_gives_are_refused(data: st.DataObject, semantic: int) -> None:
    made = streams(semantic, 320)
    plan = LAYOUT.plan(made)
    codes = data.draw(rows_of_streams(made, max_segments=1))
    require_refused_or_true(plan, data.draw(disturbed(plan, plan.lay(codes).tokens)))


def test_only_codes_of_the_acoustic_stream_can_be_masked() -> None:
    vocabulary = LAYOUT.plan(streams(320, 320)).vocabulary
    assert [vocabulary.has("<mask>", column) for column in range(3)] == [False, True, True]
    assert vocabulary.said(6, column=2) == "<mask>"


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        (soundstorm("acoustic", "acoustic"), {}, "takes 2 different streams; 'acoustic' is named twice"),
        (soundstorm("semantic", "acoustic", 3), {}, r"takes 3 codebook\(s\) of stream 'acoustic', of which 2 are read"),
        (LAYOUT, {"semantic": text_spec()}, r"'semantic' \(text-tokens\) has no clock of its own"),
        (LAYOUT, {"acoustic": replace(spec(2, 5), chunk_length=9, chunk_stride=8)}, "takes no chunks that overlap"),
        (LAYOUT, {"semantic": spec(0, 0, dim=4)}, "takes codes; stream 'semantic' holds frames of 4 numbers"),
    ],
)
def test_streams_that_it_cannot_take_are_refused_in_words(layout: soundstorm, changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        layout.plan({**streams(320, 320), **changes})


def test_a_semantic_token_is_given_over_the_whole_of_its_frame() -> None:
    made = streams(960, 320, num_codebooks=1)
    laid = LAYOUT.plan(made).lay(rows(made, semantic=[[1, 2]], acoustic=[np.zeros(8, dtype=int)]))
    pad = LAYOUT.plan(made).vocabulary.token("<pad>")
    assert laid.tokens[:, 0].tolist() == [1, 1, 1, 2, 2, 2, pad, pad]
