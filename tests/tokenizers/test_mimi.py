"""Mimi: which weights are it, its split codebooks, and attention that sees ten seconds and no more."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import weights_causal
from wavemill.tokenizers.causal import CausalCodec
from wavemill.tokenizers.mimi import ENTRIES, open_mimi
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.tokenizer import Description, TokenizerConfig
from weights_causal import num_differing, oracle, oracle_sound, speech

ENTRY = ENTRIES[0]
PUBLISHED = Path(weights_causal.__file__).parent / "published" / "mimi.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_causal.small(tmp_path_factory, "mimi")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "weights"))


def describe(folder: Path) -> Description:
    return ENTRY.describe(TokenizerConfig(tokenizer="mimi", weights=str(folder)))


def opened(folder: Path, chunk_frames: int = 0) -> CausalCodec:
    return open_mimi(describe(folder), "cpu", chunk_frames=chunk_frames)


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.slow
def test_attention_sees_the_published_window_and_no_more(folder: Path, copied: Path):
    """The same weights with windows of 20 and of 250 positions (10 s), on 15 s."""
    waveform_N = speech(20)[: 15 * 24_000 + 7]
    change(copied, sliding_window=20)
    codes = {}
    for weights in (folder, copied):
        expected_KT = oracle(weights, waveform_N)[:8]
        for chunk_frames in (9, 60, 1000):
            codes[weights] = opened(weights, chunk_frames).encode(waveform_N)
            assert num_differing(weights, waveform_N, codes[weights], expected_KT) <= 1
    seen = 20 // 2  # frames whose positions all see back to the first
    assert torch.equal(codes[folder][:, :seen], codes[copied][:, :seen])
    assert (codes[folder] != codes[copied])[:, seen:].any()


def test_decoding_sees_the_published_window_in_chunks_and_whole(copied: Path):
    change(copied, sliding_window=20)
    codes_KT = opened(copied).encode(speech(20)[: 6 * 24_000])
    expected_N = oracle_sound(copied, codes_KT)
    for chunk_frames in (8, 1000):
        sound_N = opened(copied, chunk_frames).decode(codes_KT)
        torch.testing.assert_close(sound_N, expected_N, rtol=0, atol=1e-5)


def test_heads_that_share_keys_are_attended_as_published(tmp_path: Path):
    weights = weights_causal.make("mimi", tmp_path / "weights", small=True, num_key_value_heads=1)
    waveform_N = speech(20)[:50_000]
    codes_KT = opened(weights, 8).encode(waveform_N)
    assert num_differing(weights, waveform_N, codes_KT, oracle(weights, waveform_N)[:8]) <= 1


def test_the_acoustic_codebooks_quantize_what_the_semantic_one_does(folder: Path, copied: Path):
    """Other semantic centroids change the first code and none of the others."""
    state = safetensors.torch.load_file(copied / "model.safetensors")
    state["quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum"].neg_()
    safetensors.torch.save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    waveform_N = speech(20)[:50_000]
    codes_KT, other_KT = opened(folder).encode(waveform_N), opened(copied).encode(waveform_N)
    assert (other_KT[0] != codes_KT[0]).any()
    assert torch.equal(other_KT[1:], codes_KT[1:])


def test_the_registry_says_what_the_published_configuration_gives(copied: Path):
    (copied / "config.json").write_text(json.dumps(json.loads(PUBLISHED.read_text())["model"]))
    assert describe(copied).spec == ENTRY.spec
    assert float(ENTRY.spec.frame_rate) == 12.5
    assert ENTRY.spec.bits_per_second == 1_100


def test_a_codec_that_is_not_causal_or_of_another_rate_is_refused(copied: Path):
    change(copied, use_causal_conv=False, sampling_rate=16_000)
    with pytest.raises(UserError, match="another codec than mimi: sampling_rate 16000, not 24000; use_causal_conv Fal"):
        describe(copied)


def test_a_frame_rate_that_the_strides_do_not_give_is_refused(copied: Path):
    change(copied, frame_rate=25.0)
    with pytest.raises(UserError, match=r"config.json says 25.0 frames/s, its strides give 12.5"):
        describe(copied)
