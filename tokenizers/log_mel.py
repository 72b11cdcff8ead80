"""Log-mel frames every 10 ms at 16 kHz, as the feature extractors of SeamlessM4T (Kaldi's) and Whisper make them.

Axes: N samples, F frames, M bands, B segments, W samples of a window, R frequencies.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .hub import Weights
from .spec import UserError

HOP = 160  # samples
WINDOW = 400  # samples
_RATE = 16_000
_KALDI_FFT = 512
_KALDI_FLOOR = torch.finfo(torch.float32).eps
_BLOCK_FRAMES = 1_024  # at a time, so that float64 does not fill the memory
_WHISPER_FLOOR = 1e-10
_WHISPER_RANGE = 8.0  # decades below the loudest


class KaldiFrames:
    """Log energies of mel bands, of whole windows: 1 + (n - 400) // 160 frames, 0 below 400 samples.

    Kaldi's filter banks of 16 bit samples: each window without its mean, emphasised, under Povey's window, in float64
    as SeamlessM4TFeatureExtractor has it, rounded to complex64 between.
    """

    def __init__(self, num_bands: int, device: str) -> None:
        self._device = device
        window_W = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).pow(0.85)
        self._window_W = window_W.to(device)
        self._bands_RM = _kaldi_bands(num_bands).to(device)

    def __call__(self, waveform_N: Tensor) -> Tensor:
        """Log energies `[F, M]` float32 on the device."""
        if waveform_N.shape[0] < WINDOW:
            return torch.empty(0, self._bands_RM.shape[1], device=self._device)
        windows_FW = waveform_N.to(self._device).contiguous().unfold(0, WINDOW, HOP)
        return torch.cat([self._energies(block_FW) for block_FW in windows_FW.split(_BLOCK_FRAMES)])

    def _energies(self, windows_FW: Tensor) -> Tensor:
        centred_FW = windows_FW.double() * 2.0**15
        centred_FW = centred_FW - centred_FW.mean(dim=1, keepdim=True)
        before_FW = torch.cat([centred_FW[:, :1], centred_FW[:, :-1]], dim=1)
        spectrum_FR = torch.fft.rfft((centred_FW - 0.97 * before_FW) * self._window_W, n=_KALDI_FFT)
        power_FR = spectrum_FR.to(torch.complex64).to(torch.complex128).abs().square()
        return (power_FR @ self._bands_RM).clamp_min(_KALDI_FLOOR).log().float()


class WhisperFrames:
    """Whisper's log-mel frames of segments that zeros fill up to `num_samples`: one for each whole 10 ms.

    Windows are centred on their 10 ms mark, the waveform mirrored before its start. Nothing is more than eight decades
    below the loudest of the segment (Radford et al. 2022, section 2.2; WhisperFeatureExtractor).
    """

    def __init__(self, num_bands: int, num_samples: int, device: str) -> None:
        self._num_samples = num_samples
        self._window_W = torch.hann_window(WINDOW, device=device)
        self._bands_MR = _whisper_bands(num_bands).float().t().contiguous().to(device)

    def __call__(self, waveforms_BN: Tensor) -> Tensor:
        """Frames `[B, M, num_samples // 160]` float32 of waveforms of no more than `num_samples`, on their device."""
        missing = self._num_samples - waveforms_BN.shape[1]
        # what lies beyond is silence, whose frames are known: half a window is all that the sound reaches into it
        needed = min(missing, -waveforms_BN.shape[1] % HOP + WINDOW)
        padded_BN = torch.nn.functional.pad(waveforms_BN, (0, needed))
        spectrum_BRF = torch.stft(padded_BN, WINDOW, HOP, window=self._window_W, return_complex=True)[..., :-1]
        log_BMF = (self._bands_MR @ spectrum_BRF.abs().square()).clamp_min(_WHISPER_FLOOR).log10()
        silent = self._num_samples // HOP - log_BMF.shape[2]
        log_BMF = torch.nn.functional.pad(log_BMF, (0, silent), value=math.log10(_WHISPER_FLOOR))
        return (log_BMF.maximum(log_BMF.amax(dim=(1, 2), keepdim=True) - _WHISPER_RANGE) + 4.0) / 4.0


def require_extractor(weights: Weights, tokenizer: str, expected: dict[str, Any]) -> None:
    """Raise `UserError` for a feature extractor that makes other frames; what it does not say is as expected."""
    for key, value in expected.items():
        found = weights.preprocessor.get(key, value)
        if found != value:
            raise UserError(
                f"{weights.name} has a feature extractor with {key} {found} (its preprocessor_config.json says so); "
                f"{tokenizer} takes {value}. Name other weights."
            )


def _kaldi_bands(num_bands: int) -> Tensor:
    """Triangles `[R, M]` float64, on Kaldi's mel scale, from 20 to 8,000 Hz."""
    edges = _kaldi_mel(torch.tensor([20.0, _RATE / 2], dtype=torch.float64))
    corners = torch.linspace(float(edges[0]), float(edges[1]), num_bands + 2, dtype=torch.float64)
    bins = torch.arange(_KALDI_FFT // 2 + 1, dtype=torch.float64) * (_RATE / _KALDI_FFT)
    return _triangles(_kaldi_mel(bins), corners)


def _kaldi_mel(hertz: Tensor) -> Tensor:
    return 1127.0 * (1.0 + hertz / 700.0).log()


def _whisper_bands(num_bands: int) -> Tensor:
    """Triangles `[R, M]` float64 of equal area, on Slaney's mel scale, from 0 to 8,000 Hz (librosa's)."""
    step = math.log(6.4) / 27  # of the scale's logarithmic part, which begins at 1,000 Hz, its 15th mel
    top = 15 + math.log(_RATE / 2 / 1_000) / step
    mels = torch.linspace(0.0, top, num_bands + 2, dtype=torch.float64)
    corners = torch.where(mels < 15, mels * 200 / 3, 1_000 * ((mels - 15) * step).exp())
    bins = torch.linspace(0.0, _RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    return _triangles(bins, corners) * (2.0 / (corners[2:] - corners[:-2]))


def _triangles(bins_R: Tensor, corners: Tensor) -> Tensor:
    """Bands `[R, M]` that rise from one corner to the next and fall to the one after it."""
    widths = corners.diff()
    rising = (bins_R[:, None] - corners[:-2]) / widths[:-1]
    falling = (corners[2:] - bins_R[:, None]) / widths[1:]
    return torch.minimum(rising, falling).clamp_min(0.0)
