"""Published architectures with random weights in Hugging Face layout, by the registry's names."""

from pathlib import Path

import torch
import weights_causal
import weights_dac
import weights_ssl
from torch import Tensor
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.fit import FitPlan, fit
from wavemill.tokenizers.registry import REGISTRY, describe, load_features, load_tokenizer
from wavemill.tokenizers.tokenizer import Mode, Tokenizer, TokenizerConfig

FAMILIES = {"encodec": weights_causal, "mimi": weights_causal, "dac": weights_dac}
PUBLISHED = [name for name, entry in REGISTRY.items() if entry.weights]


def make_weights(name: str, folder: Path, *, small: bool, seed: int = 0) -> Path:
    """A folder of random weights for tokenizer `name`: of published shape, or small."""
    return _family(name).make(name, folder, small=small, seed=seed)


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
    return _family(name).oracle(folder, waveform_N)


def _centroids(features_TD: Tensor, small: bool) -> Tensor:
    """`[1, C, D]`: 32 of the features themselves, or 500 by k-means."""
    if small:
        chosen = torch.randperm(features_TD.shape[0], generator=torch.Generator().manual_seed(0))[:32]
        return features_TD[chosen][None].clone()
    return fit(features_TD.numpy(), FitPlan(size=500)).centroids_KCE


def _family(name: str):
    return FAMILIES.get(name.partition("-")[0], weights_ssl)
