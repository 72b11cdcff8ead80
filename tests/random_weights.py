"""Published architectures with random weights in Hugging Face layout, by the registry's names."""

from pathlib import Path

import torch
import weights_causal
import weights_dac
import weights_encodec48
import weights_latents
import weights_lyra
import weights_snac
import weights_speech_tokenizer
import weights_ssl
import weights_w2v_bert
import weights_whisper
import weights_xcodec
import weights_xcodec2
import weights_xvector
from torch import Tensor
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.fit import FitPlan, fit
from wavemill.tokenizers.latents import SUFFIX
from wavemill.tokenizers.registry import REGISTRY, describe, load_features, load_tokenizer
from wavemill.tokenizers.tokenizer import Mode, Output, Tokenizer, TokenizerConfig

FAMILIES = {
    "encodec": weights_causal,
    "encodec-48khz": weights_encodec48,
    "mimi": weights_causal,
    "dac": weights_dac,
    "xcodec": weights_xcodec,
    "higgs": weights_xcodec,
    "w2v": weights_w2v_bert,
    "whisper": weights_whisper,
    "speechtokenizer": weights_speech_tokenizer,
    "snac": weights_snac,
    "lyra": weights_lyra,
    "xcodec2": weights_xcodec2,
    "neucodec": weights_xcodec2,
    "pocket": weights_latents,
    "vibevoice": weights_latents,
    "wavlm-sv": weights_xvector,
}
# what is said, and what texts become, has no clock that a contract could hold
PUBLISHED = [
    name for name, entry in REGISTRY.items() if entry.weights and entry.takes == "audio" and entry.spec.has_clock
]
# tests/contract/test_continuous_contract.py has those that are never codes
CODED = [name for name in PUBLISHED if REGISTRY[name].output is not Output.EMBEDDING and not REGISTRY[name].spec.dim]


def make_weights(name: str, folder: Path, *, small: bool, seed: int = 0) -> Path:
    """A folder of random weights for tokenizer `name`: of published shape, or small."""
    return _family(name).make(published_name(name), folder, small=small, seed=seed)


def open_published(
    name: str, folder: Path, *, small: bool, mode: Mode = Mode.EXACT, layer: int | None = None, speech_N: Tensor
) -> Tokenizer:
    """Tokenizer `name` with the weights in `folder`, and a codebook, if it needs one, of its features of `speech_N`."""
    config = TokenizerConfig(tokenizer=name, weights=str(folder), mode=mode, layer=layer)
    if not REGISTRY[name].needs_codebook:
        return load_tokenizer(config)
    exact = TokenizerConfig(tokenizer=name, weights=str(folder), layer=layer)
    with torch.inference_mode():
        features_TD = load_features(exact).extract(speech_N)
    header = {"tokenizer": name, **describe(exact).fingerprint}
    return load_tokenizer(config, Codebook(_centroids(features_TD, small), header), codebook_name="drawn")


def oracle(name: str, folder: Path, waveform_N: Tensor) -> Tensor:
    """What the published implementation gives for one segment: codes, or features where a codebook is needed."""
    family = _family(name)
    return (family.oracle if published_name(name) == name else family.oracle_latents)(folder, waveform_N)


def published_name(name: str) -> str:
    """Whose published weights and configuration tokenizer `name` has: a codec's latents have the codec's."""
    codec = name.removesuffix(SUFFIX)
    return codec if codec in REGISTRY else name


def _centroids(features_TD: Tensor, small: bool) -> Tensor:
    """`[1, C, D]`: 32 of the features themselves, or up to 500 by k-means."""
    if small:
        chosen = torch.randperm(features_TD.shape[0], generator=torch.Generator().manual_seed(0))[:32]
        return features_TD[chosen][None].clone()
    return fit(features_TD.numpy(), FitPlan(size=min(500, features_TD.shape[0] // 2))).centroids_KCE


def _family(name: str):
    return FAMILIES.get(published_name(name)) or FAMILIES.get(name.partition("-")[0], weights_ssl)
