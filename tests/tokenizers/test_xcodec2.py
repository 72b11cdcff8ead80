"""X-Codec-2 and NeuCodec against transformers' own, with small random weights; published sizes behind the marker.

Axes: N samples, T frames, D dimensions, E dimensions that are rounded, K codebooks, of which there is one.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import weights_xcodec2
from torch import Tensor, nn
from wavemill.tokenizers.compare import Comparison, compare_codes
from wavemill.tokenizers.fsq import FiniteScalarQuantizer
from wavemill.tokenizers.registry import REGISTRY, describe, load_tokenizer
from wavemill.tokenizers.spec import UserError, decoded_samples, num_frames
from wavemill.tokenizers.tokenizer import Mode, TokenizerConfig
from wavemill.tokenizers.xcodec2 import Xcodec2, open_xcodec2
from weights_xcodec2 import loaded, oracle, oracle_sound, speech

NAMES = ["xcodec2", "neucodec"]
HOP = 320
LONG = 35 * 16_000 + 123  # two windows
LONGEST = {"xcodec2": 1_501, "neucodec": 1_500}  # frames of 30 s


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_xcodec2.small(tmp_path_factory, name)


@pytest.fixture(scope="module")
def tokenizer(name: str, folder: Path) -> Xcodec2:
    return opened(name, folder)


def opened(name: str, folder: Path, *, chunk_frames: int = 0, mode: Mode = Mode.EXACT) -> Xcodec2:
    config = TokenizerConfig(tokenizer=name, weights=str(folder), mode=mode)
    return open_xcodec2(describe(config), "cpu", chunk_frames=chunk_frames)


def digits(codes_KT: Tensor) -> Tensor:
    """The level of each of the eight dimensions, `[T, 8]`."""
    return (codes_KT[0, :, None] // 4 ** torch.arange(8)) % 4


def require_same(tokenizer: Xcodec2, waveforms: list[Tensor], ours: list[Tensor], theirs: list[Tensor]) -> None:
    found = sum((compare_codes(tokenizer, *each) for each in zip(waveforms, ours, theirs, strict=True)), Comparison())
    assert found.mismatches == 0, found
    assert found.near_ties <= 1 + 1e-4 * found.num_codes, found


def changed(folder: Path, into: Path, file: str, **fields: object) -> Path:
    """A folder with the same weights, whose `file` says something else."""
    into.mkdir()
    for path in folder.iterdir():
        (into / path.name).symlink_to(path)
    content = json.loads((folder / file).read_text())
    (into / file).unlink()
    (into / file).write_text(json.dumps({**content, **fields}))
    return into


def test_codes_of_speech_are_those_of_transformers(tokenizer: Xcodec2, folder: Path):
    speech_N = speech(4)
    lengths = [HOP, HOP + 1, 2 * HOP - 1, 2 * HOP, 9 * HOP - 1, 9 * HOP, 9 * HOP + 1, 20_123, len(speech_N)]
    waveforms = [speech_N[-length:] for length in lengths]
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [oracle(folder, waveform_N) for waveform_N in waveforms])


def test_each_has_the_frames_that_the_published_extractor_makes():
    spec = {name: REGISTRY[name].spec for name in NAMES}
    assert [num_frames(num, spec["xcodec2"]) for num in (1, 319, 320, 321, 640)] == [1, 1, 2, 2, 3]
    assert [num_frames(num, spec["neucodec"]) for num in (1, 319, 320, 321, 640)] == [0, 0, 1, 1, 2]
    assert [spec[name].bits_per_second for name in NAMES] == [800, 800]


def test_neucodec_has_no_frame_below_a_hop_and_what_is_left_after_the_last_is_heard_in_it(
    tmp_path_factory: pytest.TempPathFactory,
):
    tokenizer = opened("neucodec", weights_xcodec2.small(tmp_path_factory, "neucodec"))
    speech_N = speech(4)[-30_000:]
    assert tokenizer.encode(speech_N[:319]).shape == (1, 0)
    assert tokenizer.gaps(speech_N[:319]).shape == (1, 0)
    loud_N = speech_N[: 4 * HOP + 200].clone()
    loud_N[4 * HOP :] += 1.0
    assert tokenizer.encode(loud_N).shape == (1, 4)
    assert not torch.equal(tokenizer.encode(loud_N), tokenizer.encode(speech_N[: 4 * HOP]))


def test_decoded_sound_is_that_of_transformers(tokenizer: Xcodec2, folder: Path):
    codes_KT = tokenizer.encode(speech(4))
    for num in (1, 2, codes_KT.shape[1]):
        sound_N = tokenizer.decode(codes_KT[:, :num])
        torch.testing.assert_close(sound_N, oracle_sound(folder, codes_KT[:, :num]), atol=1e-6, rtol=0)
        assert sound_N.shape == (decoded_samples(num, tokenizer.spec),)
    assert sound_N.abs().max() > 0.05


def test_random_weights_use_all_levels_and_codes_of_two_bytes(tokenizer: Xcodec2):
    codes_KT = tokenizer.encode(speech(4))
    assert all(len(digits_T.unique()) == 4 for digits_T in digits(codes_KT).t())
    assert codes_KT.max() > 32_767
    assert len(codes_KT.unique()) > 0.5 * codes_KT.shape[1]


def test_chunks_of_the_acoustic_encoder_join_without_a_seam(name: str, folder: Path):
    waveform_N = speech(4)[:28_000]
    whole = opened(name, folder, chunk_frames=10_000)
    codes_KT = whole.encode(waveform_N)
    chunked = opened(name, folder, chunk_frames=19)
    require_same(whole, [waveform_N], [codes_KT], [chunked.encode(waveform_N)])
    together = chunked.encode_batch([waveform_N, waveform_N[:9_000]], 30_777)
    require_same(whole, [waveform_N, waveform_N[:9_000]], [codes_KT, whole.encode(waveform_N[:9_000])], together)


def test_a_chunk_sees_as_far_as_the_acoustic_encoder_does(tokenizer: Xcodec2, folder: Path):
    """By what an impulse in silence gives; its filters are flat, since the ends of the published ones are small."""
    encoder = loaded(folder)[0].acoustic_encoder.double()
    for module in encoder.modules():
        if hasattr(module, "filter"):
            module.filter.fill_(1 / 12)
        if isinstance(module, nn.Conv1d) and module.bias is not None:
            module.bias.zero_()
    middle, num = 40, 81
    impulse_N = torch.zeros(num * HOP, dtype=torch.float64)
    impulse_N[middle * HOP : (middle + 1) * HOP] = 1.0
    with torch.inference_mode():
        seen = encoder(impulse_N[None, None])[0].any(dim=0).nonzero()[:, 0].tolist()
    loaded.cache_clear()  # the encoder was changed
    assert max(max(seen) - middle, middle - min(seen)) == tokenizer._reach


@pytest.mark.slow
def test_long_audio_is_the_published_model_over_windows_of_its_own_mels(name: str, tokenizer: Xcodec2, folder: Path):
    waveform_N = speech(36)[:LONG]
    model, extractor = loaded(folder)
    taken = extractor(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt")
    features_1TD, longest = taken["input_features"], LONGEST[name]
    num = features_1TD.shape[1]
    last = num - longest
    border = (last + longest) // 2
    with torch.inference_mode():
        parts = []
        for first, keep in ((0, slice(0, border)), (last, slice(border - last, longest))):
            hidden_1TD = model.semantic_encoder(features_1TD[:, first : first + longest]).last_hidden_state
            parts.append(model.semantic_adapter(hidden_1TD.transpose(1, 2))[..., keep])
        semantic_1DT = torch.cat(parts, dim=2)
        acoustic_1DT = model.acoustic_encoder(taken["input_values"])[..., :num]
        latents_1TD = model.fc_encoder(torch.cat([semantic_1DT, acoustic_1DT], dim=1).transpose(1, 2))
        expected_KT = model.quantizer(latents_1TD)[1][0].t().long()
    require_same(tokenizer, [waveform_N], [tokenizer.encode(waveform_N)], [expected_KT])
    short_N = waveform_N[:20_000]
    batch = tokenizer.encode_batch([short_N, waveform_N], LONG)
    require_same(tokenizer, [short_N, waveform_N], batch, [tokenizer.encode(short_N), expected_KT])


def test_long_codes_are_decoded_in_windows_and_joined(name: str, tokenizer: Xcodec2, folder: Path):
    longest = LONGEST[name]
    codes_KT = tokenizer.encode(speech(4)).repeat(1, 9)[:, : longest + 200]
    sound_N = tokenizer.decode(codes_KT)
    assert sound_N.shape == (decoded_samples(longest + 200, tokenizer.spec),)
    hop = tokenizer.spec.hop_length * tokenizer.spec.decode_sample_rate // 16_000
    border = (200 + longest) // 2
    first_N, last_N = oracle_sound(folder, codes_KT[:, :longest]), oracle_sound(folder, codes_KT[:, 200:])
    seam = (border - 2) * hop  # four frames of the spectrum sound in each hop
    torch.testing.assert_close(sound_N[:seam], first_N[:seam], atol=1e-6, rtol=0)
    seam = (border + 2) * hop
    torch.testing.assert_close(sound_N[seam:], last_N[seam - 200 * hop :], atol=1e-6, rtol=0)


def test_the_quantizer_is_that_of_transformers(folder: Path):
    quantizer = loaded(folder)[0].quantizer
    ours = FiniteScalarQuantizer(quantizer)
    assert ours.size == 65_536
    frames_ND = 3.0 * torch.randn(2_000, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        latents_ND, codes_N1 = quantizer(frames_ND)
        codes_1N = ours.encode(frames_ND)
        assert torch.equal(codes_1N[0], codes_N1[:, 0].long())
        torch.testing.assert_close(ours.decode(codes_1N), latents_ND, atol=1e-5, rtol=0)


def test_gaps_are_how_far_the_nearest_border_is(folder: Path):
    quantizer = loaded(folder)[0].quantizer
    frames_ND = 2.0 * torch.randn(500, 80, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        bound = quantizer.quantizer.bound
        projected_NE = frames_ND.double() @ quantizer.project_in.weight.double().t() + quantizer.project_in.bias
        bounded_NE = bound(bound(projected_NE))
        borders_B = torch.tensor([-1.5, -0.5, 0.5], dtype=torch.float64)
        nearest_N = (bounded_NE[..., None] - borders_B).abs().flatten(1).amin(dim=1)
        gaps_1N = FiniteScalarQuantizer(quantizer).gaps(frames_ND)
    torch.testing.assert_close(gaps_1N[0], (2 * nearest_N).clamp_max(1.0), atol=1e-12, rtol=0)
    assert gaps_1N.min() < 0.01
    assert gaps_1N.max() > 0.2


def test_codes_that_there_are_none_of_are_refused(tokenizer: Xcodec2):
    for codes in ([[65_536]], [[-1]], [[1], [2]]):
        with pytest.raises(ValueError, match="codebook"):
            tokenizer.decode(torch.tensor(codes))


def test_silence_and_nothing_have_codes_too(name: str, tokenizer: Xcodec2, folder: Path):
    silence_N = torch.zeros(30_000)
    codes_KT = tokenizer.encode(silence_N)
    assert torch.equal(codes_KT, oracle(folder, silence_N))
    assert tokenizer.encode(silence_N[:0]).shape == (1, 1 if name == "xcodec2" else 0)
    assert tokenizer.decode(codes_KT[:, :0]).shape == (0,)


def test_fast_mode_differs_in_some_digits(tmp_path_factory: pytest.TempPathFactory):
    folder = weights_xcodec2.small(tmp_path_factory, "neucodec")
    exact, fast = opened("neucodec", folder), opened("neucodec", folder, mode=Mode.FAST)
    assert fast.fingerprint != exact.fingerprint
    waveform_N = speech(4)
    different = float((digits(exact.encode(waveform_N)) != digits(fast.encode(waveform_N))).float().mean())
    assert 0 < different < 0.2


def test_weights_of_the_one_are_not_taken_for_the_other(folder: Path, name: str):
    other = NAMES[1 - NAMES.index(name)]
    with pytest.raises(UserError, match=rf"holds a model of type '{name}'.*{other} takes '{other}'"):
        describe(TokenizerConfig(tokenizer=other, weights=str(folder)))


@pytest.mark.parametrize(
    ("file", "fields", "told"),
    [
        ("config.json", {"quantization_levels": [4] * 7}, r"quantization_levels \[4, 4, 4, 4, 4, 4, 4\], not \[4, 4"),
        ("config.json", {"downsampling_ratios": [2, 4, 4, 5]}, r"downsampling_ratios \[2, 4, 4, 5\], not \[2, 2"),
        ("config.json", {"sampling_rate": 24_000}, "sampling_rate 24000, not 16000"),
        ("preprocessor_config.json", {"sampling_rate": 44_100}, "a feature extractor's sampling_rate 44100, not 16000"),
        ("preprocessor_config.json", {"hop_length": 512}, "a feature extractor's hop_length 512, not 320"),
    ],
)
def test_weights_that_are_built_otherwise_are_refused(
    file: str, fields: dict[str, object], told: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    odd = changed(weights_xcodec2.small(tmp_path_factory, "xcodec2"), tmp_path / "odd", file, **fields)
    with pytest.raises(UserError, match=rf"odd holds another codec than xcodec2: {told}.*Name other weights"):
        describe(TokenizerConfig(tokenizer="xcodec2", weights=str(odd)))


def test_more_than_one_codebook_cannot_be_had(folder: Path, name: str):
    with pytest.raises(UserError, match=f"{name} has 1 to 1 codebooks; 2 were asked for"):
        describe(TokenizerConfig(tokenizer=name, weights=str(folder), num_codebooks=2))


def test_the_registry_opens_what_it_describes(folder: Path, name: str):
    config = TokenizerConfig(tokenizer=name, weights=str(folder))
    described, tokenizer = describe(config), load_tokenizer(config)
    assert tokenizer.spec == described.spec
    assert tokenizer.fingerprint == described.fingerprint
    assert tokenizer.spec.codebook_size == math.prod([4] * 8)
    assert {"tokenizer", "codec", "weights", "codebooks", "precision"} <= set(described.fingerprint)


@pytest.mark.published
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_at_published_size_codes_and_sound_are_those_of_transformers(name: str, tmp_path: Path):
    folder = weights_xcodec2.make(name, tmp_path / name, small=False)
    tokenizer = opened(name, folder)
    speech_N = speech(3)
    waveforms = [speech_N[-length:] for length in (HOP, 3 * HOP - 1, len(speech_N))]
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    gaps = {len(waveform_N): tokenizer.gaps(waveform_N) for waveform_N in waveforms}
    some_KT = ours[-1][:, :50]
    sound_N = tokenizer.decode(some_KT)
    del tokenizer  # the two together take 7 GB
    for waveform_N, codes_KT in zip(waveforms, ours, strict=True):
        different_KT = codes_KT != oracle(folder, waveform_N)
        assert (gaps[len(waveform_N)][different_KT] < 1e-5).all()
        assert int(different_KT.sum()) <= 1
    torch.testing.assert_close(sound_N, oracle_sound(folder, some_KT), atol=1e-5, rtol=0)
