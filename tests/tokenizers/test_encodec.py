"""EnCodec 24 kHz: which weights are it, and its right edge at every length of a few hops."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import weights_causal
from wavemill.tokenizers.causal import CausalCodec
from wavemill.tokenizers.encodec import ENTRIES
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.tokenizer import Description, TokenizerConfig
from weights_causal import num_differing, oracle, speech

ENTRY = ENTRIES[0]
PUBLISHED = Path(weights_causal.__file__).parent / "published" / "encodec-24khz.json"
# what config.json of facebook/encodec_48khz has otherwise
OF_48_KHZ = {
    "sampling_rate": 48_000,
    "audio_channels": 2,
    "use_causal_conv": False,
    "normalize": True,
    "chunk_length_s": 1.0,
    "overlap": 0.01,
    "norm_type": "time_group_norm",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_causal.small(tmp_path_factory, "encodec-24khz")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "weights"))


def describe(folder: Path) -> Description:
    return ENTRY.describe(TokenizerConfig(tokenizer="encodec-24khz", weights=str(folder)))


def opened(folder: Path) -> CausalCodec:
    return ENTRY.open(describe(folder), "cpu")


def change(folder: Path, file: str, **fields: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_codes_are_the_published_ones_at_every_length_of_up_to_three_hops(folder: Path):
    tokenizer = opened(folder)
    differing = 0
    for length in range(1, 3 * 320 + 2, 7):
        waveform_N = speech(20)[24_000 + length : 24_000 + 2 * length]
        expected_KT = oracle(folder, waveform_N)[:8]
        differing += num_differing(folder, waveform_N, tokenizer.encode(waveform_N), expected_KT)
    assert differing <= 1


def test_the_registry_says_what_the_published_configuration_gives(copied: Path):
    (copied / "config.json").write_text(json.dumps(json.loads(PUBLISHED.read_text())["model"]))
    assert describe(copied).spec == ENTRY.spec
    assert ENTRY.spec.frame_rate == 75
    assert ENTRY.spec.bits_per_second == 6_000


def test_the_48_khz_codec_is_refused_with_all_that_differs(copied: Path):
    change(copied, "config.json", **OF_48_KHZ)
    with pytest.raises(UserError) as caught:
        describe(copied)
    told = str(caught.value)
    assert "holds another codec than encodec-24khz: sampling_rate 48000, not 24000;" in told
    for key in ("use_causal_conv False, not True", "normalize True, not False", "chunk_length_s 1.0, not None"):
        assert key in told


def test_a_feature_extractor_for_another_rate_is_refused(copied: Path):
    change(copied, "preprocessor_config.json", sampling_rate=16_000)
    with pytest.raises(UserError, match="a feature extractor for 16000 Hz, not 24000"):
        describe(copied)


@pytest.mark.parametrize("changed", [{"target_bandwidths": []}, {"target_bandwidths": [0.1]}, {"codebook_size": 1}])
def test_weights_without_codebooks_are_refused(copied: Path, changed: dict[str, Any]):
    change(copied, "config.json", **changed)
    with pytest.raises(UserError, match=r"has no codebooks: .* which pay for none"):
        describe(copied)


def test_weights_of_another_model_are_refused(copied: Path):
    change(copied, "config.json", model_type="mimi")
    with pytest.raises(UserError, match=r"'mimi'.*encodec-24khz takes 'encodec'"):
        describe(copied)


def test_weights_with_the_names_of_the_published_file_give_the_same_codes(folder: Path, copied: Path):
    """The file on the hub is older than torch's parametrizations: weight_g and weight_v."""
    state = safetensors.torch.load_file(copied / "model.safetensors")
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for name, weight in state.items():
        for new_part, old_part in old.items():
            name = name.replace(new_part, old_part)
        renamed[name] = weight
    assert set(renamed) != set(state)
    safetensors.torch.save_file(renamed, copied / "model.safetensors", metadata={"format": "pt"})
    waveform_N = speech(20)[:30_000]
    assert torch.equal(opened(copied).encode(waveform_N), opened(folder).encode(waveform_N))


def test_chunks_too_short_to_be_reflected_are_a_mistake_of_the_caller(folder: Path):
    with pytest.raises(ValueError, match="8 or more"):
        ENTRY.open(describe(folder), "cpu", chunk_frames=6)
