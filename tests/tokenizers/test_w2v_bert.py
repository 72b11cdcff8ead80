"""w2v-BERT 2.0: small, with random weights, against transformers one segment at a time."""

from pathlib import Path

import pytest
import torch
import transformers
import weights_w2v_bert
from torch import Tensor
from wavemill.tokenizers.log_mel import KaldiFrames
from wavemill.tokenizers.registry import REGISTRY, describe, load_features
from wavemill.tokenizers.spec import UserError, num_frames
from wavemill.tokenizers.tokenizer import Mode, TokenizerConfig
from wavemill.tokenizers.w2v_bert import W2vBertFeatures
from weights_ssl import speech

NAME = "w2v-bert-2"
NAMES = [NAME, "w2v-bert-2-25hz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers; both names take them."""
    return weights_w2v_bert.make(NAME, tmp_path_factory.mktemp("w2v") / "bert", small=True, num_hidden_layers=3)


def open_at(folder: Path, layer: int, name: str = NAME, mode: Mode = Mode.EXACT) -> W2vBertFeatures:
    features = load_features(TokenizerConfig(tokenizer=name, weights=str(folder), layer=layer, mode=mode))
    assert isinstance(features, W2vBertFeatures)
    return features


def require_close(ours_TD: Tensor, theirs_TD: Tensor, tolerance: float = 3e-5) -> None:
    assert ours_TD.shape == theirs_TD.shape
    if theirs_TD.numel():
        assert (ours_TD - theirs_TD).abs().max() <= tolerance * theirs_TD.abs().max()


def noise(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, generator=generator) * torch.linspace(0, length / 4_000, length).sin() * 0.1


def test_log_mel_frames_are_those_of_the_published_extractor():
    extractor = transformers.SeamlessM4TFeatureExtractor()
    for waveform_N in (speech(3), noise(400), noise(2_345), torch.zeros(4_000)):
        theirs_FM = torch.from_numpy(extractor._extract_fbank_features(waveform_N.numpy()))
        require_close(KaldiFrames(80, "cpu")(waveform_N), theirs_FM, 1e-6)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_every_layer_is_what_transformers_gives(folder: Path, layer: int):
    features = open_at(folder, layer)
    # whole pairs of log-mel frames, and one frame more that the published extractor fills up and masks
    for waveform_N in (speech(3) + 0.05, noise(16_080), noise(16_240), noise(560), noise(720), torch.zeros(4_000)):
        require_close(features.extract(waveform_N), weights_w2v_bert.oracle(folder, waveform_N, layer=layer))


def test_frames_differ_from_each_other_and_know_their_distance(folder: Path):
    waveform_N = speech(4)
    features_TD = open_at(folder, 3).extract(waveform_N)
    assert features_TD.std(dim=0).mean() > 0.2, "frames that are all alike prove nothing"
    loaded = transformers.Wav2Vec2BertModel.from_pretrained(folder)
    for layer in loaded.encoder.layers:
        torch.nn.init.zeros_(layer.self_attn.distance_embedding.weight)
    inputs = transformers.SeamlessM4TFeatureExtractor()(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt")
    without_TD = loaded(**inputs).last_hidden_state[0, : features_TD.shape[0]]
    assert (features_TD - without_TD).norm() > 0.02 * features_TD.norm()


def test_25_hz_are_two_frames_side_by_side(folder: Path):
    for waveform_N in (noise(16_000), noise(16_400), noise(879), noise(880)):
        at_50 = open_at(folder, 2).extract(waveform_N)
        at_25 = open_at(folder, 2, "w2v-bert-2-25hz").extract(waveform_N)
        assert torch.equal(at_25, torch.cat([at_50[0::2][: len(at_25)], at_50[1::2]], dim=1))
    assert REGISTRY["w2v-bert-2-25hz"].spec.frame_rate == 25
    assert REGISTRY["w2v-bert-2-25hz"].spec.codebook_size == 1_024


@pytest.mark.parametrize("name", NAMES)
def test_features_in_a_batch_are_those_of_each_alone(folder: Path, name: str):
    features = open_at(folder, 3, name)
    waveforms = [noise(length, length) for length in (24_000, 0, 399, 559, 560, 720, 880, 5_000, 17_777)]
    alone = [features.extract(waveform_N) for waveform_N in waveforms]
    for padded_length in (24_000, 25_333):
        for ours_TD, expected_TD in zip(features.extract_batch(waveforms, padded_length), alone, strict=True):
            require_close(ours_TD, expected_TD)
    require_close(features.extract_batch(waveforms[7:8], 30_000)[0], alone[7])


def test_a_batch_of_one_shape_gives_the_same_whoever_is_in_it(folder: Path):
    features = open_at(folder, 3, mode=Mode.FAST)
    segment_N = noise(9_000)
    with_mates = features.extract_batch([segment_N, noise(12_000), noise(5_000)], 12_000)[0]
    with_silence = features.extract_batch([segment_N, torch.zeros(0), torch.zeros(10)], 12_000)[0]
    assert torch.equal(with_mates, with_silence)


def test_bfloat16_is_near(folder: Path):
    waveform_N = speech(2)
    theirs_TD = weights_w2v_bert.oracle(folder, waveform_N, layer=3)
    ours_TD = open_at(folder, 3, mode=Mode.FAST).extract(waveform_N)
    assert ours_TD.dtype == torch.float32
    assert 1e-6 < (ours_TD - theirs_TD).norm() / theirs_TD.norm() < 0.06


@pytest.mark.parametrize("name", NAMES)
def test_several_layers_from_one_pass_are_those_of_each_alone(folder: Path, name: str):
    waveform_N = noise(20_000)
    [pieces] = open_at(folder, 3, name).layer_pieces(waveform_N, [0, 2, 3])
    for layer in (0, 2, 3):
        assert torch.equal(pieces[layer], open_at(folder, layer, name).extract(waveform_N))


@pytest.mark.parametrize("name", NAMES)
def test_a_long_recording_has_its_frames_and_is_normalized_as_a_whole(folder: Path, name: str):
    waveform_N = noise(850_123) * torch.linspace(0.1, 1, 850_123)
    features = open_at(folder, 0, name)
    pieces = list(features.pieces(waveform_N))
    assert len(pieces) == 2
    assert sum(len(piece_TD) for piece_TD in pieces) == num_frames(850_123, features.spec)
    assert torch.equal(torch.cat(pieces), features.extract(waveform_N))
    stacked = features.dim // 32
    given_TD = torch.cat(pieces)
    inputs = transformers.SeamlessM4TFeatureExtractor()(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt")
    model = transformers.Wav2Vec2BertModel.from_pretrained(folder)
    whole_TD = model.feature_projection(inputs.input_features)[0][0, : len(given_TD) * stacked].detach()
    require_close(given_TD, whole_TD.reshape(given_TD.shape))


def test_a_long_recording_in_a_batch_is_run_by_itself(folder: Path):
    features = open_at(folder, 0)
    waveforms = [noise(5_000), noise(500_000)]
    for waveform_N, ours_TD in zip(waveforms, features.extract_batch(waveforms, 500_000), strict=True):
        require_close(ours_TD, features.extract(waveform_N))


def test_what_cannot_be_had_is_a_mistake_with_a_way_out(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"w2v-bert-2 has layers 0 to 3; layer 4 was asked for."):
        open_at(folder, 4)
    small = {"small": True, "num_hidden_layers": 1}
    other = weights_w2v_bert.make(NAME, tmp_path / "rotary", position_embeddings_type="rotary", **small)
    with pytest.raises(UserError, match=r"tells positions by 'rotary' .*takes 'relative_key'. Name other weights."):
        open_at(other, 1)
    other = weights_w2v_bert.make(NAME, tmp_path / "stride", preprocessor={"stride": 1}, **small)
    with pytest.raises(UserError, match=r"feature extractor with stride 1 .*w2v-bert-2 takes 2. Name other weights."):
        open_at(other, 1)
    with pytest.raises(UserError, match=r"type 'wav2vec2-bert'.*hubert-base takes 'hubert'"):
        describe(TokenizerConfig(tokenizer="hubert-base", weights=str(folder)))


@pytest.mark.published
def test_published_sizes_give_what_transformers_gives(tmp_path: Path):
    folder = weights_w2v_bert.make(NAME, tmp_path / NAME, small=False)
    waveform_N = speech(4)
    require_close(open_at(folder, 17).extract(waveform_N), weights_w2v_bert.oracle(folder, waveform_N))
