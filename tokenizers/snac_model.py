"""SNAC's two networks and its quantizer of several rates.

Modules have the names of the published state dict, but for weight normalization. As in DAC, whose layers these are but
for convolutions of single channels, the walk silences what lies past a segment, so that it is in a batch what it is
alone.

Axes: B segments, C channels, N positions of a layer's input, T frames, L latents of one, D dimensions of a latent, K
codes of a frame, P positions of the tape.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .dac_model import Beyond, SnakeParameter
from .factorized import FactorizedQuantizer

LATENT_REACH = 3  # the encoder's last convolution, over 7 latents
_TAPE = 65_536  # positions


class Residual(nn.Module):
    def __init__(self, num: int, dilation: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            SnakeParameter(num),
            nn.Conv1d(num, num, 7, padding=3 * dilation, dilation=dilation, groups=groups),
            SnakeParameter(num),
            nn.Conv1d(num, num, 1),
        )

    def forward(self, x_BCN: Tensor) -> Tensor:
        return self.block(x_BCN).add_(x_BCN)


class Down(nn.Module):
    def __init__(self, num: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.block = nn.Sequential(
            *(Residual(num, dilation, groups) for dilation in (1, 3, 9)),
            SnakeParameter(num),
            nn.Conv1d(num, 2 * num, 2 * stride, stride, padding=math.ceil(stride / 2)),
        )


class Noise(nn.Module):
    """How loud the noise is that each position is given: a number for each channel, made from the position."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(num, num, 1, bias=False)

    def forward(self, x_BCN: Tensor, noise_N: Tensor) -> Tensor:
        return x_BCN + noise_N * self.linear(x_BCN)


class Up(nn.Module):
    def __init__(self, num: int, stride: int, groups: int, *, noise: bool) -> None:
        super().__init__()
        half = num // 2
        self.stride = stride
        self.block = nn.Sequential(
            SnakeParameter(num),
            nn.ConvTranspose1d(num, half, 2 * stride, stride, math.ceil(stride / 2), output_padding=stride % 2),
            *([Noise(half)] if noise else []),
            *(Residual(half, dilation, groups) for dilation in (1, 3, 9)),
        )


class SnacEncoder(nn.Module):
    def __init__(self, num: int, strides: Sequence[int], *, depthwise: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(1, num, 7, padding=3)]
        for stride in strides:
            layers.append(Down(num, stride, num if depthwise else 1))
            num *= 2
        layers.append(nn.Conv1d(num, num, 7, padding=3, groups=num if depthwise else 1))
        self.block = nn.Sequential(*layers)


