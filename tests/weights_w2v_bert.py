"""Random weights of w2v-BERT 2.0 in the layout of the published ones, and features by transformers.

Fresh weights hide mistakes: see weights_ssl.py. Distances have embeddings that matter, convolutions pass what they get.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from wavemill.tokenizers.registry import REGISTRY
from wavemill.tokenizers.spec import num_frames
from weights_ssl import speech, spread

_PUBLISHED = Path(__file__).parent / "published"
_SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights of `name` to `folder`; `changes` are made to its configuration, or to `preprocessor`'s."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    preprocessor = changes.pop("preprocessor", {})
    fields = {**published["model"]}
    if small:
        fields |= {**_SMALL, "num_hidden_layers": (REGISTRY[name].layer or 0) + 1}
    fields |= changes
    torch.manual_seed(seed)
    model = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig.from_dict(fields)).eval()
    model.requires_grad_(False)
    for module in model.modules():
        spread(module)
        if isinstance(module, nn.Conv1d):
            module.weight.normal_(std=(module.in_channels // module.groups * module.kernel_size[0]) ** -0.5)
    _spread_input(model.feature_projection, published["preprocessor"])
    for layer in model.encoder.layers:  # conformers norm last: deep ones would forget their input
        for network in (layer.ffn1.output_dense, layer.ffn2.output_dense, layer.self_attn.linear_out):
            network.weight.mul_(0.5)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": ["Wav2Vec2BertModel"], "for": name}))
    transformers.SeamlessM4TFeatureExtractor(**published["preprocessor"] | preprocessor).save_pretrained(folder)
    return folder


def oracle(folder: Path, waveform_N: Tensor, *, layer: int | None = None) -> Tensor:
    """Features `[T, D]` of a layer (else the tokenizer's default), by transformers alone; frames that are masked go."""
    model, extractor, name = _loaded(folder)
    inputs = extractor(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        hidden_states = model(**inputs, output_hidden_states=True).hidden_states
    hidden_TD = hidden_states[REGISTRY[name].layer if layer is None else layer][0]
    own_TD = hidden_TD[inputs.attention_mask[0].bool()]
    num = num_frames(waveform_N.shape[0], REGISTRY[name].spec)
    stacked = 2 if name.endswith("25hz") else 1
    return own_TD[: num * stacked].reshape(num, -1)


def _spread_input(module: Any, preprocessor: dict[str, Any]) -> None:
    """Give the first conformer frames of mean zero and deviation 1."""
    extractor = transformers.SeamlessM4TFeatureExtractor(**preprocessor)
    frames = extractor(speech(8).numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    projected_TD = module.layer_norm(frames[0, :-1]) @ module.projection.weight.t()
    deviation_D = projected_TD.std(dim=0)
    module.projection.weight.div_(deviation_D[:, None])
    module.projection.bias.copy_(-projected_TD.mean(dim=0) / deviation_D)


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> tuple[Any, Any, str]:
    name = json.loads((folder / "config.json").read_text())["for"]
    model = transformers.Wav2Vec2BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.SeamlessM4TFeatureExtractor.from_pretrained(folder), name
