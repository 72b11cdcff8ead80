"""wav2vec 2.0's own codes: the two groups of 320 that its contrastive targets are made of (Baevski et al. 2020).

The convolutions' frames, layer-normed, are scored by the quantizer's projection; the best of each group is its code,
of equal ones the first, as transformers' Wav2Vec2GumbelVectorQuantizer has it outside training. The transformer is not
run. Long recordings go in the windows of ssl_windows.py with the group norm of the whole: their codes are exact, too.

Axes: T frames, C channels, G groups, V codes of a group.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import ssl_windows as windows
from .bundles import BundleWeights
from .hub import load_model, remove_weight_norm
from .spec import FrameRule, StreamSpec, UserError
from .ssl_features import LAST_FRAME, SAMPLE_RATE, Found, find, fingerprint
from .ssl_model import SslModel
from .tokenizer import Description, TokenizerConfig, TokenizerEntry

_NAME = "wav2vec2-codes"
_WEIGHTS = "facebook/wav2vec2-base"
_NUM_GROUPS, _NUM_CODES = 2, 320


class Wav2Vec2Codes:
    """Codes `[2, T]` every 20 ms at 16 kHz; T is 1 + (n - 400) // 320."""

    def __init__(self, description: Description, *, device: str = "cpu") -> None:
        found: Found = description.weights
        assert not isinstance(found.weights, BundleWeights)
        self.spec = description.spec
        self.fingerprint = description.fingerprint
        self._device = device
        self._normalization = found.normalization
        # what only training and the transformer's own output need may be absent
        may_lack = ("masked_spec_embed", "project_hid.weight", "project_hid.bias", "project_q.weight", "project_q.bias")
        loaded = load_model("Wav2Vec2ForPreTraining", found.weights, may_lack=may_lack, num_hidden_layers=0)
        self._model = SslModel(remove_weight_norm(loaded).get_submodule("wav2vec2"), device=device)
        projection = loaded.get_submodule("quantizer.weight_proj")
        self._weight_OC = projection.get_parameter("weight").to(device)
        self._bias_O = projection.get_parameter("bias").to(device)

    def encode(self, waveform_N: Tensor) -> Tensor:
        # made at once: small tensors kept from window to window would hold the memory between them
        codes_KT = torch.empty(self.spec.num_codebooks, windows.num_frames(waveform_N.shape[0]), dtype=torch.int64)
        begin = 0
        for frames_TC in self._frames(waveform_N):
            codes_KT[:, begin : begin + frames_TC.shape[0]] = self._quantize(frames_TC)
            begin += frames_TC.shape[0]
        return codes_KT

    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        batch = windows.run_batch(
            waveforms, padded_length, self._model.frames, normalization=self._normalization, device=self._device
        )
        return [self.encode(waveforms[i]) if done is None else self._quantize(done) for i, done in enumerate(batch)]

    def gaps(self, waveform_N: Tensor) -> Tensor:
        """How sure each code is, `[K, T]` float64: the best score's lead on the second, by the range of all scores."""
        gaps = [torch.empty(self.spec.num_codebooks, 0, dtype=torch.float64)]
        for frames_TC in self._frames(waveform_N):
            scores_TGV = self._scores(frames_TC.double())
            lead_TG = scores_TGV.topk(2, dim=2).values.diff(dim=2).neg()[:, :, 0]
            range_TG = (scores_TGV.amax(dim=2) - scores_TGV.amin(dim=2)).clamp_min(1e-300)
            gaps.append((lead_TG / range_TG)[:, : self.spec.num_codebooks].t().cpu())
        return torch.cat(gaps, dim=1)

    def decode(self, codes_KT: Tensor) -> Tensor:
        raise UserError(f"Tokenizer {_NAME} has no decoder: semantic tokens do not say how it sounds.")

    def _frames(self, waveform_N: Tensor) -> Iterator[Tensor]:
        return windows.run_windows(
            waveform_N, self._model, self._model.frames, normalization=self._normalization, device=self._device
        )

    def _scores(self, frames_TC: Tensor) -> Tensor:
        weight_OC, bias_O = self._weight_OC.to(frames_TC.dtype), self._bias_O.to(frames_TC.dtype)
        return torch.nn.functional.linear(frames_TC, weight_OC, bias_O).unflatten(1, (_NUM_GROUPS, _NUM_CODES))

    def _quantize(self, frames_TC: Tensor) -> Tensor:
        scores_TGV = self._scores(frames_TC)
        best_TGV = scores_TGV == scores_TGV.amax(dim=2, keepdim=True)
        codes_V = torch.arange(_NUM_CODES, device=scores_TGV.device)
        codes_TG = torch.where(best_TGV, codes_V, _NUM_CODES - 1).amin(dim=2)
        return codes_TG[:, : self.spec.num_codebooks].t().contiguous().cpu()


def _describe(config: TokenizerConfig) -> Description:
    found = find(config, default=_WEIGHTS, architecture="wav2vec2")
    if isinstance(found.weights, BundleWeights):
        raise UserError(f"torchaudio's bundles come without the quantizer that {_NAME} needs; name weights of the hub.")
    shape = found.weights.config["num_codevector_groups"], found.weights.config["num_codevectors_per_group"]
    if shape != (_NUM_GROUPS, _NUM_CODES):
        raise UserError(
            f"{found.weights.name} has {shape[0]} codebooks of {shape[1]} (its config.json says so); {_NAME} has "
            f"{_NUM_GROUPS} of {_NUM_CODES}. Name other weights."
        )
    num_codebooks = _NUM_GROUPS if config.num_codebooks is None else config.num_codebooks
    if not 1 <= num_codebooks <= _NUM_GROUPS:
        raise UserError(f"{_NAME} has 1 to {_NUM_GROUPS} codebooks; {num_codebooks} were asked for.")
    parts = {
        "tokenizer": _NAME,
        "codec": f"{_NAME}/1",
        **fingerprint(found),
        "codebooks": str(num_codebooks),
        "precision": config.mode.precision,
    }
    return Description(config, _spec(num_codebooks), parts, weights=found)


def _spec(num_codebooks: int) -> StreamSpec:
    return StreamSpec(
        tokenizer=_NAME,
        sample_rate=SAMPLE_RATE,
        decode_sample_rate=0,
        hop_length=windows.HOP,
        window_length=windows.WINDOW,
        frame_rule=FrameRule.FLOOR,
        num_codebooks=num_codebooks,
        codebook_size=_NUM_CODES,
    )


ENTRIES = (
    TokenizerEntry(
        spec=_spec(_NUM_GROUPS),
        kind="semantic",
        about="wav2vec 2.0's own two codebooks (Baevski et al. 2020)",
        needs_codebook=False,
        last_frame=LAST_FRAME,
        long_audio="in windows of 30 s, normalized as a whole; exact",
        weights=_WEIGHTS,
        licence="Apache-2.0",
        describe=_describe,
        open=lambda description, device: Wav2Vec2Codes(description, device=device),
    ),
)
