"""X-Codec and HiggsAudio v2's tokenizer against transformers' own, with small random weights; published sizes behind
the marker `published`.

Axes: N samples, T frames, D dimensions, K codebooks.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
import weights_dac
import weights_xcodec
from torch import Tensor, nn
from wavemill.tokenizers import ssl_windows
from wavemill.tokenizers.compare import compare_all
from wavemill.tokenizers.dac_model import decoder_reach, encoder_reach
from wavemill.tokenizers.higgs_audio import open_higgs
from wavemill.tokenizers.published import published_encoder
from wavemill.tokenizers.registry import REGISTRY, describe, load_tokenizer
from wavemill.tokenizers.spec import UserError, decoded_samples
from wavemill.tokenizers.tokenizer import TokenizerConfig
from wavemill.tokenizers.xcodec import open_xcodec
from wavemill.tokenizers.xcodec_model import JointCodec, at_semantic_rate

OPEN = {"xcodec": open_xcodec, "higgs-audio-v2": open_higgs}


@pytest.fixture(scope="module", params=OPEN)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_xcodec.small(tmp_path_factory, name)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "weights"))


def opened(name: str, folder: Path, *, chunk_frames: int = 0, **fields: Any) -> JointCodec:
    config = TokenizerConfig(tokenizer=name, weights=str(folder), **fields)
    return OPEN[name](describe(config), "cpu", chunk_frames=chunk_frames)


def speech(name: str, seconds: float) -> Tensor:
    rate = REGISTRY[name].spec.sample_rate
    return weights_dac.speech(int(seconds * rate), rate)


def require_same(tokenizer: JointCodec, waveforms: list[Tensor], ours: list[Tensor], theirs: list[Tensor]) -> None:
    found = compare_all(tokenizer, waveforms, ours, theirs)
    assert found.mismatches == 0, found
    assert found.near_ties <= 1 + 1e-4 * found.num_codes, found


def change(folder: Path, **fields: Any) -> None:
    """Other values in config.json; those of a part are given as a dictionary."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in fields.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))


