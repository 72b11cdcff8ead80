"""Speaker embeddings of a segment: x-vectors (Snyder et al. 2018) over a self-supervised model, as WavLM's have them.

The model's layers are summed by learned weights (or its last is taken), go through convolutions over time, and mean and
deviation over all frames become one vector. Segments longer than 30 s have their layers in the windows of
ssl_windows.py, their statistics over all of their frames.

Axes: B segments, N samples, T frames, L layers, D dimensions of the model, C channels of the convolutions, E of the
embedding.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import ssl_windows as windows
from .bundles import BundleWeights
from .hub import load_model, remove_weight_norm
from .layers import layer_norm, same
from .spec import FrameRule, StreamSpec, UserError
from .ssl_features import SAMPLE_RATE, Found, find, fingerprint
from .ssl_model import SslModel, Statistics
from .tokenizer import Description, Output, TokenizerConfig, TokenizerEntry

_NAME = "wavlm-sv"
_WEIGHTS = "microsoft/wavlm-base-plus-sv"
_TDNN = {"tdnn_kernel": (5, 3, 3, 1, 1), "tdnn_dilation": (1, 2, 3, 1, 1)}
_DIM = 512


class XVector:
    """One vector `[1, E]` of a segment, `[0, E]` of one too short to have a deviation over frames."""

    def __init__(self, description: Description, *, device: str = "cpu") -> None:
        found: Found = description.weights
        self.spec = description.spec
        self.dim = description.dim or 0
        self.fingerprint = description.fingerprint
        self.precision = description.config.mode.precision
        weights = cast(Any, found.weights)  # bundles are refused by `_describe`
        loaded = cast(Any, load_model("WavLMForXVector", weights, may_lack=_UNUSED))
        base = cast(Any, remove_weight_norm(loaded.wavlm))
        self._model = SslModel(base, device=device)
        self._layers = tuple(range(loaded.config.num_hidden_layers + 1))
        self._weights_L = None
        self._norm = same
        if loaded.config.use_weighted_layer_sum:
            self._weights_L = loaded.layer_weights.softmax(dim=0).to(device)
        elif loaded.config.do_stable_layer_norm:  # the last layer lacks the encoder's last norm
            self._norm = layer_norm(base.encoder.layer_norm, torch.device(device))
        self._projector, self._tdnn = loaded.projector.to(device), loaded.tdnn.to(device)
        self._embedding = loaded.feature_extractor.to(device)
        self._reach = _reach(loaded.config.to_dict())
        self._normalization = found.normalization
        self._device = device

    @torch.inference_mode()
    def extract(self, waveform_N: Tensor) -> Tensor:
        return self._embed(
            windows.run_windows(
                waveform_N, self._model, self._hidden, normalization=self._normalization, device=self._device
            )
        )

    @torch.inference_mode()
    def extract_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        batch = windows.run_batch(
            waveforms, padded_length, self._hidden, normalization=self._normalization, device=self._device
        )
        return [self.extract(waveforms[i]) if done is None else self._embed([done]) for i, done in enumerate(batch)]

    def _hidden(
        self, waveforms_BN: Tensor, lengths: Sequence[int], statistics: Sequence[Statistics | None] = ()
    ) -> Tensor:
        """What the convolutions over time are given, `[B, T, D]`."""
        if self._weights_L is None:
            return self._norm(self._model(waveforms_BN, lengths, statistics))
        layers_BTE = self._model.at(waveforms_BN, lengths, statistics, layers=self._layers)
        return torch.einsum("btld,l->btd", layers_BTE.unflatten(2, (len(self._layers), -1)), self._weights_L)

    def _embed(self, pieces: Iterable[Tensor]) -> Tensor:
        count, mean_C, squares_C = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for frames_TC in self._convolved(pieces):
            num, own_C = frames_TC.shape[0], frames_TC.mean(dim=0)
            # moments of two sets from those of each (Chan et al. 1979)
            away_C = own_C - mean_C
            squares_C = squares_C + (frames_TC - own_C).square().sum(dim=0) + away_C**2 * (count * num / (count + num))
            mean_C = mean_C + away_C * (num / (count + num))
            count += num
        if count < 2:
            return torch.empty(0, self.dim, device=self._device)
        deviation_C = (squares_C / (count - 1)).sqrt()
        return self._embedding(torch.cat([mean_C, deviation_C]).float()[None])

    def _convolved(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames `[t, C]` float64 after the convolutions, which see `reach` frames after their own."""
        left_TD: Tensor | None = None
        for piece_TD in pieces:
            frames_TD = piece_TD if left_TD is None else torch.cat([left_TD, piece_TD])
            left_TD = frames_TD[max(0, frames_TD.shape[0] - self._reach) :]
            if frames_TD.shape[0] <= self._reach:
                continue
            x_1TC = self._projector(frames_TD[None])
            for layer in self._tdnn:
                x_1TC = layer(x_1TC)
            yield x_1TC[0].double()


_UNUSED = ("masked_spec_embed", "classifier.weight", "classifier.bias", "objective.weight")


def _reach(config: dict[str, Any]) -> int:
    pairs = zip(config["tdnn_kernel"], config["tdnn_dilation"], strict=True)
    return sum((kernel - 1) * dilation for kernel, dilation in pairs)


def _describe(config: TokenizerConfig) -> Description:
    found = find(config, default=_WEIGHTS, architecture="wavlm")
    if isinstance(found.weights, BundleWeights):
        raise UserError(f"torchaudio's bundles come without the head that {_NAME} needs; name weights of the hub.")
    architectures = found.weights.config.get("architectures") or ["WavLMForXVector"]
    if architectures[0] != "WavLMForXVector":
        raise UserError(
            f"{found.weights.name} holds a {architectures[0]} (its config.json says so); {_NAME} takes a "
            "WavLMForXVector. Name other weights."
        )
    dim, decides = found.weights.config["xvector_output_dim"], {"features": f"{_NAME}/1", **fingerprint(found)}
    return Description(config, _spec(_reach(found.weights.config)), decides, dim=dim, weights=found)


def _spec(reach: int) -> StreamSpec:
    return StreamSpec(
        tokenizer=_NAME,
        sample_rate=SAMPLE_RATE,
        decode_sample_rate=0,
        hop_length=windows.HOP,
        window_length=windows.WINDOW + (reach + 1) * windows.HOP,  # two frames are left, of which there is a deviation
        frame_rule=FrameRule.ONE,
        num_codebooks=1,
        codebook_size=500,
    )


ENTRIES = (
    TokenizerEntry(
        spec=_spec(_reach(_TDNN)),
        kind="semantic",
        about="x-vectors over WavLM: who speaks (Chen et al. 2022), one vector a segment",
        needs_codebook=True,
        output=Output.EMBEDDING,
        last_frame="whole windows only, of 16 frames or more",
        long_audio="layers in windows of 30 s every 26 s, statistics over all frames; counted, not exact",
        weights=_WEIGHTS,
        licence="CC-BY-SA-3.0",
        describe=_describe,
        open=lambda description, device: XVector(description, device=device),
    ),
)
