"""Transcripts by Whisper: transformers' own ids, their times, and longer recordings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import weights_text
from torch import Tensor
from wavemill.tokenizers.registry import describe, load_tokenizer
from wavemill.tokenizers.spec import FrameRule, UserError
from wavemill.tokenizers.tokenizer import TokenizerConfig, Tokens
from wavemill.tokenizers.whisper_text import NUM_TIMES, WINDOW, Said, timestamps

MadeOnce = Callable[[str, Callable[[Path], None]], Path]
FIRST = weights_text.WORDS + 6


@pytest.fixture(scope="module")
def folder(made_once: MadeOnce) -> Path:
    return made_once("whisper-text", lambda path: weights_text.make_whisper(path) and None)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(TokenizerConfig(tokenizer="whisper-text", weights=str(folder)))


def sound(seconds: float, seed: int) -> Tensor:
    num = int(seconds * 16_000)
    envelope = torch.linspace(0, seed * 9, num).sin()
    return torch.randn(num, generator=torch.Generator().manual_seed(seed)) * envelope * 0.1


def by_transformers(folder: Path, waveform_N: Tensor, **asked: str) -> list[int]:
    """What the published model and extractor say of one segment, without the prompt and the end."""
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    mel = extractor(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    with torch.inference_mode():
        said = model.generate(mel, return_timestamps=True, return_segments=True, do_sample=False, **asked)
    [segments] = said["segments"]
    first_window = segments[0]["result"].tolist()  # of all sentences that were heard at once
    kept = [segment["tokens"].tolist() for segment in segments if segment["result"].tolist() == first_window]
    return [each for ids in kept for each in ids]


def test_a_segment_says_what_transformers_says_of_it(tokenizer: Any, folder: Path) -> None:
    differing = set()
    for seconds, seed in ((2.5, 1), (20, 2), (29.5, 3)):
        waveform_N = sound(seconds, seed)
        ids = tokenizer.tokens(waveform_N).codes_KT[0].tolist()
        window = ids[: ids.index(FIRST - 1)] if FIRST - 1 in ids else ids
        assert window == by_transformers(folder, waveform_N)
        assert any(each >= FIRST for each in window)
        assert any(each < weights_text.WORDS for each in window)
        differing.add(tuple(window))
    assert len(differing) == 3


def test_a_language_and_a_task_that_are_named_are_those_that_transformers_is_told(folder: Path) -> None:
    waveform_N, seen = sound(20, 2), set()
    for asked in ({}, {"task": "translate"}, {"language": "en", "task": "transcribe"}):
        config = TokenizerConfig(tokenizer="whisper-text", weights=str(folder), **asked)
        ids = load_tokenizer(config).tokens(waveform_N).codes_KT[0].tolist()
        assert _split(ids)[0] == by_transformers(folder, waveform_N, **asked)
        seen.add(tuple(ids))
        fingerprint = describe(config).fingerprint
        assert {key: fingerprint[key] for key in ("language", "task") if key in fingerprint} == asked
    assert len(seen) == 2, "English is what these weights are told anyway, translation is not"


def test_a_language_or_task_that_a_checkpoint_does_not_know_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(name: str = "whisper-text", place: Path = folder, **asked: Any) -> str:
        with pytest.raises(UserError) as refusal:
            describe(TokenizerConfig(tokenizer=name, weights=str(place), **asked))
        return str(refusal.value)

    assert refused(language="xx").endswith("knows no language 'xx'; there are: en.")
    told = refused(task="transcrib")
    assert told.endswith("knows no task 'transcrib'; there are: transcribe, translate. Did you mean 'transcribe'?")
    assert "writes down no words; leave out language and task" in refused("whisper-tiny", task="translate")
    shutil.copytree(folder, tmp_path / "w")
    change(tmp_path / "w", "generation_config.json", is_multilingual=False)
    assert "knows English alone" in refused(place=tmp_path / "w", language="en")


def test_text_and_codes_are_of_the_same_words_and_depend_on_the_samples_alone(tokenizer: Any) -> None:
    one_N, other_N = sound(4, 1), sound(5, 2)
    first: Tokens = tokenizer.tokens(one_N)
    tokenizer.tokens(other_N)
    again: Tokens = tokenizer.tokens(one_N)
    assert torch.equal(first.codes_KT, again.codes_KT)
    assert first.text == again.text
    letters = [chr(ord("a") + each) for each in first.codes_KT[0].tolist() if each < weights_text.WORDS]
    assert first.text == " ".join(letters)
    assert letters


def test_a_longer_recording_is_heard_from_where_its_last_sentence_ended(tokenizer: Any) -> None:
    waveform_N = sound(50, 4)
    ids = tokenizer.tokens(waveform_N).codes_KT[0].tolist()
    begins, windows = [0], _split(ids)
    for window in windows[:-1]:
        begins.append(begins[-1] + _advance(window))
    assert len(begins) > 1
    assert begins[-1] + _advance(windows[-1]) >= len(waveform_N) > begins[-1]
    alone = [tokenizer.tokens(waveform_N[begin : begin + WINDOW]).codes_KT[0].tolist() for begin in begins]
    assert [_split(each)[0] for each in alone] == windows
    assert all(
        said.end_sample is None or said.start_sample <= said.end_sample for said in timestamps(ids, FIRST + NUM_TIMES)
    )


def test_times_are_read_from_the_ids() -> None:
    num_ids = 100 + NUM_TIMES

    def at(seconds: float) -> int:
        return 100 + round(seconds / 0.02)

    assert timestamps([], num_ids) == []
    assert timestamps([at(0), 5, 6, at(1.5)], num_ids) == [Said(0, 24_000, (5, 6))]
    two = [at(0.5), 5, at(2), at(3), 6, at(4)]
    assert timestamps(two, num_ids) == [Said(8_000, 32_000, (5,)), Said(48_000, 64_000, (6,))]
    assert timestamps([at(1), 5], num_ids) == [Said(16_000, None, (5,))]
    # the last sentence was cut: the next window begins at its end, that is at 10 s
    cut = [at(0), 5, at(10), at(10), 99, at(0.5), 6, at(1)]
    assert timestamps(cut, num_ids) == [Said(0, 160_000, (5,)), Said(168_000, 176_000, (6,))]
    # it was whole: behind its 30 s
    assert timestamps([at(0), 5, at(10), 99, at(1), 6, at(2)], num_ids)[1] == Said(496_000, 512_000, (6,))


def test_nothing_is_said_of_no_samples(tokenizer: Any) -> None:
    tokens = tokenizer.tokens(torch.empty(0))
    assert tuple(tokens.codes_KT.shape) == (1, 0)
    assert tokens.text == ""


def test_the_spec_holds_all_ids_and_has_no_clock(folder: Path) -> None:
    described = describe(TokenizerConfig(tokenizer="whisper-text", weights=str(folder)))
    assert described.spec.codebook_size == FIRST + NUM_TIMES
    assert described.spec.frame_rule is FrameRule.FREE
    assert described.spec.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_timestamps_token_id": None}, ("cannot tell times", "1,501 timestamps")),
        ({"no_timestamps_token_id": "null"}, ("cannot tell times", "no_timestamps_token_id and eos_token_id")),
        ({"no_timestamps_token_id": "29"}, ("cannot tell times", "no_timestamps_token_id and eos_token_id")),
        ({"no_timestamps_token_id": 2_000}, ("cannot tell times", "1,501 timestamps")),
    ],
)
def test_a_checkpoint_that_cannot_tell_times_is_refused(
    changes: dict[str, Any], words: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "w")
    place = tmp_path / "w" / "generation_config.json"
    fields = {**json.loads(place.read_text()), **changes}
    left = {key: None if value == "null" else value for key, value in fields.items() if value is not None}
    place.write_text(json.dumps(left))
    with pytest.raises(UserError) as refused:
        describe(TokenizerConfig(tokenizer="whisper-text", weights=str(tmp_path / "w")))
    assert all(each in str(refused.value) for each in words)


def change(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_fft", 512),
        ("chunk_length", 20),
        ("dither", 0.5),
        ("sampling_rate", 8_000),
        ("feature_size", 40),
        ("padding_value", 0.1),
    ],
)
def test_a_feature_extractor_of_other_frames_is_refused(field: str, value: float, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "w")
    change(tmp_path / "w", "preprocessor_config.json", **{field: value})
    with pytest.raises(UserError, match=f"a feature extractor with {field} {value} .*; whisper-text takes"):
        describe(TokenizerConfig(tokenizer="whisper-text", weights=str(tmp_path / "w")))


def test_whatever_decides_the_words_is_in_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "w")

    def told() -> str:
        return describe(TokenizerConfig(tokenizer="whisper-text", weights=str(tmp_path / "w"))).fingerprint["words"]

    seen = [told()]
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
    for name in names:
        change(tmp_path / "w", name, changed=True)
        seen.append(told())
    assert len(set(seen)) == 1 + len(names)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_folder_without_what_words_are_made_of_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "w")
    (tmp_path / "w" / name).unlink()
    with pytest.raises(UserError, match=f"holds no {name}"):
        describe(TokenizerConfig(tokenizer="whisper-text", weights=str(tmp_path / "w")))


def _split(ids: list[int]) -> list[list[int]]:
    windows: list[list[int]] = [[]]
    for each in ids:
        windows.append([]) if each == FIRST - 1 else windows[-1].append(each)
    return windows


def _advance(window: list[int]) -> int:
    """Restated: to the first of the last two times in a row, unless a word and a time end the window."""
    times = [each >= FIRST for each in window]
    pairs = [place for place in range(len(window) - 1) if times[place] and times[place + 1]]
    if not pairs or times[-2:] == [False, True]:
        return WINDOW
    return (window[pairs[-1]] - FIRST) * 320 or WINDOW
