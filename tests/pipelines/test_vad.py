"""Speech found as Silero's own package finds it, at any rate, however long the recording; spans keep their promises."""

import builtins
import importlib.metadata
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import silero_vad
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchaudio.functional import resample
from wavemill.pipelines import vad
from wavemill.pipelines.entries import AudioError
from wavemill.pipelines.policy import VadPolicy
from wavemill.pipelines.vad import CHUNK, SAMPLE_RATE, SpeechDetector, require_vad_model, speech_spans, vad_model
from wavemill.tokenizers.spec import UserError

SPEECH = Path(__file__).resolve().parents[2] / "jobs" / "samples" / "speech"
WHOLE = VadPolicy(max_speech_s=3600)
Waveform = NDArray[np.float32]


@pytest.fixture(scope="module")
def talk_N() -> Waveform:
    """Most of a minute of different people, at 16 kHz, with pauses of 0.1 to 3 s of faint noise between them."""
    random = np.random.default_rng(7)
    parts: list[Waveform] = []
    for path in sorted(SPEECH.glob("*.flac")):
        sound_N, rate = soundfile.read(path, dtype="float32")
        parts.append(resample(torch.from_numpy(sound_N), rate, SAMPLE_RATE).numpy())
        pause = int(random.choice([0.1, 0.25, 0.5, 1.0, 3.0]) * SAMPLE_RATE)
        parts.append(1e-4 * random.standard_normal(pause).astype(np.float32))
    return np.concatenate(parts)


def theirs(waveform_N: Waveform) -> list[float]:
    """The packaged loop: one chunk after the other, its last filled up with silence."""
    model: Any = silero_vad.load_silero_vad()
    padded_N = torch.from_numpy(np.pad(waveform_N, (0, -len(waveform_N) % CHUNK)))
    with torch.inference_mode():
        return [model(chunk_N, SAMPLE_RATE).item() for chunk_N in padded_N.split(CHUNK)]


def ours(waveform_N: Waveform, rate: int, *, seconds: int) -> Waveform:
    detector = SpeechDetector(rate)
    for start in range(0, len(waveform_N), seconds * rate):
        detector.push(waveform_N[start : start + seconds * rate])
    return detector.finish()


def test_probabilities_are_those_of_the_packaged_loop(talk_N: Waveform):
    expected = theirs(talk_N)
    assert len(talk_N) > 50 * SAMPLE_RATE
    for seconds in (1, 7, 1_000):
        np.testing.assert_allclose(ours(talk_N, SAMPLE_RATE, seconds=seconds), expected, atol=2e-4)


def test_one_recording_leaves_nothing_behind_for_the_next(talk_N: Waveform):
    start_N = talk_N[: 5 * SAMPLE_RATE]
    before = ours(start_N, SAMPLE_RATE, seconds=5)
    ours(talk_N[::-1].copy(), SAMPLE_RATE, seconds=5)
    np.testing.assert_array_equal(ours(start_N, SAMPLE_RATE, seconds=5), before)


@pytest.mark.parametrize("num_samples", [1, 511, 512, 513, 16_000])
def test_the_shortest_recordings_get_a_probability_for_every_chunk(talk_N: Waveform, num_samples: int):
    part_N = talk_N[20_000 : 20_000 + num_samples]
    np.testing.assert_allclose(ours(part_N, SAMPLE_RATE, seconds=1), theirs(part_N), atol=2e-5)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_other_rates_are_resampled_as_if_in_one_piece(talk_N: Waveform, rate: int):
    sound_N = resample(torch.from_numpy(talk_N[: 21 * SAMPLE_RATE + 99]), SAMPLE_RATE, rate).numpy()
    whole_N = resample(torch.from_numpy(sound_N), rate, SAMPLE_RATE).numpy()
    found_T = ours(sound_N, rate, seconds=4)
    np.testing.assert_allclose(found_T, theirs(whole_N)[: len(found_T)], atol=1e-3)


