"""Words at their times: ids of any text tokenizer between timestamps as Whisper writes them."""

import math
import struct
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import transformers
import weights_text
from hypothesis import given
from hypothesis import strategies as st
from wavemill.jobs.arguments import parse_streams
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.verify import verify
from wavemill.storage.codes import open_corpus, open_stream, read_codes
from wavemill.storage.root import Root
from wavemill.tokenizers.registry import describe, load_tokenizer
from wavemill.tokenizers.tokenizer import TextTokenizer, TokenizerConfig, Word, WordTokenizer
from wavemill.tokenizers.whisper_text import HOP, NUM_TIMES, Said, timestamps
from wavemill.tokenizers.word_tokens import with_times

import tokenizers

MadeOnce = Callable[[str, Callable[[Path], None]], Path]
TICK = Fraction(1, 50)
FIRST = 100  # of timestamps, where there is no tokenizer


@pytest.fixture(scope="module")
def folder(made_once: MadeOnce) -> Path:
    return made_once("text-tokenizer", lambda path: weights_text.make_text_tokenizer(path) and None)


def open_words(folder: Path) -> Any:
    return load_tokenizer(TokenizerConfig(tokenizer="word-tokens", weights=str(folder)))


def words(*parts: tuple[str, float, float]) -> list[Word]:
    return [Word(label, Fraction(str(start)), Fraction(str(end))) for label, start, end in parts]


def said(tokenizer: Any, *parts: tuple[str, float, float]) -> list[Said]:
    ids = tokenizer.tokens_of_words(words(*parts)).codes_KT[0].tolist()
    return timestamps(ids, tokenizer.spec.codebook_size)


def test_each_word_stands_between_its_times(folder: Path) -> None:
    tokenizer, theirs = open_words(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, WordTokenizer)
    assert not isinstance(tokenizer, TextTokenizer)
    tokens = tokenizer.tokens_of_words(words(("the", 0.1, 0.3), ("fox", 0.3, 0.514), ("jumps", 1, 1.5)))
    first = len(theirs) + 1
    found = tokens.codes_KT[0].tolist()
    ids = [theirs(text, add_special_tokens=False).input_ids for text in ("the", " fox", " jumps")]
    assert found == [
        *(first + 5, *ids[0], first + 15),
        *(first + 15, *ids[1], first + 26),
        *(first + 50, *ids[2], first + 75),
    ]
    assert tokens.text == "the fox jumps"
    assert tokenizer.spec.codebook_size == first + NUM_TIMES


def test_the_ids_are_those_of_the_text_with_every_word_its_own(folder: Path) -> None:
    labels = ["the", "quick", "Ünïcödé", "日本", "\N{GRINNING FACE}", "two  things", "</s>", "fox"]
    found = said(open_words(folder), *((label, index, index + 0.5) for index, label in enumerate(labels)))
    text_ids = load_tokenizer(TokenizerConfig(tokenizer="text-tokens", weights=str(folder))).tokens_of_text(
        " ".join(labels)
    )
    assert [each for one in found for each in one.ids] == text_ids.codes_KT[0].tolist()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert [theirs.decode(one.ids).strip() for one in found] == labels
    assert [one.start_sample for one in found] == [index * 16_000 for index in range(len(labels))]


@pytest.mark.parametrize("kind", ["metaspace", "letters"])
def test_marks_of_spaces_go_with_the_word_behind_them(kind: str, tmp_path: Path) -> None:
    pieces = ["<unk>", "\N{LOWER ONE EIGHTH BLOCK}", "a", "b", "\N{LOWER ONE EIGHTH BLOCK}a", " "]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -len(piece)) for piece in pieces], unk_id=0))
    if kind == "metaspace":
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(tmp_path)
    found = said(open_words(tmp_path), ("a", 0, 1), ("b", 1, 2), ("bab", 2, 3))
    space = pieces.index(" " if kind == "letters" else "\N{LOWER ONE EIGHTH BLOCK}")
    first = (2,) if kind == "letters" else (4,)
    assert [one.ids for one in found] == [first, (space, 3), (space, 3, 2, 3)]


def test_what_nobody_has_words_for_has_no_ids(folder: Path) -> None:
    tokenizer = open_words(folder)
    for none, text in ((None, None), ([], "")):
        tokens = tokenizer.tokens_of_words(none)
        assert tuple(tokens.codes_KT.shape) == (1, 0)
        assert tokens.text == text


