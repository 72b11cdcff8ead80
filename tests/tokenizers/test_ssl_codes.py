"""wav2vec 2.0's own codes: small, with random weights, against transformers' quantizer."""

from pathlib import Path

import pytest
import torch
import weights_ssl
from torch import Tensor
from wavemill.tokenizers.compare import compare_codes
from wavemill.tokenizers.registry import REGISTRY, describe, load_tokenizer
from wavemill.tokenizers.spec import UserError, num_frames
from wavemill.tokenizers.tokenizer import TokenizerConfig
from wavemill.tokenizers.wav2vec2_codes import Wav2Vec2Codes

NAME = "wav2vec2-codes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_ssl.make(NAME, tmp_path_factory.mktemp("codes") / NAME, small=True)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Wav2Vec2Codes:
    opened = load_tokenizer(TokenizerConfig(tokenizer=NAME, weights=str(folder)))
    assert isinstance(opened, Wav2Vec2Codes)
    return opened


def noise(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(length, generator=generator) * torch.linspace(0, length / 4_000, length).sin() * 0.1


def require_same(tokenizer: Wav2Vec2Codes, waveform_N: Tensor, theirs_KT: Tensor) -> None:
    found = compare_codes(tokenizer, waveform_N, tokenizer.encode(waveform_N), theirs_KT)
    assert found.mismatches == 0
    assert found.near_ties <= 2


def test_codes_are_those_of_transformers_and_most_of_them_are_used(folder: Path, tokenizer: Wav2Vec2Codes):
    waveform_N = weights_ssl.speech(30)
    codes_KT = tokenizer.encode(waveform_N)
    require_same(tokenizer, waveform_N, weights_ssl.oracle(folder, waveform_N))
    assert all(len(codes_T.unique()) >= 0.9 * 320 for codes_T in codes_KT)
    assert codes_KT.dtype == torch.int64
    for length in (400, 719, 720, 12_345):
        require_same(tokenizer, noise(length), weights_ssl.oracle(folder, noise(length)))


def test_codes_in_a_batch_are_those_of_each_alone(tokenizer: Wav2Vec2Codes):
    waveforms = [noise(length) for length in (16_000, 0, 1, 399, 400, 401, 719, 720, 9_001, 15_999)]
    for padded_length in (16_000, 17_111):
        for waveform_N, codes_KT in zip(waveforms, tokenizer.encode_batch(waveforms, padded_length), strict=True):
            require_same(tokenizer, waveform_N, codes_KT)


def test_the_frame_rule_holds_for_silence_of_any_length_and_for_long_recordings(tokenizer: Wav2Vec2Codes):
    for length in (0, 1, 399, 400, 719, 720, 1_039, 1_040, 480_081, 1_000_000):
        assert tokenizer.encode(torch.zeros(length)).shape == (2, num_frames(length, tokenizer.spec))


def test_codes_of_a_long_recording_are_those_of_the_whole(folder: Path, tokenizer: Wav2Vec2Codes):
    waveform_N = weights_ssl.speech(75) * torch.linspace(0.2, 1, 75 * 16_000)
    require_same(tokenizer, waveform_N, weights_ssl.oracle(folder, waveform_N))


def test_fewer_codebooks_are_the_first_ones(folder: Path, tokenizer: Wav2Vec2Codes):
    config = TokenizerConfig(tokenizer=NAME, weights=str(folder), num_codebooks=1)
    first = load_tokenizer(config)
    assert first.spec.num_codebooks == 1
    assert torch.equal(first.encode(noise(8_000)), tokenizer.encode(noise(8_000))[:1])
    assert first.fingerprint == describe(config).fingerprint != tokenizer.fingerprint
    with pytest.raises(UserError, match="has 1 to 2 codebooks; 3 were asked for"):
        describe(TokenizerConfig(tokenizer=NAME, weights=str(folder), num_codebooks=3))


def test_of_equal_scores_the_lowest_code_is_taken(tokenizer: Wav2Vec2Codes):
    assert (tokenizer._quantize(torch.zeros(3, 16)) == tokenizer._bias_O.view(2, 320).argmax(dim=1)[:, None]).all()
    kept = tokenizer._bias_O.clone()
    try:
        tokenizer._bias_O[:] = torch.arange(640).remainder(7).float()  # 6 is the highest, 46 times in each group
        assert tokenizer._quantize(torch.zeros(1, 16)).tolist() == [[6], [1]]
    finally:
        tokenizer._bias_O[:] = kept


def test_weights_without_a_quantizer_are_refused(tmp_path: Path):
    plain = weights_ssl.make("wav2vec2-base", tmp_path / "plain", small=True)
    with pytest.raises(UserError, match=r"lack .* parameters of Wav2Vec2ForPreTraining"):
        load_tokenizer(TokenizerConfig(tokenizer=NAME, weights=str(plain)))
    other = weights_ssl.make(NAME, tmp_path / "other", small=True, num_codevectors_per_group=100)
    with pytest.raises(UserError, match="has 2 codebooks of 100"):
        describe(TokenizerConfig(tokenizer=NAME, weights=str(other)))
    with pytest.raises(UserError, match="has no decoder"):
        load_tokenizer(
            TokenizerConfig(tokenizer=NAME, weights=str(weights_ssl.make(NAME, tmp_path / "ok", small=True)))
        ).decode(torch.zeros(2, 1, dtype=torch.int64))
    assert REGISTRY[NAME].spec.num_codebooks == 2


@pytest.mark.published
def test_published_size_gives_what_transformers_gives(tmp_path: Path):
    folder = weights_ssl.make(NAME, tmp_path / NAME, small=False)
    tokenizer = load_tokenizer(TokenizerConfig(tokenizer=NAME, weights=str(folder)))
    assert isinstance(tokenizer, Wav2Vec2Codes)
    require_same(tokenizer, weights_ssl.speech(6), weights_ssl.oracle(folder, weights_ssl.speech(6)))
