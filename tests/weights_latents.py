"""Random weights of codecs whose latents are their tokens, Pocket TTS's and VibeVoice's, and what transformers gives.

Fresh weights say little: blocks that are added with weights of a millionth, latents that hardly move. Here what blocks
add counts, and every convolution is scaled to give outputs of deviation 1 on speech.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from weights_causal import speech

_PUBLISHED = Path(__file__).parent / "published"
_MODELS = {
    "pocket_tts_audio_tokenizer": "PocketTTSAudioTokenizerModel",
    "vibevoice_acoustic_tokenizer": "VibeVoiceAcousticTokenizerModel",
}
_SMALL = {
    "pocket-tts-latents": {
        "num_filters": 4,
        "hidden_size": 32,
        "latent_dim": 8,
        "upsample_groups": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "vibevoice-latents": {"num_filters": 2, "hidden_size": 8, "depths": [1, 1, 1, 1, 1, 1, 2]},
}


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights of `name` to `folder`; `changes` are made to its configuration, or to `preprocessor`'s."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    preprocessor = {**published["preprocessor"], **changes.pop("preprocessor", {})}
    fields = {**published["model"], **(_SMALL[name] if small else {}), **changes}
    torch.manual_seed(seed)
    kind = getattr(transformers, _MODELS[fields["model_type"]])
    model = kind(kind.config_class.from_dict(fields)).eval().requires_grad_(False)
    for module in model.modules():
        _enliven(module)
    hooks = [module.register_forward_hook(_rescale) for module in model.modules() if isinstance(module, _CONVOLUTIONS)]
    with torch.inference_mode():
        latents_1TD = _latents(model, speech(4)[None, None])
        _sound(model, latents_1TD)
    for hook in hooks:
        hook.remove()
    model.save_pretrained(folder)
    # save_pretrained would write the fields of today's class, not those of the published file
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": [kind.__name__]}))
    extractor = getattr(transformers, preprocessor.pop("feature_extractor_type"))
    extractor(**preprocessor).save_pretrained(folder)
    return folder


def oracle(folder: Path, waveform_N: Tensor) -> Tensor:
    """Latents `[T, D]` by transformers' own feature extractor and model."""
    model, extractor = _loaded(folder)
    taken = extractor(waveform_N.numpy(), sampling_rate=24_000, return_tensors="pt")
    with torch.inference_mode():
        return _latents(model, taken["input_values"])[0]


def oracle_sound(folder: Path, latents_TD: Tensor) -> Tensor:
    """Samples by transformers' own decoder."""
    with torch.inference_mode():
        return _sound(_loaded(folder)[0], latents_TD[None])[0, 0]


def _latents(model: Any, waveforms_B1N: Tensor) -> Tensor:
    means = {"sample": False} if model.config.model_type == "vibevoice_acoustic_tokenizer" else {}
    return model.encode(waveforms_B1N, **means).latents


def _sound(model: Any, latents_BTD: Tensor) -> Tensor:
    out = model.decode(latents_BTD)
    return out.audio if "audio" in out else out.audio_values


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> tuple[Any, Any]:
    kind = getattr(transformers, _MODELS[json.loads((folder / "config.json").read_text())["model_type"]])
    model = kind.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, transformers.AutoFeatureExtractor.from_pretrained(folder)


_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)


def _rescale(conv: Any, _: Any, out: Tensor) -> Tensor:
    """Scale a convolution, when it is first used, to give outputs of deviation 1."""
    factor = 1.0 / float(out.std())
    conv.weight.mul_(factor)
    if conv.bias is not None:
        conv.bias.mul_(factor)
    return out * factor


def _enliven(module: Any) -> None:
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    elif kind.endswith(("RMSNorm", "LayerNorm")):
        nn.init.normal_(module.weight, mean=1.0, std=0.2)
    elif kind.endswith("LayerScale"):
        nn.init.uniform_(module.scale, 0.2, 0.6)
    elif kind.endswith("ConvNext1dLayer"):
        nn.init.uniform_(module.gamma, 0.2, 0.6)
        nn.init.uniform_(module.ffn_gamma, 0.2, 0.6)
