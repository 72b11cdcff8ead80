"""The layers of X-Codec-2 and NeuCodec, walked so that a segment in a batch is what it is alone.

The parameters are those of transformers' `Xcodec2Model` and `NeuCodecModel`, and so are the modules, but for those that
look to the right: theirs let the padding of a batch leak into the last frames, and a segment must fit into memory.

Axes: B segments, N samples or positions of a layer, C channels, T frames, D dimensions, F frequencies, P padding.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torchaudio.compliance.kaldi as kaldi
from torch import Tensor, nn
from torch.nn import functional

from .codec import padded_span

HOP = 320  # samples of a frame
NUM_MEL = 80
STACKED = 2  # filterbank frames in one of the semantic encoder's
_SHIFT, _WINDOW = 160, 400  # samples of a filterbank frame
_UNITS = ("res_unit1", "res_unit2", "res_unit3")
_DILATIONS = (1, 3, 9)
_PADDING = 27  # positions past the end that a layer looks at: a convolution of 7 that is dilated by 9
_SNAKE_REACH = 5  # positions, through a filter of 12 at twice the rate, up and down
_UNIT_REACH = sum(3 * dilation + 2 * _SNAKE_REACH for dilation in _DILATIONS) + _SNAKE_REACH
_BLOCK = 4_096  # frames of log mels at a time, for statistics


class LogMels:
    """Kaldi's log-mel filterbank, 80 bands every 10 ms, of a waveform at 16 kHz with zeros around it.

    Two of its frames are one of the semantic encoder's; `margin` zeros come before the first sample. Each band has mean
    0 and deviation 1 over all frames of the waveform: Xcodec2FeatureExtractor and NeuCodecFeatureExtractor, with the
    same calls where the waveform is no longer than `longest` frames, else a block at a time.
    """

    def __init__(self, waveform_N: Tensor, num_frames: int, *, margin: int, longest: int, device: str) -> None:
        self._waveform_N = waveform_N
        self._margin = margin
        self._device = device
        self._whole = self._raw(0, num_frames) if num_frames <= longest else None
        self._mean_F, variance_F = self._statistics(num_frames) if self._whole is None else _of_all(self._whole)
        self._deviation_F = torch.sqrt(variance_F + 1e-7)

    def span(self, begin: int, end: int) -> Tensor:
        """Frames `begin` to `end` as the semantic encoder takes them, `[T, 160]`."""
        mels_TF = self._raw(begin, end) if self._whole is None else self._whole[STACKED * begin : STACKED * end]
        return ((mels_TF - self._mean_F) / self._deviation_F).reshape(end - begin, STACKED * NUM_MEL)

    def _raw(self, begin: int, end: int) -> Tensor:
        first = begin * HOP - self._margin
        samples_N = padded_span(self._waveform_N, first, end * HOP - self._margin + _WINDOW - _SHIFT)
        return kaldi.fbank(
            samples_N.to(self._device)[None] * (2**15),
            num_mel_bins=NUM_MEL,
            frame_length=25.0,
            frame_shift=10.0,
            sample_frequency=16_000,
            low_freq=20,
            high_freq=8_000,
            use_energy=False,
            dither=0.0,
        )

    def _statistics(self, num_frames: int) -> tuple[Tensor, Tensor]:
        sums_F = torch.zeros(NUM_MEL, dtype=torch.float64, device=self._device)
        squares_F = torch.zeros_like(sums_F)
        for begin in range(0, num_frames, _BLOCK):
            mels_TF = self._raw(begin, min(begin + _BLOCK, num_frames)).double()
            sums_F += mels_TF.sum(dim=0)
            squares_F += mels_TF.square().sum(dim=0)
        count = STACKED * num_frames
        variance_F = (squares_F - sums_F.square() / count).clamp_min(0.0) / (count - 1)
        return (sums_F / count).float(), variance_F.float()


def _of_all(mels_TF: Tensor) -> tuple[Tensor, Tensor]:
    return mels_TF.mean(0), mels_TF.var(0, unbiased=True)


def semantic(encoder: Any, adapter: Any, features_BTD: Tensor, frames: Sequence[int]) -> Tensor:
    """`[B, D, T]` by a transformers `Wav2Vec2BertModel` and `Xcodec2SemanticAdapter`; T is at least each of `frames`.

    The encoder's convolutions see the past only and its attention is masked; the adapter's see zeros past the end.
    """
    edge = _Edge(frames, features_BTD.shape[1], features_BTD.device)
    own_BT = torch.arange(features_BTD.shape[1], device=features_BTD.device) < edge.valid_B[:, None]
    hidden_BTD = encoder(features_BTD, attention_mask=own_BT.int()).last_hidden_state
    first_BDT = adapter.act1(adapter.conv1(edge.silence(hidden_BTD.transpose(1, 2))))
    x_BDT = adapter.act2(adapter.conv2(edge.silence(first_BDT)))
    x_BDT = adapter.conv3(edge.silence(x_BDT)) + first_BDT
    return adapter.conv4(edge.silence(x_BDT))


def acoustic(encoder: Any, waveforms_B1N: Tensor, valid: Sequence[int]) -> Tensor:
    """Latents `[B, D, T]` by the layers of a transformers `Xcodec2Encoder`; N and `valid` are whole hops.

    Convolutions see zeros past the end of a segment, and the filters around each Snake its last value again and again.
    """
    edge = _Edge(valid, waveforms_B1N.shape[2], waveforms_B1N.device)
    x_BCN = encoder.conv1(waveforms_B1N)
    for block in encoder.block:
        for unit in (getattr(block, name) for name in _UNITS):
            inner_BCN = unit.conv1(edge.silence(_activate(unit.snake1, x_BCN, edge)))
            x_BCN = x_BCN + unit.conv2(_activate(unit.snake2, inner_BCN, edge))
        x_BCN = block.conv1(edge.silence(_activate(block.snake1, x_BCN, edge)))
        edge = edge.at(1, block.conv1.stride[0])
    return encoder.conv2(edge.silence(_activate(encoder.snake1, x_BCN, edge)))


def acoustic_reach(strides: Sequence[int]) -> int:
    """Whole frames on either side of a frame's own samples that it sees."""
    reach = 1 + _SNAKE_REACH
    for stride in reversed(strides):
        reach = reach * stride + math.ceil(stride / 2) + _UNIT_REACH
    return math.ceil((reach + 3) / math.prod(strides))


