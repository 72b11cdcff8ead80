"""Features of self-supervised speech models, to fit k-means on: HuBERT, WavLM, wav2vec 2.0, data2vec at any layer.

Layer L is transformers' `hidden_states[L]`: 0 is what the transformer is given, after the positional convolution (and
the layer norm, in models that norm last); L >= 1 is what its L-th layer gives. In models that norm first (most large
ones) the encoder's final norm is part of no layer: `hidden_states[-1]` of transformers 5 and torchaudio's
`extract_features` do not have it either, while transformers' `last_hidden_state` and fairseq's last layer do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ssl_windows as windows
from .bundles import PREFIX, BundleWeights, find_bundle, load_bundle
from .hub import Weights, find_weights, fingerprint_of, load_model, remove_weight_norm
from .spec import FrameRule, StreamSpec, UserError
from .ssl_model import SslModel
from .ssl_windows import Normalization
from .tokenizer import Description, Mode, TokenizerConfig, TokenizerEntry

SAMPLE_RATE = 16_000
_MODELS = {
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "wav2vec2": "Wav2Vec2Model",
    "data2vec-audio": "Data2VecAudioModel",
}


@dataclass(frozen=True, slots=True)
class Found:
    """Weights of a family, what is done to the waveform, and of features the layer."""

    architecture: str
    weights: Weights | BundleWeights
    normalization: Normalization | None
    layer: int = 0


class SslFeatures:
    """Features `[T, D]` of one layer, every 20 ms at 16 kHz; T is 1 + (n - 400) // 320, 0 below 400 samples."""

    def __init__(self, description: Description, *, device: str = "cpu") -> None:
        found: Found = description.weights
        self.spec = description.spec
        self.dim = description.dim or 0
        self.fingerprint = description.fingerprint
        self.precision = description.config.mode.precision
        self._device = device
        self._normalization = found.normalization
        dtype = torch.bfloat16 if description.config.mode is Mode.FAST else torch.float32
        self._model = SslModel(_load(found), device=device, dtype=dtype)

    def extract(self, waveform_N: Tensor) -> Tensor:
        pieces = list(self.pieces(waveform_N))
        return torch.cat(pieces) if pieces else torch.empty(0, self.dim, device=self._device)

    def pieces(self, waveform_N: Tensor) -> Iterator[Tensor]:
        """One piece for each window of ssl_windows.py."""
        return windows.run_windows(
            waveform_N, self._model, self._model, normalization=self._normalization, device=self._device
        )

    def layer_pieces(self, waveform_N: Tensor, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """As `pieces` gives them at each of several layers, none above the one that this was opened for."""
        run = partial(self._model.at, layers=layers)
        pieces = windows.run_windows(
            waveform_N, self._model, run, normalization=self._normalization, device=self._device
        )
        for piece_TD in pieces:
            yield dict(zip(layers, piece_TD.split(self.dim, dim=1), strict=True))

    def extract_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        """As `extract` gives them; those longer than 30 s are run by themselves."""
        batch = windows.run_batch(
            waveforms, padded_length, self._model, normalization=self._normalization, device=self._device
        )
        return [self.extract(waveforms[i]) if done is None else done for i, done in enumerate(batch)]


def find(config: TokenizerConfig, *, default: str, architecture: str) -> Found:
    """The weights that `config` names, a folder, a hub id or a bundle of torchaudio.

    Raises `UserError` for weights that cannot be had and for clocks other than 320 samples at 16 kHz.
    """
    source = config.weights or default
    kind: dict[str, Any] = {
        "tokenizer": config.tokenizer,
        "architecture": architecture,
        "revision": config.revision,
        "local_files_only": config.local_files_only,
    }
    if source.startswith(PREFIX):
        bundle = find_bundle(source, **kind)
        return Found(architecture, bundle, Normalization(1e-5) if bundle.do_normalize else None)
    weights = find_weights(source, **kind)
    rate = weights.preprocessor.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise UserError(
            f"{source} takes audio at {rate} Hz (its preprocessor_config.json says so); {config.tokenizer} is at "
            f"{SAMPLE_RATE} Hz. Name other weights."
        )
    hop, window = windows.clock(weights.config)
    if (hop, window) != (windows.HOP, windows.WINDOW):
        raise UserError(
            f"{source} has frames of {window} samples every {hop} (its config.json says so); {config.tokenizer} has "
            f"{windows.WINDOW} every {windows.HOP}. Name other weights."
        )
    do_normalize = weights.preprocessor.get("do_normalize", True)
    return Found(architecture, weights, Normalization(1e-7) if do_normalize else None)


def fingerprint(found: Found) -> dict[str, str]:
    """Weights and what is done to the waveform before them."""
    normalize = "no" if found.normalization is None else f"{found.normalization.epsilon:g}"
    if isinstance(found.weights, BundleWeights):
        return {"weights": found.weights.sha256, "revision": found.weights.name, "normalize": normalize}
    return {**fingerprint_of(found.weights), "normalize": normalize}


def _load(found: Found) -> Any:
    model = _MODELS[found.architecture]
    if isinstance(found.weights, BundleWeights):
        return remove_weight_norm(load_bundle(model, found.weights, num_hidden_layers=found.layer))
    loaded = load_model(model, found.weights, may_lack=("masked_spec_embed",), num_hidden_layers=found.layer)
    return remove_weight_norm(loaded)


def _describe(config: TokenizerConfig, *, published: "_Published") -> Description:
    found = find(config, default=published.weights, architecture=published.architecture)
    num_layers = found.weights.config["num_hidden_layers"]
    layer = published.layer if config.layer is None else config.layer
    if not 0 <= layer <= num_layers:
        raise UserError(f"{config.tokenizer} has layers 0 to {num_layers}; layer {layer} was asked for.")
    return Description(
        config,
        _spec(published.name),
        {"features": f"{published.name}/1", **fingerprint(found), "layer": str(layer)},
        dim=found.weights.config["hidden_size"],
        weights=Found(found.architecture, found.weights, found.normalization, layer),
    )


def _spec(name: str) -> StreamSpec:
    return StreamSpec(
        tokenizer=name,
        sample_rate=SAMPLE_RATE,
        decode_sample_rate=0,
        hop_length=windows.HOP,
        window_length=windows.WINDOW,
        frame_rule=FrameRule.FLOOR,
        num_codebooks=1,
        codebook_size=500,
    )


@dataclass(frozen=True, slots=True)
class _Published:
    """A published model and the layer that is usual for discrete units."""

    name: str
    weights: str
    layer: int
    num_layers: int
    fast_change: str = ""

    @property
    def architecture(self) -> str:
        prefix = self.name.partition("-")[0]
        return "data2vec-audio" if prefix == "data2vec" else prefix  # there are data2vecs of text and images, too


_ABOUT = {
    "hubert": "HuBERT at a layer, k-means (Hsu et al. 2021)",
    "wavlm": "WavLM at a layer, k-means (Chen et al. 2022)",
    "wav2vec2": "wav2vec 2.0 at a layer, k-means (Baevski et al. 2020)",
    "data2vec-audio": "data2vec at a layer, k-means (Baevski et al. 2022)",
}
_LICENCES = {
    "hubert": "Apache-2.0",
    "wavlm": "CC-BY-SA-3.0",
    "wav2vec2": "Apache-2.0",
    "data2vec-audio": "Apache-2.0",
}
_LONG_AUDIO = "whole up to 30 s; longer in windows of 30 s every 26 s, normalized as a whole; counted, not exact"
LAST_FRAME = "whole windows only"


def _entry(published: _Published) -> TokenizerEntry:
    return TokenizerEntry(
        spec=_spec(published.name),
        kind="semantic",
        about=_ABOUT[published.architecture],
        needs_codebook=True,
        last_frame=LAST_FRAME,
        long_audio=_LONG_AUDIO,
        weights=published.weights,
        licence=_LICENCES[published.architecture],
        layer=published.layer,
        num_layers=published.num_layers,
        modes=(Mode.EXACT, Mode.FAST),
        fast_change=published.fast_change,
        describe=partial(_describe, published=published),
        open=lambda description, device: SslFeatures(description, device=device),
    )


ENTRIES = tuple(
    map(
        _entry,
        (
            _Published("hubert-base", "facebook/hubert-base-ls960", 9, 12, "1.3 % of ids, random weights"),
            _Published("hubert-large", "facebook/hubert-large-ll60k", 18, 24, "1.2 % of ids, random weights"),
            _Published("hubert-xlarge", "facebook/hubert-xlarge-ll60k", 36, 48, "1.0 % of ids, random weights"),
            _Published("wavlm-base", "microsoft/wavlm-base", 9, 12, "1.1 % of ids, random weights"),
            _Published("wavlm-base-plus", "microsoft/wavlm-base-plus", 9, 12, "1.1 % of ids, random weights"),
            _Published("wavlm-large", "microsoft/wavlm-large", 18, 24, "1.3 % of ids, random weights"),
            _Published("wav2vec2-base", "facebook/wav2vec2-base", 6, 12, "0.8 % of ids, random weights"),
            _Published("wav2vec2-large", "facebook/wav2vec2-large", 14, 24, "1.7 % of ids, random weights"),
            _Published("wav2vec2-large-lv60", "facebook/wav2vec2-large-lv60", 14, 24, "1.3 % of ids, random weights"),
            # three quarters up, as HuBERT's: its targets, too, are of a model's upper layers
            _Published("data2vec-base", "facebook/data2vec-audio-base", 9, 12, "2.5 % of ids, random weights"),
            _Published("data2vec-large", "facebook/data2vec-audio-large", 18, 24, "not measured"),
        ),
    )
)
