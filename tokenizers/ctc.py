"""A CTC model's label of each frame, by which runs of frames are merged: HuBERT, WavLM, wav2vec 2.0, data2vec.

The model is transformers' `HubertForCTC` and the like; each frame's label is the best of its scores, of equal ones the
first. Segments are always run one at a time and in float32, so that no label, and with it no number of frames, depends
on what else is encoded. Long recordings go in the windows of ssl_windows.py.

Axes: N samples, T frames, D dimensions, V labels.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from . import ssl_windows as windows
from .bundles import PREFIX
from .hub import find_folder, load_model, read_json, remove_weight_norm
from .layers import layer_norm, linear, same
from .spec import FrameRule, StreamSpec, UserError
from .ssl_features import SAMPLE_RATE, Found, find, fingerprint
from .ssl_model import SslModel
from .tokenizer import TokenizerConfig

_MODELS = {
    "hubert": "HubertForCTC",
    "wavlm": "WavLMForCTC",
    "wav2vec2": "Wav2Vec2ForCTC",
    "data2vec-audio": "Data2VecAudioForCTC",
}


@dataclass(frozen=True, slots=True)
class FoundCtc:
    """Weights of a CTC model, not loaded, and its blank."""

    found: Found
    blank: int

    @property
    def fingerprint(self) -> dict[str, str]:
        """What decides the labels, by parts whose names begin with `ctc_`."""
        parts = {f"ctc_{part}": value for part, value in fingerprint(self.found).items() if part != "revision"}
        return {"ctc": "ctc/1", **parts}


class CtcLabels:
    """The best label of each frame, every 20 ms at 16 kHz; the frames are those of `ssl_windows.num_frames`."""

    def __init__(self, ctc: FoundCtc, *, device: str = "cpu") -> None:
        found, to = ctc.found, (torch.device(device), torch.float32)
        weights = cast(Any, found.weights)  # bundles are refused by `find_ctc`
        loaded = cast(Any, load_model(_MODELS[found.architecture], weights, may_lack=("masked_spec_embed",)))
        base = cast(Any, remove_weight_norm(loaded.base_model))
        self.blank = ctc.blank
        self._model = SslModel(base, device=device)
        # a layer of a model that norms first lacks the encoder's last norm, which scores are taken after
        norms_first = bool(getattr(loaded.config, "do_stable_layer_norm", False))
        self._norm = layer_norm(base.encoder.layer_norm, to[0]) if norms_first else same
        self._scores = linear(loaded.lm_head, *to)
        self._normalization = found.normalization
        self._device = device

    @torch.inference_mode()
    def labels(self, waveform_N: Tensor) -> Tensor:
        """Labels `[T]` int64 on the CPU."""
        labels_T = torch.empty(windows.num_frames(waveform_N.shape[0]), dtype=torch.int64)
        begin = 0
        for hidden_TD in windows.run_windows(
            waveform_N, self._model, self._model, normalization=self._normalization, device=self._device
        ):
            end = begin + hidden_TD.shape[0]
            labels_T[begin:end] = self._scores(self._norm(hidden_TD)).argmax(dim=1).cpu()
            begin = end
        return labels_T


def find_ctc(source: str, config: TokenizerConfig) -> FoundCtc:
    """The CTC model at `source`, a folder or a hub id; builds nothing.

    Raises `UserError` for what is no CTC model of these families, and for another clock than 320 samples at 16 kHz.
    """
    name = "reduce=ctc"
    if source.startswith(PREFIX):
        raise UserError(f"{name} takes a CTC model in Hugging Face layout; {source} is a bundle of torchaudio.")
    folder, _ = find_folder(source, revision=None, local_files_only=config.local_files_only)
    given = read_json(folder / "config.json", source)
    architecture, classes = given.get("model_type"), given.get("architectures") or []
    if architecture not in _MODELS or (classes and not str(classes[0]).endswith("ForCTC")):
        found = f"{classes[0]} of type {architecture!r}" if classes else f"a model of type {architecture!r}"
        raise UserError(
            f"{source} holds {found} (its config.json says so); {name} takes one of: {', '.join(_MODELS.values())}."
        )
    asked = TokenizerConfig(tokenizer=name, weights=source, local_files_only=config.local_files_only)
    found = find(asked, default=source, architecture=architecture)
    model = found.weights.config
    if model.get("add_adapter") or model.get("adapter_attn_dim"):
        raise UserError(f"{source} has adapters after or in its layers; {name} takes CTC models without. Name another.")
    blank, size = model.get("pad_token_id"), model.get("vocab_size")
    if blank is None or size is None or not 0 <= blank < size:
        raise UserError(
            f"{source} says that its blank is label {blank} of {size} (pad_token_id and vocab_size of its "
            "config.json): expected one of them. Mend config.json, or name another CTC model."
        )
    return FoundCtc(found, blank)


def require_ctc_clock(spec: StreamSpec) -> None:
    """Raise `UserError` for features that are not on the clock of CTC's labels."""
    clock = (spec.sample_rate, spec.hop_length, spec.window_length, spec.frame_rule)
    if clock != (SAMPLE_RATE, windows.HOP, windows.WINDOW, FrameRule.FLOOR):
        raise UserError(
            f"{spec.tokenizer} has frames of {spec.window_length:,} samples every {spec.hop_length:,} at "
            f"{spec.sample_rate:,} Hz ({spec.frame_rule}); reduce=ctc merges those of {windows.WINDOW} every "
            f"{windows.HOP} at {SAMPLE_RATE:,} Hz ({FrameRule.FLOOR}). Name other features, or leave out reduce."
        )
