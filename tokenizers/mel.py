"""Stacked log-mel frames and the way back to sound: the acoustic baseline that needs no trained network."""

from typing import ClassVar

import torch
from torch import Tensor
from torchaudio.functional import griffinlim, melscale_fbanks

from .spec import FrameRule, StreamSpec
from .tokenizer import Description, TokenizerConfig, TokenizerEntry

_SHIFT = 160  # samples: 10 ms at 16 kHz
_FFT = 640
_NUM_MEL = 80
_FLOOR = 1e-5
_BLOCK_FRAMES = 1024  # 10 ms frames at a time, counted from the segment's start: bounded memory, same codes
_GRIFFIN_LIM_ROUNDS = 60
_MIN_DECODE = 4  # 20 ms frames
_DECODE_BLOCK = 3_000  # 20 ms frames (one minute) through Griffin-Lim at a time
_DECODE_OVERLAP = 25  # 20 ms frames of context on either side of a block


class MelFeatures:
    """Two 10 ms log-mel frames of 80 Slaney bands stacked to one 160-dimensional vector every 20 ms, 16 kHz.

    Frame count is `ceil(n / 320)`: the waveform is followed by silence to a whole hop, and each window of 640 samples
    is centred on its 10 ms mark with silence beyond both ends.
    """

    spec = StreamSpec(
        tokenizer="mel-rvq",
        sample_rate=16_000,
        decode_sample_rate=16_000,
        hop_length=2 * _SHIFT,
        window_length=1,
        frame_rule=FrameRule.CEIL,
        num_codebooks=8,
        codebook_size=1024,
    )
    dim = 2 * _NUM_MEL
    fingerprint: ClassVar[dict[str, str]] = {"features": "mel-rvq/1"}  # raised with every change of a number
    precision = "float32"

    def __init__(self, *, device: str = "cpu") -> None:
        self._device = device
        mel_FM = melscale_fbanks(_FFT // 2 + 1, 0.0, 8_000.0, _NUM_MEL, self.spec.sample_rate, "slaney", "slaney")
        self._mel_FM = mel_FM.to(device)
        self._inverse_MF = torch.linalg.pinv(mel_FM).to(device)
        self._window = torch.hann_window(_FFT, device=device)

    def extract(self, waveform_N: Tensor) -> Tensor:
        """Features `[T, 160]` of a mono float32 waveform at 16 kHz."""
        num_frames = -(-waveform_N.shape[0] // self.spec.hop_length)
        if num_frames == 0:
            return torch.empty(0, self.dim, device=self._device)
        right = num_frames * self.spec.hop_length - waveform_N.shape[0]
        padded = torch.nn.functional.pad(
            waveform_N.to(self._device).contiguous(), (_FFT // 2, right + _FFT // 2 - _SHIFT)
        )
        windows_TW = padded.unfold(0, _FFT, _SHIFT)
        blocks = [self._log_mel(block_TW) for block_TW in windows_TW.split(_BLOCK_FRAMES)]
        return torch.cat(blocks).reshape(num_frames, self.dim)

    def synthesize(self, features_TD: Tensor) -> Tensor:
        """Sound `[T * 320]` at 16 kHz by fast Griffin-Lim (Perraudin et al. 2013), phases started at zero.

        Long segments are synthesized a minute at a time with half a second of context on either side.
        """
        pieces = []
        for begin in range(0, features_TD.shape[0], _DECODE_BLOCK):
            first = max(0, begin - _DECODE_OVERLAP)
            end = min(begin + _DECODE_BLOCK, features_TD.shape[0])
            last = min(end + _DECODE_OVERLAP, features_TD.shape[0])
            sound = self._griffin_lim(features_TD[first:last])
            pieces.append(sound[(begin - first) * self.spec.hop_length : (end - first) * self.spec.hop_length])
        return torch.cat(pieces) if pieces else torch.empty(0, device=self._device)

    def _log_mel(self, windows_TW: Tensor) -> Tensor:
        magnitude_TF = torch.fft.rfft(windows_TW * self._window).abs()
        return (magnitude_TF @ self._mel_FM).clamp_min(_FLOOR).log()

    def _griffin_lim(self, features_TD: Tensor) -> Tensor:
        num_samples = features_TD.shape[0] * self.spec.hop_length
        if features_TD.shape[0] < _MIN_DECODE:  # the STFT reflects half a window at both ends
            repeats = _MIN_DECODE - features_TD.shape[0]
            features_TD = torch.cat([features_TD, features_TD[-1:].expand(repeats, -1)])
        mel_TM = features_TD.reshape(-1, _NUM_MEL).exp()
        magnitude_TF = (mel_TM @ self._inverse_MF).clamp_min(0.0)
        # one frame more than marks: a centred inverse STFT of T + 1 frames gives T whole shifts
        magnitude_FT = torch.cat([magnitude_TF, magnitude_TF[-1:]]).t()
        return griffinlim(
            magnitude_FT[None],
            window=self._window,
            n_fft=_FFT,
            hop_length=_SHIFT,
            win_length=_FFT,
            power=1.0,
            n_iter=_GRIFFIN_LIM_ROUNDS,
            momentum=0.99,
            length=mel_TM.shape[0] * _SHIFT,
            rand_init=False,
        )[0, :num_samples]


def _describe(config: TokenizerConfig) -> Description:
    return Description(config, MelFeatures.spec, MelFeatures.fingerprint, dim=MelFeatures.dim)


ENTRIES = (
    TokenizerEntry(
        spec=MelFeatures.spec,
        kind="acoustic",
        about="two stacked log-mel frames, residual k-means, fast Griffin-Lim",
        needs_codebook=True,
        last_frame="silence after the end",
        long_audio="whole, in blocks; exact (decode: a minute at a time, half a second of context)",
        describe=_describe,
        open=lambda description, device: MelFeatures(device=device),
    ),
)
