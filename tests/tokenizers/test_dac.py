"""DAC against transformers' own, with small random weights; at published sizes behind the marker `published`.

Axes: N samples, T frames, K codebooks.
"""

import json
from pathlib import Path

import pytest
import torch
import weights_dac
from torch import Tensor, nn
from wavemill.tokenizers.compare import Comparison, compare_codes
from wavemill.tokenizers.dac import Dac, open_dac
from wavemill.tokenizers.dac_model import Snake, decoder_reach, encoder_reach
from wavemill.tokenizers.registry import REGISTRY, describe, load_tokenizer
from wavemill.tokenizers.spec import UserError, decoded_samples
from wavemill.tokenizers.tokenizer import Mode, TokenizerConfig

NAMES = ["dac-16khz", "dac-24khz", "dac-44khz"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dac")
    return {name: weights_dac.make(name, folder / name, small=True) for name in NAMES}


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, weights: dict[str, Path]) -> Path:
    return weights[request.param]


def opened(folder: Path, *, chunk_frames: int = 0, **fields: object) -> Dac:
    config = TokenizerConfig(tokenizer=folder.name, weights=str(folder), **fields)
    return open_dac(describe(config), "cpu", chunk_frames=chunk_frames)


def speech(folder: Path, seconds: float) -> Tensor:
    rate = REGISTRY[folder.name].spec.sample_rate
    return weights_dac.speech(int(seconds * rate), rate)


def require_same(tokenizer: Dac, waveforms: list[Tensor], ours: list[Tensor], theirs: list[Tensor]) -> None:
    found = sum(
        (compare_codes(tokenizer, *each) for each in zip(waveforms, ours, theirs, strict=True)), start=Comparison()
    )
    assert found.mismatches == 0, found
    assert found.near_ties <= 1 + 1e-4 * found.num_codes, found


def edge_lengths(hop: int) -> list[int]:
    generator = torch.Generator().manual_seed(5)
    some = torch.randint(3 * hop, 60 * hop, (4,), generator=generator).tolist()
    return [1, 2, hop - 1, hop, hop + 1, 2 * hop, 2 * hop + 1, 3 * hop - 1, *some]


def test_codes_are_those_of_transformers(folder: Path):
    tokenizer = opened(folder)
    speech_N = speech(folder, 5)
    waveforms = [speech_N[-length:] for length in [*edge_lengths(tokenizer.spec.hop_length), len(speech_N)]]
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [weights_dac.oracle(folder, waveform_N) for waveform_N in waveforms])


def test_a_segment_in_a_batch_of_any_padded_length_has_the_codes_it_has_alone(folder: Path):
    tokenizer = opened(folder)
    hop = tokenizer.spec.hop_length
    speech_N = speech(folder, 4)
    waveforms = [speech_N[length : 2 * length] for length in edge_lengths(hop)] + [speech_N[:0]]
    alone = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    longest = max(len(waveform_N) for waveform_N in waveforms)
    for padded_length in (longest, longest + 160, longest + 20 * hop + 1):
        require_same(tokenizer, waveforms, tokenizer.encode_batch(waveforms, padded_length), alone)


def test_chunks_join_without_a_seam(folder: Path):
    whole, speech_N = opened(folder, chunk_frames=10_000), speech(folder, 2)
    codes_KT = whole.encode(speech_N)
    sound_N = whole.decode(codes_KT)
    for chunk_frames in (9, 40):
        chunked = opened(folder, chunk_frames=chunk_frames)
        require_same(whole, [speech_N], [codes_KT], [chunked.encode(speech_N)])
        together = chunked.encode_batch([speech_N, speech_N[:9_000]], len(speech_N) + 777)
        require_same(whole, [speech_N, speech_N[:9_000]], [codes_KT, whole.encode(speech_N[:9_000])], together)
        torch.testing.assert_close(chunked.decode(codes_KT), sound_N, atol=2e-5, rtol=0)


