"""MFCC features, on which HuBERT's first k-means labels were made (Hsu et al. 2021, section IV-A)."""

import math
from typing import ClassVar

import torch
import torchaudio.compliance.kaldi as kaldi
from torch import Tensor
from torchaudio.functional import compute_deltas, create_dct

from .spec import FrameRule, StreamSpec
from .tokenizer import Description, TokenizerConfig, TokenizerEntry

_SHIFT = 160  # samples: 10 ms at 16 kHz
_WINDOW = 400  # samples: 25 ms
_FFT = 512
_NUM_MEL = 23
_NUM_CEPS = 13
_LIFTER = 22.0
_PREEMPHASIS = 0.97
_BLOCK_FRAMES = 1024  # 10 ms frames at a time, counted from the segment's start: bounded memory, same codes


class MfccFeatures:
    """13 MFCC with first and second deltas, 39 dimensions, every 20 ms at 16 kHz.

    The numbers are Kaldi's as torchaudio computes them (25 ms Povey windows every 10 ms, no dither, snip_edges),
    of which every second frame is kept, so that the count is HuBERT's own, `1 + (n - 400) // 320`.
    """

    spec = StreamSpec(
        tokenizer="mfcc-kmeans",
        sample_rate=16_000,
        decode_sample_rate=0,
        hop_length=320,
        window_length=_WINDOW,
        frame_rule=FrameRule.FLOOR,
        num_codebooks=1,
        codebook_size=100,
    )
    dim = 3 * _NUM_CEPS
    fingerprint: ClassVar[dict[str, str]] = {"features": "mfcc-kmeans/1"}  # raised with every change of a number
    precision = "float32"

    def __init__(self, *, device: str = "cpu") -> None:
        self._device = device
        window = torch.hann_window(_WINDOW, periodic=False).pow(0.85)  # Povey's window
        mel_MF, _ = kaldi.get_mel_banks(_NUM_MEL, _FFT, float(self.spec.sample_rate), 20.0, 0.0, 100.0, -500.0, 1.0)
        dct_MC = create_dct(_NUM_CEPS, _NUM_MEL, "ortho")
        dct_MC[:, 0] = math.sqrt(1 / _NUM_MEL)
        lifter_C = 1 + 0.5 * _LIFTER * torch.sin(math.pi * torch.arange(_NUM_CEPS) / _LIFTER)
        self._window = window.to(device)
        self._mel_FM = torch.nn.functional.pad(mel_MF, (0, 1)).t().contiguous().to(device)
        self._dct_MC = (dct_MC * lifter_C).to(device)

    def extract(self, waveform_N: Tensor) -> Tensor:
        """Features `[T, 39]` of a mono float32 waveform at 16 kHz in [-1, 1]; `[0, 39]` below one window."""
        if waveform_N.shape[0] < _WINDOW:
            return torch.empty(0, self.dim, device=self._device)
        windows_TW = waveform_N.to(self._device).contiguous().unfold(0, _WINDOW, _SHIFT)
        ceps_TC = torch.cat([self._cepstra(block_TW) for block_TW in windows_TW.split(_BLOCK_FRAMES)])
        ceps_CT = ceps_TC.t().contiguous()
        deltas_CT = compute_deltas(ceps_CT)
        all_CT = torch.cat([ceps_CT, deltas_CT, compute_deltas(deltas_CT)])
        return all_CT.t()[::2].contiguous()

    def _cepstra(self, windows_TW: Tensor) -> Tensor:
        centred_TW = windows_TW - windows_TW.mean(dim=1, keepdim=True)
        previous_TW = torch.cat([centred_TW[:, :1], centred_TW[:, :-1]], dim=1)
        emphasised_TW = (centred_TW - _PREEMPHASIS * previous_TW) * self._window
        power_TF = torch.fft.rfft(emphasised_TW, n=_FFT).abs().square()
        mel_TM = (power_TF @ self._mel_FM).clamp_min(torch.finfo(torch.float32).eps).log()
        return mel_TM @ self._dct_MC


def _describe(config: TokenizerConfig) -> Description:
    return Description(config, MfccFeatures.spec, MfccFeatures.fingerprint, dim=MfccFeatures.dim)


ENTRIES = (
    TokenizerEntry(
        spec=MfccFeatures.spec,
        kind="semantic",
        about="39 MFCC and deltas, k-means: the labels of HuBERT's first iteration",
        needs_codebook=True,
        last_frame="whole windows only",
        long_audio="whole, in blocks; exact",
        describe=_describe,
        open=lambda description, device: MfccFeatures(device=device),
    ),
)
