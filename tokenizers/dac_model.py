"""The layers of DAC, walked so that a segment in a batch, and a frame in a chunk, is what it is alone and in the whole.

The parameters are those of transformers' `DacModel`; the walk is ours, since theirs lets the padding of a batch leak
into the last frames and needs a segment in memory as a whole.

Axes: B segments, C channels, N positions of a layer's input, T frames, D dimensions of a latent.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_UNITS = ("res_unit1", "res_unit2", "res_unit3")
_UNIT_REACH = 3 * (1 + 3 + 9)  # three convolutions over 7 positions, dilated by 1, 3 and 9
_EDGE_REACH = 3  # the first and the last convolution of each network, over 7 positions
_LATENT_REACH = 1  # the encoder's last one, over 3


class SnakeParameter(nn.Module):
    """What weights have of a Snake; `with_fast_snakes` puts what computes it in its place."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, num, 1))


class Snake(nn.Module):
    """x + sin^2(a x) / a, a for each channel (Ziyin et al. 2020), with the reciprocal worked out beforehand."""

    alpha: Tensor
    inverse: Tensor

    def __init__(self, alpha_1C1: Tensor) -> None:
        super().__init__()
        self.register_buffer("alpha", alpha_1C1.detach().clone())
        self.register_buffer("inverse", (alpha_1C1.detach() + 1e-9).reciprocal())

    def forward(self, x_BCN: Tensor) -> Tensor:
        sine_BCN = torch.mul(x_BCN, self.alpha).sin_()
        return sine_BCN.mul_(sine_BCN).mul_(self.inverse).add_(x_BCN)


def with_fast_snakes(model: nn.Module) -> nn.Module:
    """`model` with transformers' Snake1d, which makes five copies of its input, replaced by `Snake`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "alpha"):
                setattr(parent, name, Snake(child.get_parameter("alpha")))
    return model


def encode(encoder: Any, waveforms_B1N: Tensor, valid: Sequence[int]) -> Tensor:
    """Latents `[B, D, T]` by the layers of a transformers `DacEncoder`; N and `valid` are whole hops.

    Convolutions look both ways and see zeros beyond a segment. After each layer with a bias, what lies past the
    `valid` positions of a segment is therefore zeroed again; Snake leaves zeros be.
    """
    beyond = Beyond(valid, waveforms_B1N)
    x_BCN = beyond.silence(encoder.conv1(waveforms_B1N))
    for block in encoder.block:
        x_BCN = _residual_units(block, x_BCN, beyond)
        stride = block.conv1.stride[0]
        valid = [num // stride for num in valid]
        x_BCN = block.conv1(block.snake1(x_BCN))
        beyond = Beyond(valid, x_BCN)
        x_BCN = beyond.silence(x_BCN)
    return encoder.conv2(encoder.snake1(x_BCN))


def decode(decoder: Any, latents_BDT: Tensor) -> Tensor:
    """Samples `[B, 1, N]` by the layers of a transformers `DacDecoder`."""
    x_BCN = decoder.conv1(latents_BDT)
    for block in decoder.block:
        x_BCN = block.conv_t1(block.snake1(x_BCN))
        x_BCN = _residual_units(block, x_BCN, None)
    return decoder.tanh(decoder.conv2(decoder.snake1(x_BCN)))  # X-Codec has the identity in its place


def encoder_reach(strides: Sequence[int], latent_reach: int = _LATENT_REACH) -> tuple[int, int]:
    """Whole frames before and after a frame's own samples that it sees."""
    first, last = -latent_reach, latent_reach
    for stride in reversed(strides):
        padding = math.ceil(stride / 2)
        first = first * stride - padding - _UNIT_REACH
        last = last * stride - padding + 2 * stride - 1 + _UNIT_REACH
    hop = math.prod(strides)
    return -((first - _EDGE_REACH) // hop), (last + _EDGE_REACH) // hop


def decoder_reach(strides: Sequence[int]) -> tuple[int, int]:
    """Whole frames before and after its own that a frame's samples are made of; `strides` are the encoder's."""
    first, last = -_EDGE_REACH, math.prod(strides) - 1 + _EDGE_REACH
    for stride in strides:
        padding = math.ceil(stride / 2)
        first = (first - _UNIT_REACH + padding) // stride - 1
        last = (last + _UNIT_REACH + padding) // stride
    return _EDGE_REACH - first, last + _EDGE_REACH


def decode_trim(strides: Sequence[int]) -> int:
    """Samples that decoding gives less than whole hops: a transposed convolution of odd stride is one short."""
    trim = 0
    for stride in reversed(strides):
        trim = trim * stride + stride % 2
    return trim


def _residual_units(block: Any, x_BCN: Tensor, beyond: "Beyond | None") -> Tensor:
    for unit in (getattr(block, name) for name in _UNITS):
        x_BCN = unit.conv2(unit.snake2(unit.conv1(unit.snake1(x_BCN)))).add_(x_BCN)
        if beyond is not None:
            x_BCN = beyond.silence(x_BCN)
    return x_BCN


class Beyond:
    """The positions past each segment's valid ones, of all tensors of one length."""

    def __init__(self, valid: Sequence[int], x_BCN: Tensor) -> None:
        self._shortest = min(valid)
        self._mask_B1N: Tensor | None = None
        if self._shortest < x_BCN.shape[2]:
            positions_N = torch.arange(self._shortest, x_BCN.shape[2], device=x_BCN.device)
            self._mask_B1N = positions_N >= torch.tensor(valid, device=x_BCN.device)[:, None, None]

    def silence(self, x_BCN: Tensor) -> Tensor:
        if self._mask_B1N is not None:
            x_BCN[..., self._shortest :].masked_fill_(self._mask_B1N, 0.0)
        return x_BCN
