"""The published implementation: transformers' own feature extractor and whole model, one segment at a time, float32.

What a tokenizer's codes are held to. Nothing here is wavemill's, but for loading.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .hub import Weights, load_published
from .registry import require_tokenizer
from .spec import num_frames
from .tokenizer import Description

MODELS = {
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "wav2vec2": "Wav2Vec2Model",
    "data2vec-audio": "Data2VecAudioModel",
    "wav2vec2-bert": "Wav2Vec2BertModel",
    "whisper": "WhisperModel",
    "encodec": "EncodecModel",
    "dac": "DacModel",
    "mimi": "MimiModel",
    "xcodec": "XcodecModel",
    "higgs_audio_v2_tokenizer": "HiggsAudioV2TokenizerModel",
    "xcodec2": "Xcodec2Model",
    "neucodec": "NeuCodecModel",
    "pocket_tts_audio_tokenizer": "PocketTTSAudioTokenizerModel",
    "vibevoice_acoustic_tokenizer": "VibeVoiceAcousticTokenizerModel",
}


def published_encoder(description: Description) -> Callable[[Tensor], Tensor] | None:
    """From a waveform to codes `[K, T]`, or to features `[T, D]` where a codebook is needed.

    None for what transformers has no model and extractor of: baselines, bundles of torchaudio, folders without a
    preprocessor_config.json, and wav2vec 2.0's own codes, whose numbers its quantizer does not give.
    """
    if not description.spec.has_clock:
        return None
    weights = getattr(description.weights, "weights", description.weights)
    if not isinstance(weights, Weights) or not weights.preprocessor or description.spec.tokenizer == "wav2vec2-codes":
        return None
    architecture = str(weights.config["model_type"])
    speaker = description.spec.tokenizer == "wavlm-sv"
    model, extractor = load_published("WavLMForXVector" if speaker else MODELS[architecture], weights)

    def prepare(waveform_N: Tensor) -> Any:
        return extractor(waveform_N.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")

    if "layer" in description.fingerprint:
        layer = int(description.fingerprint["layer"])
        encoder = model.encoder if architecture == "whisper" else model

        def features(waveform_N: Tensor) -> Tensor:
            states = encoder(**prepare(waveform_N), output_hidden_states=True).hidden_states
            return _own_frames(description, states[layer][0], waveform_N.shape[0])

        return features
    if speaker:
        return lambda waveform_N: model(**prepare(waveform_N)).embeddings
    if description.dim is not None:
        return lambda waveform_N: _latents(architecture, model, prepare(waveform_N))
    books = description.spec.num_codebooks
    if architecture != "encodec":
        return lambda waveform_N: _encode(architecture, model, prepare(waveform_N)).audio_codes[0, :books]
    highest = weights.config["target_bandwidths"][-1]
    if description.spec.chunk_length:

        def codes(waveform: Tensor) -> Tensor:
            # not through the extractor, which fills the last chunk up with zeros, as the authors' package does not
            found = model.encode(waveform.expand(2, -1)[None], bandwidth=highest)
            joined_KT = found.audio_codes[:, 0].transpose(0, 1).flatten(1)
            return joined_KT[:books, : joined_KT.shape[1] - found.last_frame_pad_length]

        return codes
    return lambda waveform_N: model.encode(**prepare(waveform_N), bandwidth=highest).audio_codes[0, 0, :books]


def _encode(architecture: str, model: Any, prepared: Any) -> Any:
    """What transformers' codec gives, as its documentation calls it."""
    if architecture in ("dac", "xcodec", "higgs_audio_v2_tokenizer"):
        return model.encode(prepared["input_values"])
    return model.encode(**prepared)


# what a codec joins two encoders with, where that is what it quantizes
_SEAMS = {"xcodec": "fc", "higgs_audio_v2_tokenizer": "fc", "xcodec2": "fc_encoder", "neucodec": "fc_encoder"}


def _latents(architecture: str, model: Any, prepared: Any) -> Tensor:
    """What a codec has before its quantizer, or in its place, `[T, D]`."""
    waveforms_B1N = prepared["input_values"]
    if architecture in _SEAMS:
        return _seen(getattr(model, _SEAMS[architecture]), lambda: _encode(architecture, model, prepared))
    if architecture == "pocket_tts_audio_tokenizer":
        return model.encode(waveforms_B1N).latents[0]
    if architecture == "vibevoice_acoustic_tokenizer":
        return model.encode(waveforms_B1N, sample=False).latents[0]
    found = model.encoder(waveforms_B1N)
    return (found.latents if architecture == "mimi" else found)[0].t()


def _seen(module: Any, run: Callable[[], Any]) -> Tensor:
    """What a module gives `[T, D]` for the one segment that `run` runs through it."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, given_BTD: seen.append(given_BTD[0]))
    try:
        run()
    finally:
        handle.remove()
    (given_TD,) = seen
    return given_TD


def _own_frames(description: Description, hidden_SD: Tensor, num_samples: int) -> Tensor:
    """Features `[T, D]`: without the frames that the extractor fills up, and stacked where the tokenizer stacks."""
    num = num_frames(num_samples, require_tokenizer(description.config.tokenizer).spec)
    stacked = (description.dim or 0) // hidden_SD.shape[1]
    return hidden_SD[: num * stacked].reshape(num, stacked * hidden_SD.shape[1])
