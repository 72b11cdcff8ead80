"""Text and audio in one vocabulary: tasks with tags, and chains of them."""

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams_made import (
    disturbed,
    random_rows,
    refused_kinds,
    require_invertible,
    rows,
    rows_of_streams,
    spec,
    text_spec,
    with_changes,
    write_root,
)
from wavemill.pipelines.layouts.unified import unified
from wavemill.storage.dataset import Pack, TokenDataset
from wavemill.tokenizers.spec import UserError

STREAMS = {"words": text_spec(30), "units": spec(2, 10), "mots": text_spec(30), "sons": spec(2, 10)}
ROLES = {"text": "words", "audio": "units", "translation": "mots", "spoken_translation": "sons"}
LANGUAGES = {"language": "English", "target_language": "French"}
HEARD = ("asr", "ast", "s2st")  # what is asked for of audio
CHAINS = [chain for num in (1, 2, 3) for subset in combinations(HEARD, num) for chain in permutations(subset)]
ONE = rows(STREAMS, words=[[7, 8]], units=[[[1, 2], [3, 4]]], mots=[[9]], sons=[[[5], [6]]])


def read(layout: unified) -> dict[str, Any]:
    return {stream: STREAMS[stream] for stream in layout.streams}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_all_streams_of_a_task_or_a_chain_come_back(data: st.DataObject) -> None:
    tasks = data.draw(st.sampled_from([*CHAINS, ("tts",), ("mt",), ("mt", "tts")]))
    num, languages = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([{}, LANGUAGES]))
    layout = unified(tasks, codebooks=num, **ROLES, **languages)
    made = data.draw(rows_of_streams(read(layout)))
    roles = {"asr": "words", "ast": "mots", "s2st": "sons", "tts": "units", "mt": "mots"}
    streams = ["words" if tasks[0] in ("tts", "mt") else "units", *(roles[task] for task in tasks)]
    held = {stream: range(num if stream in ("units", "sons") else 1) for stream in streams}
    require_invertible(layout.plan(read(layout)), made, held=held)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_steps_that_no_segment_gives_are_refused(data: st.DataObject) -> None:
    layout = unified(data.draw(st.sampled_from([("asr",), ("tts",), HEARD])), **ROLES, codebooks=2)
    plan = layout.plan(STREAMS)
    tokens = data.draw(disturbed(plan, plan.lay(ONE).tokens))
    try:
        found = plan.invert(type(plan.lay(ONE))(tokens))
    except ValueError:
        return
    whole = {**ONE, **found}  # streams that no task takes are not in the tokens
    assert plan.lay(whole).tokens.tolist() == tokens.tolist()


def test_transcribing_is_a_tag_and_the_audio_given_and_the_text_asked_for() -> None:
    plan = unified(("asr",), "words", "units", language="English").plan(STREAMS)
    laid = plan.lay(ONE)
    assert [plan.vocabulary.said(token) for token in laid.tokens.tolist()] == [
        *["[ASR English]", "audio.0:1", "audio.0:2", "<sep>", "text.0:7", "text.0:8", "<eos>"]
    ]
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False] * 4 + [True] * 3


def test_speaking_is_given_the_text() -> None:
    plan = unified(("tts",), "words", "units", language="English", codebooks=2).plan(STREAMS)
    laid = plan.lay(ONE)
    assert laid.tokens.tolist() == [50, 7, 8, 51, 31, 43, 32, 44, 52]
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False] * 4 + [True] * 5


def test_a_chain_has_one_tag_and_its_targets_in_turn() -> None:
    plan = unified(HEARD, **ROLES, **LANGUAGES).plan(STREAMS)
    laid = plan.lay(ONE)
    assert [plan.vocabulary.said(token) for token in laid.tokens.tolist()] == [
        *["[ASR AST S2ST English French]", "audio.0:1", "audio.0:2", "<sep>"],
        *["text.0:7", "text.0:8", "<sep>", "text.0:9", "<sep>", "audio.0:5", "<eos>"],
    ]
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False] * 4 + [True] * 7  # also where a target ends


@pytest.mark.parametrize(
    ("tasks", "tag"),
    [
        (("asr",), "[ASR English]"),
        (("tts",), "[TTS English]"),
        (("mt",), "[MT English French]"),
        (("s2st",), "[S2ST English French]"),
        (("asr", "ast"), "[ASR AST English French]"),
    ],
)
def test_a_tag_names_the_languages_that_its_tasks_are_between(tasks: tuple[str, ...], tag: str) -> None:
    assert unified(tasks, **ROLES, **LANGUAGES).tag == tag
    assert unified(tasks, **ROLES).tag == tag.replace(" English", "").replace(" French", "")


