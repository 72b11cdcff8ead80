"""Resampling in blocks against torchaudio on the whole waveform, and against the formula in float64."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchaudio.transforms import Resample
from wavemill.pipelines.resample import StreamResampler, can_resample, resampled_length

RATES = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)
NEW_RATES = (16_000, 24_000)
TOLERANCE = 2e-6
BLOCK = 1 << 18  # input samples the resampler takes at a time, about


def noise(num_samples: int, *, seed: int = 0) -> Tensor:
    """White noise just inside [-1, 1]: every frequency, the filter's stop band included."""
    return torch.rand(num_samples, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def in_pieces(waveform_N: Tensor, sample_rate: int, new_rate: int, cuts: list[int]) -> Tensor:
    sink = StreamResampler(waveform_N.shape[0], sample_rate, new_rate)
    for piece_N in torch.tensor_split(waveform_N, sorted(cuts)):
        sink.push(piece_N)
    return sink.finish()


def assert_like_torchaudio(ours_N: Tensor, waveform_N: Tensor, sample_rate: int, new_rate: int) -> None:
    theirs_N = Resample(sample_rate, new_rate)(waveform_N)
    assert ours_N.shape[0] == math.ceil(waveform_N.shape[0] * new_rate / sample_rate)
    # torchaudio computes its length in float32, so it may lack the last sample of a long waveform
    assert ours_N.shape[0] - theirs_N.shape[0] in (0, 1)
    assert ours_N.isfinite().all()
    torch.testing.assert_close(ours_N[: theirs_N.shape[0]], theirs_N, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("new_rate", NEW_RATES)
@pytest.mark.parametrize("sample_rate", RATES)
def test_several_blocks_come_out_as_torchaudio_has_the_whole(sample_rate: int, new_rate: int) -> None:
    waveform_N = noise(2 * BLOCK + 12_345)
    ours_N = in_pieces(waveform_N, sample_rate, new_rate, [1, 2, 1_000, 131_072, 131_073, BLOCK, 300_001])
    assert_like_torchaudio(ours_N, waveform_N, sample_rate, new_rate)


@pytest.mark.parametrize("new_rate", NEW_RATES)
@pytest.mark.parametrize("sample_rate", RATES)
def test_short_waveforms_come_out_as_torchaudio_has_them(sample_rate: int, new_rate: int) -> None:
    for num_samples in (1, 2, 3, 5, 17, 100, 441, 1_001, 4_800):
        waveform_N = noise(num_samples, seed=num_samples)
        ours_N = in_pieces(waveform_N, sample_rate, new_rate, [])
        assert_like_torchaudio(ours_N, waveform_N, sample_rate, new_rate)


@pytest.mark.parametrize(("sample_rate", "new_rate"), [(44_100, 16_000), (48_000, 16_000), (22_050, 24_000)])
def test_waveforms_that_end_about_a_block_border_come_out_as_torchaudio_has_them(
    sample_rate: int, new_rate: int
) -> None:
    period = sample_rate // math.gcd(sample_rate, new_rate)
    block = period * (BLOCK // period)
    whole_N = noise(block + 2 * period + 64)
    for num_samples in (block - 1, block, block + 1, block + period, block + 2 * period + 64):
        waveform_N = whole_N[:num_samples]
        ours_N = in_pieces(waveform_N, sample_rate, new_rate, [])
        assert_like_torchaudio(ours_N, waveform_N, sample_rate, new_rate)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sample_rate=st.sampled_from(RATES),
    new_rate=st.sampled_from(NEW_RATES),
    num_samples=st.integers(1, 6_000),
    data=st.data(),
)
def test_however_the_waveform_is_cut_the_bits_are_the_same(
    sample_rate: int, new_rate: int, num_samples: int, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, num_samples), max_size=8))
    waveform_N = noise(num_samples)
    whole_N = in_pieces(waveform_N, sample_rate, new_rate, [])
    assert torch.equal(in_pieces(waveform_N, sample_rate, new_rate, cuts), whole_N)
    assert_like_torchaudio(whole_N, waveform_N, sample_rate, new_rate)


@pytest.mark.parametrize("sample_rate", [8_000, 16_000, 44_100, 48_000])
def test_several_blocks_are_the_same_bits_however_they_are_cut(sample_rate: int) -> None:
    waveform_N = noise(2 * BLOCK + 999)
    whole_N = in_pieces(waveform_N, sample_rate, 16_000, [])
    generator = np.random.default_rng(7)
    for cuts in (
        list(range(0, waveform_N.shape[0], 131_072)),
        list(range(0, waveform_N.shape[0], 4_099)),
        [1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1],
        generator.integers(0, waveform_N.shape[0], 20).tolist(),
    ):
        assert torch.equal(in_pieces(waveform_N, sample_rate, 16_000, cuts), whole_N)


def test_equal_rates_leave_every_bit_alone() -> None:
    waveform_N = noise(300_000)
    assert torch.equal(in_pieces(waveform_N, 16_000, 16_000, [1, 77_777]), waveform_N)


