"""Features of w2v-BERT 2.0 (Seamless Communication 2023) at any layer, to fit k-means on: 50 or 25 a second.

Layer L is transformers' `hidden_states[L]`: 0 is what the first conformer is given, L >= 1 what the L-th gives. A frame
is made of two 10 ms log-mel frames, normalized band by band over the whole segment. Where their number is odd the
published extractor fills up the last pair and masks it: that one is no frame here, but counts for the normalization.

AudioLM (Borsos et al. 2022) quantizes 25 frames a second to 1,024 codes. Its model is not published; `w2v-bert-2-25hz`
stacks two frames of this one.

Axes: N samples, F log-mel frames, M bands, T frames, D dimensions, B segments.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .hub import Weights, find_weights, fingerprint_of, load_model
from .log_mel import HOP, WINDOW, KaldiFrames, require_extractor
from .spec import FrameRule, StreamSpec, UserError
from .ssl_windows import LONGEST, plan_windows
from .tokenizer import Description, Mode, TokenizerConfig, TokenizerEntry
from .w2v_bert_model import W2vBertModel

_NUM_BANDS = 80
_PAIR = 2  # log-mel frames in a frame
_BLOCK = 1 << 12  # log-mel frames whose moments are taken at a time
_EPSILON = 1e-7  # SeamlessM4TFeatureExtractor's
_EXTRACTOR = {"sampling_rate": 16_000, "num_mel_bins": _NUM_BANDS, "stride": _PAIR}


@dataclass(frozen=True, slots=True)
class _Found:
    """Weights, and the layer that is asked for."""

    weights: Weights
    layer: int


class W2vBertFeatures:
    """Features `[T, D]` of one layer; T is (1 + (n - 400) // 160) // 2, every 20 ms at 16 kHz, or half as many."""

    def __init__(self, description: Description, *, stacked: int, device: str = "cpu") -> None:
        found: _Found = description.weights
        self.spec = description.spec
        self.dim = description.dim or 0
        self.fingerprint = description.fingerprint
        self.precision = description.config.mode.precision
        self._device = device
        self._stacked = stacked
        self._layer = found.layer
        self._frames = KaldiFrames(_NUM_BANDS, device)
        loaded = load_model(
            "Wav2Vec2BertModel", found.weights, may_lack=("masked_spec_embed",), num_hidden_layers=found.layer
        )
        dtype = torch.bfloat16 if description.config.mode is Mode.FAST else torch.float32
        self._model = W2vBertModel(loaded, device=device, dtype=dtype)

    def extract(self, waveform_N: Tensor) -> Tensor:
        pieces = list(self.pieces(waveform_N))
        return torch.cat(pieces) if pieces else torch.empty(0, self.dim, device=self._device)

    def pieces(self, waveform_N: Tensor) -> Iterator[Tensor]:
        """One piece for each window of ssl_windows.py."""
        for piece in self.layer_pieces(waveform_N, [self._layer]):
            yield piece[self._layer]

    def layer_pieces(self, waveform_N: Tensor, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """As `pieces` gives them at each of several layers, none above the one that this was opened for."""
        for piece_TE in _whole_groups(self._windows(waveform_N, layers), self._stacked):
            parts = piece_TE.chunk(len(layers), dim=1)
            yield {layer: self._stack(part_TD) for layer, part_TD in zip(layers, parts, strict=True)}

    def extract_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        """As `extract` gives them; those longer than 30 s are run by themselves."""
        counts = [_num_pairs(waveform_N.shape[0]) for waveform_N in waveforms]
        fit = [count > 0 and len(waveform_N) <= LONGEST for count, waveform_N in zip(counts, waveforms, strict=True)]
        if not any(fit):
            return [self.extract(waveform_N) for waveform_N in waveforms]
        # those that do not fit have their row nonetheless: in `fast` mode its shape decides the last bits
        num_frames = _num_pairs(min(padded_length, LONGEST))
        frames_BTF = torch.zeros(len(waveforms), num_frames, _PAIR * _NUM_BANDS, device=self._device)
        for i, waveform_N in enumerate(waveforms):
            if fit[i]:
                frames_BTF[i, : counts[i]] = self._normalized(waveform_N)(0, counts[i])
        lengths = [count if fits else 1 for count, fits in zip(counts, fit, strict=True)]
        hidden_BTD = self._model.at(frames_BTF, lengths, [self._layer])
        return [
            self._stack(hidden_BTD[i, : counts[i]]) if fit[i] else self.extract(waveform_N)
            for i, waveform_N in enumerate(waveforms)
        ]

    def _windows(self, waveform_N: Tensor, layers: Sequence[int]) -> Iterator[Tensor]:
        """What the model gives for each window, cut to the frames that are taken from it."""
        windows = plan_windows(_num_pairs(waveform_N.shape[0]))
        if not windows:
            return
        longest = _num_pairs(LONGEST)
        normalized = self._normalized(waveform_N)
        for window in windows:
            end = min(window.first + longest, windows[-1].keep_end)
            frames_TF = normalized(window.first, end)
            hidden_TE = self._model.at(frames_TF[None], [frames_TF.shape[0]], layers)[0]
            yield hidden_TE[window.keep_begin - window.first : window.keep_end - window.first]

    def _normalized(self, waveform_N: Tensor) -> Callable[[int, int], Tensor]:
        """The model's input `[T, F]` from one frame to another, normalized as the whole waveform is.

        The mean is rounded before it is subtracted, as in the published extractor: bands that hardly vary show it.
        """
        total = 1 + (waveform_N.shape[0] - WINDOW) // HOP
        sum_M = torch.zeros(_NUM_BANDS, dtype=torch.float64, device=self._device)
        squares_M = torch.zeros_like(sum_M)
        for begin in range(0, total, _BLOCK):
            block_FM = self._span(waveform_N, begin, min(begin + _BLOCK, total)).double()
            sum_M += block_FM.sum(dim=0)
            squares_M += block_FM.square().sum(dim=0)
        mean_M = (sum_M / total).float()
        around_M = squares_M - 2.0 * mean_M * sum_M + total * mean_M.double().square()
        deviation_M = (around_M.clamp_min(0.0) / (total - 1) + _EPSILON).sqrt().float()

        def frames(first: int, end: int) -> Tensor:
            span_FM = self._span(waveform_N, first * _PAIR, end * _PAIR)
            return ((span_FM - mean_M) / deviation_M).view(end - first, _PAIR * _NUM_BANDS)

        return frames

    def _span(self, waveform_N: Tensor, first: int, end: int) -> Tensor:
        """Log-mel frames `[F, M]` from one to another."""
        return self._frames(waveform_N[first * HOP : (end - 1) * HOP + WINDOW])

    def _stack(self, frames_TD: Tensor) -> Tensor:
        num = frames_TD.shape[0] // self._stacked
        return frames_TD[: num * self._stacked].reshape(num, self._stacked * frames_TD.shape[1])


def _num_pairs(num_samples: int) -> int:
    return 0 if num_samples < WINDOW else (1 + (num_samples - WINDOW) // HOP) // _PAIR


def _whole_groups(pieces: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The pieces, cut so that each but the last is of whole groups of `size` frames."""
    left: list[Tensor] = []
    for piece_TE in pieces:
        joined_TE = torch.cat([*left, piece_TE]) if left else piece_TE
        whole = joined_TE.shape[0] // size * size
        yield joined_TE[:whole]
        left = [joined_TE[whole:]] if whole < joined_TE.shape[0] else []


def _describe(config: TokenizerConfig, *, published: "_Published") -> Description:
    weights = find_weights(
        config.weights or _WEIGHTS,
        tokenizer=config.tokenizer,
        architecture="wav2vec2-bert",
        revision=config.revision,
        local_files_only=config.local_files_only,
    )
    require_extractor(weights, config.tokenizer, _EXTRACTOR)
    place = weights.config["position_embeddings_type"]
    if place != "relative_key":
        raise UserError(
            f"{weights.name} tells positions by {place!r} (its config.json says so); {config.tokenizer} takes "
            "'relative_key'. Name other weights."
        )
    width = weights.config["feature_projection_input_dim"]
    if width != _PAIR * _NUM_BANDS:
        raise UserError(
            f"{weights.name} takes frames of {width} numbers (its config.json says so); {config.tokenizer} has "
            f"{_PAIR * _NUM_BANDS}. Name other weights."
        )
    num_layers = weights.config["num_hidden_layers"]
    layer = _LAYER if config.layer is None else config.layer
    if not 0 <= layer <= num_layers:
        raise UserError(f"{config.tokenizer} has layers 0 to {num_layers}; layer {layer} was asked for.")
    return Description(
        config,
        _spec(published),
        {"features": f"{published.name}/1", **fingerprint_of(weights), "layer": str(layer)},
        dim=published.stacked * weights.config["hidden_size"],
        weights=_Found(weights, layer),
    )


@dataclass(frozen=True, slots=True)
class _Published:
    """A name, and how many frames it makes one."""

    name: str
    stacked: int
    about: str


_WEIGHTS = "facebook/w2v-bert-2.0"
_LAYER = 17  # that MaskGCT's semantic tokens are of (Wang et al. 2024)


def _spec(published: _Published) -> StreamSpec:
    return StreamSpec(
        tokenizer=published.name,
        sample_rate=16_000,
        decode_sample_rate=0,
        hop_length=published.stacked * _PAIR * HOP,
        window_length=WINDOW + (published.stacked * _PAIR - 1) * HOP,
        frame_rule=FrameRule.FLOOR,
        num_codebooks=1,
        codebook_size=1_024,
    )


def _entry(published: _Published) -> TokenizerEntry:
    return TokenizerEntry(
        spec=_spec(published),
        kind="semantic",
        about=published.about,
        needs_codebook=True,
        last_frame="whole windows only",
        long_audio="whole up to 30 s; longer in windows of 30 s every 26 s, normalized as a whole; counted, not exact",
        weights=_WEIGHTS,
        licence="MIT",
        layer=_LAYER,
        num_layers=24,
        modes=(Mode.EXACT, Mode.FAST),
        fast_change="not measured",
        describe=partial(_describe, published=published),
        open=lambda description, device: W2vBertFeatures(description, stacked=published.stacked, device=device),
    )


ENTRIES = tuple(
    map(
        _entry,
        (
            _Published("w2v-bert-2", 1, "w2v-BERT 2.0 at a layer, k-means (Seamless Communication 2023)"),
            _Published("w2v-bert-2-25hz", 2, "w2v-BERT 2.0 at a layer, two frames stacked, k-means (as AudioLM)"),
        ),
    )
)
