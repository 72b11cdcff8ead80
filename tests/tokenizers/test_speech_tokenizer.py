"""SpeechTokenizer against a plain reading of the published pass; `make oracles` holds both to the original package.

Axes: N samples, T frames, K codebooks.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import weights_speech_tokenizer
from safetensors.torch import save_file
from torch import Tensor
from wavemill.tokenizers.compare import compare_all
from wavemill.tokenizers.registry import describe, load_tokenizer
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.speech_tokenizer import ENTRIES, SpeechTokenizer, open_speech_tokenizer
from wavemill.tokenizers.tokenizer import TokenizerConfig
from weights_dac import speech
from weights_speech_tokenizer import make, oracle, oracle_sound

ENTRY = ENTRIES[0]
PUBLISHED = Path(weights_speech_tokenizer.__file__).parent / "published" / "speechtokenizer.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("speechtokenizer", tmp_path_factory.mktemp("speechtokenizer") / "weights", small=True)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "weights"))


def config_of(folder: Path, **fields: Any) -> TokenizerConfig:
    return TokenizerConfig(tokenizer="speechtokenizer", weights=str(folder), **fields)


def opened(folder: Path, *, chunk_frames: int = 0, stretch_frames: int = 0, **fields: Any) -> SpeechTokenizer:
    described = describe(config_of(folder, **fields))
    return open_speech_tokenizer(described, "cpu", chunk_frames=chunk_frames, stretch_frames=stretch_frames)


def excerpts(*lengths: int) -> list[Tensor]:
    speech_N = speech(8 * 16_000, 16_000)
    return [speech_N[16_000 + length % 977 :][:length] for length in lengths]


def require_same(tokenizer: Any, waveforms: list[Tensor], ours: list[Tensor], theirs: list[Tensor]) -> None:
    found = compare_all(tokenizer, waveforms, ours, theirs)
    assert found.mismatches == 0, found
    assert found.near_ties <= 1 + 1e-4 * found.num_codes, found


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def state_of(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "SpeechTokenizer.pt", weights_only=True)


def test_codes_are_the_published_ones_at_the_edges_of_strides_and_at_any_other_length(folder: Path):
    tokenizer = opened(folder)
    edges = [1, 2, 3, 7, *(near for hops in (1, 2, 3, 5) for near in (320 * hops - 1, 320 * hops, 320 * hops + 1))]
    waveforms = excerpts(*edges, 327, 350, 400, 441, 479, 10_007, 77_777)
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [oracle(folder, waveform_N) for waveform_N in waveforms])


def test_chunks_of_convolutions_join_without_a_seam_at_any_right_edge(folder: Path):
    whole = opened(folder, chunk_frames=10_000)
    waveforms = excerpts(*(320 * 24 + extra for extra in (0, 1, 2, 9, 39, 41, 319)))
    expected = [whole.encode(waveform_N) for waveform_N in waveforms]
    for chunk_frames in (1, 8):
        chunked = opened(folder, chunk_frames=chunk_frames)
        require_same(whole, waveforms, expected, [chunked.encode(waveform_N) for waveform_N in waveforms])
        require_same(whole, waveforms, expected, chunked.encode_batch(waveforms, 9_000))


def test_a_long_segment_has_the_codes_of_the_published_pass_over_the_whole(folder: Path):
    """The LSTM's way back begins at the end of the segment, whatever a stretch is."""
    waveforms = excerpts(320 * 30 + 1, 20_003)
    theirs = [oracle(folder, waveform_N) for waveform_N in waveforms]
    for stretch_frames in (7, 30):
        tokenizer = opened(folder, chunk_frames=11, stretch_frames=stretch_frames)
        require_same(tokenizer, waveforms, [tokenizer.encode(waveform_N) for waveform_N in waveforms], theirs)
        assert tokenizer.gaps(waveforms[0]).shape == theirs[0].shape


