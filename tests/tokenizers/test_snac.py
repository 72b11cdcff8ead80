"""SNAC against a plain reading of the published pass; `make oracles` holds both to the original package.

Axes: N samples, T frames, K codes of one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import weights_snac
from torch import Tensor
from wavemill.tokenizers.compare import compare_all
from wavemill.tokenizers.registry import describe, load_tokenizer
from wavemill.tokenizers.snac import ENTRIES, Snac, open_snac
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.tokenizer import TokenizerConfig
from weights_dac import speech
from weights_snac import make, oracle, oracle_sound

ENTRY = ENTRIES[0]
HOP = 2_048
PUBLISHED = Path(weights_snac.__file__).parent / "published" / "snac-24khz.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("snac-24khz", tmp_path_factory.mktemp("snac") / "weights", small=True)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "weights"))


def config_of(folder: Path, **fields: Any) -> TokenizerConfig:
    return TokenizerConfig(tokenizer="snac-24khz", weights=str(folder), **fields)


def opened(folder: Path, *, chunk_frames: int = 0, **fields: Any) -> Snac:
    return open_snac(describe(config_of(folder, **fields)), "cpu", chunk_frames=chunk_frames)


def excerpts(*lengths: int) -> list[Tensor]:
    speech_N = speech(10 * 24_000, 24_000)
    return [speech_N[24_000 + length % 977 :][:length] for length in lengths]


def require_same(tokenizer: Any, waveforms: list[Tensor], ours: list[Tensor], theirs: list[Tensor]) -> None:
    found = compare_all(tokenizer, waveforms, ours, theirs)
    assert found.mismatches == 0, found
    assert found.near_ties <= 1 + 1e-4 * found.num_codes, found


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_codes_are_the_published_ones_at_the_edges_of_frames_and_at_any_other_length(folder: Path):
    tokenizer = opened(folder)
    edges = [1, 511, 513, *(near for hops in (1, 2, 3) for near in (HOP * hops - 1, HOP * hops, HOP * hops + 1))]
    waveforms = excerpts(*edges, 20_003, 80_000)
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [oracle(folder, waveform_N) for waveform_N in waveforms])


def test_chunks_join_without_a_seam(folder: Path):
    whole, waveforms = opened(folder, chunk_frames=1_000), excerpts(40_001, 9_000)
    expected = [whole.encode(waveform_N) for waveform_N in waveforms]
    sound_N = whole.decode(expected[0])
    for chunk_frames in (2, 7):
        chunked = opened(folder, chunk_frames=chunk_frames)
        require_same(whole, waveforms, expected, [chunked.encode(waveform_N) for waveform_N in waveforms])
        require_same(whole, waveforms, expected, chunked.encode_batch(waveforms, 40_777))
        torch.testing.assert_close(chunked.decode(expected[0]), sound_N, atol=2e-5, rtol=0)


def test_decoded_sound_is_the_published_one_with_its_noise_from_a_tape(folder: Path):
    tokenizer = opened(folder)
    codes_KT = tokenizer.encode(excerpts(40_000)[0])
    for num_codebooks, num_frames in ((7, codes_KT.shape[1]), (3, 5), (1, 1)):
        some_KT = codes_KT[:num_codebooks, :num_frames]
        expected_N = oracle_sound(folder, some_KT, tokenizer._tapes)
        torch.testing.assert_close(tokenizer.decode(some_KT), expected_N, atol=1e-4, rtol=0)
    assert expected_N.abs().max() > 0.01
    quiet_N = oracle_sound(folder, some_KT, [torch.zeros_like(tape_P) for tape_P in tokenizer._tapes])
    assert not torch.equal(quiet_N, expected_N)


def test_only_whole_levels_can_be_asked_for_and_are_the_first_of_all(folder: Path):
    (waveform_N,) = excerpts(30_000)
    all_KT = opened(folder).encode(waveform_N)
    for num_codebooks in (1, 3):
        few = opened(folder, num_codebooks=num_codebooks)
        assert torch.equal(few.encode(waveform_N), all_KT[:num_codebooks])
        assert few.fingerprint["codebooks"] == str(num_codebooks)
    for num_codebooks in (2, 8):
        with pytest.raises(UserError, match=f"the first 1, 3, 7 are whole levels; {num_codebooks} were asked for"):
            opened(folder, num_codebooks=num_codebooks)


def test_a_frame_decodes_also_from_a_part_of_a_level(folder: Path):
    tokenizer = opened(folder)
    codes_KT = tokenizer.encode(excerpts(20_000)[0])
    sounds = [tokenizer.decode(codes_KT[:num_codebooks]) for num_codebooks in range(1, 8)]
    assert len({sound_N.shape for sound_N in sounds}) == 1
    assert len({float(sound_N.square().sum()) for sound_N in sounds}) == 7


def test_random_weights_use_nearly_all_codes(folder: Path):
    codes_KT = opened(folder).encode(speech(500 * 512, 24_000, noise_share=0.25))
    for level in (codes_KT[1:3], codes_KT[3:]):
        assert len(level.unique()) >= 0.8 * 64


def test_networks_that_are_not_depthwise_and_add_no_noise_are_taken(tmp_path: Path):
    plain = make("snac-24khz", tmp_path / "weights", small=True, depthwise=False, noise=False)
    tokenizer, waveforms = opened(plain, chunk_frames=3), excerpts(1, 13_333)
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [oracle(plain, waveform_N) for waveform_N in waveforms])
    torch.testing.assert_close(tokenizer.decode(ours[1]), oracle_sound(plain, ours[1], []), atol=2e-5, rtol=0)


def test_weights_with_the_older_names_of_weight_normalization_give_the_same_codes(folder: Path, copied: Path):
    state = torch.load(copied / "pytorch_model.bin", weights_only=True)
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, old in older.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    assert not any("parametrizations" in name for name in state)
    torch.save(state, copied / "pytorch_model.bin")
    (waveform_N,) = excerpts(30_000)
    assert torch.equal(opened(copied).encode(waveform_N), opened(folder).encode(waveform_N))


def test_the_registry_says_what_the_published_configuration_gives(copied: Path):
    (copied / "config.json").write_text(json.dumps(json.loads(PUBLISHED.read_text())["model"]))
    assert describe(config_of(copied)).spec == ENTRY.spec
    assert round(ENTRY.spec.bits_per_second) == 984  # the README's 0.98 kbit/s


def test_the_registry_opens_what_it_describes(folder: Path):
    described, tokenizer = describe(config_of(folder)), load_tokenizer(config_of(folder))
    assert tokenizer.spec == described.spec
    assert tokenizer.fingerprint == described.fingerprint


def test_the_codecs_with_attention_are_refused(copied: Path):
    change(copied, sampling_rate=44_100, attn_window_size=32, encoder_rates=[2, 3, 8, 8])
    with pytest.raises(UserError, match=r"another codec than snac-24khz.*sampling_rate 44100, not 24000; attn_window_"):
        describe(config_of(copied))


def test_rates_that_do_not_fit_each_other_are_refused(copied: Path):
    change(copied, vq_strides=[4, 3, 1], decoder_rates=[2, 4, 8, 8])
    with pytest.raises(UserError, match=r"vq_strides \[4, 3, 1\]; decoder_rates \[2, 4, 8, 8\] with encoder_rates"):
        describe(config_of(copied))


@pytest.mark.published
def test_at_published_size_codes_and_sound_are_those_of_a_plain_reading(tmp_path: Path):
    folder = make("snac-24khz", tmp_path / "weights", small=False)
    tokenizer, waveforms = opened(folder), excerpts(1, HOP + 1, 150_000)
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [oracle(folder, waveform_N) for waveform_N in waveforms])
    some_KT = ours[-1][:, :20]
    expected_N = oracle_sound(folder, some_KT, tokenizer._tapes)
    torch.testing.assert_close(tokenizer.decode(some_KT), expected_N, atol=1e-4, rtol=0)
