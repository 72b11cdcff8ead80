"""Log-mel features against torchaudio's MelSpectrogram, and the way back to sound."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor
from torchaudio.transforms import MelSpectrogram
from wavemill.tokenizers.mel import MelFeatures
from wavemill.tokenizers.numerics import use_one_thread
from wavemill.tokenizers.spec import FrameRule


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the product encodes; more threads would only slow such small transforms."""
    before = torch.get_num_threads()
    use_one_thread()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mel() -> MelFeatures:
    return MelFeatures()


@pytest.fixture(scope="module")
def spectrogram() -> MelSpectrogram:
    return MelSpectrogram(
        16_000, 640, hop_length=160, n_mels=80, mel_scale="slaney", norm="slaney", power=1, pad_mode="constant"
    )


def oracle(spectrogram: MelSpectrogram, waveform_N: Tensor) -> Tensor:
    """torchaudio's log-mel of the waveform and silence to a whole hop, two 10 ms frames to a row. `[T, 160]`."""
    num_frames = -(-waveform_N.shape[0] // 320)
    padded = torch.nn.functional.pad(waveform_N, (0, num_frames * 320 - waveform_N.shape[0]))
    mel_MF = spectrogram(padded)  # centred: a frame more than marks
    return mel_MF.clamp_min(1e-5).log().t()[: 2 * num_frames].reshape(num_frames, 160)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(num_samples: int, *, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=generator(seed))


def speech(samples: Path) -> Tensor:
    sound, sample_rate = soundfile.read(samples / "speech" / "de_jonas_01.flac", dtype="float32")
    assert sample_rate == 16_000
    return torch.from_numpy(sound)


@pytest.mark.parametrize("num_samples", [1, 159, 160, 320, 321, 640, 7_777, 16_000, None])
def test_log_mel_of_speech_is_torchaudios(
    mel: MelFeatures, spectrogram: MelSpectrogram, samples: Path, num_samples: int | None
) -> None:
    waveform_N = speech(samples)[8_000:][:num_samples]
    torch.testing.assert_close(mel.extract(waveform_N), oracle(spectrogram, waveform_N), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "waveform_N",
    [noise(50_000), torch.rand(20_000, generator=generator(1)) * 2 - 1, torch.full((9_000,), 0.5), torch.zeros(9_000)],
    ids=["noise", "full-scale", "constant", "silence"],
)
def test_log_mel_of_noise_and_silence_is_torchaudios(
    mel: MelFeatures, spectrogram: MelSpectrogram, waveform_N: Tensor
) -> None:
    features_TD = mel.extract(waveform_N)
    assert features_TD.isfinite().all()
    torch.testing.assert_close(features_TD, oracle(spectrogram, waveform_N), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("inner_frames", [1_022, 1_024, 1_026, 2_048, 2_050])
def test_a_long_segment_in_blocks_has_the_features_of_the_whole(
    mel: MelFeatures, spectrogram: MelSpectrogram, inner_frames: int
) -> None:
    waveform_N = noise(160 * inner_frames - 7, seed=inner_frames)
    torch.testing.assert_close(mel.extract(waveform_N), oracle(spectrogram, waveform_N), atol=1e-5, rtol=1e-5)


def test_every_begun_hop_of_320_samples_is_a_frame(mel: MelFeatures) -> None:
    waveform_N = noise(100_000)
    drawn = torch.randint(0, 100_000, (40,), generator=generator(2)).tolist()
    for num_samples in [*range(3 * 320 + 1), *drawn]:
        assert mel.extract(waveform_N[:num_samples]).shape == (-(-num_samples // 320), 160), num_samples
    assert (mel.spec.sample_rate, mel.spec.hop_length, mel.spec.frame_rule) == (16_000, 320, FrameRule.CEIL)


def test_features_do_not_depend_on_where_the_samples_lie_in_memory(mel: MelFeatures) -> None:
    waveform_N = noise(30_000)
    expected_TD = mel.extract(waveform_N)
    for offset in (1, 2, 3, 5, 7, 15):
        longer = torch.full((30_000 + 2 * offset,), 9.0)
        longer[offset : offset + 30_000] = waveform_N
        assert torch.equal(mel.extract(longer[offset : offset + 30_000]), expected_TD), offset
    stereo_NC = torch.stack([waveform_N, -waveform_N], dim=1)
    assert torch.equal(mel.extract(stereo_NC[:, 0]), expected_TD)


@pytest.mark.parametrize("num_frames", [0, 1, 2, 3, 10, 57])
def test_synthesis_gives_320_samples_a_frame(mel: MelFeatures, num_frames: int) -> None:
    features_TD = mel.extract(noise(num_frames * 320))
    assert features_TD.shape[0] == num_frames
    sound = mel.synthesize(features_TD)
    assert sound.shape == (num_frames * 320,)
    assert sound.isfinite().all()


def test_synthesis_is_the_same_every_time(mel: MelFeatures, samples: Path) -> None:
    features_TD = mel.extract(speech(samples)[:16_000])
    torch.manual_seed(1)
    first = mel.synthesize(features_TD)
    torch.manual_seed(2)
    assert torch.equal(first, mel.synthesize(features_TD))


def test_synthesized_speech_has_the_log_mel_it_was_made_from(mel: MelFeatures, samples: Path) -> None:
    features_TD = mel.extract(speech(samples))
    again_TD = mel.extract(mel.synthesize(features_TD))
    distance = (again_TD - features_TD).abs().mean()
    shuffled_TD = features_TD[torch.randperm(features_TD.shape[0], generator=generator(3))]
    neighbour_TD = features_TD.roll(1, dims=0)  # 20 ms late
    assert distance < 0.1 * (again_TD - shuffled_TD).abs().mean()
    assert distance < 0.2 * (again_TD - neighbour_TD).abs().mean()
    assert distance < 0.25  # of a natural logarithm: 2 dB


def test_synthesized_silence_is_silent(mel: MelFeatures) -> None:
    assert mel.synthesize(mel.extract(torch.zeros(6_400))).abs().max() < 1e-3


@pytest.mark.slow
def test_sound_of_over_a_minute_has_no_seam(mel: MelFeatures, samples: Path) -> None:
    waveform_N = speech(samples).repeat(19)[: 61 * 16_000]
    features_TD = mel.extract(waveform_N)
    sound = mel.synthesize(features_TD)
    assert sound.shape == (features_TD.shape[0] * 320,)
    distance_T = (mel.extract(sound) - features_TD).abs().mean(dim=1)
    seam = distance_T[2_995:3_005].mean()
    assert seam < 2 * distance_T.mean()
