"""Features of Whisper's encoder (Radford et al. 2022) at any layer, to fit k-means on or to give to language models.

Layer L is the encoder's `hidden_states[L]` in transformers: 0 is what the first layer is given, the last is its
`last_hidden_state`, after the final norm: what Whisper's decoder reads, and the adapters of Qwen-Audio and Ultravox.

The published extractor fills every segment up to 30 s with zeros, and the encoder attends to all of it. Of the 1,500
frames those are kept that a segment's own samples begin: n / 320, rounded up. Each window of a longer recording is to
Whisper a segment of its own, with its own loudest moment.

Axes: N samples, T frames, D dimensions, B segments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .hub import Weights, find_weights, fingerprint_of, load_model
from .log_mel import WhisperFrames, require_extractor
from .spec import FrameRule, StreamSpec, UserError
from .ssl_windows import HOP, LONGEST, plan_windows
from .tokenizer import Description, Mode, TokenizerConfig, TokenizerEntry
from .whisper_model import WhisperEncoder

_LONGEST_FRAMES = LONGEST // HOP
_GPU_ROWS = 8  # segments at a time, each of 30 s whatever its length; on a CPU one, where more only cost
_EXTRACTOR = {
    "sampling_rate": 16_000,
    "n_fft": 400,
    "hop_length": 160,
    "chunk_length": 30,
    "dither": 0.0,
    "padding_value": 0.0,
    "padding_side": "right",
}


@dataclass(frozen=True, slots=True)
class _Found:
    """Weights, and the layer that is asked for."""

    weights: Weights
    layer: int


class WhisperFeatures:
    """Features `[T, D]` of one layer, every 20 ms at 16 kHz; T is n / 320, rounded up."""

    def __init__(self, description: Description, *, device: str = "cpu") -> None:
        found: _Found = description.weights
        self.spec = description.spec
        self.dim = description.dim or 0
        self.fingerprint = description.fingerprint
        self.precision = description.config.mode.precision
        self._device = device
        self._layer = found.layer
        self._rows = 1 if torch.device(device).type == "cpu" else _GPU_ROWS
        config = found.weights.config
        self._mel = WhisperFrames(config["num_mel_bins"], LONGEST, device)
        # the decoder is not needed, but for its embeddings, without which it cannot be built
        loaded = load_model("WhisperModel", found.weights, encoder_layers=found.layer, decoder_layers=0)
        dtype = torch.bfloat16 if description.config.mode is Mode.FAST else torch.float32
        whole = found.layer == config["encoder_layers"]
        self._model = WhisperEncoder(cast(Any, loaded).encoder, whole=whole, device=device, dtype=dtype)

    def extract(self, waveform_N: Tensor) -> Tensor:
        pieces = list(self.pieces(waveform_N))
        return torch.cat(pieces) if pieces else torch.empty(0, self.dim, device=self._device)

    def pieces(self, waveform_N: Tensor) -> Iterator[Tensor]:
        """One piece for each window of 30 s."""
        for piece in self.layer_pieces(waveform_N, [self._layer]):
            yield piece[self._layer]

    def layer_pieces(self, waveform_N: Tensor, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """As `pieces` gives them at each of several layers, none above the one that this was opened for."""
        for window in plan_windows(_num_frames(waveform_N.shape[0]), _LONGEST_FRAMES):
            begin = window.first * HOP
            span_N = waveform_N[begin : begin + LONGEST].to(self._device)
            hidden_TE = self._model.at(self._mel(span_N[None]), layers)[0]
            kept_TE = hidden_TE[window.keep_begin - window.first : window.keep_end - window.first]
            yield dict(zip(layers, kept_TE.split(self.dim, dim=1), strict=True))

    def extract_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        """As `extract` gives them; those longer than 30 s are run by themselves.

        A few at a time, in batches of one size: in `fast` mode their shape decides the last bits.
        """
        rows = min(self._rows, len(waveforms))
        features: list[Tensor] = []
        for begin in range(0, len(waveforms), rows):
            group = waveforms[begin : begin + rows]
            fit = [0 < waveform_N.shape[0] <= LONGEST for waveform_N in group]
            hidden_BTD = self._together(group, fit, rows, min(padded_length, LONGEST)) if any(fit) else None
            for i, waveform_N in enumerate(group):
                if fit[i] and hidden_BTD is not None:
                    features.append(hidden_BTD[i, : _num_frames(waveform_N.shape[0])].clone())
                else:
                    features.append(self.extract(waveform_N))
        return features

    def _together(self, group: Sequence[Tensor], fit: Sequence[bool], rows: int, length: int) -> Tensor:
        padded_BN = torch.zeros(rows, length)
        for i, waveform_N in enumerate(group):
            if fit[i]:
                padded_BN[i, : waveform_N.shape[0]] = waveform_N
        return self._model.at(self._mel(padded_BN.to(self._device)), [self._layer])


def _num_frames(num_samples: int) -> int:
    return -(-num_samples // HOP)


def require_windows(weights: Weights, tokenizer: str) -> None:
    """Raise `UserError` for a Whisper that sees other frames than the published ones, or windows other than 30 s."""
    bands, places = weights.config["num_mel_bins"], weights.config["max_source_positions"]
    require_extractor(weights, tokenizer, {**_EXTRACTOR, "feature_size": bands})
    if places != _LONGEST_FRAMES:
        raise UserError(
            f"{weights.name} sees {places} frames (its config.json says so); {tokenizer} sees "
            f"{_LONGEST_FRAMES}, 30 s. Name other weights."
        )


def _describe(config: TokenizerConfig, *, published: "_Published") -> Description:
    weights = find_weights(
        config.weights or published.weights,
        tokenizer=config.tokenizer,
        architecture="whisper",
        revision=config.revision,
        local_files_only=config.local_files_only,
    )
    require_windows(weights, config.tokenizer)
    num_layers = weights.config["encoder_layers"]
    layer = num_layers if config.layer is None else config.layer
    if not 0 <= layer <= num_layers:
        raise UserError(f"{config.tokenizer} has layers 0 to {num_layers}; layer {layer} was asked for.")
    return Description(
        config,
        _spec(published.name),
        {"features": f"{published.name}/1", **fingerprint_of(weights), "layer": str(layer)},
        dim=weights.config["d_model"],
        weights=_Found(weights, layer),
    )


def _spec(name: str) -> StreamSpec:
    return StreamSpec(
        tokenizer=name,
        sample_rate=16_000,
        decode_sample_rate=0,
        hop_length=HOP,
        window_length=1,
        frame_rule=FrameRule.CEIL,
        num_codebooks=1,
        codebook_size=500,
    )


@dataclass(frozen=True, slots=True)
class _Published:
    """A published model; the default is its last layer, which the decoder reads."""

    name: str
    weights: str
    num_layers: int
    fast_change: str = "not measured"


def _entry(published: _Published) -> TokenizerEntry:
    return TokenizerEntry(
        spec=_spec(published.name),
        kind="semantic",
        about="Whisper's encoder at a layer, k-means (Radford et al. 2022)",
        needs_codebook=True,
        last_frame="silence after the end, to 30 s as published",
        long_audio="whole up to 30 s; longer in windows of 30 s every 26 s, each for itself; counted, not exact",
        weights=published.weights,
        licence="Apache-2.0",
        layer=published.num_layers,
        num_layers=published.num_layers,
        modes=(Mode.EXACT, Mode.FAST),
        fast_change=published.fast_change,
        describe=partial(_describe, published=published),
        open=lambda description, device: WhisperFeatures(description, device=device),
    )


ENTRIES = tuple(
    map(
        _entry,
        (
            _Published("whisper-tiny", "openai/whisper-tiny", 4, "0.1 % of ids, random weights"),
            _Published("whisper-base", "openai/whisper-base", 6, "0.1 % of ids, random weights"),
            _Published("whisper-small", "openai/whisper-small", 12),
            _Published("whisper-medium", "openai/whisper-medium", 24),
            _Published("whisper-large-v3", "openai/whisper-large-v3", 32),
        ),
    )
)