def _activate(activation: Any, x_BCN: Tensor, edge: "_Edge") -> Tensor:
    """A transformers `Xcodec2AntiAliasedActivation1d`: up to twice the rate, Snake, and down again.

    Its Snake is x + sin^2(a x) / b (Ziyin et al. 2020; Lee et al. 2023, BigVGAN), here without copies.
    """
    twice_BCN = edge.at(2, 1).hold(activation.upsample(edge.hold(x_BCN)))
    snake = activation.act
    sine_BCN = torch.mul(twice_BCN, snake.alpha.exp()[:, None]).sin_()
    inverse_C1 = 1.0 / (snake.beta.exp()[:, None] + snake.no_div_by_zero)
    return activation.downsample(sine_BCN.mul_(sine_BCN).mul_(inverse_C1).add_(twice_BCN))


class _Edge:
    """Where each segment ends, of all tensors of one length. What is past the end is overwritten in place."""

    def __init__(self, valid: Sequence[int], length: int, device: torch.device) -> None:
        self.valid_B = torch.tensor(valid, device=device)
        self._valid = list(valid)
        self._length = length
        self._is_padded = min(valid) < length
        self._rates: dict[tuple[int, int], _Edge] = {}
        if self._is_padded:
            beyond_P = torch.arange(_PADDING, device=device)
            self._rows_B1 = torch.arange(len(valid), device=device)[:, None]
            self._past_BP = (self.valid_B[:, None] + beyond_P).clamp_max(length - 1)
            self._is_padded_B11 = (self.valid_B < length)[:, None, None]
            self._last_B = (self.valid_B - 1).clamp_min(0)

    def at(self, up: int, down: int) -> "_Edge":
        """The same ends, at `up / down` times the rate."""
        if (up, down) not in self._rates:
            valid = [num * up // down for num in self._valid]
            self._rates[up, down] = _Edge(valid, self._length * up // down, self.valid_B.device)
        return self._rates[up, down]

    def silence(self, x_BCN: Tensor) -> Tensor:
        """Zeros past the end, as far as a convolution sees."""
        return self._overwrite(x_BCN, torch.zeros((), dtype=x_BCN.dtype, device=x_BCN.device))

    def hold(self, x_BCN: Tensor) -> Tensor:
        """The last value of each channel past the end, as far as a filter sees."""
        if not self._is_padded:
            return x_BCN
        last_B1C = x_BCN[self._rows_B1[:, 0], :, self._last_B][:, None]
        return self._overwrite(x_BCN, last_B1C)

    def _overwrite(self, x_BCN: Tensor, value: Tensor) -> Tensor:
        if self._is_padded:
            there_BPC = x_BCN[self._rows_B1, :, self._past_BP]
            x_BCN[self._rows_B1, :, self._past_BP] = torch.where(self._is_padded_B11, value, there_BPC)
        return x_BCN


class Decoder:
    """Sound of latents by a transformers `Xcodec2Decoder`, window by window.

    Its transformer and group norms see all frames of a window. What is spliced are frames of the spectrum, not samples:
    the inverse transform adds four of them to each hop, which fades from one window to the next.
    """

    def __init__(self, decoder: Any, *, device: str) -> None:
        self._head = decoder.head.to(device)
        decoder.head = nn.Identity()
        self._body = decoder.to(device)

    def hidden(self, latents_TD: Tensor) -> Tensor:
        """What the spectrum of each frame is projected from, `[T, D]`."""
        return self._body(latents_TD[None])[0]

    def sound(self, pieces: Iterator[Tensor], num_frames: int) -> Tensor:
        """Samples `[T * hop]` on the CPU of all frames, from pieces of `hidden` in order: the head's own transform."""
        hop, size, window_n = self._head.hop_length, self._head.n_fft, self._head.window
        total = (num_frames - 1) * hop + size
        sound_N, envelope_N = torch.zeros(total), torch.zeros(total)
        begin = 0
        for hidden_TD in pieces:
            frames_Tn = torch.fft.irfft(self._spectrum(hidden_TD), size, dim=-1, norm="backward") * window_n
            end = begin + (len(hidden_TD) - 1) * hop + size
            sound_N[begin:end] += _overlap(frames_Tn, hop).cpu()
            envelope_N[begin:end] += _overlap(window_n.square().expand_as(frames_Tn), hop).cpu()
            begin += len(hidden_TD) * hop
        inner = slice(self._head.padding, total - self._head.padding)
        return sound_N[inner] / envelope_N[inner].clamp_min(1e-11)

    def _spectrum(self, hidden_TD: Tensor) -> Tensor:
        magnitude_TF, phase_TF = self._head.linear(hidden_TD).chunk(2, dim=-1)
        return torch.polar(torch.exp(magnitude_TF).clamp(max=1e2), phase_TF)


def _overlap(frames_Tn: Tensor, hop: int) -> Tensor:
    num, size = frames_Tn.shape
    shape = (1, (num - 1) * hop + size)
    return functional.fold(frames_Tn.t()[None], output_size=shape, kernel_size=(1, size), stride=(1, hop))[0, 0, 0]
