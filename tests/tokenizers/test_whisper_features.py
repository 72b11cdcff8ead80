"""Whisper's encoder: small, with random weights, against transformers one segment at a time."""

from pathlib import Path

import pytest
import torch
import transformers
import weights_whisper
from torch import Tensor
from wavemill.tokenizers.log_mel import WhisperFrames
from wavemill.tokenizers.registry import REGISTRY, describe, load_features
from wavemill.tokenizers.spec import UserError, num_frames
from wavemill.tokenizers.tokenizer import Mode, TokenizerConfig
from wavemill.tokenizers.whisper_features import WhisperFeatures
from weights_ssl import speech

NAME = "whisper-tiny"
NAMES = [name for name, entry in REGISTRY.items() if name.startswith("whisper") and entry.layer is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_whisper.make(NAME, tmp_path_factory.mktemp("whisper") / "tiny", small=True)


def open_at(folder: Path, layer: int | None = None, name: str = NAME, mode: Mode = Mode.EXACT) -> WhisperFeatures:
    features = load_features(TokenizerConfig(tokenizer=name, weights=str(folder), layer=layer, mode=mode))
    assert isinstance(features, WhisperFeatures)
    return features


def require_close(ours_TD: Tensor, theirs_TD: Tensor, tolerance: float = 2e-5) -> None:
    assert ours_TD.shape == theirs_TD.shape
    if theirs_TD.numel():
        assert (ours_TD - theirs_TD).abs().max() <= tolerance * theirs_TD.abs().max()


def noise(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, generator=generator) * torch.linspace(0, length / 4_000, length).sin() * 0.1


@pytest.mark.parametrize("num_bands", [80, 128])
def test_log_mel_frames_are_those_of_the_published_extractor(num_bands: int):
    extractor = transformers.WhisperFeatureExtractor(feature_size=num_bands)
    frames = WhisperFrames(num_bands, 480_000, "cpu")
    for waveform_N in (speech(3), noise(1), noise(479_999), noise(479_700), noise(480_000), torch.zeros(700)):
        theirs = extractor(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        require_close(frames(waveform_N[None]), theirs)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_layer_is_what_transformers_gives(folder: Path, layer: int):
    features = open_at(folder, layer)
    for waveform_N in (speech(3) + 0.05, noise(1), noise(320), noise(321), noise(480_000), torch.zeros(700)):
        require_close(features.extract(waveform_N), weights_whisper.oracle(folder, waveform_N, layer=layer))


def test_the_last_layer_is_what_the_decoder_and_adapters_of_language_models_are_given(folder: Path):
    waveform_N = speech(2)
    inputs = transformers.WhisperFeatureExtractor()(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt")
    model = transformers.WhisperModel.from_pretrained(folder)
    read_TD = model.encoder(inputs.input_features).last_hidden_state[0, :100]
    require_close(open_at(folder).extract(waveform_N), read_TD.detach())
    assert describe(TokenizerConfig(tokenizer=NAME, weights=str(folder))).fingerprint["layer"] == "2"
    assert read_TD.std(dim=0).mean() > 0.2, "frames that are all alike prove nothing"


def test_features_in_a_batch_are_those_of_each_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    features = open_at(folder)
    waveforms = [noise(length, length) for length in (24_000, 0, 1, 320, 321, 17_777, 500_000)]
    alone = [features.extract(waveform_N) for waveform_N in waveforms]
    for rows in (1, 3, 8):  # a GPU takes several at a time
        monkeypatch.setattr(features, "_rows", rows)
        for ours_TD, expected_TD in zip(features.extract_batch(waveforms, 25_333), alone, strict=True):
            require_close(ours_TD, expected_TD)


def test_a_batch_of_one_shape_gives_the_same_whoever_is_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    features = open_at(folder, mode=Mode.FAST)
    monkeypatch.setattr(features, "_rows", 2)
    segment_N = noise(9_000)
    with_mates = features.extract_batch([noise(12_000), noise(5_000), segment_N], 12_000)[2]
    with_silence = features.extract_batch([segment_N, torch.zeros(0), torch.zeros(10)], 12_000)[0]
    assert torch.equal(with_mates, with_silence)


def test_bfloat16_is_near(folder: Path):
    waveform_N = speech(2)
    theirs_TD = weights_whisper.oracle(folder, waveform_N)
    ours_TD = open_at(folder, mode=Mode.FAST).extract(waveform_N)
    assert ours_TD.dtype == torch.float32
    assert 1e-6 < (ours_TD - theirs_TD).norm() / theirs_TD.norm() < 0.06


def test_several_layers_from_one_pass_are_those_of_each_alone(folder: Path):
    waveform_N = noise(20_000)
    [pieces] = open_at(folder, 2).layer_pieces(waveform_N, [0, 1, 2])
    for layer in range(3):
        assert torch.equal(pieces[layer], open_at(folder, layer).extract(waveform_N))


def test_each_window_of_a_long_recording_is_a_segment_of_its_own(folder: Path):
    features = open_at(folder)
    waveform_N = noise(850_123) * torch.linspace(0.1, 1, 850_123)
    pieces = list(features.pieces(waveform_N))
    assert sum(len(piece_TD) for piece_TD in pieces) == num_frames(850_123, features.spec)
    # of 2,657 frames windows begin at 0 and 1,157; of what both have each gives half
    begin = 1_157 * 320
    require_close(pieces[0], weights_whisper.oracle(folder, waveform_N[:480_000])[:1_328])
    require_close(pieces[1], weights_whisper.oracle(folder, waveform_N[begin:])[171:])


def test_what_cannot_be_had_is_a_mistake_with_a_way_out(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"whisper-tiny has layers 0 to 2; layer 3 was asked for."):
        open_at(folder, 3)
    other = weights_whisper.make(NAME, tmp_path / "short", small=True, max_source_positions=750)
    with pytest.raises(UserError, match=r"sees 750 frames .*whisper-tiny sees 1500, 30 s. Name other weights."):
        open_at(other)
    other = weights_whisper.make(NAME, tmp_path / "dither", small=True, preprocessor={"dither": 0.1})
    with pytest.raises(UserError, match=r"feature extractor with dither 0.1 .*takes 0.0. Name other weights."):
        open_at(other)
    with pytest.raises(UserError, match=r"type 'whisper'.*hubert-base takes 'hubert'"):
        describe(TokenizerConfig(tokenizer="hubert-base", weights=str(folder)))


@pytest.mark.published
@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_give_what_transformers_gives(name: str, tmp_path: Path):
    folder = weights_whisper.make(name, tmp_path / name, small=False)
    waveform_N = speech(4)
    require_close(open_at(folder, name=name).extract(waveform_N), weights_whisper.oracle(folder, waveform_N))
