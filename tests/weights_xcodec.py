"""Random weights of X-Codec and HiggsAudio v2's tokenizer in the layout of the published ones, and what they give.

A fresh random codec says little: its features hardly move and its codebooks are zeros. Here the HuBERT varies as in
weights_ssl.py, every convolution is scaled to give outputs of deviation 1 on speech, both halves of a frame weigh the
same, and each codebook is drawn from what the ones before leave.

Axes: N samples, T frames, D dimensions of a latent, E dimensions of a codebook.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import weights_causal
import weights_dac
import weights_ssl
from torch import Tensor, nn

_PUBLISHED = Path(__file__).parent / "published"
_MODELS = {"xcodec": "XcodecModel", "higgs-audio-v2": "HiggsAudioV2TokenizerModel"}
_SMALL_ACOUSTIC = {"encoder_hidden_size": 4, "hidden_size": 16, "decoder_hidden_size": 64}
_SMALL_SEMANTIC = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embedding_groups": 4,
}
_SMALL = {  # six codebooks
    "xcodec": {"codebook_size": 64, "codebook_dim": 48, "target_bandwidths": [0.6, 1.8]},
    "higgs-audio-v2": {"codebook_size": 64, "codebook_dim": 8, "target_bandwidths": [0.3, 0.9]},
}
_PART_S = 10  # that a HuBERT sees at a time
_STEP = 0.7  # how much of what it sees a stage takes away


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights of `name` to `folder`; `changes` are made to its configuration, parts of which are dictionaries."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    fields = published["model"]
    acoustic, semantic = fields["acoustic_model_config"], fields["semantic_model_config"]
    if small:
        fields |= _SMALL[name]
        acoustic |= _SMALL_ACOUSTIC
        semantic |= _SMALL_SEMANTIC
    acoustic |= changes.pop("acoustic_model_config", {})
    semantic |= changes.pop("semantic_model_config", {})
    fields |= changes
    torch.manual_seed(seed)
    kind = getattr(transformers, _MODELS[name])
    model = kind(kind.config_class.from_dict(fields)).eval().requires_grad_(False)
    rate = fields["sample_rate"]
    waveform_N = weights_dac.speech(rate * (20 if small else 60), rate, noise_share=0.25)
    with torch.no_grad():
        latents_TD = _spread_encoders(model, list(waveform_N[None, None].split(rate * _PART_S, dim=2)))
        quantized_TD = _fit_codebooks(name, model, latents_TD)
        _vary(model.fc2)
        given_DT = model.fc2(quantized_TD[-50:]).t()
        _spread(model.acoustic_decoder, given_DT[None])
        weights_dac._scale(model.acoustic_decoder.conv2, 0.1)
    model.save_pretrained(folder)
    # save_pretrained would write the fields of today's class, not those of the published file
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": [_MODELS[name]]}))
    preprocessor = {key: value for key, value in published["preprocessor"].items() if key != "feature_extractor_type"}
    transformers.DacFeatureExtractor(**preprocessor).save_pretrained(folder)
    return folder


def small(factory: pytest.TempPathFactory, name: str) -> Path:
    """Small weights, made once in a run of tests."""
    folder = factory.getbasetemp() / f"small-{name}"
    return folder if folder.exists() else make(name, folder, small=True)


def oracle(folder: Path, waveform_N: Tensor) -> Tensor:
    """Codes `[K, T]` of all codebooks by transformers' own feature extractor and model."""
    model, extractor = loaded(folder)
    taken = extractor(waveform_N.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
    with torch.inference_mode():
        return model.encode(taken["input_values"]).audio_codes[0]


def oracle_latents(folder: Path, waveform_N: Tensor) -> Tensor:
    """What is quantized, `[T, D]`, by transformers' own feature extractor and model."""
    seen: list[Tensor] = []
    handle = loaded(folder)[0].fc.register_forward_hook(lambda _, __, given_BTD: seen.append(given_BTD[0]))
    oracle(folder, waveform_N)
    handle.remove()
    (latents_TD,) = seen
    return latents_TD


def oracle_sound(folder: Path, codes_KT: Tensor) -> Tensor:
    """Samples by transformers' own decoder."""
    model, _ = loaded(folder)
    with torch.inference_mode():
        return model.decode(codes_KT[None]).audio_values[0, 0]


@lru_cache(maxsize=2)
def loaded(folder: Path) -> tuple[Any, Any]:
    """transformers' own model and feature extractor."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return kind.from_pretrained(folder, dtype=torch.float32).eval(), extractor


def _spread_encoders(model: Any, parts_11N: list[Tensor]) -> Tensor:
    """Let both encoders and the seam vary; the latents `[T, D]` of the sound in `parts`, what is quantized."""
    for module in model.semantic_model.modules():
        weights_ssl.spread(module)
    weights_ssl.spread_input(model.semantic_model, weights_ssl.speech(10)[None])
    for layer in model.semantic_model.encoder.layers:
        layer.attention.out_proj.weight.mul_(0.5)
        layer.feed_forward.output_dense.weight.mul_(0.5)
    features = [model._extract_semantic_features(part_11N).transpose(1, 2) for part_11N in parts_11N]
    _spread(model.encoder_semantic, features[-1])
    _spread(model.acoustic_encoder, parts_11N[-1])
    semantic_TD = torch.cat([model.encoder_semantic(part_1DT)[0].t() for part_1DT in features])
    acoustic_TD = torch.cat([model.acoustic_encoder(part_11N)[0].t() for part_11N in parts_11N])
    weights_dac._centre(model.encoder_semantic.conv_blocks[-1].conv, semantic_TD)
    weights_dac._centre(model.acoustic_encoder.conv2, acoustic_TD)
    joint_TD = torch.cat([acoustic_TD, semantic_TD], dim=1)
    _vary(model.fc)
    return model.fc((joint_TD - joint_TD.mean(0)) / (joint_TD - joint_TD.mean(0)).square().mean(0).sqrt())


def _spread(network: nn.Module, given: Tensor) -> None:
    """Draw each Snake's alpha and all convolutions, and scale these, when first used, to outputs of deviation 1."""
    for module in network.modules():
        if hasattr(module, "alpha") and isinstance(module.alpha, nn.Parameter):  # not the constant of an ELU
            nn.init.uniform_(module.alpha, 0.3, 2.0)
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            nn.init.normal_(module.weight, std=0.05)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.02)
    with weights_causal._scaled(network):
        network(given)


