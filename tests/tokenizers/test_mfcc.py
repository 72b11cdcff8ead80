"""MFCC features against torchaudio's own Kaldi port."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch
import torchaudio.compliance.kaldi as kaldi
from torch import Tensor
from torchaudio.functional import compute_deltas
from wavemill.tokenizers.mfcc import MfccFeatures
from wavemill.tokenizers.numerics import use_one_thread
from wavemill.tokenizers.spec import FrameRule

# float32 of cepstra up to 80: a few last bits
TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}


def oracle(waveform_N: Tensor) -> Tensor:
    """What HuBERT's first labels were made on: Kaldi's MFCC and its deltas, every second frame. `[T, 39]`."""
    ceps_CT = kaldi.mfcc(waveform_N[None], sample_frequency=16_000, use_energy=False).t()
    deltas_CT = compute_deltas(ceps_CT)
    return torch.cat([ceps_CT, deltas_CT, compute_deltas(deltas_CT)]).t()[::2]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(num_samples: int, *, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=generator(seed))


def speech(samples: Path, name: str) -> Tensor:
    sound, sample_rate = soundfile.read(samples / "speech" / name, dtype="float32")
    assert sample_rate == 16_000
    return torch.from_numpy(sound)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the product encodes; more threads would only slow such small transforms."""
    before = torch.get_num_threads()
    use_one_thread()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mfcc() -> MfccFeatures:
    return MfccFeatures()


@pytest.mark.parametrize("name", ["de_frieda_02.flac", "de_jonas_01.flac"])
@pytest.mark.parametrize("num_samples", [400, 719, 720, 7_777, 40_001, None])
def test_mfcc_of_speech_are_kaldis(mfcc: MfccFeatures, samples: Path, name: str, num_samples: int | None) -> None:
    waveform_N = speech(samples, name)[:num_samples]
    torch.testing.assert_close(mfcc.extract(waveform_N), oracle(waveform_N), **TOLERANCE)


@pytest.mark.parametrize(
    "waveform_N",
    [noise(50_000), torch.rand(20_000, generator=generator(1)) * 2 - 1, torch.full((9_000,), 0.5), torch.zeros(9_000)],
    ids=["noise", "full-scale", "constant", "silence"],
)
def test_mfcc_of_noise_and_silence_are_kaldis(mfcc: MfccFeatures, waveform_N: Tensor) -> None:
    features_TD = mfcc.extract(waveform_N)
    assert features_TD.isfinite().all()
    torch.testing.assert_close(features_TD, oracle(waveform_N), **TOLERANCE)


def test_a_long_segment_in_blocks_has_the_features_of_the_whole(mfcc: MfccFeatures, samples: Path) -> None:
    waveform_N = torch.cat([speech(samples, "de_jonas_01.flac"), noise(400_000)])  # 28 s: 2,833 inner frames
    features_TD = mfcc.extract(waveform_N)
    assert features_TD.shape[0] > 1_024
    torch.testing.assert_close(features_TD, oracle(waveform_N), **TOLERANCE)


@pytest.mark.parametrize("inner_frames", [1_023, 1_024, 1_025, 2_048, 2_049])
def test_no_frame_is_lost_or_doubled_where_blocks_meet(mfcc: MfccFeatures, inner_frames: int) -> None:
    waveform_N = noise(400 + 160 * (inner_frames - 1), seed=inner_frames)
    torch.testing.assert_close(mfcc.extract(waveform_N), oracle(waveform_N), **TOLERANCE)


def test_the_number_of_frames_is_huberts_for_every_length_up_to_three_hops(mfcc: MfccFeatures) -> None:
    waveform_N = noise(3 * 320)
    for num_samples in range(3 * 320 + 1):
        expected = 0 if num_samples < 400 else 1 + (num_samples - 400) // 320
        assert mfcc.extract(waveform_N[:num_samples]).shape == (expected, 39), num_samples


def test_the_number_of_frames_is_huberts_for_lengths_drawn_at_random(mfcc: MfccFeatures) -> None:
    waveform_N = noise(100_000)
    for num_samples in torch.randint(400, 100_000, (40,), generator=generator(2)).tolist():
        assert mfcc.extract(waveform_N[:num_samples]).shape == (1 + (num_samples - 400) // 320, 39), num_samples


def test_the_class_says_the_clock_it_keeps(mfcc: MfccFeatures) -> None:
    assert (mfcc.spec.sample_rate, mfcc.spec.hop_length, mfcc.spec.window_length) == (16_000, 320, 400)
    assert mfcc.spec.frame_rule is FrameRule.FLOOR
    assert mfcc.dim == mfcc.extract(noise(400)).shape[1]


def test_features_do_not_depend_on_where_the_samples_lie_in_memory(mfcc: MfccFeatures) -> None:
    waveform_N = noise(30_000)
    expected_TD = mfcc.extract(waveform_N)
    for offset in (1, 2, 3, 5, 7, 15):
        longer = torch.full((30_000 + 2 * offset,), 9.0)
        longer[offset : offset + 30_000] = waveform_N
        assert torch.equal(mfcc.extract(longer[offset : offset + 30_000]), expected_TD), offset


def test_features_of_one_channel_of_interleaved_sound_are_those_of_a_copy_of_it(mfcc: MfccFeatures) -> None:
    waveform_N = noise(30_000)
    stereo_NC = torch.stack([waveform_N, -waveform_N], dim=1)
    assert torch.equal(mfcc.extract(stereo_NC[:, 0]), mfcc.extract(waveform_N))


def test_extracting_leaves_the_waveform_as_it_was(mfcc: MfccFeatures) -> None:
    waveform_N = noise(5_000)
    before = waveform_N.clone()
    mfcc.extract(waveform_N)
    assert torch.equal(waveform_N, before)
