"""Random weights of WavLM's speaker model and of CTC models in the layout of the published ones, and transformers' own.

As in weights_ssl.py, norms and biases vary, and the transformer is given frames that differ.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
import weights_ssl
from torch import Tensor

_PUBLISHED = Path(__file__).parent / "published"
_SMALL = {"num_hidden_layers": 2, "tdnn_dim": [24, 24, 24, 24, 40], "xvector_output_dim": 16}
_LABELS = 12  # of small CTC models; label 0 is the blank


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights of the speaker model to `folder`; `changes` are made to its configuration."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    fields = {**published["model"], **({**weights_ssl.SMALL, **_SMALL} if small else {}), **changes}
    _write("WavLMForXVector", fields, published["preprocessor"], folder, seed)
    return folder


def make_ctc(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a small CTC model of the architecture of `name`, whose blank wins about every third frame."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    kind = {"hubert": "HubertForCTC", "wavlm": "WavLMForCTC", "wav2vec2": "Wav2Vec2ForCTC"}
    fields = {
        **published["model"],
        **weights_ssl.SMALL,
        "num_hidden_layers": 2,
        "vocab_size": _LABELS,
        "pad_token_id": 0,
        **changes,
    }
    _write(kind[fields["model_type"]], fields, published["preprocessor"], folder, seed)
    return folder


def oracle(folder: Path, waveform_N: Tensor) -> Tensor:
    """The embedding `[1, E]`, none of a segment that is too short; of a CTC model its labels `[T]`."""
    model, extractor = _loaded(folder)
    taken = extractor(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        out = model(**taken)
    return out.logits[0].argmax(dim=1) if "embeddings" not in out else out.embeddings


def _write(kind: str, fields: dict[str, Any], preprocessor: dict[str, Any], folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    kind_of = getattr(transformers, kind)
    model = kind_of(kind_of.config_class.from_dict(fields)).eval().requires_grad_(False)
    for module in model.modules():
        weights_ssl.spread(module)
    extractor = transformers.Wav2Vec2FeatureExtractor(**preprocessor)
    values = extractor(weights_ssl.speech(20).numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    weights_ssl.spread_input(model.base_model, values)
    if fields.get("use_weighted_layer_sum"):
        model.layer_weights.normal_()
    if kind == "WavLMForXVector":  # half of what rectifiers are given is lost
        for layer in model.tdnn:
            layer.kernel.weight.mul_(2.0)
    if kind.endswith("ForCTC"):
        _let_labels_change(model, values)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": [kind]}))
    extractor.save_pretrained(folder)


def _let_labels_change(model: Any, values: Tensor) -> None:
    """Scores of each label of mean 0 and deviation 1 over frames, and the blank ahead of the others."""
    scores_TV = model(values).logits[0]
    deviation_V = scores_TV.std(dim=0)
    model.lm_head.weight.div_(deviation_V[:, None])
    model.lm_head.bias.copy_((model.lm_head.bias - scores_TV.mean(dim=0)) / deviation_V)
    model.lm_head.bias[0] += 1.0


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> tuple[Any, Any]:
    [kind] = json.loads((folder / "config.json").read_text())["architectures"]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
