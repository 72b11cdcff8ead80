"""What streams of text with times say of many segments at once, and text with times as a sequence."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams_made import (
    Rows,
    disturbed,
    refused_kinds,
    require_invertible,
    require_refused_or_true,
    rows,
    spec,
    text_spec,
)
from timed_made import FIRST, MARK, NUM_IDS, TEXT, any_codes, said, text_rows, words
from wavemill.pipelines.layouts import timed
from wavemill.pipelines.layouts.timed import TimedText, num_text_ids, timed_text
from wavemill.pipelines.layouts.transcript import transcript
from wavemill.tokenizers.registry import REGISTRY
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.whisper_text import HOP, NUM_TIMES, WINDOW, Said, timestamps

SPECS = {"text": TEXT, "audio": spec(2, 5)}


def phrases(found: TimedText, index: int) -> list[Said]:
    """One segment's phrases; those that end when they begin have no end."""
    begin = int(found.phrases_N[:index].sum())
    told, at = [], int(found.counts_N[:index].sum())
    for phrase in range(begin, begin + int(found.phrases_N[index])):
        start, end, size = (int(each[phrase]) for each in (found.starts_P, found.ends_P, found.sizes_P))
        ids = tuple(found.ids_X[at : at + size].tolist())
        told.append(Said(start * HOP, end * HOP, ids))
        at += size
    assert at == int(found.counts_N[: index + 1].sum())
    return told


@settings(deadline=None)
@given(st.lists(any_codes(), max_size=4))
def test_many_segments_say_what_whispers_own_reader_finds_in_each(segments: list[list[int]]) -> None:
    found = timed_text(text_rows(segments)["text"], TEXT)
    assert len(found.counts_N) == len(found.phrases_N) == len(segments)
    for index, codes in enumerate(segments):
        expected = [
            Said(each.start_sample, each.start_sample if each.end_sample is None else each.end_sample, each.ids)
            for each in timestamps(codes, TEXT.codebook_size)
        ]
        assert phrases(found, index) == expected


@given(words())
def test_words_keep_their_times_behind_any_silence(made: list[tuple[int, int, list[int]]]) -> None:
    found = timed_text(text_rows([said(*made)])["text"], TEXT)
    assert phrases(found, 0) == [Said(start * HOP, end * HOP, tuple(ids)) for start, end, ids in made]


def test_times_count_on_from_window_to_window() -> None:
    first, second = [FIRST + 10, 3, 4, FIRST + 20, FIRST + 20, MARK, FIRST + 5, 1, FIRST + 7], [2, MARK, 6, FIRST]
    found = timed_text(text_rows([first, [], second])["text"], TEXT)
    assert found.ids_X.tolist() == [3, 4, 1, 2, 6]
    assert found.counts_N.tolist() == [3, 0, 2]
    assert found.sizes_P.tolist() == [2, 1, 1, 1]
    assert found.starts_P.tolist() == [10, 25, 0, 1_500]
    assert found.ends_P.tolist() == [20, 27, 0, 1_500]


def test_the_format_is_that_of_the_tokenizers() -> None:
    assert (timed.NUM_TIMES, timed.WINDOW * HOP) == (NUM_TIMES, WINDOW)
    assert num_text_ids(TEXT) == NUM_IDS
    for name in ("whisper-text", "word-tokens"):
        text = REGISTRY[name].spec
        assert timed.timed_stream("moshi", {"text": text}, "text") == text
        assert timed.frames_a_tick("moshi", text, "units", spec(hop_length=1_280)) * 4 == 1


def test_text_without_times_is_refused() -> None:
    for other in (spec(), text_spec()):
        with pytest.raises(UserError, match=r"takes text with its times; stream 'text' \(.*\) has none"):
            timed.timed_stream("moshi", {"text": other}, "text")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_transcripts_come_back_with_their_times(data: st.DataObject) -> None:
    plan, made = transcript("text", "audio", None).plan(SPECS), _rows(data)
    require_invertible(plan, made)


def test_codes_are_given_and_the_text_behind_them_is_not() -> None:
    plan = transcript("text", "audio").plan(SPECS)
    laid = plan.lay(rows(SPECS, text=[said((2, 4, [6, 5]))], audio=[[[1, 4], [0, 0]]]))
    names = [plan.vocabulary.said(token) for token in laid.tokens.tolist()]
    times = [f"text.0:{FIRST + tick}" for tick in (2, 4)]
    assert names == ["audio.0:1", "audio.0:4", "<text>", times[0], "text.0:6", "text.0:5", times[1], "<eos>"]
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False, False, False, True, True, True, True, True]
    assert plan.vocabulary.block("text").offset == 0


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_steps_that_are_no_transcript_are_refused(data: st.DataObject) -> None:
    plan = transcript("text", "audio", None).plan(SPECS)
    laid = plan.lay(rows(SPECS, text=[said((2, 4, [6, 5]))], audio=[[[1, 4], [0, 0]]]))
    require_refused_or_true(plan, data.draw(disturbed(plan, laid.tokens)))


def test_transcripts_of_what_has_no_codes_are_refused() -> None:
    for specs in refused_kinds(SPECS, "audio").values():
        with pytest.raises(UserError, match="transcript"):
            transcript("text", "audio").plan(specs)
    with pytest.raises(UserError, match=r"takes 3 codebook\(s\) of stream 'audio', of which 2 are read"):
        transcript("text", "audio", 3).plan(SPECS)
    with pytest.raises(UserError, match="'text' is named twice"):
        transcript("text", "text").plan(SPECS)


def _rows(data: st.DataObject) -> Rows:
    segments = data.draw(st.lists(st.tuples(words(), st.integers(0, 5)), max_size=4))
    rng_codes = [[[(index + book) % 5 for index in range(count)] for book in range(2)] for _, count in segments]
    return rows(SPECS, text=[said(*each) for each, _ in segments], audio=rng_codes)
