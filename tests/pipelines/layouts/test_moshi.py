"""Moshi's columns: text at the frames of its words, codes on time and late, one speaker and two."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams_made import (
    Rows,
    disturbed,
    num_segments,
    refused_kinds,
    rows,
    segment_of,
    spec,
    text_spec,
    with_changes,
    write_root,
)
from timed_made import TEXT, Words, any_codes, said, words
from wavemill.pipelines.layouts.moshi import MoshiPlan, moshi
from wavemill.storage.dataset import Pack, TokenDataset
from wavemill.storage.layouts import GroupBy, Grouping, Laid, StreamRows
from wavemill.tokenizers.spec import FrameRule, UserError

MIMI = spec(3, 5, hop_length=1_280, frame_rule=FrameRule.CEIL)  # 12.5 frames a second: four ticks each
SPECS = {"text": TEXT, "audio": MIMI}
DIALOGUE = {**SPECS, "other": MIMI}
PAIR = {"text@0": TEXT, "text@1": TEXT, "audio@0": MIMI, "audio@1": MIMI}


def plan_of(specs: Any = SPECS, **options: Any) -> MoshiPlan:
    return moshi("text", "audio", **options).plan(specs)


def told(plan: MoshiPlan, laid: Laid) -> list[str]:
    """The columns as people read them, `.` for `<pad>`."""
    columns = []
    for number, column in enumerate(laid.tokens.T.tolist()):
        names = [plan.vocabulary.said(token, number) for token in column]
        short = [name.replace("<pad>", ".").replace("<epad>", "^").rpartition(":")[2] for name in names]
        columns.append(" ".join(short))
    return columns


def one(plan: MoshiPlan, words: Words, codes: list[list[int]]) -> list[str]:
    return told(plan, plan.lay(rows(SPECS, text=[said(*words)], audio=[codes])))


@st.composite
def segments(draw: st.DrawFn, names: tuple[str, ...] = ("audio",), text: str = "text") -> Rows:
    made = draw(
        st.lists(
            st.tuples(
                st.one_of(words().map(lambda each: said(*each)), any_codes()),
                *(st.integers(0, 9) for _ in names),
                st.integers(0, 2**32 - 1),
            ),
            max_size=4,
        )
    )
    specs = {text: TEXT, **dict.fromkeys(names, MIMI)}
    codes = {
        name: [np.random.default_rng(each[-1] + place).integers(0, 5, (3, each[1 + place])) for each in made]
        for place, name in enumerate(names)
    }
    return rows(specs, **{text: [each[0] for each in made]}, **codes)


def require_all_back(plan: MoshiPlan, made: Rows) -> None:
    known = {name: each if name in plan.read_to_plan else StreamRows(each.counts_N, ()) for name, each in made.items()}
    steps_N, laid = plan.num_steps(known), plan.lay(made)
    assert laid.tokens.shape == (steps_N.sum(), len(plan.column_sizes))
    assert ((laid.tokens >= 0) & (laid.tokens < np.array(plan.column_sizes))).all()
    ends_N = np.cumsum(steps_N)
    for index in range(num_segments(made)):
        alone = segment_of(made, index)
        part = laid.tokens[ends_N[index] - steps_N[index] : ends_N[index]]
        np.testing.assert_array_equal(plan.lay(alone).tokens, part)
        found, expected = plan.invert(Laid(part)), plan.held(alone)
        assert found.keys() == expected.keys() == plan_streams(plan)
        for name, each in expected.items():
            assert found[name].counts_N.tolist() == each.counts_N.tolist()
            assert [book.tolist() for book in found[name].books] == [book.tolist() for book in each.books]
        for name in alone.keys() - {plan.text}:
            assert [book.tolist() for book in found[name].books] == [book.tolist() for book in alone[name].books]
        codes = alone[plan.text].books[0]
        assert found[plan.text].books[0].tolist() == codes[codes < 7].tolist()


def plan_streams(plan: MoshiPlan) -> set[str]:
    return {plan.text, *(column.stream for column in plan.columns)}


@settings(max_examples=25, deadline=None)
@given(segments(), st.integers(0, 2))
def test_codes_and_ids_of_text_come_back(made: Rows, acoustic_delay: int) -> None:
    require_all_back(plan_of(acoustic_delay=acoustic_delay), made)


@settings(max_examples=25, deadline=None)
@given(segments(("audio", "other")))
def test_codes_of_both_speakers_come_back(made: Rows) -> None:
    require_all_back(plan_of(DIALOGUE, other="other"), made)


@settings(max_examples=25, deadline=None)
@given(segments(("audio@0", "audio@1"), "text@0"))
def test_codes_of_what_was_separated_come_back(made: Rows) -> None:
    require_all_back(plan_of(PAIR, num_speakers=2), made)


def test_words_stand_where_they_begin_and_acoustic_codes_are_late() -> None:
    """The paper's figure 4: a word's ids from its frame on, `<epad>` before, `<pad>` between."""
    codes = [[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 1], [2, 3, 4, 0, 1, 2]]
    found = one(plan_of(), [(8, 12, [1, 2]), (21, 24, [3])], codes)  # in frames 2 and 5
    assert found == [". ^ 1 2 ^ 3 .", "0 1 2 3 4 0 .", ". 1 2 3 4 0 1", ". 2 3 4 0 1 2"]
    assert one(plan_of(acoustic_delay=2, codebooks=2), [], codes[:2] + codes[2:]) == [
        ". . . . . . . .",
        "0 1 2 3 4 0 . .",
        ". . 1 2 3 4 0 1",
    ]


def test_a_word_at_the_beginning_leaves_a_step_for_its_mark() -> None:
    assert one(plan_of(), [(0, 4, [1]), (4, 8, [2])], [[0] * 4] * 3)[0] == "^ 1 2 . ."


def test_words_that_have_no_room_move_right_and_on_behind_the_last_frame() -> None:
    plan, codes = plan_of(), [[0] * 5] * 3
    assert one(plan, [(4, 8, [1, 2, 3]), (8, 12, [4]), (16, 18, [5])], codes)[0] == "^ 1 2 3 4 5"
    text, first, *_ = one(plan, [(8, 9, [1]), (12, 13, [2, 3, 4]), (900, 910, [5])], codes)
    assert text == ". ^ 1 2 3 4 5"
    assert first == "0 0 0 0 0 . ."
    assert one(plan, [(900, 910, [5])], codes)[0] == ". . . ^ 5 ."


def test_a_segment_of_text_alone_or_of_nothing_has_its_steps() -> None:
    plan = plan_of()
    assert one(plan, [(30, 40, [1, 2])], [[], [], []])[0] == "^ 1 2"
    assert plan.lay(rows(SPECS, text=[[]], audio=[[[], [], []]])).tokens.shape == (0, 4)


def test_two_speakers_have_columns_behind_one_another_and_the_first_ones_text() -> None:
    plan = plan_of(DIALOGUE, other="other", codebooks=2)
    made = rows(DIALOGUE, text=[said((4, 5, [6]))], audio=[[[1, 2], [3, 4], [0, 0]]], other=[[[4], [3], [2]]])
    assert told(plan, plan.lay(made)) == ["^ 6 .", "1 2 .", ". 3 4", "4 . .", ". 3 ."]
    layout = moshi("text", "audio", num_speakers=2)
    assert layout.grouping == Grouping(GroupBy.PARENT, 2)
    assert moshi("text", "audio").grouping is None
    streams = [(column.stream, column.book) for column in layout.plan(PAIR).columns]
    assert streams == [(name, book) for name in ("audio@0", "audio@1") for book in range(3)]


@settings(max_examples=25, deadline=None)
@given(segments().filter(num_segments), st.data())
def test_steps_that_no_segment_gives_are_refused(made: Rows, data: st.DataObject) -> None:
    plan = plan_of()
    tokens = data.draw(disturbed(plan, plan.lay(segment_of(made, 0)).tokens))
    try:
        found = plan.invert(Laid(tokens))
    except ValueError:
        return
    # a text that has these ids in these frames gives these very steps
    step_X = np.flatnonzero(tokens[:, 0] < 7)
    text = said(*((4 * int(step), 4 * int(step), [int(tokens[step, 0])]) for step in step_X))
    np.testing.assert_array_equal(plan.lay({**found, "text": rows(SPECS, text=[text])["text"]}).tokens, tokens)


def test_streams_and_options_that_do_not_fit_are_refused() -> None:
    for specs in refused_kinds(SPECS, "audio").values():
        with pytest.raises(UserError, match="moshi"):
            plan_of(specs)
    mistakes = [
        (with_changes(SPECS, "audio", frame_rule=FrameRule.FREE), {}, "has no clock"),
        ({**SPECS, "text": text_spec()}, {}, "takes text with its times"),
        (
            with_changes(DIALOGUE, "other", hop_length=320),
            {"other": "other"},
            "'audio' has 12.5 frames a second, 'other' 50",
        ),
        (DIALOGUE, {"other": "audio"}, "'audio' is named twice"),
        (DIALOGUE, {"other": "other", "num_speakers": 2}, "leave out other or num_speakers"),
        (SPECS, {"num_speakers": 3}, "takes 1 or 2 speakers; 3 were asked for"),
        (SPECS, {"acoustic_delay": -1}, "an acoustic delay of -1 steps; expected 0 or more"),
        (SPECS, {"codebooks": 4}, r"takes 4 codebook\(s\) of stream 'audio', of which 3 are read"),
    ]
    for specs, options, message in mistakes:
        with pytest.raises(UserError, match=message):
            plan_of(specs, **options)


def test_a_dataset_packs_what_each_segment_says_and_sounds_like(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    shards = [
        rows(
            SPECS,
            text=[said(*((9 * word, 9 * word + 5, [word % 7]) for word in range(index))) for index in range(count)],
            audio=[rng.integers(0, 5, (3, 2 * index)) for index in range(count)],
        )
        for count in (3, 5)
    ]
    write_root(tmp_path, SPECS, shards)
    plan = plan_of()
    pack = Pack(moshi("text", "audio"), 32, "single")  # pyright: ignore
    batches = list(TokenDataset(str(tmp_path), pack=pack, batch_size=1, shuffle=False))
    found = [batch.tokens[batch.segment_ids > 0].tolist() for batch in batches]
    expected = [
        plan.lay(segment_of(made, index)).tokens.tolist() for made in shards for index in range(num_segments(made))
    ]
    assert sorted(found) == sorted(each for each in expected if each)
