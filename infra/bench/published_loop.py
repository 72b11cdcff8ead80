"""The published way to codes, as model cards and scripts have it: transformers, nothing of wavemill's but names."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from wavemill.tokenizers.published import MODELS
from wavemill.tokenizers.registry import REGISTRY

Loop = Callable[[Tensor], Tensor]


def published_loop(name: str, folder: Path, *, ours_centroids: int) -> Loop:
    """Codes of one segment at a time."""
    batch = published_batch(name, folder, num_centroids=ours_centroids)
    return lambda waveform_N: batch([waveform_N])


def published_batch(
    name: str, folder: Path, *, num_centroids: int, centroids_CD: Tensor | None = None
) -> Callable[[list[Tensor]], Tensor]:
    """Codes `[B, ..., T]` of a batch padded as the feature extractor pads, masks given where the model takes any."""
    kind = name.partition("-")[0]
    model = getattr(transformers, MODELS[kind]).from_pretrained(folder).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    rate = extractor.sampling_rate

    def prepare(waveforms: list[Tensor], **options: object):
        raw = [waveform_N.numpy() for waveform_N in waveforms]
        return extractor(raw if len(raw) > 1 else raw[0], sampling_rate=rate, return_tensors="pt", **options)

    if kind in ("hubert", "wavlm", "wav2vec2"):
        layer = REGISTRY[name].layer
        if centroids_CD is None:
            centroids_CD = torch.randn(num_centroids, model.config.hidden_size)

        def semantic(waveforms: list[Tensor]) -> Tensor:
            inputs = prepare(waveforms, padding=len(waveforms) > 1, return_attention_mask=len(waveforms) > 1)
            states_BTD = model(**inputs, output_hidden_states=True).hidden_states[layer]
            return torch.cdist(states_BTD, centroids_CD[None]).argmin(dim=-1)

        return semantic
    if kind == "encodec":
        return lambda waveforms: model.encode(**prepare(waveforms), bandwidth=6.0).audio_codes[0]
    if kind == "mimi":
        return lambda waveforms: model.encode(**prepare(waveforms), num_quantizers=8).audio_codes
    return lambda waveforms: model.encode(prepare(waveforms)["input_values"]).audio_codes