def test_text_ids_are_tokens_as_they_are_and_all_else_follows_them() -> None:
    for tasks in (*CHAINS, ("tts",), ("mt",)):
        vocabulary = unified(tasks, **ROLES, codebooks=2).plan(STREAMS).vocabulary
        text, *audio = (block for block in vocabulary.blocks if block.codebook is not None)
        assert (text.name, text.offset, text.size) == ("text", 0, 30)
        assert [(block.name, block.codebook, block.offset) for block in audio] == [("audio", 0, 30), ("audio", 1, 40)]
        assert list(vocabulary.specials()) == [unified(tasks, **ROLES).tag, "<sep>", "<eos>"]


def test_layouts_of_a_mixture_share_a_vocabulary() -> None:
    tags = ("[ASR English]", "[TTS English]", "[S2ST English French]")
    plans = [unified((task,), **ROLES, **LANGUAGES, tags=tags).plan(STREAMS) for task in ("asr", "tts", "s2st")]
    assert plans[0].vocabulary == plans[1].vocabulary == plans[2].vocabulary
    assert [plan.lay(ONE).tokens[0] for plan in plans] == [40, 41, 42]


@pytest.mark.parametrize("kind", ["numbers", "chunks", "missing"])
@pytest.mark.parametrize("stream", list(STREAMS))
def test_streams_that_it_cannot_take_are_named(stream: str, kind: str) -> None:
    with pytest.raises(UserError, match=rf"^Layout unified takes .*'{stream}'.*\.$"):
        unified(HEARD, **ROLES).plan(refused_kinds(STREAMS, stream)[kind])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ()}, "Layout unified has no task; there are: asr, tts, mt, ast, s2st."),
        ({"tasks": ("arr",)}, "there is no task 'arr'; there are: asr, tts, mt, ast, s2st. Did you mean 'asr'?"),
        ({"tasks": ("asr", "arr")}, "there is no task 'arr'"),
        ({"tasks": ("asr", "asr")}, "task asr is there twice; keep one."),
        ({"tasks": ("asr", "tts")}, "asr is given audio and tts text; all tasks of a chain must be given the same."),
        ({"tasks": ("asr",), "text": None}, "asr takes text: name its stream (text=...)."),
        ({"tasks": ("ast",), "translation": None}, "ast takes translation: name its stream (translation=...)."),
        ({"tags": ("[TTS]", "[MT]")}, "has the tag [ASR]; tags are [TTS], [MT]: name it there once."),
        ({"tags": ("[ASR]", "[ASR]")}, "tags are [ASR], [ASR]: name it there once."),
    ],
)
def test_tasks_that_do_not_go_together_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        unified(**{**ROLES, **options})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "streams", "said"),
    [
        (unified(("asr",), "words", "words"), STREAMS, "takes 2 different streams; 'words' is named twice."),
        (
            unified(("asr",), "words", "units", codebooks=3),
            STREAMS,
            "takes 3 codebook(s) of stream 'units', of which 2",
        ),
        (
            unified(("asr", "ast"), **ROLES),
            with_changes(STREAMS, "words", codebook_size=40),
            "streams 'words' (text-tokens, 40 ids) and 'mots' (text-tokens, 30 ids) are of different tokenizers.",
        ),
        (
            unified(("s2st",), **ROLES),
            with_changes(STREAMS, "sons", tokenizer="toys"),
            "streams 'units' (toy, 10 ids) and 'sons' (toys, 10 ids) are of different tokenizers.",
        ),
    ],
)
def test_streams_that_share_no_vocabulary_are_refused(layout: unified, streams: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        layout.plan(streams)
    assert said in str(caught.value)


def test_streams_of_other_weights_share_no_tokens_in_a_dataset(tmp_path: Path) -> None:
    streams = {"words": text_spec(9), "units": spec(1, 7), "undid": spec(1, 7), "toads": spec(1, 7)}
    write_root(
        tmp_path / "root",
        streams,
        [{name: random_rows(each, [4], np.random.default_rng(0)) for name, each in streams.items()}],
    )

    def read(spoken: str) -> TokenDataset:
        layout = unified(("s2st",), audio="units", spoken_translation=spoken)
        return TokenDataset(str(tmp_path / "root"), pack=Pack(layout, 16), batch_size=1)

    assert len(list(read("undid"))) == 1  # of another revision and resampler, but with the same weights
    with pytest.raises(UserError) as caught:
        read("toads")
    assert "streams 'units' and 'toads' the same tokens, but their tokenizers differ (weights)" in str(caught.value)