class SnacDecoder(nn.Module):
    def __init__(self, dim: int, num: int, strides: Sequence[int], *, depthwise: bool, noise: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(dim, num, 7, padding=3)]
        if depthwise:
            layers = [nn.Conv1d(dim, dim, 7, padding=3, groups=dim), nn.Conv1d(dim, num, 1)]
        for stride in strides:
            layers.append(Up(num, stride, num // 2 if depthwise else 1, noise=noise))
            num //= 2
        layers += [SnakeParameter(num), nn.Conv1d(num, 1, 7, padding=3)]
        self.model = nn.Sequential(*layers)


class Level(nn.Module):
    """A codebook and the projections around it; `FactorizedQuantizer` knows what to do with them."""

    def __init__(self, dim: int, code_dim: int, size: int) -> None:
        super().__init__()
        self.in_proj = nn.Conv1d(dim, code_dim, 1)
        self.out_proj = nn.Conv1d(code_dim, dim, 1)
        self.codebook = nn.Embedding(size, code_dim)


def build(config: dict[str, Any]) -> Any:
    """A module of `encoder`, `decoder` and `quantizer.quantizers`, without storage."""
    strides, depthwise = config["encoder_rates"], config["depthwise"]
    dim = config["encoder_dim"] * 2 ** len(strides)
    with torch.device("meta"):
        model = nn.Module()
        model.encoder = SnacEncoder(config["encoder_dim"], strides, depthwise=depthwise)
        model.decoder = SnacDecoder(
            dim, config["decoder_dim"], config["decoder_rates"], depthwise=depthwise, noise=config["noise"]
        )
        model.quantizer = nn.Module()
        model.quantizer.quantizers = nn.ModuleList(
            Level(dim, config["codebook_dim"], config["codebook_size"]) for _ in config["vq_strides"]
        )
    return model


def encode(encoder: Any, waveforms_B1N: Tensor, valid: Sequence[int]) -> Tensor:
    """Latents `[B, D, N']` of samples of which so many are each segment's, whole hops."""
    beyond = Beyond(valid, waveforms_B1N)
    x_BCN = waveforms_B1N
    for layer in encoder.block:
        if not isinstance(layer, Down):
            x_BCN = beyond.silence(layer(x_BCN))
            continue
        *residuals, snake, down = layer.block
        for residual in residuals:
            x_BCN = beyond.silence(residual(x_BCN))
        valid = [num // layer.stride for num in valid]
        x_BCN = down(snake(x_BCN))
        beyond = Beyond(valid, x_BCN)
        x_BCN = beyond.silence(x_BCN)
    return x_BCN


def decode(decoder: Any, latents_BDN: Tensor, tapes: Sequence[Tensor], first: int) -> Tensor:
    """Samples `[B, 1, N]` of latents of which the first is number `first` of its segment.

    The published decoder adds noise that it draws anew each time; here `tapes` have it, of which each position of a
    segment is given its own, so that the same codes are the same sound, in one piece or in several.
    """
    x_BCN, tape = latents_BDN, iter(tapes)
    for layer in decoder.model:
        if not isinstance(layer, Up):
            x_BCN = layer(x_BCN)
            continue
        first *= layer.stride
        for inner in layer.block:
            if isinstance(inner, Noise):
                places_N = torch.arange(first, first + x_BCN.shape[2], device=x_BCN.device) % _TAPE
                x_BCN = inner(x_BCN, next(tape)[places_N])
            else:
                x_BCN = inner(x_BCN)
    return x_BCN.tanh_()


def noise_tapes(decoder: Any, device: str) -> list[Tensor]:
    """Noise `[P]` of deviation 1 for each place where the decoder adds some."""
    generator = torch.Generator().manual_seed(0)
    noisy = sum(isinstance(module, Noise) for module in decoder.modules())
    return [torch.randn(_TAPE, generator=generator).to(device) for _ in range(noisy)]


class MultiRateQuantizer:
    """Residual quantization by direction, each level at its own rate.

    A level averages what the levels before leave over `stride` latents, and takes the vector of its code from each of
    them. A frame is as many latents as the first level's stride; its codes are those of the first level, then those of
    the second in their order, and so on. Siuzdak et al. 2024, section 2.
    """

    def __init__(self, levels: Sequence[Any], strides: Sequence[int], *, device: str = "cpu") -> None:
        self._levels = [FactorizedQuantizer([level], device=device) for level in levels]
        self._strides = list(strides)
        self._counts = [strides[0] // stride for stride in strides]

    @torch.no_grad()
    def encode(self, frames_TX: Tensor) -> Tensor:
        """Codes `[K, T]`, int64, of frames `[T, L x D]`."""
        return self._each(frames_TX, lambda level, _, codes_1M: codes_1M)

    @torch.no_grad()
    def gaps(self, frames_TX: Tensor) -> Tensor:
        """How sure each code is, `[K, T]` float64: see `FactorizedQuantizer.gaps`."""
        return self._each(frames_TX, lambda level, mean_MD, _: level.gaps(mean_MD))

    def _each(self, frames_TX: Tensor, of: Any) -> Tensor:
        num_frames, left_TLD = frames_TX.shape[0], frames_TX.unflatten(1, (self._strides[0], -1)).clone()
        rows = []
        for level, count in zip(self._levels, self._counts, strict=True):
            parts_TKLD = left_TLD.unflatten(1, (count, -1))
            mean_MD = parts_TKLD.mean(dim=2).flatten(0, 1)
            codes_1M = level.encode(mean_MD)
            rows.append(of(level, mean_MD, codes_1M).view(num_frames, count).t())
            parts_TKLD -= level.decode(codes_1M).view(num_frames, count, 1, -1)
        return torch.cat(rows)

    @torch.no_grad()
    def decode(self, codes_KT: Tensor) -> Tensor:
        """Latents `[T x L, D]` of the first K codes of each frame; those that are not given add nothing."""
        total_ND = torch.zeros((), device=codes_KT.device)
        for level, stride, count in zip(self._levels, self._strides, self._counts, strict=True):
            codes_CT, codes_KT = codes_KT[:count], codes_KT[count:]
            num_given, num_frames = codes_CT.shape
            if num_given:
                vectors_MD = level.decode(codes_CT.t().reshape(1, -1))
                vectors_TCD = vectors_MD.unflatten(0, (num_frames, num_given))
                vectors_TCD = functional.pad(vectors_TCD, (0, 0, 0, count - num_given))
                total_ND = total_ND + vectors_TCD.flatten(0, 1).repeat_interleave(stride, dim=0)
        return total_ND
