"""Random weights of X-Codec-2 and NeuCodec in the layout of the published ones, and codes and sound by transformers.

A fresh random codec says little: its features hardly move and nearly all frames have one code. Here every convolution
is scaled to give outputs of deviation 1 on speech, norms and biases vary, and each of the eight dimensions that are
rounded spreads over all its levels.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from weights_ssl import speech, spread

_PUBLISHED = Path(__file__).parent / "published"
_MODELS = {"xcodec2": "Xcodec2Model", "neucodec": "NeuCodecModel"}
_SMALL = {
    "encoder_hidden_size": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "quantization_dim": 80,
}
_SMALL_SEMANTIC = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "output_hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_SPREAD = 1.4  # deviation of a dimension before it is bounded twice: all four levels are used


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights of `name` to `folder`; `changes` are made to its configuration, or to `preprocessor`'s."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    preprocessor = {**published["preprocessor"], **changes.pop("preprocessor", {})}
    fields = {**published["model"]}
    if small:
        fields |= {**_SMALL, "semantic_model_config": {**fields["semantic_model_config"], **_SMALL_SEMANTIC}}
    torch.manual_seed(seed)
    kind = getattr(transformers, _MODELS[name])
    model = kind(kind.config_class.from_dict(fields)).eval().requires_grad_(False)
    extractor = getattr(transformers, preprocessor.pop("feature_extractor_type"))(**preprocessor)
    taken = extractor(speech(4 if small else 6).numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        latents_TD = _spread_encoders(model, taken)
        _spread_quantizer(model.quantizer, latents_TD)
        _spread_decoder(model, latents_TD[:60])
    model.save_pretrained(folder)
    # save_pretrained would write the fields of today's class, not those of the published file
    config = {**fields, **changes, "architectures": [kind.__name__]}
    (folder / "config.json").write_text(json.dumps(config))
    extractor.save_pretrained(folder)
    return folder


def small(factory: pytest.TempPathFactory, name: str) -> Path:
    """Small weights, made once in a run of tests."""
    folder = factory.getbasetemp() / f"small-{name}"
    return folder if folder.exists() else make(name, folder, small=True)


def oracle(folder: Path, waveform_N: Tensor) -> Tensor:
    """Codes `[1, T]` by transformers' own feature extractor and model."""
    model, extractor = loaded(folder)
    taken = extractor(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        return model.encode(**taken).audio_codes[0].long()


def oracle_latents(folder: Path, waveform_N: Tensor) -> Tensor:
    """What is quantized, `[T, D]`, by transformers' own feature extractor and model."""
    seen: list[Tensor] = []
    handle = loaded(folder)[0].fc_encoder.register_forward_hook(lambda _, __, given_BTD: seen.append(given_BTD[0]))
    oracle(folder, waveform_N)
    handle.remove()
    (latents_TD,) = seen
    return latents_TD


def oracle_sound(folder: Path, codes_KT: Tensor) -> Tensor:
    """Samples by transformers' own decoder."""
    model, _ = loaded(folder)
    with torch.inference_mode():
        return model.decode(audio_codes=codes_KT[None]).audio_values[0, 0]


@lru_cache(maxsize=2)
def loaded(folder: Path) -> tuple[Any, Any]:
    """transformers' model and feature extractor."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, transformers.AutoFeatureExtractor.from_pretrained(folder)


def _spread_encoders(model: Any, taken: Any) -> Tensor:
    """Draw and scale both encoders; latents `[T, D]` of the speech before the quantizer."""
    for module in model.semantic_encoder.modules():
        spread(module)
        if isinstance(module, nn.Conv1d):
            fan_in = module.kernel_size[0] * module.in_channels // module.groups
            module.weight.normal_(std=fan_in**-0.5)
    semantic_BDT = model.semantic_encoder(taken["input_features"]).last_hidden_state.transpose(1, 2)
    semantic_BDT = _scaled(model.semantic_adapter, semantic_BDT)
    acoustic_BDT = _scaled(model.acoustic_encoder, taken["input_values"])
    num = min(semantic_BDT.shape[2], acoustic_BDT.shape[2])
    spread(model.fc_encoder)
    return model.fc_encoder(torch.cat([semantic_BDT[..., :num], acoustic_BDT[..., :num]], dim=1)[0].t())


def _spread_quantizer(quantizer: Any, latents_TD: Tensor) -> None:
    project = quantizer.project_in
    project.weight.normal_()
    projected_TE = latents_TD @ project.weight.t()
    factor_E = _SPREAD / projected_TE.std(dim=0)
    project.weight.mul_(factor_E[:, None])
    project.bias.copy_(-projected_TE.mean(dim=0) * factor_E)
    spread(quantizer.project_out)


def _spread_decoder(model: Any, latents_TD: Tensor) -> None:
    decoder = model.acoustic_decoder
    for module in decoder.modules():
        spread(module)
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.normal_(mean=1.0, std=0.2)
    quantized_TD, _ = model.quantizer(latents_TD)
    sound_N = _scaled(decoder, quantized_TD[None])[0, 0]
    magnitude = decoder.head.linear.bias[: decoder.head.n_fft // 2 + 1]
    magnitude += torch.log(0.1 / sound_N.std())


def _scaled(network: nn.Module, given: Tensor) -> Tensor:
    """Scale each convolution, when it is first used, to outputs of deviation 1; what the network then gives."""
    for module in network.modules():
        if hasattr(module, "alpha"):
            nn.init.uniform_(module.get_parameter("alpha"), -0.7, 0.7)
            nn.init.uniform_(module.get_parameter("beta"), -0.7, 0.7)

    def rescale(conv: Any, _: Any, out: Tensor) -> Tensor:
        factor = 1.0 / float(out.std())
        conv.weight.mul_(factor)
        if conv.bias is not None:
            conv.bias.mul_(factor)
        return out * factor

    hooks = [m.register_forward_hook(rescale) for m in network.modules() if isinstance(m, nn.Conv1d)]
    out = network(given)
    for hook in hooks:
        hook.remove()
    return out