def test_codes_are_those_of_transformers_on_speech(name: str, folder: Path):
    tokenizer = opened(name, folder)
    hop, speech_N = tokenizer.spec.hop_length, speech(name, 3)
    lengths = [1, hop, hop + 1, 7 * hop + 3, 31 * hop - 1, len(speech_N)]
    waveforms = [speech_N[-length:] for length in lengths]
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [weights_xcodec.oracle(folder, waveform_N) for waveform_N in waveforms])
    assert ours[-1].shape == (6, -(-len(speech_N) // hop))


def test_the_check_on_own_recordings_runs_the_published_model(name: str, folder: Path):
    waveform_N = speech(name, 1)
    published = published_encoder(describe(TokenizerConfig(tokenizer=name, weights=str(folder), num_codebooks=2)))
    assert published is not None
    with torch.inference_mode():
        assert torch.equal(published(waveform_N), weights_xcodec.oracle(folder, waveform_N)[:2])


def test_random_weights_use_most_codes(name: str, folder: Path):
    codes_KT = opened(name, folder).encode(speech(name, 20))
    used = [len(codes_T.unique()) for codes_T in codes_KT]
    assert min(used) >= 0.7 * 64, used


def test_decoded_sound_is_that_of_transformers(name: str, folder: Path):
    tokenizer = opened(name, folder)
    codes_KT = tokenizer.encode(speech(name, 3))
    for num_codebooks, num_frames in ((6, codes_KT.shape[1]), (2, 40), (1, 1)):
        some_KT = codes_KT[:num_codebooks, :num_frames]
        sound_N = tokenizer.decode(some_KT)
        torch.testing.assert_close(sound_N, weights_xcodec.oracle_sound(folder, some_KT), atol=1e-5, rtol=0)
        assert sound_N.shape == (decoded_samples(num_frames, tokenizer.spec),)
    assert sound_N.abs().max() > 0.01


def test_chunks_join_without_a_seam(name: str, folder: Path):
    whole, chunked = opened(name, folder), opened(name, folder, chunk_frames=30)
    waveforms = [speech(name, 3), speech(name, 3)[:9_000]]
    alone = [whole.encode(waveform_N) for waveform_N in waveforms]
    assert alone[0].shape[1] > 2 * 30
    require_same(whole, waveforms, alone, [chunked.encode(waveform_N) for waveform_N in waveforms])
    require_same(whole, waveforms, alone, chunked.encode_batch(waveforms, len(waveforms[0]) + 777))
    torch.testing.assert_close(chunked.decode(alone[0]), whole.decode(alone[0]), atol=1e-5, rtol=0)


def test_a_chunk_sees_as_far_as_the_convolutions_reach(name: str, folder: Path):
    model, _ = weights_xcodec.loaded(folder)
    config, hop, middle = model.config.acoustic_model_config, model.config.hop_length, 40
    waveform_N = speech(name, 4)[: 81 * hop].double()
    seen = []  # by frames, of a change of the first and of the last sample of one
    for sample in (middle * hop, middle * hop + hop - 1):
        changed_N = waveform_N.clone()
        changed_N[sample] += 1.0
        seen.append(changes(model.acoustic_encoder.double(), waveform_N[None], changed_N[None]))
    model.acoustic_encoder.float()
    before, after = encoder_reach(config.downsampling_ratios)
    assert min(seen[0]) >= middle - after
    assert max(seen[1]) <= middle + before
    assert middle - min(seen[0]) == after or max(seen[1]) - middle == before  # no more than there is need for

    latents_DT = torch.randn(config.hidden_size, 81, generator=torch.Generator().manual_seed(0)).double()
    changed_DT = latents_DT.clone()
    changed_DT[:, middle] += 1.0
    heard = changes(model.acoustic_decoder.double(), latents_DT, changed_DT)
    model.acoustic_decoder.float()
    before, after = decoder_reach(config.upsampling_ratios[::-1])
    assert min(heard) // hop >= middle - after
    assert max(heard) // hop <= middle + before
    assert min(heard) // hop == middle - after or max(heard) // hop == middle + before


def changes(network: nn.Module, given: Tensor, changed: Tensor) -> list[int]:
    """The positions of what `network` gives that differ."""
    with torch.inference_mode():
        return (network(given[None]) != network(changed[None]))[0].any(dim=0).nonzero()[:, 0].tolist()


def test_any_span_is_resampled_as_in_the_whole():
    speech_N = speech("higgs-audio-v2", 2)[: 47 * 960 - 500]
    padded_N = torch.cat([speech_N, torch.zeros(500)])
    whole_N = torchaudio.functional.resample(padded_N, 24_000, 16_000)
    assert len(whole_N) == 47 * 640
    for begin, end in ((0, 1), (0, 640), (639, 1_282), (5, 9_001), (10_001, 47 * 640), (47 * 640 - 1, 47 * 640)):
        span_N = at_semantic_rate(speech_N, 24_000, begin, end, device="cpu")
        torch.testing.assert_close(span_N, whole_N[begin:end], atol=1e-6, rtol=0)
    assert torch.equal(at_semantic_rate(speech_N, 16_000, 5, 900, device="cpu"), speech_N[5:900])


def test_thirty_seconds_are_seen_whole(name: str, folder: Path):
    waveform_N = speech(name, 30)
    tokenizer = opened(name, folder)
    require_same(tokenizer, [waveform_N], [tokenizer.encode(waveform_N)], [weights_xcodec.oracle(folder, waveform_N)])


@pytest.mark.slow
def test_longer_audio_is_what_the_published_model_gives_for_each_window(name: str, tmp_path: Path):
    """Without a group norm, which has the statistics of the whole: see the next test."""
    semantic = {"feat_extract_norm": "layer", "conv_bias": True}
    folder = weights_xcodec.make(name, tmp_path / "weights", small=True, semantic_model_config=semantic)
    tokenizer, waveform_N = opened(name, folder), speech(name, 59.3)
    codes_KT = tokenizer.encode(waveform_N)
    expected_KT = by_windows(folder, waveform_N)
    require_same(tokenizer, [waveform_N], [codes_KT], [expected_KT])
    whole_KT = weights_xcodec.oracle(folder, waveform_N)
    assert (expected_KT != whole_KT).any()  # windows do count


def by_windows(folder: Path, waveform_N: Tensor) -> Tensor:
    """Codes by transformers' own modules; what the semantic ones see is cut into windows of 30 s every 26 s."""
    model, extractor = weights_xcodec.loaded(folder)
    taken = extractor(waveform_N.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_values"]
    rate, every = model.config.sample_rate, model.config.hop_length * 16_000 // model.config.sample_rate // 320
    sound_N = torchaudio.functional.resample(taken[0, 0], rate, 16_000)
    padded_N = nn.functional.pad(sound_N, (160, 160))
    kept = []
    with torch.inference_mode():
        acoustic_1DT = model.acoustic_encoder(taken)
        for window in ssl_windows.plan_windows(acoustic_1DT.shape[2], 1_500 // every, 1_300 // every):
            begin = window.first * 320 * every
            states = model.semantic_model(padded_N[None, begin : begin + 480_080], output_hidden_states=True)
            mean_1DT = torch.stack(states.hidden_states).mean(dim=0)[:, ::every].transpose(1, 2)
            span = slice(window.keep_begin - window.first, window.keep_end - window.first)
            kept.append(model.encoder_semantic(mean_1DT)[..., span])
        joint_1TD = model.fc(torch.cat([acoustic_1DT, torch.cat(kept, dim=2)], dim=1).transpose(1, 2))
        return model.quantizer.encode(joint_1TD.transpose(1, 2), model.config.target_bandwidths[-1])[:, 0]


@pytest.mark.slow
def test_longer_audio_changes_few_first_codes(name: str, folder: Path):
    waveform_N = speech(name, 59.3)
    differ = opened(name, folder).encode(waveform_N)[0] != weights_xcodec.oracle(folder, waveform_N)[0]
    print(f"{name}: {float(differ.float().mean()):.2%} of first codes")
    assert differ.float().mean() < 0.2


def test_a_batch_with_a_long_segment_has_the_codes_of_each_alone(name: str, folder: Path):
    tokenizer = opened(name, folder)
    waveforms = [speech(name, 1), speech(name, 30.5), torch.zeros(0), speech(name, 0.7)]
    alone = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, tokenizer.encode_batch(waveforms, len(waveforms[1])), alone)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["wavlm", "wav2vec2"])
def test_siblings_with_another_semantic_model_are_taken(architecture: str, tmp_path: Path):
    semantic = {"model_type": architecture}
    folder = weights_xcodec.make("xcodec", tmp_path / "weights", small=True, semantic_model_config=semantic)
    tokenizer, speech_N = opened("xcodec", folder), speech("xcodec", 3)
    waveforms = [speech_N, speech_N[:11_111]]
    theirs = [weights_xcodec.oracle(folder, waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, tokenizer.encode_batch(waveforms, 50_000), theirs)


def test_fewer_codebooks_are_the_first_of_all(name: str, folder: Path):
    waveform_N = speech(name, 1)
    few = opened(name, folder, num_codebooks=2)
    assert torch.equal(few.encode(waveform_N), opened(name, folder).encode(waveform_N)[:2])
    assert few.spec.num_codebooks == 2
    assert few.fingerprint["codebooks"] == "2"
    with pytest.raises(UserError, match="1 to 6 codebooks; 7 were asked for"):
        opened(name, folder, num_codebooks=7)


def test_nothing_has_no_codes_and_silence_has_those_of_transformers(name: str, folder: Path):
    tokenizer = opened(name, folder)
    silence_N = torch.zeros(20_000)
    codes_KT = tokenizer.encode(silence_N)
    require_same(tokenizer, [silence_N], [codes_KT], [weights_xcodec.oracle(folder, silence_N)])
    assert tokenizer.encode(silence_N[:0]).shape == (6, 0)
    assert tokenizer.gaps(silence_N[:0]).shape == (6, 0)
    assert tokenizer.decode(codes_KT[:, :0]).shape == (0,)


def test_the_registry_opens_what_it_describes(name: str, folder: Path):
    config = TokenizerConfig(tokenizer=name, weights=str(folder))
    described, tokenizer = describe(config), load_tokenizer(config)
    assert tokenizer.spec == described.spec
    assert tokenizer.fingerprint == described.fingerprint
    assert described.fingerprint["codec"] == f"{name}/1"
    assert (described.spec.num_codebooks, described.spec.codebook_size) == (6, 64)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sample_rate": 48_000}, r"sample_rate 48000, not (16000|24000)"),
        ({"strides": [2, 1]}, r"strides \[2, 1\] after the semantic model, not 1"),
        ({"acoustic_model_config": {"downsampling_ratios": [8, 5, 4]}}, r"frames of 160 and (320|960) samples, not"),
        ({"semantic_model_config": {"conv_stride": [5, 2, 2, 2, 2, 2, 1]}}, "400 samples every 160, not 400 every 320"),
        (
            {"semantic_model_config": {"conv_kernel": [12, 3, 3, 3, 3, 2, 2]}},
            "402 samples every 320, not 400 every 320",
        ),
        ({"kernel_size": 4}, "an even kernel_size, 4"),
        ({"unit_kernel_size": 2}, "an even unit_kernel_size, 2"),
        ({"acoustic_model_config": {"model_type": "encodec"}}, "an acoustic model of type 'encodec', not 'dac'"),
        (
            {"semantic_model_config": {"model_type": "bert"}},
            "a semantic model of type 'bert', not one of hubert",
        ),
    ],
)
def test_weights_of_another_layout_are_refused(name: str, copied: Path, changed: dict[str, Any], told: str):
    change(copied, **changed)
    with pytest.raises(UserError, match=rf"holds another codec than {name}: .*{told}.*Name other weights"):
        describe(TokenizerConfig(tokenizer=name, weights=str(copied)))


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"sampling_rate": 44_100}, "for 44100 Hz, not"), ({"hop_length": 512}, "with hop_length 512, not (320|960)")],
)
def test_another_feature_extractor_is_refused(name: str, copied: Path, changed: dict[str, int], told: str):
    extractor = json.loads((copied / "preprocessor_config.json").read_text())
    (copied / "preprocessor_config.json").write_text(json.dumps({**extractor, **changed}))
    with pytest.raises(UserError, match=f"a feature extractor {told}"):
        describe(TokenizerConfig(tokenizer=name, weights=str(copied)))


