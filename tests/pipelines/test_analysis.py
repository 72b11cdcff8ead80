"""Segments found in sound: against numpy, torchaudio, FFmpeg and the figures that the standard gives."""

import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional
from numpy.typing import NDArray
from wavemill.pipelines.analysis import (
    MAX_GAIN_DB,
    Figures,
    Found,
    clipped_share,
    duration_reason,
    find_segments,
    level_db,
    loudness_gain_db,
    loudness_lufs,
    measure,
    metadata_reason,
    trimmed,
)
from wavemill.pipelines.entries import AudioError
from wavemill.pipelines.policy import CorpusPolicy, Filters, Transforms, VadPolicy

SPEECH = Path(__file__).resolve().parents[2] / "jobs" / "samples" / "speech"
RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000)
LOUD = CorpusPolicy(transforms=Transforms(loudness_lufs=-23))
Waveform = NDArray[np.float32]


def speech(name: str, rate: int) -> Waveform:
    sound_N, own_rate = soundfile.read(SPEECH / name, dtype="float32")
    return torchaudio.functional.resample(torch.from_numpy(sound_N), own_rate, rate).numpy()


def noise(num_samples: int, *, level: float = 0.1, seed: int = 0) -> Waveform:
    return (level * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def sine(rate: int, seconds: float, *, hz: float = 997, amplitude: float = 1.0) -> Waveform:
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def figures_of(sound_N: Waveform, rate: int) -> Figures:
    return measure(iter([sound_N]), sample_rate=rate, num_samples=len(sound_N), policy=LOUD)


def segments(sound_N: Waveform, rate: int, policy: CorpusPolicy, *, start: int = 0) -> tuple[list[Found], Counter[str]]:
    return find_segments(iter([sound_N]), sample_rate=rate, start_sample=start, num_samples=len(sound_N), policy=policy)


def ffmpeg_loudness(sound_N: Waveform, rate: int) -> float:
    """FFmpeg's EBU R128 meter."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format="flt", layout="mono", time_base=Fraction(1, rate))
    meter, sink = graph.add("ebur128", "metadata=1"), graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    measured = -math.inf
    for start in range(0, len(sound_N), 4_096):
        frame = av.AudioFrame.from_ndarray(sound_N[None, start : start + 4_096], format="flt", layout="mono")
        frame.sample_rate, frame.pts = rate, start
        graph.push(frame)
        while True:
            try:
                measured = float(graph.pull().metadata.get("lavfi.r128.I", measured))
            except av.BlockingIOError:
                break
    return measured


@pytest.mark.parametrize("name", ["en_anna_11.flac", "de_jonas_01.flac", "fr_camille_05.flac"])
@pytest.mark.parametrize("rate", RATES)
def test_the_loudness_of_speech_is_torchaudios_at_every_rate(name: str, rate: int):
    sound_N = np.concatenate([speech(name, rate), np.zeros(rate, np.float32), 0.05 * speech(name, rate)])
    theirs = torchaudio.functional.loudness(torch.from_numpy(sound_N).double()[None], rate).item()
    assert loudness_lufs(figures_of(sound_N, rate), 0, len(sound_N)) == pytest.approx(theirs, abs=0.1)


@pytest.mark.parametrize("name", ["en_anna_11.flac", "de_jonas_01.flac", "es_mateo_06.flac"])
def test_the_loudness_of_speech_is_ffmpegs(name: str):
    sound_N = speech(name, 48_000)
    ours = loudness_lufs(figures_of(sound_N, 48_000), 0, len(sound_N))
    assert ours == pytest.approx(ffmpeg_loudness(sound_N, 48_000), abs=0.02)


def test_a_full_scale_sine_has_the_loudness_that_the_standard_gives():
    assert loudness_lufs(figures_of(sine(48_000, 5), 48_000), 0, 240_000) == pytest.approx(-3.01, abs=0.005)


def test_the_loudness_of_a_recording_does_not_depend_on_its_rate():
    low_N = torch.from_numpy(speech("en_anna_11.flac", 8_000))
    found = []
    for rate in RATES:
        sound_N = torchaudio.functional.resample(low_N, 8_000, rate, lowpass_filter_width=64).numpy()
        found.append(loudness_lufs(figures_of(sound_N, rate), 0, len(sound_N)))
    assert max(found) - min(found) < 0.05


def test_quiet_stretches_are_gated_out_of_the_loudness():
    rate = 16_000
    tone_N = sine(rate, 4, amplitude=0.1)
    alone = loudness_lufs(figures_of(tone_N, rate), 0, len(tone_N))
    mixed_N = np.concatenate([tone_N, 0.01 * tone_N, np.zeros(8 * rate, np.float32)])
    assert loudness_lufs(figures_of(mixed_N, rate), 0, len(mixed_N)) == pytest.approx(alone, abs=0.25)
    assert loudness_lufs(figures_of(0.0001 * tone_N, rate), 0, len(tone_N)) is None


def test_the_loudness_of_less_than_400_ms_is_that_of_its_one_block():
    rate = 16_000
    figures = figures_of(sine(rate, 5, amplitude=0.5), rate)
    long = loudness_lufs(figures, 0, 5 * rate)
    for num_samples in (160, 1_600, 6_399):
        assert loudness_lufs(figures, rate, rate + num_samples) == pytest.approx(long, abs=0.1)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100])
def test_level_and_clipping_are_those_of_numpy(rate: int):
    sound_N = np.clip(noise(13 * rate + 77, level=0.5), -1, 1)
    sound_N[rate : rate + 50] = 32767 / 32768
    sound_N[2 * rate : 2 * rate + 50] = 32766 / 32768  # one less than full scale
    figures = figures_of(sound_N, rate)
    for start_frame, end_frame in ((0, 1), (3, 250), (90, 110), (100, 1_300), (0, 1_301)):
        start, end = start_frame * rate // 100, min(len(sound_N), end_frame * rate // 100)
        part_N = sound_N[start:end].astype(np.float64)
        assert level_db(figures, start, end) == pytest.approx(20 * np.log10(np.sqrt(np.mean(part_N**2))), abs=1e-9)
        assert clipped_share(figures, start, end) == np.mean(np.abs(part_N) >= 32767 / 32768)
    assert level_db(figures_of(np.zeros(rate, np.float32), rate), 0, rate) == -math.inf


def test_trimming_cuts_what_is_quieter_at_both_ends_and_nothing_between():
    rate = 11_025
    sound_N = noise(2 * rate, level=10 ** (-70 / 20))
    begin, end = 37 * rate // 100, 155 * rate // 100
    sound_N[begin : 60 * rate // 100] = noise(60 * rate // 100 - begin)
    sound_N[120 * rate // 100 : end] = noise(end - 120 * rate // 100)
    figures = figures_of(sound_N, rate)
    assert trimmed(figures, 0, 2 * rate, -50) == (begin, end)
    assert trimmed(figures, begin + 5, end - 5, -50) == (begin + 5, end - 5)
    assert trimmed(figures, 0, 2 * rate, -100) == (0, 2 * rate)
    assert trimmed(figures, 61 * rate // 100, 119 * rate // 100, -50)[0] == 61 * rate // 100
    assert trimmed(figures, 61 * rate // 100, 119 * rate // 100, -50)[1] == 61 * rate // 100


def test_the_gain_brings_speech_to_the_target_without_clipping_it():
    rate = 16_000
    sound_N = 0.1 * speech("en_brian_10.flac", rate)
    gain_db = loudness_gain_db(figures_of(sound_N, rate), 0, len(sound_N), -30)
    assert gain_db is not None
    assert gain_db == round(gain_db, 2)
    louder_N = (sound_N * 10 ** (gain_db / 20)).astype(np.float32)
    assert loudness_lufs(figures_of(louder_N, rate), 0, len(sound_N)) == pytest.approx(-30, abs=0.01)
    held_db = loudness_gain_db(figures_of(sound_N, rate), 0, len(sound_N), -5)
    assert held_db is not None
    assert held_db < -5 - loudness_lufs(figures_of(sound_N, rate), 0, len(sound_N))
    assert 0.998 < np.abs(sound_N).max() * 10 ** (held_db / 20) <= 1


def test_sound_past_full_scale_is_turned_down_and_no_gain_is_beyond_its_bounds():
    rate = 16_000
    tone_N = sine(rate, 2)
    assert loudness_gain_db(figures_of(4 * tone_N, rate), 0, 2 * rate, 0) == pytest.approx(-12.05, abs=0.011)
    assert loudness_gain_db(figures_of(1e-3 * tone_N, rate), 0, 2 * rate, 0) == MAX_GAIN_DB
    assert loudness_gain_db(figures_of(1e6 * tone_N, rate), 0, 2 * rate, -23) == -MAX_GAIN_DB
    assert loudness_gain_db(figures_of(0 * tone_N, rate), 0, 2 * rate, -23) is None


def test_silence_after_a_loud_sound_gets_no_gain_from_the_filters_ringing():
    rate = 16_000
    sound_N = np.concatenate([sine(rate, 1, hz=30), np.zeros(rate, np.float32)])
    found, left_out = segments(sound_N, rate, CorpusPolicy(window_s=0.1, transforms=LOUD.transforms))
    assert [each.gain_db is None for each in found] == [False] * 10 + [True] * 10
    assert not left_out


@pytest.mark.parametrize("rate", [8_000, 11_025, 48_000])
def test_the_result_does_not_depend_on_how_the_recording_is_cut_into_pieces(rate: int):
    sound_N = np.concatenate([speech("en_callum_09.flac", rate), noise(40 * rate, level=0.01)])
    policy = CorpusPolicy(vad=VadPolicy(max_speech_s=2), transforms=Transforms(trim_silence_db=-45, loudness_lufs=-23))
    whole = segments(sound_N, rate, policy)
    assert len(whole[0]) > 1
    for size in (1_000, 65_536, 131_072, 777_777):
        pieces = iter(np.array_split(sound_N, range(size, len(sound_N), size)))
        cut = find_segments(pieces, sample_rate=rate, start_sample=0, num_samples=len(sound_N), policy=policy)
        assert cut == whole


@pytest.mark.parametrize("rate", [11_025, 16_000])
def test_windows_lie_where_they_lie_without_analysis(rate: int):
    sound_N = noise(3 * rate)
    found, left_out = segments(sound_N, rate, CorpusPolicy(window_s=0.77, transforms=LOUD.transforms), start=500)
    window = round(0.77 * rate)
    starts = list(range(0, 3 * rate, window))
    assert [each.start_sample for each in found] == [500 + start for start in starts]
    assert [each.num_samples for each in found] == [min(window, 3 * rate - start) for start in starts]
    assert not left_out


def test_speech_becomes_segments_that_hold_the_speech_and_not_the_pauses():
    rate = 22_050
    words = [speech(name, rate) for name in ("en_anna_11.flac", "fr_camille_12.flac", "es_lucia_07.flac")]
    pause_N = noise(2 * rate, level=1e-4)
    sound_N = np.concatenate([pause_N, *(part for word_N in words for part in (word_N, pause_N))])
    policy = CorpusPolicy(vad=VadPolicy(min_silence_s=1.0, pad_s=0.1))
    found, left_out = segments(sound_N, rate, policy, start=4_410)
    assert len(found) == 3
    assert not left_out
    start = 2 * rate
    for each, word_N in zip(found, words, strict=True):
        spoken = slice(each.start_sample - 4_410, each.start_sample - 4_410 + each.num_samples)
        inside = np.sum(np.square(sound_N[spoken], dtype=np.float64))
        assert start - 0.3 * rate < spoken.start < start + len(word_N) < spoken.stop + 0.5 * rate
        assert inside > 0.999 * np.sum(np.square(word_N, dtype=np.float64))
        start += len(word_N) + 2 * rate


def test_what_is_left_out_is_counted_by_reason():
    rate = 16_000
    second = np.ones(rate, np.float32)
    sound_N = np.concatenate([noise(rate), 0 * second, noise(rate, level=0.003), second, noise(rate // 2)])
    policy = CorpusPolicy(
        window_s=1,
        filters=Filters(min_duration_s=0.6, max_duration_s=10, min_level_db=-40, max_clipping=0.01),
        transforms=Transforms(trim_silence_db=-60),
    )
    found, left_out = segments(sound_N, rate, policy)
    assert found == [Found(0, rate, None)]
    assert left_out == {"silent": 1, "too quiet": 1, "clipped": 1, "too short": 1}
    whole = CorpusPolicy(filters=Filters(max_duration_s=2, min_level_db=-100))
    assert segments(sound_N, rate, whole) == ([], Counter({"too long": 1}))
    assert segments(noise(3 * rate, level=0.001), rate, CorpusPolicy(vad=VadPolicy())) == (
        [],
        Counter({"no speech": 1}),
    )


def test_what_is_known_of_a_recording_is_enough_for_some_filters():
    policy = CorpusPolicy(filters=Filters(languages=("de", "fr"), speakers=("anna",), min_duration_s=1))
    assert metadata_reason("de", "anna", policy) is None
    assert metadata_reason("en", "anna", policy) == "other language"
    assert metadata_reason(None, "anna", policy) == "other language"
    assert metadata_reason("fr", None, policy) == "other speaker"
    assert metadata_reason(None, None, CorpusPolicy()) is None
    assert duration_reason(0.99, policy) == "too short"
    assert duration_reason(1.0, policy) is None


@pytest.mark.parametrize("num_samples", [15_999, 16_001])
def test_another_number_of_samples_than_promised_is_bad_audio(num_samples: int):
    with pytest.raises(AudioError, match="samples came, 16,000 were expected"):
        find_segments(iter([noise(num_samples)]), sample_rate=16_000, start_sample=0, num_samples=16_000, policy=LOUD)


def test_a_stream_that_never_ends_is_stopped():
    def pieces() -> Iterator[Waveform]:
        while True:
            yield np.zeros(16_000, np.float32)

    with pytest.raises(AudioError, match="more than 160,000 samples"):
        find_segments(pieces(), sample_rate=16_000, start_sample=0, num_samples=160_000, policy=LOUD)


@pytest.mark.slow
def test_ten_hours_are_analysed_in_bounded_memory():
    rate, num_seconds = 4_000, 36_000
    second_N = noise(60 * rate)

    def pieces() -> Iterator[Waveform]:
        for _ in range(num_seconds // 60):
            yield second_N

    tracemalloc.start()
    try:
        found, _ = find_segments(
            pieces(), sample_rate=rate, start_sample=0, num_samples=num_seconds * rate, policy=LOUD
        )
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [each.num_samples for each in found] == [num_seconds * rate]
    assert peak_bytes < 300e6  # the samples are 576 MB, and their K-weighted squares 1,152 MB
