"""Text and speech in turn: spans of words, the marks between them, and what two such sequences hold together."""

from dataclasses import replace
from itertools import zip_longest
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
from wavemill.pipelines.layouts.interleaved import InterleavedPlan, interleaved
from wavemill.storage.dataset import Pack, TokenDataset
from wavemill.storage.layouts import Laid, StreamRows
from wavemill.tokenizers.spec import FrameRule, UserError

SIZE = 5  # of the units' codebook
SPECS = {"text": TEXT, "units": spec(1, SIZE, hop_length=640)}  # 25 frames a second: two ticks each
RUNS = with_changes(SPECS, "units", durations=True, frame_rule=FrameRule.FREE)
TOGETHER = ("text", "speech")


def plan_of(specs: Any = SPECS, **options: Any) -> InterleavedPlan:
    return interleaved("text", "units", **options).plan(specs)


def told(plan: InterleavedPlan, laid: Laid) -> str:
    names = (plan.vocabulary.said(token) for token in laid.tokens.tolist())
    return " ".join(name.replace("text.0:", "t").replace("units.0:", "u") for name in names)


@st.composite
def segments(draw: st.DrawFn) -> Rows:
    """Segments of words and units, with durations."""
    parts = draw(
        st.lists(st.tuples(st.one_of(words().map(lambda each: said(*each)), any_codes()), _runs()), max_size=4)
    )
    made = rows(RUNS, text=[text for text, _ in parts], units=[[unit for unit, _ in runs] for _, runs in parts])
    durations = [length for _, runs in parts for _, length in runs]
    return {**made, "units": replace(made["units"], durations_T=np.array(durations, dtype=np.int32))}


def _runs() -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 6)), max_size=30)


def same(found: dict[str, StreamRows], expected: dict[str, StreamRows]) -> None:
    assert found.keys() == expected.keys()
    for stream, each in expected.items():
        assert found[stream].counts_N.tolist() == each.counts_N.tolist()
        assert found[stream].books[0].tolist() == each.books[0].tolist()


@pytest.mark.parametrize("specs", [SPECS, RUNS], ids=["units", "runs"])
@settings(max_examples=25, deadline=None)
@given(segments(), st.integers(1, 3), st.sampled_from(["text", "speech", "either"]))
def test_each_segment_is_laid_as_it_is_alone_and_gives_back_its_spans(
    specs: Any, made: Rows, words: int, first: str
) -> None:
    if not specs["units"].durations:
        made = {**made, "units": replace(made["units"], durations_T=None)}
    plan = plan_of(specs, words=words, first=first)
    known = {name: each if name in plan.read_to_plan else StreamRows(each.counts_N, ()) for name, each in made.items()}
    steps_N, laid = plan.num_steps(known), plan.lay(made)
    assert laid.loss_S is None
    assert len(laid.tokens) == steps_N.sum()
    assert ((laid.tokens >= 0) & (laid.tokens < plan.column_sizes[0])).all()
    for index, tokens in enumerate(np.split(laid.tokens, np.cumsum(steps_N)[:-1]) if num_segments(made) else []):
        alone = segment_of(made, index)
        assert plan.lay(alone).tokens.tolist() == tokens.tolist()
        same(plan.invert(Laid(tokens)), plan.held(alone))


@pytest.mark.parametrize("specs", [SPECS, RUNS], ids=["units", "runs"])
@settings(max_examples=25, deadline=None)
@given(segments(), st.integers(1, 3))
def test_what_begins_with_text_and_what_begins_with_speech_hold_all_of_both(specs: Any, made: Rows, words: int) -> None:
    if not specs["units"].durations:
        made = {**made, "units": replace(made["units"], durations_T=None)}
    for index in range(num_segments(made)):
        alone = segment_of(made, index)
        plans = [plan_of(specs, words=words, first=first) for first in TOGETHER]
        spans = [plan.spans(plan.lay(alone)) for plan in plans]
        found: dict[bool, list[int]] = {False: [], True: []}
        for pair in zip_longest(*spans):
            if pair[0].is_speech == pair[1].is_speech:  # a segment without words: all speech in both
                assert pair[0].is_speech
                pair = pair[:1]
            for span in pair:
                found[span.is_speech] += span.codes.tolist()
        text = alone["text"].books[0]
        assert found[False] == text[text < plans[0].vocabulary.block("text").size].tolist()
        assert found[True] == alone["units"].books[0].tolist()