@pytest.mark.parametrize(("sample_rate", "new_rate"), [(44_100, 16_000), (8_000, 16_000), (48_000, 24_000)])
def test_a_sample_is_the_windowed_sinc_of_its_surroundings_in_float64(sample_rate: int, new_rate: int) -> None:
    """sum_n x[n] * cutoff / rate * sinc(cutoff t) * cos(pi cutoff t / 12)^2 within six zero crossings (torchaudio).

    The bound is wider than against torchaudio, whose taps stand at times that it rounds to float32.
    """
    waveform_N = noise(BLOCK + 9_000, seed=3)
    ours_N = in_pieces(waveform_N, sample_rate, new_rate, [50_000])
    cutoff = 0.99 * min(sample_rate, new_rate)  # Hz, twice the band kept
    x_N = waveform_N.numpy().astype(np.float64)
    positions = np.arange(x_N.shape[0])
    border = BLOCK * new_rate // sample_rate
    for at in (0, 1, 777, border - 1, border, border + 1, ours_N.shape[0] - 1):
        t_N = np.clip((at / new_rate - positions / sample_rate) * cutoff, -6, 6)
        taps_N = np.sinc(t_N) * np.cos(np.pi * t_N / 12) ** 2 * cutoff / sample_rate
        assert abs((x_N * taps_N).sum() - ours_N[at].item()) < 5e-6


def test_the_length_is_the_exact_ceiling_even_where_floats_round() -> None:
    for num_samples in (1, 3, 2**24 + 1, 2**31 + 7, 10**12 + 1):
        for sample_rate in RATES:
            for new_rate in NEW_RATES:
                length = resampled_length(num_samples, sample_rate, new_rate)
                assert (length - 1) * sample_rate < num_samples * new_rate <= length * sample_rate


LONG_RATIOS = [(2_003, 2_100), (2_100, 2_003), (4_001, 1_999), (8_821, 977), (3_001, 2_998)]


@pytest.mark.parametrize(
    ("sample_rate", "new_rate"),
    [pytest.param(*ratio, marks=() if ratio == LONG_RATIOS[0] else pytest.mark.slow) for ratio in LONG_RATIOS],
)
def test_ratios_without_small_numbers_come_out_as_torchaudio_has_them(sample_rate: int, new_rate: int) -> None:
    """torchaudio keeps four million taps and more for these; here they are evaluated as they are needed."""
    for num_samples in (1, 2, 17, 1_000, BLOCK - 1, BLOCK + 4_321):
        waveform_N = noise(num_samples, seed=num_samples)
        ours_N = in_pieces(waveform_N, sample_rate, new_rate, [])
        theirs_N = Resample(sample_rate, new_rate)(waveform_N)
        assert ours_N.shape[0] - theirs_N.shape[0] in (0, 1)
        torch.testing.assert_close(ours_N[: theirs_N.shape[0]], theirs_N, atol=1e-6, rtol=0)
        assert torch.equal(
            in_pieces(waveform_N, sample_rate, new_rate, [1, num_samples // 3, num_samples // 2]), ours_N
        )


@pytest.mark.parametrize("sample_rate", [4_001, 11_127, 44_056, 96_001])
def test_a_tone_at_any_odd_rate_is_the_same_tone_at_16_khz(sample_rate: int) -> None:
    seconds, tone = 20, 440.0
    waveform_N = torch.sin(2 * math.pi * tone * torch.arange(seconds * sample_rate, dtype=torch.float64) / sample_rate)
    ours_N = in_pieces(waveform_N.float(), sample_rate, 16_000, [5, 100_000])
    assert ours_N.shape[0] == seconds * 16_000
    expected_N = torch.sin(2 * math.pi * tone * torch.arange(seconds * 16_000, dtype=torch.float64) / 16_000)
    inner = slice(200, -200)  # at its ends, a filter sees silence
    assert (ours_N[inner] - expected_N[inner]).abs().max() < 5e-3  # what the filter lets ripple


@pytest.mark.slow
def test_odd_rates_need_no_more_memory_than_usual_ones() -> None:
    """torchaudio's taps for 47,999 to 24,000 Hz alone are 9 GB."""
    script = """
import resource
import torch
from wavemill.pipelines.resample import StreamResampler

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for sample_rate in (47_999, 767_999):
    sink = StreamResampler(sample_rate, sample_rate, 24_000)
    sink.push(torch.zeros(sample_rate))
    sink.finish()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert float(done.stdout) < 200


def test_any_two_rates_of_audio_can_be_resampled() -> None:
    for sample_rate in (4_000, 4_001, 11_127, 44_056, 767_999, 768_000):
        assert all(can_resample(sample_rate, new_rate) for new_rate in NEW_RATES)
    assert not can_resample(2**31 - 1, 16_000)


def test_a_waveform_shorter_than_promised_is_never_handed_out() -> None:
    sink = StreamResampler(1_000, 44_100, 16_000)
    sink.push(noise(500))
    with pytest.raises(AssertionError, match="not as long as promised"):
        sink.finish()
