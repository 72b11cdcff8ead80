"""Streams of text with times to lay out, small and random."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st
from streams_made import Rows, rows, text_spec
from wavemill.tokenizers.whisper_text import NUM_TIMES
from wavemill.tokenizers.word_tokens import with_times

NUM_IDS = 7  # of text
MARK, FIRST = NUM_IDS, NUM_IDS + 1  # between windows; 0.00 s
TEXT = replace(text_spec(FIRST + NUM_TIMES, text=True), tokenizer="word-tokens")

Words = list[tuple[int, int, list[int]]]  # beginning and end in ticks, ids


def said(*words: tuple[int, int, list[int]]) -> list[int]:
    """The codes of words."""
    return with_times(words, FIRST)


def words(*, max_words: int = 6, max_ticks: int = 40) -> st.SearchStrategy[Words]:
    """Words one after the other, perhaps at one time, behind a long silence, or beyond all frames."""
    gaps = st.one_of(st.integers(0, max_ticks), st.sampled_from([0, 1_500, 1_501, 4_000]))
    ids = st.lists(st.integers(0, NUM_IDS - 1), min_size=1, max_size=4)
    return st.lists(st.tuples(gaps, st.integers(0, max_ticks), ids), max_size=max_words).map(_in_order)


def _in_order(parts: Sequence[tuple[int, int, list[int]]]) -> Words:
    found, now = [], 0
    for gap, length, ids in parts:
        found.append((now + gap, now + gap + length, ids))
        now += gap + length
    return found


def any_codes() -> st.SearchStrategy[list[int]]:
    """Codes of a stream with times in any order, as a model may say them."""
    times = st.sampled_from([0, 1, 3, 400, 1_500]).map(lambda tick: FIRST + tick)
    return st.lists(st.one_of(st.integers(0, NUM_IDS - 1), times, times, st.just(MARK)), max_size=14)


def text_rows(segments: Sequence[list[int]]) -> Rows:
    """Rows of a stream "text" by the codes of each segment."""
    return rows({"text": TEXT}, text=segments)