def _vary(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    nn.init.normal_(linear.bias, std=0.1)


def _fit_codebooks(name: str, model: Any, latents_TD: Tensor) -> Tensor:
    """Write codebooks into the model's quantizers; the quantized latents."""
    generator = torch.Generator().manual_seed(1)
    stages = model.quantizer.quantizers
    if name == "xcodec":
        return weights_causal._fit_stages(stages, latents_TD, generator)
    residual_TD = latents_TD.clone()
    for stage in stages:
        into_ED = torch.randn(stage.project_in.weight.shape) / residual_TD.norm(dim=1).mean()
        stage.project_in.weight.copy_(into_ED)
        stage.project_in.bias.copy_(-(residual_TD @ into_ED.t()).mean(0))
        projected_TE = stage.project_in(residual_TD)
        codebook_CE = weights_causal._codebook(projected_TE, stage.codebook.codebook_size, generator)
        stage.codebook.embed.copy_(codebook_CE)
        stage.project_out.weight.copy_(_STEP * torch.linalg.pinv(into_ED))
        nn.init.normal_(stage.project_out.bias, std=0.01)
        nearest_T = torch.cdist(projected_TE, codebook_CE).argmin(dim=1)
        residual_TD -= stage.project_out(codebook_CE[nearest_T])
    return latents_TD - residual_TD