def test_the_end_of_a_segment_is_heard_where_no_convolution_reaches(folder: Path):
    """That is why stretches by themselves, each with some frames around it, would not do."""
    tokenizer = opened(folder, stretch_frames=8)
    (waveform_N,) = excerpts(16 * 320)
    louder_N = waveform_N.clone()
    louder_N[-320:] *= 50
    first, second = (next(iter(tokenizer.latents([given_N], 16 * 320)))[0] for given_N in (waveform_N, louder_N))
    assert max(tokenizer._reach) < 8
    assert (first[0, 0] - second[0, 0]).abs().max() > 1e-6


def test_long_and_short_segments_of_a_batch_have_the_codes_they_have_alone(folder: Path):
    tokenizer = opened(folder, stretch_frames=20)
    waveforms = excerpts(20_001, 100, 6_400, 6_401, 0, 3_000)
    alone = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, alone, tokenizer.encode_batch(waveforms, 24_000))
    assert alone[4].shape == (8, 0)


def test_decoded_sound_is_the_published_one_in_chunks_and_whole(folder: Path):
    codes_KT = opened(folder).encode(excerpts(30_000)[0])
    for num_codebooks, num_frames in ((8, codes_KT.shape[1]), (2, 40), (1, 1)):
        some_KT = codes_KT[:num_codebooks, :num_frames]
        expected_N = oracle_sound(folder, some_KT)
        for chunk_frames in (2, 7, 1_000):
            sound_N = opened(folder, chunk_frames=chunk_frames).decode(some_KT)
            torch.testing.assert_close(sound_N, expected_N, atol=2e-5, rtol=0)
    assert expected_N.abs().max() > 0.01


def test_weights_with_snake_activations_are_taken(tmp_path: Path):
    """Those of AnyGPT, which the same authors published later."""
    snaky = make("speechtokenizer", tmp_path / "weights", small=True, activation="Snake")
    tokenizer, waveforms = opened(snaky, chunk_frames=9), excerpts(1, 9_999, 20_000)
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [oracle(snaky, waveform_N) for waveform_N in waveforms])
    torch.testing.assert_close(tokenizer.decode(ours[2]), oracle_sound(snaky, ours[2]), atol=2e-5, rtol=0)


def test_the_same_state_dict_as_safetensors_gives_the_same_codes(folder: Path, copied: Path):
    save_file(state_of(copied), copied / "model.safetensors")
    (copied / "SpeechTokenizer.pt").unlink()
    (waveform_N,) = excerpts(20_000)
    assert torch.equal(opened(copied).encode(waveform_N), opened(folder).encode(waveform_N))
    assert opened(copied).fingerprint["weights"] != opened(folder).fingerprint["weights"]


def test_weights_are_found_in_the_folder_that_the_hub_keeps_them_in(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "clone" / "speechtokenizer_hubert_avg")
    assert describe(config_of(tmp_path / "clone")).fingerprint == describe(config_of(folder)).fingerprint


def test_published_weights_are_found_in_the_cache_of_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--fnlp--SpeechTokenizer"
    shutil.copytree(folder, cache / "snapshots" / commit / "speechtokenizer_hubert_avg")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = describe(TokenizerConfig(tokenizer="speechtokenizer", local_files_only=True)).fingerprint
    assert found == {**describe(config_of(folder)).fingerprint, "revision": commit}
    with pytest.raises(UserError, match=r"The weights hubertsiuzdak/snac_24khz are not on this machine"):
        describe(TokenizerConfig(tokenizer="snac-24khz", local_files_only=True))


def test_random_weights_use_nearly_all_codes(folder: Path):
    codes_KT = opened(folder).encode(speech(15 * 16_000, 16_000, noise_share=0.25))
    used = [len(codes_T.unique()) for codes_T in codes_KT]
    assert min(used) >= 0.8 * 64, used


def test_fewer_codebooks_are_the_first_of_all(folder: Path):
    (waveform_N,) = excerpts(16_000)
    few = opened(folder, num_codebooks=2)
    assert torch.equal(few.encode(waveform_N), opened(folder).encode(waveform_N)[:2])
    with pytest.raises(UserError, match="1 to 8 codebooks; 9 were asked for"):
        opened(folder, num_codebooks=9)


