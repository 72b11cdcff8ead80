"""Random weights of HuBERT, WavLM, wav2vec 2.0 and data2vec as the published ones lie in folders, and their features.

Fresh weights hide mistakes: norms that change nothing, biases of zero, frames that are all alike. Here all of them
vary, and the rows of wav2vec 2.0's quantizer are frames of the model's own, so that its codes are used.
"""

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import soundfile
import torch
import torchaudio
import transformers
from torch import Tensor, nn
from wavemill.tokenizers.registry import REGISTRY

_PUBLISHED = Path(__file__).parent / "published"
_SPEECH = Path(__file__).parents[1] / "jobs" / "samples" / "speech"
_MODELS = {
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "wav2vec2": "Wav2Vec2Model",
    "data2vec-audio": "Data2VecAudioModel",
}
SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embedding_groups": 4,
}
_CODES = {"codevector_dim": 8, "proj_codevector_dim": 8}


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights of `name` to `folder`; `changes` are made to its configuration, or to `preprocessor`'s."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    preprocessor = changes.pop("preprocessor", {})
    fields = {**published["model"]}
    if small:
        fields |= {**SMALL, "num_hidden_layers": (REGISTRY[name].layer or 0) + 1}
        fields |= _CODES if fields["model_type"] == "wav2vec2" else {}
    fields |= changes
    torch.manual_seed(seed)
    kind = getattr(
        transformers, "Wav2Vec2ForPreTraining" if name == "wav2vec2-codes" else _MODELS[fields["model_type"]]
    )
    model = kind(kind.config_class.from_dict(fields)).eval().requires_grad_(False)
    for module in model.modules():
        spread(module)
    extractor = transformers.Wav2Vec2FeatureExtractor(**published["preprocessor"])
    values = extractor(speech(20).numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    base = model.wav2vec2 if name == "wav2vec2-codes" else model
    spread_input(base, values)
    for layer in base.encoder.layers:  # deep models that norm last would forget their input
        layer.attention.out_proj.weight.mul_(0.5)
        layer.feed_forward.output_dense.weight.mul_(0.5)
    if name == "wav2vec2-codes":
        _fit_quantizer(model, values)
    model.save_pretrained(folder)
    # save_pretrained would write the fields of today's class, not those of the published file
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": [kind.__name__], "for": name}))
    transformers.Wav2Vec2FeatureExtractor(**published["preprocessor"] | preprocessor).save_pretrained(folder)
    return folder


def oracle(folder: Path, waveform_N: Tensor, *, layer: int | None = None) -> Tensor:
    """Features `[T, D]` of a layer (else the tokenizer's default), or codes `[K, T]`, by transformers alone."""
    model, extractor, name = _loaded(folder)
    values = extractor(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.inference_mode():
        if name == "wav2vec2-codes":
            return _codes(model, values)
        hidden_states = model(values, output_hidden_states=True).hidden_states
    return hidden_states[REGISTRY[name].layer if layer is None else layer][0]


@cache
def speech(seconds: int) -> Tensor:
    """So much of the shipped speech at 16 kHz."""
    parts, length = [], 0
    for path in sorted(path for path in _SPEECH.iterdir() if path.suffix in {".flac", ".wav", ".ogg", ".mp3"}):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        parts.append(torchaudio.functional.resample(torch.from_numpy(samples[:, 0].copy()), rate, 16_000))
        length += parts[-1].shape[0]
        if length >= seconds * 16_000:
            break
    return torch.cat(parts)[: seconds * 16_000].clone()


def _codes(model: Any, values: Tensor) -> Tensor:
    """transformers' quantizer gives the vectors it chose, not their numbers: these are put in the vectors' place."""
    features = model.wav2vec2(values).extract_features
    quantizer = model.quantizer
    kept, numbers = quantizer.codevectors.data, torch.arange(quantizer.num_vars, dtype=torch.float32)
    quantizer.codevectors.data = numbers.repeat(quantizer.num_groups)[None, :, None]
    chosen, _ = quantizer(features)
    quantizer.codevectors.data = kept
    return chosen[0].t().long()


def spread(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.normal_(std=0.8 * module.in_features**-0.5)
    if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
        module.weight.normal_(mean=1.0, std=0.2)
    if isinstance(module, nn.Embedding):
        module.weight.normal_(std=1.0)
    if getattr(module, "bias", None) is not None:
        module.bias.normal_(std=0.1)
    if hasattr(module, "gru_rel_pos_const"):
        module.gru_rel_pos_const.normal_(mean=1.0, std=0.3)


def spread_input(model: Any, values: Tensor) -> None:
    """Give the transformer frames of mean zero and deviation 1: convolutions leave a large part that all share."""
    projection = model.feature_projection.projection
    frames_TC = model.feature_projection.layer_norm(model.feature_extractor(values)[0].t())
    projected_TD = frames_TC @ projection.weight.t()
    deviation_D = projected_TD.std(dim=0)
    projection.weight.div_(deviation_D[:, None])
    projection.bias.copy_(-projected_TD.mean(dim=0) / deviation_D)


def _fit_quantizer(model: Any, values: Tensor) -> None:
    """Scores x.c - |c|^2 / 2 of frames c: the nearest one wins."""
    frames_TC = model.wav2vec2(values).extract_features[0]
    projection = model.quantizer.weight_proj
    chosen = torch.randperm(frames_TC.shape[0])[: projection.out_features]
    projection.weight.copy_(frames_TC[chosen])
    projection.bias.copy_(-0.5 * frames_TC[chosen].square().sum(dim=1))


@lru_cache(maxsize=2)  # the largest published models take 4 GB each
def _loaded(folder: Path) -> tuple[Any, Any, str]:
    fields = json.loads((folder / "config.json").read_text())
    name = fields["for"]
    kind = "Wav2Vec2ForPreTraining" if name == "wav2vec2-codes" else _MODELS[fields["model_type"]]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder), name
