"""The published implementation: transformers' own feature extractor and whole model, one segment at a time, float32.

What a tokenizer's codes are held to. Nothing here is wavemill's, but for loading.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .hub import Weights, load_published
from .tokenizer import Description

MODELS = {
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "wav2vec2": "Wav2Vec2Model",
    "encodec": "EncodecModel",
    "dac": "DacModel",
    "mimi": "MimiModel",
}


def published_encoder(description: Description) -> Callable[[Tensor], Tensor] | None:
    """From a waveform to codes `[K, T]`, or to the layer's features `[T, D]` where a codebook is needed.

    None for what transformers has no model and extractor of: baselines, bundles of torchaudio, folders without a
    preprocessor_config.json, and wav2vec 2.0's own codes, whose numbers its quantizer does not give.
    """
    weights = getattr(description.weights, "weights", description.weights)
    if not isinstance(weights, Weights) or not weights.preprocessor or description.spec.tokenizer == "wav2vec2-codes":
        return None
    architecture = str(weights.config["model_type"])
    model, extractor = load_published(MODELS[architecture], weights)

    def prepare(waveform_N: Tensor) -> Any:
        return extractor(waveform_N.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")

    if "layer" in description.fingerprint:
        layer = int(description.fingerprint["layer"])
        return lambda waveform_N: model(**prepare(waveform_N), output_hidden_states=True).hidden_states[layer][0]
    books = description.spec.num_codebooks
    if architecture == "dac":
        return lambda waveform_N: model.encode(prepare(waveform_N)["input_values"]).audio_codes[0, :books]
    if architecture == "mimi":
        return lambda waveform_N: model.encode(**prepare(waveform_N)).audio_codes[0, :books]
    highest = weights.config["target_bandwidths"][-1]
    return lambda waveform_N: model.encode(**prepare(waveform_N), bandwidth=highest).audio_codes[0, 0, :books]