def test_spans_change_where_words_begin() -> None:
    """As figure 1 of SpiritLM (Nguyen et al. 2024) has it: `[TEXT] the cat [SPEECH] [Hu3] ... [TEXT] the mat`."""
    text = said((2, 6, [0, 1]), (6, 8, [2]), (8, 11, [3]), (13, 16, [4, 5]))
    made = rows(SPECS, text=[text], units=[[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    units = ["u0 u1 u2", "u3", "u4 u0", "u1 u2 u3 u4"]  # words begin in frames 1, 3, 4 and 6
    by_one = [told(plan, plan.lay(made)) for plan in (plan_of(words=1, first=first) for first in TOGETHER)]
    assert by_one[0] == f"[TEXT] t0 t1 [SPEECH] {units[1]} [TEXT] t3 [SPEECH] {units[3]}"
    assert by_one[1] == f"[SPEECH] {units[0]} [TEXT] t2 [SPEECH] {units[2]} [TEXT] t4 t5"
    by_three = plan_of(words=3, first="text")
    assert told(by_three, by_three.lay(made)) == f"[TEXT] t0 t1 t2 t3 [SPEECH] {units[3]}"


def test_a_deduplicated_unit_belongs_to_the_span_that_it_begins_in() -> None:
    made = rows(RUNS, text=[said((2, 6, [0]), (6, 8, [1]), (12, 14, [2]))], units=[[4, 3, 2, 1]])
    made["units"] = replace(made["units"], durations_T=np.array([2, 2, 1, 9], dtype=np.int32))
    plan = plan_of(RUNS, words=1, first="speech")  # words begin in frames 1, 3 and 6; units in 0, 2, 4 and 5
    assert told(plan, plan.lay(made)) == "[SPEECH] u4 u3 [TEXT] t1 [SPEECH]"
    plan = plan_of(RUNS, words=1, first="text")
    assert told(plan, plan.lay(made)) == "[TEXT] t0 [SPEECH] u2 u1 [TEXT] t2"


def test_a_segment_without_words_is_all_speech_and_either_is_told_by_its_units() -> None:
    made = rows(SPECS, text=[[], said((0, 2, [1])), said((0, 2, [1]))], units=[[1, 2], [3], [4, 0]])
    for first in TOGETHER:
        plan = plan_of(first=first)
        assert told(plan, plan.lay(segment_of(made, 0))) == "[SPEECH] u1 u2"
    plan = plan_of()
    assert [told(plan, plan.lay(segment_of(made, index))) for index in (1, 2)] == ["[SPEECH] u3", "[TEXT] t1"]


def test_ids_of_text_are_those_of_their_tokenizer() -> None:
    vocabulary = plan_of().vocabulary
    assert (vocabulary.block("text").offset, vocabulary.block("text").size) == (0, 7)
    assert vocabulary.block("units").offset == 7
    assert vocabulary.column_sizes == (7 + SIZE + 2,)
    assert plan_of().read_to_plan == ("text",)
    assert plan_of(RUNS).read_to_plan == ("text", "units")


@settings(max_examples=40, deadline=None)
@given(words(max_words=3), st.data())
def test_steps_that_no_segment_gives_are_refused(made: Words, data: st.DataObject) -> None:
    plan = plan_of(words=1, first="text")
    laid = plan.lay(rows(SPECS, text=[said(*made)], units=[[1] * 20]))
    tokens = data.draw(disturbed(plan, laid.tokens))
    try:
        spans = plan.spans(Laid(tokens))
    except ValueError:
        return
    assert len(spans) == 1 or [span.is_speech for span in spans] == [place % 2 == 1 for place in range(len(spans))]
    again = []
    for span in spans:
        again += [plan.vocabulary.token("[SPEECH]" if span.is_speech else "[TEXT]")]
        again += (span.codes + (plan.vocabulary.block("units").offset if span.is_speech else 0)).tolist()
    assert again == tokens.tolist()


@pytest.mark.parametrize(
    "told",
    [[], ["t1"], ["[TEXT]"], ["[SPEECH]", "t1"], ["[TEXT]", "u1"], ["[TEXT]", "t1", "[TEXT]", "t1"]],
    ids=lambda told: " ".join(told) or "nothing",
)
def test_spans_of_nothing_or_of_the_other_kind_are_refused(told: list[str]) -> None:
    plan = plan_of(first="text")
    numbers = {
        "t1": 1,
        "u1": 8,
        "[TEXT]": plan.vocabulary.token("[TEXT]"),
        "[SPEECH]": plan.vocabulary.token("[SPEECH]"),
    }
    with pytest.raises(ValueError, match=r"sequence|span"):
        plan.invert(Laid(np.array([numbers[each] for each in told], dtype=np.int16)))


def test_streams_and_options_that_do_not_fit_are_refused() -> None:
    for specs in refused_kinds(SPECS, "units").values():
        with pytest.raises(UserError, match="interleaved"):
            plan_of(specs)
    mistakes = [
        ({**SPECS, "units": text_spec()}, {}, r"stream 'units', but that \(text-tokens\) has no clock"),
        ({**SPECS, "text": text_spec()}, {}, "has none. Name a stream made with word-tokens or whisper-text"),
        (SPECS, {"words": 0}, "spans of 0 words; expected 1 or more"),
        (SPECS, {"first": "music"}, "first 'music' is unknown; there are: text, speech, either"),
    ]
    for specs, options, message in mistakes:
        with pytest.raises(UserError, match=message):
            plan_of(specs, **options)


@pytest.mark.parametrize("specs", [SPECS, RUNS], ids=["units", "runs"])
def test_a_dataset_packs_the_sequences_of_its_segments(specs: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    shards = []
    for count in (3, 5):
        text = [said(*((7 * word, 7 * word + 5, [word % 7]) for word in range(index))) for index in range(count)]
        made = rows(specs, text=text, units=[rng.integers(0, SIZE, 9 * index) for index in range(count)])
        durations = np.ones(made["units"].counts_N.sum(), dtype=np.int32)
        shards.append({**made, "units": replace(made["units"], durations_T=durations)})
    write_root(tmp_path, specs, shards)
    layout = interleaved("text", "units", words=2)
    plan = layout.plan(specs)
    dataset = TokenDataset(str(tmp_path), pack=Pack(layout, 128, "single"), batch_size=1, shuffle=False)  # pyright: ignore
    found = [batch.tokens[batch.segment_ids > 0].tolist() for batch in dataset]
    expected = [
        plan.lay(segment_of(made, index)).tokens.tolist() for made in shards for index in range(num_segments(made))
    ]
    assert sorted(found) == sorted(expected)
