"""Separated speakers by turns: whose frames they are is marked, rounds stand for the same time, and all come back."""

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
from wavemill.pipelines.layouts.speakers import speakers
from wavemill.storage.layouts import Laid, PlannedLayout, member
from wavemill.tokenizers.spec import StreamSpec, UserError

TALKERS = specs(**{"units@0": (1, 10), "units@1": (1, 10)})
CODED = specs(**{"codec@0": (2, 10), "codec@1": (2, 10)})


def talkers(num: int, num_codebooks: int) -> dict[str, StreamSpec]:
    return {member("codec", index): spec(num_codebooks, 5) for index in range(num)}


@given(num=st.integers(1, 3), num_codebooks=st.integers(1, 3), chunk=st.integers(1, 4), data=st.data())
def test_each_speakers_codes_come_back(num: int, num_codebooks: int, chunk: int, data: st.DataObject) -> None:
    streams = talkers(num, num_codebooks)
    drawn = data.draw(rows_of_streams(streams, max_frames=9))
    codebooks = data.draw(st.none() | st.integers(1, num_codebooks))
    plan = speakers("codec", num_speakers=num, chunk=chunk, codebooks=codebooks).plan(streams)
    require_invertible(plan, drawn, {name: range(codebooks or num_codebooks) for name in streams})


@given(drawn=rows_of_streams(talkers(2, 2), max_frames=9, together=talkers(2, 2)), chunk=st.integers(1, 4))
def test_children_of_one_length_speak_of_the_same_time_in_each_round(drawn: Rows, chunk: int) -> None:
    plan = speakers("codec", chunk=chunk).plan(talkers(2, 2))
    laid = plan.lay(drawn)
    marks = [plan.vocabulary.token(f"<speaker-{index}>") for index in range(2)]
    places_S = np.flatnonzero(laid.tokens >= marks[0])
    assert laid.tokens[places_S].tolist() == marks * (len(places_S) // 2)
    sizes = np.diff([*places_S, len(laid.tokens)]) - 1
    assert sizes[0::2].tolist() == sizes[1::2].tolist()


def test_frames_of_each_speaker_stand_by_turns_behind_a_mark() -> None:
    plan = speakers("units", chunk=2).plan(TALKERS)
    laid = plan.lay(rows(TALKERS, **{"units@0": [[0, 1, 2], [5]], "units@1": [[3, 4, 9], [6]]}))
    first, second = (plan.vocabulary.token(f"<speaker-{index}>") for index in range(2))
    assert (first, second, plan.column_sizes) == (10, 11, (12,))
    assert laid.tokens.tolist() == [first, 0, 1, second, 3, 4, first, 2, second, 9, first, 5, second, 6]
    assert laid.loss_S is None


def test_codebooks_take_turns_in_each_frame() -> None:
    plan = speakers("codec", chunk=2).plan(CODED)
    laid = plan.lay(rows(CODED, **{"codec@0": [[[1, 2, 3], [4, 5, 6]]], "codec@1": [[[7, 8, 9], [0, 1, 2]]]}))
    assert laid.tokens.tolist() == [20, 1, 14, 2, 15, 21, 7, 10, 8, 11, 20, 3, 16, 21, 9, 12]


def test_a_speaker_whose_frames_are_over_takes_no_part() -> None:
    plan = speakers("units", chunk=2).plan(TALKERS)
    laid = plan.lay(rows(TALKERS, **{"units@0": [[0], [], []], "units@1": [[3, 4, 5], [7], []]}))
    assert laid.tokens.tolist() == [10, 0, 11, 3, 4, 11, 5, 11, 7]
    assert plan.num_steps(rows(TALKERS, **{"units@0": [[0], [], []], "units@1": [[3, 4, 5], [7], []]})).tolist() == [
        7,
        2,
        0,
    ]


def test_the_layout_takes_the_separated_children_of_a_segment() -> None:
    layout = speakers("units", num_speakers=3)
    assert isinstance(layout, PlannedLayout)
    assert (layout.grouping.by, layout.grouping.num_members) == ("parent", 3)
    assert dict(layout.streams) == {"units": None}


@given(data=st.data())
def test_tokens_that_no_segment_gives_are_refused(data: st.DataObject) -> None:
    plan = speakers("codec", chunk=2).plan(CODED)
    laid = plan.lay(rows(CODED, **{"codec@0": [[[1, 2, 3], [4, 5, 6]]], "codec@1": [[[7, 8], [0, 1]]]}))
    require_refused_or_true(plan, data.draw(disturbed(plan, laid.tokens)))


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([1, 14, 21, 7, 10], "no speaker's mark at step 0"),
        ([20, 1, 21, 7, 10], "1 tokens of codec@0, of 2 codebooks"),
        ([20, 14, 1, 21, 7, 10], "tokens of codec@0 whose codebooks do not take turns"),
        ([21, 7, 10, 20, 1, 14], "speakers that do not take turns"),
        ([20, 1, 14, 20, 2, 15], "speakers that do not take turns"),
    ],
)
def test_what_is_wrong_with_tokens_is_told(tokens: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        speakers("codec", chunk=2).plan(CODED).invert(Laid(np.array(tokens)))


@pytest.mark.parametrize("kind", ["numbers", "chunks", "missing"])
def test_streams_without_codes_of_each_speaker_are_refused_in_a_sentence(kind: str) -> None:
    with pytest.raises(UserError, match=r"Layout speakers takes .*units@1.*[.?]$"):
        speakers("units").plan(refused_kinds(TALKERS, "units@1")[kind])


def test_impossible_options_are_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"0 speakers by turns of 25 frames; both must be 1 or more\.$"):
        speakers("units", num_speakers=0).plan({})
    with pytest.raises(UserError, match=r"2 speakers by turns of -1 frames"):
        speakers("units", chunk=-1).plan(TALKERS)
    with pytest.raises(UserError, match=r"takes 3 codebook\(s\) of stream 'codec@0', of which 2 are read"):
        speakers("codec", codebooks=3).plan(CODED)
