"""Random weights of Whisper in the layout of the published ones, and its encoder's features by transformers.

Fresh weights hide mistakes: see weights_ssl.py. Positions are sinusoids as published. The decoder, which features do
not come from, has one layer, so that large models fit the memory.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from weights_ssl import speech, spread

_PUBLISHED = Path(__file__).parent / "published"
_SMALL = {
    "d_model": 32,
    "encoder_layers": 2,
    "num_hidden_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "vocab_size": 8,
    "max_target_positions": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights of `name` to `folder`; `changes` are made to its configuration, or to `preprocessor`'s."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    preprocessor = changes.pop("preprocessor", {})
    fields = {**published["model"], "decoder_layers": 1, **(_SMALL if small else {}), **changes}
    torch.manual_seed(seed)
    config = transformers.WhisperConfig.from_dict(fields)
    model = transformers.WhisperForConditionalGeneration(config).eval().requires_grad_(False)
    encoder = model.model.encoder
    places = encoder.embed_positions.weight.clone()
    for module in encoder.modules():
        spread(module)
    encoder.embed_positions.weight.copy_(places)
    extractor = transformers.WhisperFeatureExtractor(**published["preprocessor"] | preprocessor)
    _spread_input(encoder, extractor(speech(30).numpy(), sampling_rate=16_000, return_tensors="pt").input_features)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": ["WhisperForConditionalGeneration"]}))
    extractor.save_pretrained(folder)
    return folder


def oracle(folder: Path, waveform_N: Tensor, *, layer: int = -1) -> Tensor:
    """Features `[T, D]` of a layer, else the last, by transformers alone; of the 30 s, a segment's own."""
    encoder, extractor = _loaded(folder)
    inputs = extractor(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        hidden_states = encoder(inputs.input_features, output_hidden_states=True).hidden_states
    return hidden_states[layer][0, : -(-waveform_N.shape[0] // 320)]


def _spread_input(encoder: Any, mel_1MF: Tensor) -> None:
    """Let both convolutions give what varies around zero from frame to frame."""
    hidden_1DF = mel_1MF
    for conv in (encoder.conv1, encoder.conv2):
        convolved_1DF = F.conv1d(hidden_1DF, conv.weight, stride=conv.stride, padding=conv.padding)
        deviation_D = convolved_1DF[0].std(dim=1)
        conv.weight.div_(deviation_D[:, None, None])
        conv.bias.copy_(-convolved_1DF[0].mean(dim=1) / deviation_D)
        hidden_1DF = F.gelu(conv(hidden_1DF))


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> tuple[nn.Module, Any]:
    model = transformers.WhisperModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model.encoder, transformers.WhisperFeatureExtractor.from_pretrained(folder)
