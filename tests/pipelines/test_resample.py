"""Resampling in blocks against torchaudio on the whole waveform, and against the formula in float64."""

import math

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


def test_rates_with_a_huge_ratio_are_refused_and_usual_ones_are_not() -> None:
    assert all(can_resample(rate, new_rate) for rate in RATES for new_rate in NEW_RATES)
    assert not can_resample(767_999, 16_000)


def test_a_waveform_shorter_than_promised_is_never_handed_out() -> None:
    sink = StreamResampler(1_000, 44_100, 16_000)
    sink.push(noise(500))
    with pytest.raises(AssertionError, match="not as long as promised"):
        sink.finish()