def test_the_registry_says_what_the_published_configuration_gives(copied: Path):
    (copied / "config.json").write_text(json.dumps(json.loads(PUBLISHED.read_text())["model"]))
    assert describe(config_of(copied)).spec == ENTRY.spec
    assert ENTRY.spec.frame_rate == 50
    assert ENTRY.spec.bits_per_second == 4_000


def test_the_registry_opens_what_it_describes(folder: Path):
    described, tokenizer = describe(config_of(folder)), load_tokenizer(config_of(folder))
    assert tokenizer.spec == described.spec
    assert tokenizer.fingerprint == described.fingerprint


def test_another_codec_is_refused_with_all_that_differs(copied: Path):
    change(copied, sample_rate=24_000, bidirectional=False, n_filters="many", strides=[8, 0])
    with pytest.raises(UserError) as caught:
        describe(config_of(copied))
    for told in (
        "holds another codec than speechtokenizer",
        "n_filters 'many', no number",
        "strides [8, 0], no list of numbers",
        "sample_rate 24000, not 16000",
        "bidirectional False, not True",
    ):
        assert told in str(caught.value)


def test_a_model_of_another_kind_is_refused_with_what_it_says_nothing_of(copied: Path):
    (copied / "config.json").write_text(json.dumps({"model_type": "encodec", "codebook_size": 1024}))
    with pytest.raises(UserError, match=r"another model than SpeechTokenizer: .* nothing of n_filters, dimension, n_q"):
        describe(config_of(copied))


def test_a_folder_without_weights_is_refused_with_what_was_expected(copied: Path):
    (copied / "SpeechTokenizer.pt").unlink()
    with pytest.raises(
        UserError, match=r"holds no weights of SpeechTokenizer: expected config.json and SpeechTokenizer"
    ):
        describe(config_of(copied))


def test_parameters_that_lack_or_do_not_fit_the_configuration_are_refused(copied: Path):
    state = state_of(copied)
    del state["encoder.model.1.block.3.conv.conv.weight_g"]
    torch.save(state, copied / "SpeechTokenizer.pt")
    with pytest.raises(UserError, match=r"lack 'encoder.model.1.block.3.conv.weight'; 1 of \d+ parameters do not fit"):
        opened(copied)
    torch.save(state_of(copied) | {"quantizer.vq.layers.0._codebook.embed": torch.zeros(3, 3)}, copied / "x")
    (copied / "x").rename(copied / "SpeechTokenizer.pt")
    with pytest.raises(UserError, match="parameters do not fit"):
        opened(copied)


def test_a_torn_file_and_one_that_holds_more_than_tensors_are_refused(copied: Path):
    file = copied / "SpeechTokenizer.pt"
    whole = file.read_bytes()
    for content in (whole[:2_000], b"", whole[:-9], b"\x80\x02]q\x00."):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read as a state dict of tensors .* convert it: python -c"):
            opened(copied)
    torch.save({"state": {"nested": torch.zeros(1)}}, file)
    with pytest.raises(UserError, match="it holds more than tensors by their names"):
        opened(copied)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(copied: Path, tmp_path: Path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"weight": Hostile()}, copied / "SpeechTokenizer.pt")
    with pytest.raises(UserError, match="cannot be read as a state dict of tensors"):
        opened(copied)
    assert not (tmp_path / "touched").exists()


@pytest.mark.published
def test_at_published_size_codes_and_sound_are_those_of_a_plain_reading(tmp_path: Path):
    folder = make("speechtokenizer", tmp_path / "weights", small=False)
    tokenizer, waveforms = opened(folder, stretch_frames=130), excerpts(1, 321, 959, 60_000)
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [oracle(folder, waveform_N) for waveform_N in waveforms])
    some_KT = ours[-1][:, :100]
    torch.testing.assert_close(tokenizer.decode(some_KT), oracle_sound(folder, some_KT), atol=1e-4, rtol=0)