def test_a_chunk_sees_as_far_as_the_convolutions_reach(folder: Path):
    tokenizer = opened(folder)
    strides = json.loads((folder / "config.json").read_text())["downsampling_ratios"]
    hop, middle = tokenizer.spec.hop_length, 30
    waveform_N = speech(folder, 3)[: 61 * hop]
    latents_DT = tokenizer._quantizer.decode(tokenizer.encode(waveform_N)).t().double()

    encoder = tokenizer._encoder.double()
    seen = []  # by frames, of a change of the first and of the last sample of one
    for sample in (middle * hop, middle * hop + hop - 1):
        changed_N = waveform_N.clone()
        changed_N[sample] += 1.0
        seen.append(changes(encoder, waveform_N.double()[None], changed_N.double()[None]))
    before, after = encoder_reach(strides)
    assert min(seen[0]) >= middle - after
    assert max(seen[1]) <= middle + before
    assert middle - min(seen[0]) == after or max(seen[1]) - middle == before  # no more than there is need for

    changed_DT = latents_DT.clone()
    changed_DT[:, middle] += 1.0
    heard = changes(tokenizer._decoder.double(), latents_DT, changed_DT)
    before, after = decoder_reach(strides)
    assert min(heard) // hop >= middle - after
    assert max(heard) // hop <= middle + before
    assert min(heard) // hop == middle - after or max(heard) // hop == middle + before


def changes(network: nn.Module, given: Tensor, changed: Tensor) -> list[int]:
    """The positions of what `network` gives that differ."""
    with torch.inference_mode():
        return (network(given[None]) != network(changed[None]))[0].any(dim=0).nonzero()[:, 0].tolist()


def test_decoded_sound_is_that_of_transformers(folder: Path):
    tokenizer = opened(folder)
    codes_KT = tokenizer.encode(speech(folder, 2))
    for num_codebooks, num_frames in ((6, codes_KT.shape[1]), (2, 40), (1, 1)):
        some_KT = codes_KT[:num_codebooks, :num_frames]
        sound_N = tokenizer.decode(some_KT)
        torch.testing.assert_close(sound_N, weights_dac.oracle_sound(folder, some_KT), atol=1e-4, rtol=0)
        assert sound_N.shape == (decoded_samples(num_frames, tokenizer.spec),)
    assert sound_N.abs().max() > 0.01


def test_odd_strides_decode_to_less_than_whole_hops():
    assert {name: REGISTRY[name].spec.decode_trim for name in NAMES} == {
        "dac-16khz": 8,
        "dac-24khz": 8,
        "dac-44khz": 0,
    }


def test_fewer_codebooks_are_the_first_of_all(folder: Path):
    waveform_N = speech(folder, 1)
    all_KT = opened(folder).encode(waveform_N)
    few = opened(folder, num_codebooks=2)
    assert torch.equal(few.encode(waveform_N), all_KT[:2])
    assert few.spec.num_codebooks == 2
    assert few.fingerprint["codebooks"] == "2"
    with pytest.raises(UserError, match="1 to 6 codebooks; 7 were asked for"):
        opened(folder, num_codebooks=7)


def test_random_weights_use_nearly_all_codes(folder: Path):
    rate = REGISTRY[folder.name].spec.sample_rate
    codes_KT = opened(folder).encode(weights_dac.speech(20 * rate, rate, noise_share=0.25))
    used = [len(codes_T.unique()) for codes_T in codes_KT]
    assert min(used) >= 0.9 * 64, used


def test_silence_and_nothing_have_codes_too(folder: Path):
    tokenizer = opened(folder)
    silence_N = torch.zeros(30_000)
    codes_KT = tokenizer.encode(silence_N)
    assert torch.equal(codes_KT, weights_dac.oracle(folder, silence_N))
    assert tokenizer.decode(codes_KT).isfinite().all()
    assert tokenizer.encode(silence_N[:0]).shape == (6, 0)
    assert tokenizer.gaps(silence_N[:0]).shape == (6, 0)
    assert tokenizer.decode(codes_KT[:, :0]).shape == (0,)


