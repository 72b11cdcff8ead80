"""A corpus's policy: what it refuses, how it is written down, how people read it."""

import json
from typing import Any

import pytest
from wavemill.pipelines.policy import CorpusPolicy, Filters, Transforms, VadPolicy
from wavemill.tokenizers.spec import UserError

FULL = CorpusPolicy(
    channels="split",
    vad=VadPolicy(threshold=0.6, max_speech_s=20, model="silero-vad/6.2.3"),
    filters=Filters(
        min_duration_s=1,
        max_duration_s=15.5,
        min_level_db=-45,
        max_clipping=0.001,
        languages=("de", "fr"),
        speakers=("anna",),
    ),
    transforms=Transforms(trim_silence_db=-50, loudness_lufs=-23),
    separate="ab" * 32,
)


@pytest.mark.parametrize("policy", [CorpusPolicy(), CorpusPolicy(window_s=30), FULL])
def test_a_policy_comes_back_from_json_as_it_was(policy: CorpusPolicy):
    assert CorpusPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_a_policy_written_before_there_were_filters_reads_as_one_without_any():
    assert CorpusPolicy.from_json({"window_s": 30.0, "channels": "mix"}) == CorpusPolicy(window_s=30.0)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"windows": 3}, "The corpus policy holds windows"),
        ({"vad": {"treshold": 0.5}}, "vad holds treshold"),
        ({"filters": {"min_level": -40}}, "filters holds min_level"),
        ({"transforms": {"pitch": 2}}, "transforms holds pitch"),
        ({"vad": "silero"}, "expected keys and values"),
        ({"filters": {"languages": "de"}}, "expected a list of names"),
        ({"window_s": "30s"}, "accepted are numbers"),
    ],
)
def test_a_policy_with_keys_or_kinds_that_nobody_knows_is_refused(written: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        CorpusPolicy.from_json(written)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CorpusPolicy(window_s=30, vad=VadPolicy()), "choose one of them"),
        (lambda: CorpusPolicy(window_s=0), "The window is 0 s; accepted are numbers from 0.1 to 43200 s"),
        (lambda: CorpusPolicy(window_s=float("nan")), "The window is nan"),
        (lambda: CorpusPolicy(channels="left"), "choose one of mix, first, split"),
        (lambda: CorpusPolicy(separate="abc"), "64 digits"),
        (lambda: VadPolicy(threshold=1.0), "threshold is 1"),
        (lambda: VadPolicy(min_silence_s=-0.1), "min_silence_s is -0.1"),
        (lambda: VadPolicy(pad_s=True), "pad_s is True"),
        (lambda: VadPolicy(min_speech_s=20, max_speech_s=30), "at least twice"),
        (lambda: Filters(min_duration_s=10, max_duration_s=5), "keep no segment"),
        (lambda: Filters(max_clipping=2), "max_clipping is 2"),
        (lambda: Filters(min_level_db=30), "min_level_db is 30"),
        (lambda: Transforms(loudness_lufs=23), "loudness_lufs is 23; accepted are numbers from -70 to 0"),
        (lambda: Transforms(trim_silence_db=50), "trim_silence_db is 50"),
    ],
)
def test_a_policy_out_of_its_ranges_is_refused_in_one_sentence(make: Any, said: str):
    with pytest.raises(UserError, match=said):
        make()


def test_a_policy_is_said_in_words():
    assert CorpusPolicy().words() == "whole recordings, channels mix"
    policy = CorpusPolicy(window_s=30, transforms=Transforms(loudness_lufs=-23))
    assert policy.words() == "30 s windows, channels mix, loudness -23 LUFS"
    assert FULL.words() == (
        "speech found by silero-vad/6.2.3 (threshold 0.6, 0.25 to 20 s, pauses from 0.3 s, padded by 0.1 s), "
        "channels split, at least 1 s, at most 15.5 s, at least -45 dBFS, at most 0.1 % clipped, languages de, fr, "
        "1 speaker, trim -50 dBFS, loudness -23 LUFS, separated with abababababab"
    )


def test_only_what_changes_the_sound_is_in_the_transforms_fingerprint():
    assert CorpusPolicy(window_s=30, filters=Filters(min_level_db=-40)).transforms_fingerprint() == "none"
    assert FULL.transforms_fingerprint() == "trim -50 dBFS; loudness -23 LUFS"


@pytest.mark.parametrize(
    ("policy", "needed"),
    [
        (CorpusPolicy(window_s=30, channels="first", separate="ab" * 32), False),
        (CorpusPolicy(filters=Filters(min_duration_s=1, max_duration_s=9, languages=("de",), speakers=("a",))), False),
        (CorpusPolicy(vad=VadPolicy()), True),
        (CorpusPolicy(filters=Filters(min_level_db=-40)), True),
        (CorpusPolicy(filters=Filters(max_clipping=0)), True),
        (CorpusPolicy(transforms=Transforms(trim_silence_db=-50)), True),
        (CorpusPolicy(transforms=Transforms(loudness_lufs=-23)), True),
    ],
)
def test_sound_is_looked_at_only_when_the_policy_asks_for_it(policy: CorpusPolicy, needed: bool):
    assert policy.needs_analysis is needed