def test_words_that_overlap_end_where_the_next_one_begins(folder: Path) -> None:
    found = said(open_words(folder), ("late", 2, 4), ("the", 0, 3), ("fox", 2, 2.5))
    assert [(one.start_sample / 16_000, one.end_sample / 16_000) for one in found if one.end_sample] == [
        (0, 2),
        (2, 2),
        (2, 2.5),
    ]


def test_times_are_rounded_to_a_fiftieth_of_a_second(folder: Path) -> None:
    [one] = said(open_words(folder), ("fox", 0.0299, 0.05))
    assert (one.start_sample, one.end_sample) == (HOP, 3 * HOP)  # 1.495 and 2.5 of these


def test_a_silence_takes_windows_of_its_own() -> None:
    ids = with_times([(0, 50, [1]), (6_100, 6_110, [2])], FIRST)
    assert ids == [FIRST, 1, FIRST + 50, *([FIRST - 1] * 4), FIRST + 100, 2, FIRST + 110]


def test_a_word_that_a_window_would_cut_begins_the_next_one() -> None:
    ids = with_times([(0, 50, [1]), (1_490, 1_510, [2])], FIRST)
    assert ids == [FIRST, 1, FIRST + 50, FIRST + 1_490, FIRST + 1_490, FIRST - 1, FIRST, 2, FIRST + 20]
    assert timestamps(ids, FIRST + NUM_TIMES)[1] == Said(1_490 * HOP, 1_510 * HOP, (2,))


@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 60), st.sampled_from([0, 1_400, 1_499, 1_500, 1_501, 9_000])),
            st.one_of(st.integers(0, 60), st.sampled_from([1_499, 1_500, 1_700])),
            st.lists(st.integers(0, 9), min_size=1, max_size=3),
        ),
        max_size=8,
    )
)
def test_whispers_own_reader_finds_every_word_at_its_time(parts: list[tuple[int, int, list[int]]]) -> None:
    made, now = [], 0
    for gap, length, ids in parts:
        made.append((now + gap, now + gap + length, ids))
        now += gap + length
    found = timestamps(with_times(made, FIRST), FIRST + NUM_TIMES)
    assert found == [Said(start * HOP, min(end, start + 1_500) * HOP, tuple(ids)) for start, end, ids in made]


def test_the_fingerprint_is_that_of_the_files(folder: Path, tmp_path: Path) -> None:
    weights_text.make_text_tokenizer(tmp_path / "same")
    weights_text.make_text_tokenizer(tmp_path / "other", size=10)
    ours, same, other = (
        describe(TokenizerConfig(tokenizer="word-tokens", weights=str(place))).fingerprint
        for place in (folder, tmp_path / "same", tmp_path / "other")
    )
    assert ours == same
    assert ours != other
    assert ours != describe(TokenizerConfig(tokenizer="text-tokens", weights=str(folder))).fingerprint


def test_words_of_a_corpus_become_a_stream_that_can_be_verified(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "spoken"
    source.mkdir()
    _write_sound(source / "one.wav", 2.0)
    _write_sound(source / "two.wav", 1.0)
    (source / "one.wrd").write_text("0 8000 sil\n8000 16000 the\n16000 24000 fox\n24000 32000 <eps>\n")
    root = Root(tmp_path / "root")
    build_corpus(root, [f"spoken={source}"], CorpusPolicy(), shard_hours=1.0)
    streams = parse_streams([f"words=word-tokens,weights={folder}"])
    tokenize(root, streams, InlineEngine, TokenizeOptions())
    snapshot = open_stream(root, "words")
    found = {}
    for shard in snapshot.files:
        codes = read_codes(root, snapshot, shard, more=True)
        for row, text in enumerate(codes.more["text"]):
            found[text] = timestamps(codes.codes(row)[0].tolist(), open_words(folder).spec.codebook_size)
    assert found.keys() == {"the fox", None}
    assert found[None] == []
    assert [(one.start_sample, one.end_sample) for one in found["the fox"]] == [(8_000, 16_000), (16_000, 24_000)]
    verdict = verify(root, open_corpus(root), sample=2, seed=0, source_roots={})
    assert verdict.problems == []


def _write_sound(path: Path, seconds: float) -> None:
    samples = [round(9_000 * math.sin(place * 0.1)) for place in range(int(16_000 * seconds))]
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))