def test_fast_mode_differs_in_few_first_codes(weights: dict[str, Path]):
    folder = weights["dac-16khz"]
    waveform_N = speech(folder, 3)
    exact, fast = opened(folder), opened(folder, mode=Mode.FAST)
    assert fast.fingerprint != exact.fingerprint
    different = (exact.encode(waveform_N)[0] != fast.encode(waveform_N)[0]).float().mean()
    assert 0 < different < 0.2


def test_the_snake_without_copies_is_the_published_one():
    generator = torch.Generator().manual_seed(0)
    alpha_1C1 = torch.rand(1, 5, 1, generator=generator) * 3 - 0.5
    x_BCN = torch.randn(2, 5, 100, generator=generator)
    published_BCN = x_BCN + (alpha_1C1 + 1e-9).reciprocal() * torch.sin(alpha_1C1 * x_BCN).pow(2)
    assert torch.equal(Snake(alpha_1C1)(x_BCN), published_BCN)


def test_weights_of_another_rate_are_refused_with_the_name_of_the_tokenizer_that_takes_them(weights: dict[str, Path]):
    with pytest.raises(UserError, match=r"are for 44,100 Hz, dac-16khz takes 16,000 Hz: use dac-44khz\."):
        describe(TokenizerConfig(tokenizer="dac-16khz", weights=str(weights["dac-44khz"])))
    with pytest.raises(UserError, match=r"are for 16,000 Hz, dac-24khz takes 24,000 Hz: use dac-16khz\."):
        describe(TokenizerConfig(tokenizer="dac-24khz", weights=str(weights["dac-16khz"])))


def test_an_unknown_rate_or_a_feature_extractor_of_another_rate_is_refused(tmp_path: Path):
    folder = weights_dac.make("dac-16khz", tmp_path / "odd", small=True, sampling_rate=22_050)
    config = TokenizerConfig(tokenizer="dac-16khz", weights=str(folder))
    with pytest.raises(UserError, match="are for 22,050 Hz, dac-16khz takes 16,000 Hz: name other weights"):
        describe(config)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "sampling_rate": 16_000}))
    describe(config)
    extractor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**extractor, "sampling_rate": 24_000}))
    with pytest.raises(UserError, match="are for 24,000 Hz"):
        describe(config)


def test_weights_of_another_architecture_are_refused(weights: dict[str, Path], tmp_path: Path):
    settings = json.loads((weights["dac-16khz"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "encodec"}))
    with pytest.raises(UserError, match=r"holds a model of type 'encodec'.*dac-16khz takes 'dac'"):
        describe(TokenizerConfig(tokenizer="dac-16khz", weights=str(tmp_path)))


def test_the_registry_opens_what_it_describes(folder: Path):
    config = TokenizerConfig(tokenizer=folder.name, weights=str(folder))
    described, tokenizer = describe(config), load_tokenizer(config)
    assert tokenizer.spec == described.spec
    assert tokenizer.fingerprint == described.fingerprint
    assert {"tokenizer", "codec", "weights", "codebooks", "precision"} <= set(described.fingerprint)


@pytest.mark.published
@pytest.mark.parametrize("name", NAMES)
def test_at_published_size_codes_and_sound_are_those_of_transformers(name: str, tmp_path: Path):
    folder = weights_dac.make(name, tmp_path / name, small=False)
    tokenizer = opened(folder)
    speech_N = speech(folder, 8)
    hop = tokenizer.spec.hop_length
    waveforms = [speech_N[-length:] for length in (1, hop + 1, 3 * hop - 1, len(speech_N))]
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [weights_dac.oracle(folder, waveform_N) for waveform_N in waveforms])
    some_KT = ours[-1][:, :100]
    torch.testing.assert_close(tokenizer.decode(some_KT), weights_dac.oracle_sound(folder, some_KT), atol=1e-4, rtol=0)
