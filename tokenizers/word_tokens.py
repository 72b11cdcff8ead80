"""Words at their times as ids of any text tokenizer and timestamps, in the very form that `whisper-text` has.

Axes: T ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch

from .spec import FrameRule, StreamSpec
from .text_tokens import TextIds, text_files
from .tokenizer import Description, TokenizerConfig, TokenizerEntry, Tokens, Word
from .whisper_text import HOP, NUM_TIMES, WINDOW

_TICKS = WINDOW // HOP  # of a window; a tick is 0.02 s
_TICK_RATE = 50


class WordTokens:
    """A `WordTokenizer`: of each word `<|start|> ids <|end|>`, as `whisper_text.timestamps` reads them.

    The ids are those that `text-tokens` gives for the words with single spaces between, each with the word in which it
    ends; a word without any is left out. Times are rounded to 0.02 s; a word ends no later than the next one begins,
    and no later than 30 s after its beginning. None of a segment whose words nobody knows.
    """

    def __init__(self, description: Description) -> None:
        self.spec = description.spec
        self.fingerprint = description.fingerprint
        self._words = TextIds(description.weights)
        self._first = self.spec.codebook_size - NUM_TIMES

    def tokens_of_words(self, words: Sequence[Word] | None) -> Tokens:
        ordered = sorted(words or (), key=lambda word: word.start_s)
        text = " ".join(word.label for word in ordered)
        ids = with_times(_at_ticks(ordered, self._ids_by_word(ordered, text)), self._first)
        codes_KT = torch.tensor([ids], dtype=torch.int64).reshape(1, len(ids))
        return Tokens(codes_KT=codes_KT, text=None if words is None else text)

    def _ids_by_word(self, words: Sequence[Word], text: str) -> list[list[int]]:
        """The text's ids, each with the word in which its letters end; a space alone goes with the word behind it."""
        found: list[list[int]] = [[] for _ in words]
        if not words:
            return found
        ids, ends = self._words.ids_and_ends(text)
        word_ends = np.cumsum([len(word.label) + 1 for word in words]) - 1
        places = np.searchsorted(word_ends, np.maximum.accumulate(np.array(ends, dtype=np.int64)))
        for each, place in zip(ids, np.minimum(places, len(words) - 1).tolist(), strict=True):
            found[place].append(each)
        return found


def _at_ticks(words: Sequence[Word], ids: Sequence[list[int]]) -> Iterator[tuple[int, int, list[int]]]:
    """Beginning and end of each word that has ids, and these."""
    timed = [(_tick(word.start_s), _tick(word.end_s), each) for word, each in zip(words, ids, strict=True) if each]
    until = [*(start for start, _, _ in timed[1:]), *(end for _, end, _ in timed[-1:])]
    for (start, end, each), latest in zip(timed, until, strict=True):
        yield start, min(end, latest), each


def _tick(seconds: Fraction) -> int:
    return int(seconds * _TICK_RATE + Fraction(1, 2))


def with_times(words: Iterable[tuple[int, int, list[int]]], first: int) -> list[int]:
    """Ids with timestamps of words (beginning and end in ticks of 0.02 s, ids), which come in the order of time.

    `first` is the first timestamp, the id before it the mark between windows. A window has 30 s; where a word would end
    behind it, the next one begins with the word: two timestamps in a row at a window's end say where.
    """
    ids: list[int] = []
    begin = 0
    for start, end, each in words:
        while start - begin >= _TICKS:
            ids.append(first - 1)
            begin += _TICKS
        end = min(end, start + _TICKS)
        if end - begin > _TICKS:
            ids += [first + start - begin, first + start - begin, first - 1]
            begin = start
        ids += [first + start - begin, *each, first + end - begin]
    return ids


def _describe(config: TokenizerConfig) -> Description:
    words, fingerprint = text_files(config, ENTRIES[0].weights or "")
    fingerprint = {"tokenizer": config.tokenizer, "text": "words/1", **fingerprint}
    spec = replace(ENTRIES[0].spec, codebook_size=len(words) + 1 + NUM_TIMES)
    return Description(config, spec, fingerprint, weights=words)


ENTRIES = (
    TokenizerEntry(
        spec=StreamSpec(
            tokenizer="word-tokens",
            sample_rate=16_000,  # of timestamps: HOP samples from one to the next
            decode_sample_rate=0,
            hop_length=HOP,
            window_length=0,
            frame_rule=FrameRule.FREE,
            num_codebooks=1,
            codebook_size=50_257 + 1 + NUM_TIMES,
            text=True,
        ),
        kind="text",
        takes="text",
        about="the corpus's words as tokens of any text tokenizer, each between timestamps as Whisper writes them",
        needs_codebook=False,
        last_frame="-",
        long_audio="takes the corpus's words, no audio",
        weights="openai-community/gpt2",
        licence="MIT",
        describe=_describe,
        open=lambda description, device: WordTokens(description),
    ),
)