@pytest.mark.parametrize("changed", [{"target_bandwidths": []}, {"target_bandwidths": [0.1]}, {"codebook_size": 1}])
def test_weights_without_codebooks_are_refused(name: str, copied: Path, changed: dict[str, Any]):
    change(copied, **changed)
    with pytest.raises(UserError, match=r"has no codebooks: .* which pay for none"):
        describe(TokenizerConfig(tokenizer=name, weights=str(copied)))


def test_the_weights_of_the_one_are_not_those_of_the_other(name: str, folder: Path):
    [other] = set(OPEN) - {name}
    with pytest.raises(UserError, match=rf"holds a model of type '.*'.*; {other} takes"):
        describe(TokenizerConfig(tokenizer=other, weights=str(folder)))


@pytest.mark.published
def test_at_published_size_codes_and_sound_are_those_of_transformers(name: str, tmp_path: Path):
    folder = weights_xcodec.make(name, tmp_path / name, small=False)
    tokenizer, speech_N = opened(name, folder), speech(name, 8)
    assert tokenizer.spec == REGISTRY[name].spec
    hop = tokenizer.spec.hop_length
    waveforms = [speech_N[-length:] for length in (1, hop + 1, 3 * hop - 1, len(speech_N))]
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    theirs = [weights_xcodec.oracle(folder, waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, theirs)
    print(name, compare_all(tokenizer, waveforms, ours, theirs))
    some_KT = ours[-1][:, :100]
    expected_N = weights_xcodec.oracle_sound(folder, some_KT)
    torch.testing.assert_close(tokenizer.decode(some_KT), expected_N, atol=1e-5, rtol=0)
