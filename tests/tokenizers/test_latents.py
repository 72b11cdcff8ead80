"""Latents as features: what codecs have before their quantizers, and codecs that have none. Against transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import weights_causal
import weights_dac
import weights_latents
from random_weights import make_weights, oracle
from torch import Tensor
from wavemill.tokenizers import pocket_tts, vibevoice
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.latents import CodecLatents
from wavemill.tokenizers.published import published_encoder
from wavemill.tokenizers.registry import REGISTRY, describe, load_features, load_tokenizer
from wavemill.tokenizers.spec import UserError, decoded_samples, num_frames
from wavemill.tokenizers.tokenizer import Description, Output, TokenizerConfig
from weights_causal import speech

NAMES = ("encodec-24khz-latents", "mimi-latents", "dac-16khz-latents", "pocket-tts-latents", "vibevoice-latents")
OPEN = {"pocket-tts-latents": pocket_tts.open_pocket_tts, "vibevoice-latents": vibevoice.open_vibevoice}
OWN = tuple(OPEN)
MORE = ("xcodec", "higgs-audio-v2", "xcodec2", "neucodec", "speechtokenizer", "snac-24khz", "lyra")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("latents")
    return {name: make_weights(name, base / name, small=True) for name in NAMES}


def config(name: str, folder: Path, **asked: Any) -> TokenizerConfig:
    return TokenizerConfig(tokenizer=name, weights=str(folder), **asked)


def own(name: str, folder: Path, chunk_frames: int = 0) -> CodecLatents:
    return OPEN[name](describe(config(name, folder)), "cpu", chunk_frames=chunk_frames)


def change(folder: Path, file: str = "config.json", **fields: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def require_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_transformers_own(name: str, folders: dict[str, Path]):
    features = load_features(config(name, folders[name]))
    hop = features.spec.hop_length
    some_N = weights_dac.speech(64_007, features.spec.sample_rate)[4_000:]
    for waveform_N in (some_N, some_N[: 3 * hop], some_N[: 3 * hop + 1], some_N[:1]):
        theirs_TD = oracle(name, folders[name], waveform_N)
        assert theirs_TD.shape[0] == num_frames(len(waveform_N), features.spec)
        require_close(features.extract(waveform_N), theirs_TD, 1e-4)
    assert theirs_TD.shape[1] == features.dim
    deviation_D = oracle(name, folders[name], some_N).std(dim=0)
    assert deviation_D.mean() > 0.1, "frames that are all alike prove nothing"


@pytest.mark.parametrize(
    "name",
    [
        *("dac-16khz-latents", "mimi-latents", *OWN),
        *(pytest.param(f"{codec}-latents", marks=pytest.mark.slow) for codec in MORE[:4]),
    ],
)
def test_what_checks_compare_with_gives_the_same_latents(name: str, folders: dict[str, Path], tmp_path: Path):
    waveform_N = speech(2)
    folder = folders.get(name) or make_weights(name, tmp_path / name, small=True)
    encoder = published_encoder(describe(config(name, folder)))
    assert encoder is not None
    with torch.inference_mode():
        assert torch.equal(encoder(waveform_N), oracle(name, folder, waveform_N))


def test_a_codecs_own_latents_decode_to_what_transformers_makes_of_them(folders: dict[str, Path]):
    waveform_N = speech(2)
    folder = folders["encodec-24khz-latents"]
    stream = load_tokenizer(config("encodec-24khz-latents", folder, output=Output.FEATURES))
    tokens = stream.tokens(waveform_N)
    model, _ = weights_causal._loaded(folder)
    with torch.inference_mode():
        theirs_N = model.decoder(oracle("encodec-24khz-latents", folder, waveform_N).t()[None])[0, 0]
    sound_N = stream.decode_tokens(tokens)
    assert sound_N.shape == (decoded_samples(tokens.num_frames, stream.spec),)
    # the stream keeps eleven bits of each number
    assert (sound_N - theirs_N).norm() < 0.01 * theirs_N.norm()


@pytest.mark.slow
@pytest.mark.parametrize("codec", MORE)
def test_quantized_latents_sound_as_their_codes_do(codec: str, tmp_path: Path):
    folder = make_weights(codec, tmp_path / codec, small=True)
    waveform_N = weights_dac.speech(3 * REGISTRY[codec].spec.sample_rate, REGISTRY[codec].spec.sample_rate)
    tokenizer, latents = load_tokenizer(config(codec, folder)), load_features(config(f"{codec}-latents", folder))
    assert isinstance(latents, CodecLatents)
    with torch.inference_mode():
        codes_KT = tokenizer.encode(waveform_N)
        quantized_TD = tokenizer._quantizer.decode(codes_KT).reshape(codes_KT.shape[1], -1)
    assert quantized_TD.shape[1] == latents.dim
    assert torch.equal(latents.synthesize(quantized_TD), tokenizer.decode(codes_KT))


@pytest.mark.parametrize("name", OWN)
def test_sound_of_latents_is_transformers_own_in_chunks_and_whole(name: str, folders: dict[str, Path]):
    latents_TD = oracle(name, folders[name], speech(4))
    theirs_N = weights_latents.oracle_sound(folders[name], latents_TD)
    for chunk_frames in (8, 1000):
        # networks of random weights make much of what is rounded
        require_close(own(name, folders[name], chunk_frames).synthesize(latents_TD), theirs_N, 1e-3)
    assert own(name, folders[name]).synthesize(latents_TD[:0]).shape == (0,)


@pytest.mark.parametrize("name", OWN)
def test_latents_are_the_same_in_chunks_of_any_size_and_in_batches(name: str, folders: dict[str, Path]):
    waveform_N = speech(4)
    whole_TD = own(name, folders[name], 1000).extract(waveform_N)
    for chunk_frames in (8, 11):
        require_close(own(name, folders[name], chunk_frames).extract(waveform_N), whole_TD, 1e-5)
    features, hop = own(name, folders[name], 8), describe(config(name, folders[name])).spec.hop_length
    waveforms = [waveform_N[3_000 : 3_000 + length] for length in (0, 1, hop - 1, hop, 9 * hop + 1, 70_000)]
    for padded_length in (70_000, 70_001 + hop):
        batch = features.extract_batch(waveforms, padded_length)
        for ours_TD, segment_N in zip(batch, waveforms, strict=True):
            alone_TD = features.extract(segment_N)
            if len(segment_N):
                require_close(ours_TD, alone_TD, 1e-5)
            assert ours_TD.shape == alone_TD.shape


def test_loudness_changes_nothing_but_what_the_eps_lets_through(folders: dict[str, Path]):
    name = "vibevoice-latents"
    features, waveform_N = load_features(config(name, folders[name])), speech(2)
    as_it_is_TD = features.extract(waveform_N)
    require_close(features.extract(3 * waveform_N), as_it_is_TD, 1e-3)
    clicks_N = torch.zeros(24_000)
    clicks_N[::6_000] = 0.5  # brought to -25 dB its peaks would pass 1
    require_close(features.extract(clicks_N), oracle(name, folders[name], clicks_N), 1e-4)
    assert torch.isfinite(features.extract(torch.zeros(9_999))).all()


def test_loudness_is_left_as_it_is_where_the_extractor_says_so(folders: dict[str, Path], tmp_path: Path):
    name = "vibevoice-latents"
    copied = Path(shutil.copytree(folders[name], tmp_path / "w"))
    change(copied, "preprocessor_config.json", normalize_audio=False)
    described = describe(config(name, copied))
    assert described.fingerprint["normalize"] == "no"
    assert describe(config(name, folders[name])).fingerprint["normalize"] == "-25 dB, 1e-06"
    waveform_N = speech(2)
    theirs_TD = oracle(name, copied, waveform_N)
    require_close(load_features(config(name, copied)).extract(waveform_N), theirs_TD, 1e-4)
    assert not torch.allclose(theirs_TD, oracle(name, folders[name], waveform_N), atol=0.01)


@pytest.mark.parametrize("name", ["dac-16khz-latents", *OWN])
def test_a_codebook_of_latents_encodes_and_decodes(name: str, folders: dict[str, Path]):
    asked = config(name, folders[name])
    waveform_N = weights_dac.speech(48_000, REGISTRY[name].spec.sample_rate)
    features_TD = load_features(asked).extract(waveform_N)
    header = {"tokenizer": name, **describe(asked).fingerprint}
    tokenizer = load_tokenizer(asked, Codebook(features_TD[None].clone(), header), codebook_name="frames")
    codes_KT = tokenizer.encode(waveform_N)
    distinct = torch.unique(features_TD, dim=0).shape[0]
    assert len(set(codes_KT[0].tolist())) == distinct  # each frame is its own centroid
    sound_N = tokenizer.decode(codes_KT)
    kept = load_tokenizer(config(name, folders[name], output=Output.FEATURES))
    as_kept_N = kept.decode_tokens(kept.tokens(waveform_N))
    assert sound_N.shape == as_kept_N.shape == (decoded_samples(codes_KT.shape[1], tokenizer.spec),)
    assert (sound_N - as_kept_N).norm() < 0.02 * sound_N.norm()


def test_a_stream_of_latents_is_kept_unless_a_codebook_is_named():
    for name in (*NAMES, *(f"{codec}-latents" for codec in MORE)):
        assert REGISTRY[name].needs_codebook
        assert REGISTRY[name].output is Output.FEATURES
        assert REGISTRY[name].spec.decode_sample_rate > 0


def test_weights_of_another_kind_or_half_a_codec_are_refused(folders: dict[str, Path], tmp_path: Path):
    def refused(name: str, folder: Path) -> Description:
        return describe(config(name, folder))

    with pytest.raises(UserError, match=r"type 'pocket_tts_audio_tokenizer'.*vibevoice-latents takes 'vibevoice_ac"):
        refused("vibevoice-latents", folders["pocket-tts-latents"])
    pocket = Path(shutil.copytree(folders["pocket-tts-latents"], tmp_path / "pocket"))
    change(pocket, sampling_rate=16_000)
    with pytest.raises(UserError, match="another codec than pocket-tts-latents: sampling_rate 16000, not 24000"):
        refused("pocket-tts-latents", pocket)
    change(pocket, sampling_rate=24_000, encoder_config=None)
    with pytest.raises(UserError, match=r"is half a codec: its config.json says encoder_config: null"):
        refused("pocket-tts-latents", pocket)
    vibe = Path(shutil.copytree(folders["vibevoice-latents"], tmp_path / "vibe"))
    change(vibe, "preprocessor_config.json", sampling_rate=16_000)
    with pytest.raises(UserError, match=r"takes 1 channel.s. at 16000 Hz; vibevoice-latents takes 1 at 24000 Hz"):
        refused("vibevoice-latents", vibe)
    change(vibe, "preprocessor_config.json", sampling_rate=24_000, pad_to_multiple_of=1_600)
    with pytest.raises(UserError, match=r"with pad_to_multiple_of 1600 .*; vibevoice-latents takes 3200"):
        refused("vibevoice-latents", vibe)
    for key in ("target_dB_FS", "eps"):
        change(vibe, "preprocessor_config.json", **{"pad_to_multiple_of": 3_200, "target_dB_FS": -25, key: None})
        with pytest.raises(UserError, match=f"with {key} None .*: expected a number"):
            refused("vibevoice-latents", vibe)
