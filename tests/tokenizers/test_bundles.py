"""torchaudio's bundles as a source of weights: torchaudio's own models, small, their files in torch.hub's cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
import weights_ssl
from torch import nn
from wavemill.tokenizers.bundles import _BUNDLES
from wavemill.tokenizers.registry import describe, load_features
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.tokenizer import TokenizerConfig

PUBLISHED = [(architecture, bundle) for architecture, bundles in _BUNDLES.items() for bundle in bundles]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def save_bundle(name: str, hub: Path, monkeypatch: pytest.MonkeyPatch, *, small: bool = True) -> nn.Module:
    """torchaudio's model of a bundle with random weights, as `get_model` reads it from its file."""
    bundle: Any = getattr(torchaudio.pipelines, name)
    if small:
        params = {
            **bundle._params,
            "extractor_conv_layer_config": [
                (16, kernel, stride) for _, kernel, stride in bundle._params["extractor_conv_layer_config"]
            ],
            "encoder_embed_dim": 32,
            "encoder_pos_conv_groups": 4,
            "encoder_num_layers": 3,
            "encoder_num_heads": 4,
            "encoder_ff_interm_features": 64,
        }
        bundle = replace(bundle, _params=params)
        monkeypatch.setattr(torchaudio.pipelines, name, bundle)
    torch.manual_seed(0)
    factory = torchaudio.models.wavlm_model if "WAVLM" in name else torchaudio.models.wav2vec2_model
    model = factory(**bundle._params).requires_grad_(False)
    for module in model.modules():
        weights_ssl.spread(module)
    hub.mkdir(parents=True)
    torch.save(model.state_dict(), hub / bundle._path)
    return bundle.get_model()


def require_torchaudio(name: str, architecture: str, model: nn.Module, layers: list[int]) -> None:
    waveform_N = weights_ssl.speech(2) + 0.01
    with torch.inference_mode():
        theirs, _ = model.extract_features(waveform_N[None])
        for layer in layers:
            config = TokenizerConfig(tokenizer=f"{architecture}-base", weights=f"torchaudio:{name}", layer=layer)
            ours_TD = load_features(config).extract(waveform_N)
            assert (ours_TD - theirs[layer - 1][0]).norm() < 1e-5 * theirs[layer - 1].norm(), layer


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "name"), PUBLISHED)
def test_every_layer_is_what_torchaudio_gives(architecture: str, name: str, hub: Path, monkeypatch: pytest.MonkeyPatch):
    require_torchaudio(name, architecture, save_bundle(name, hub, monkeypatch), [1, 2, 3])


@pytest.mark.published
@pytest.mark.parametrize(("architecture", "name"), PUBLISHED)
def test_published_sizes_are_what_torchaudio_gives(
    architecture: str, name: str, hub: Path, monkeypatch: pytest.MonkeyPatch
):
    model = save_bundle(name, hub, monkeypatch, small=False)
    require_torchaudio(name, architecture, model, [1, 6])


def test_the_old_names_of_weight_norm_are_read(hub: Path, monkeypatch: pytest.MonkeyPatch):
    model = save_bundle("HUBERT_BASE", hub, monkeypatch)
    file = hub / torchaudio.pipelines.HUBERT_BASE._path
    stem = "encoder.transformer.pos_conv_embed.conv"
    state = torch.load(file, weights_only=True)
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state[f"{stem}.{old}"] = state.pop(f"{stem}.parametrizations.weight.{new}")
    torch.save(state, file)
    require_torchaudio("HUBERT_BASE", "hubert", model, [2])


def test_the_fingerprint_is_the_files(hub: Path, monkeypatch: pytest.MonkeyPatch):
    save_bundle("HUBERT_LARGE", hub, monkeypatch)
    described = describe(TokenizerConfig(tokenizer="hubert-large", weights="torchaudio:HUBERT_LARGE", layer=2))
    assert described.fingerprint["revision"] == "torchaudio:HUBERT_LARGE"
    assert described.fingerprint["normalize"] == "1e-05"
    assert len(described.fingerprint["weights"]) == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "torchaudio:HUBERT_BSE"}, "no bundle that is known here.*Did you mean 'HUBERT_BASE'"),
        ({"weights": "torchaudio:WAVLM_BASE"}, "holds another model; hubert-base takes torchaudio:HUBERT_BASE"),
        ({"revision": "main"}, "bundles have no revisions"),
        ({"local_files_only": True}, "not on this machine, and the network must not be asked. Fetch https://"),
    ],
)
def test_bundles_that_cannot_be_had_are_a_mistake_with_a_way_out(changes: dict[str, Any], message: str, hub: Path):
    config = TokenizerConfig(**{"tokenizer": "hubert-base", "weights": "torchaudio:HUBERT_BASE", **changes})
    with pytest.raises(UserError, match=message):
        describe(config)


def test_a_torn_or_foreign_file_is_named(hub: Path, monkeypatch: pytest.MonkeyPatch):
    save_bundle("HUBERT_BASE", hub, monkeypatch)
    file = hub / torchaudio.pipelines.HUBERT_BASE._path
    config = TokenizerConfig(tokenizer="hubert-base", weights="torchaudio:HUBERT_BASE", layer=1)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is not the file of torchaudio:HUBERT_BASE"):
            load_features(config)
    torch.save({"some": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="is not the file of torchaudio:HUBERT_BASE"):
        load_features(config)


def test_wav2vec2_codes_are_not_in_a_bundle(hub: Path, monkeypatch: pytest.MonkeyPatch):
    save_bundle("WAV2VEC2_BASE", hub, monkeypatch)
    with pytest.raises(UserError, match="without the quantizer"):
        describe(TokenizerConfig(tokenizer="wav2vec2-codes", weights="torchaudio:WAV2VEC2_BASE"))