@pytest.mark.parametrize(
    "policy",
    [
        WHOLE,
        VadPolicy(max_speech_s=3600, threshold=0.3, min_silence_s=0.1, pad_s=0.03),
        VadPolicy(max_speech_s=3600, threshold=0.8, min_speech_s=1.0, min_silence_s=0.6, pad_s=0.5),
    ],
)
def test_spans_are_those_of_the_package_to_the_grid_of_10_ms(talk_N: Waveform, policy: VadPolicy):
    model: Any = silero_vad.load_silero_vad()
    expected = silero_vad.get_speech_timestamps(
        torch.from_numpy(talk_N),
        model,
        threshold=policy.threshold,
        min_speech_duration_ms=round(policy.min_speech_s * 1_000),
        min_silence_duration_ms=round(policy.min_silence_s * 1_000),
        speech_pad_ms=round(policy.pad_s * 1_000),
    )
    probabilities_T = ours(talk_N, SAMPLE_RATE, seconds=10)
    found = speech_spans(probabilities_T, sample_rate=SAMPLE_RATE, num_samples=len(talk_N), policy=policy)
    assert len(expected) >= 5
    assert len(found) == len(expected)
    edges = np.array([[span["start"], span["end"]] for span in expected])
    assert np.abs(np.array(found) - edges).max() <= SAMPLE_RATE // 200
    assert all(edge % (SAMPLE_RATE // 100) == 0 or edge == len(talk_N) for span in found for edge in span)


def test_speech_without_a_pause_that_ends_it_is_cut_where_the_speaker_pauses_most(talk_N: Waveform):
    probabilities_T = np.full(40 * SAMPLE_RATE // CHUNK, 0.95, np.float32)
    for second, depth in ((6.0, 0.6), (9.0, 0.4), (15.0, 0.45), (21.0, 0.6)):
        at = int(second * SAMPLE_RATE / CHUNK)
        probabilities_T[at - 2 : at + 3] = depth
    found = speech_spans(
        probabilities_T, sample_rate=SAMPLE_RATE, num_samples=40 * SAMPLE_RATE, policy=VadPolicy(max_speech_s=10)
    )
    cuts = [end / SAMPLE_RATE for _, end in found[:-1]]
    assert cuts[:2] == pytest.approx([9.0, 15.0], abs=0.15)
    assert found[0][0] == 0
    assert found[-1][1] == 40 * SAMPLE_RATE


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_samples=st.integers(1, 400_000),
    rate=st.sampled_from([8_000, 11_025, 16_000, 44_100]),
    smooth=st.integers(1, 60),
    policy=st.builds(
        VadPolicy,
        threshold=st.floats(0.05, 0.95),
        min_speech_s=st.floats(0, 0.5),
        max_speech_s=st.floats(1, 8),
        min_silence_s=st.floats(0, 0.5),
        pad_s=st.floats(0, 0.5),
    ),
)
def test_spans_ascend_never_overlap_and_are_never_longer_than_asked(
    seed: int, num_samples: int, rate: int, smooth: int, policy: VadPolicy
):
    num_chunks = math.ceil(math.ceil(num_samples * SAMPLE_RATE / rate) / CHUNK)
    noise_T = np.random.default_rng(seed).random(num_chunks + smooth)
    probabilities_T = np.convolve(noise_T, np.full(smooth, 1 / smooth), mode="full")[:num_chunks].astype(np.float32)
    spans = speech_spans(probabilities_T, sample_rate=rate, num_samples=num_samples, policy=policy)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges)
    assert all(0 <= start < end <= num_samples for start, end in spans)
    on_grid = {frame * rate // 100 for frame in range(num_samples * 100 // rate + 2)}
    assert all(edge in on_grid or edge == num_samples for edge in edges)
    assert all(end - start <= policy.max_speech_s * rate + 1 for start, end in spans)
    if edges and policy.min_speech_s * rate > rate / 100:
        cut_at = policy.min_speech_s - 0.02  # the grid moves each end by 5 ms at most
        assert min(end - start for start, end in spans) >= min(cut_at * rate, num_samples)


def test_silence_and_noise_hold_no_speech():
    noise_N = 0.01 * np.random.default_rng(0).standard_normal(10 * SAMPLE_RATE).astype(np.float32)
    for sound_N in (noise_N, np.zeros_like(noise_N)):
        probabilities_T = ours(sound_N, SAMPLE_RATE, seconds=10)
        assert speech_spans(probabilities_T, sample_rate=SAMPLE_RATE, num_samples=len(sound_N), policy=WHOLE) == []
    assert speech_spans(np.zeros(0, np.float32), sample_rate=SAMPLE_RATE, num_samples=0, policy=WHOLE) == []


def test_another_model_than_the_corpus_was_cut_with_is_refused():
    require_vad_model(VadPolicy())
    require_vad_model(VadPolicy(model=vad_model()))
    with pytest.raises(UserError, match=r"is cut at pauses that silero-vad/5\.0 finds.*pip install silero-vad==5\.0"):
        require_vad_model(VadPolicy(model="silero-vad/5.0"))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    find, load = importlib.metadata.version, builtins.__import__

    def version(name: str) -> str:
        if name == "silero-vad":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("silero_vad"):
            raise ModuleNotFoundError(name)
        return load(name, *rest)

    monkeypatch.setattr(vad, "version", version)
    monkeypatch.setattr(builtins, "__import__", without)
    vad._model.cache_clear()
    for asked in (vad_model, lambda: SpeechDetector(SAMPLE_RATE)):
        with pytest.raises(UserError, match=r"pip install 'wavemill\[vad\]'"):
            asked()


def test_a_rate_that_cannot_be_resampled_is_bad_audio():
    with pytest.raises(AudioError, match="2,147,483,647 Hz cannot be resampled"):
        SpeechDetector(2**31 - 1)
