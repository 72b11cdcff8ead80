"""SpeechTokenizer's two networks: SEANets that see both ways, the encoder's with a bidirectional LSTM.

Modules have the names of the published state dict, but for weight normalization and for doubled names of convolutions
(`conv.conv`). The walk lets a segment in a batch be what it is alone: each convolution reflects each segment at its own
end.

Axes: B segments, C channels, N positions of a layer's input, T frames, M positions beyond edges.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .dac_model import SnakeParameter

_KERNEL = 7  # of the first and the last convolution of each network
States = tuple[Tensor, Tensor]  # of an LSTM: hidden and cell


class Convolution(nn.Module):
    """A convolution that gives a frame for each begun stride, of a segment that is reflected at both ends."""

    def __init__(self, num_in: int, num_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(num_in, num_out, kernel, stride)
        self.left = (kernel - stride + 1) // 2
        self.right = (kernel - stride) // 2

    def forward(self, x_BCN: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
        """Of `[B, C, N]`, N whole strides, so many positions are each segment's; what lies beyond them is anything."""
        stride = self.conv.stride[0]
        if self.left + self.right:
            x_BCN = functional.pad(x_BCN, (self.left, self.right))
            _reflect(x_BCN, self.left, self.right, stride, valid)
        return self.conv(x_BCN), [-(-num // stride) for num in valid]

    def sees(self, first: int, last: int) -> tuple[int, int]:
        """The first and the last position of the input that those of the output are made of."""
        stride = self.conv.stride[0]
        return first * stride - self.left, last * stride - self.left + self.conv.kernel_size[0] - 1


class Upsampling(nn.Module):
    """A transposed convolution that gives `stride` positions for each; what it spills over both ends is cut off."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(num_in, num_out, 2 * stride, stride)
        self.cut = stride - stride // 2

    def forward(self, x_BCN: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
        stride = self.conv.stride[0]
        out_BCN = self.conv(x_BCN)[..., self.cut :]
        return out_BCN[..., : x_BCN.shape[2] * stride], [num * stride for num in valid]

    def sees(self, first: int, last: int) -> tuple[int, int]:
        stride = self.conv.stride[0]
        return (first + self.cut) // stride - 1, (last + self.cut) // stride


class Residual(nn.Module):
    """Two convolutions that a third goes past."""

    def __init__(self, num: int, kernel: int, activation: str) -> None:
        super().__init__()
        inner = num // 2
        self.block = nn.Sequential(
            _activation(activation, num),
            Convolution(num, inner, kernel),
            _activation(activation, inner),
            Convolution(inner, num, 1),
        )
        self.shortcut = Convolution(num, num, 1)

    def forward(self, x_BCN: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
        inner_BCN, valid = through(self.block, x_BCN, valid)
        return inner_BCN.add_(self.shortcut(x_BCN, valid)[0]), valid

    def sees(self, first: int, last: int) -> tuple[int, int]:
        return reach_of(self.block, first, last)


class Recurrent(nn.Module):
    """An LSTM in the place of a layer; what it is given is added to what it gives."""

    def __init__(self, num: int, *, both_ways: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(num, num, 2, bidirectional=both_ways)


class SeanetEncoder(nn.Module):
    """`model` is the convolutions to frames, the LSTM, an activation and the convolution to latents."""

    def __init__(self, num: int, dim: int, strides: Sequence[int], kernel: int, activation: str) -> None:
        super().__init__()
        layers: list[nn.Module] = [Convolution(1, num, _KERNEL)]
        for stride in reversed(strides):
            layers += [Residual(num, kernel, activation), _activation(activation, num)]
            layers += [Convolution(num, 2 * num, 2 * stride, stride)]
            num *= 2
        layers += [Recurrent(num, both_ways=True), _activation(activation, 2 * num)]
        layers += [Convolution(2 * num, dim, _KERNEL)]
        self.model = nn.Sequential(*layers)


class SeanetDecoder(nn.Module):
    """`model` is a convolution of latents, an LSTM that only looks back, and the convolutions to samples."""

    def __init__(self, num: int, dim: int, strides: Sequence[int], kernel: int, activation: str) -> None:
        super().__init__()
        num *= 2 ** len(strides)
        layers: list[nn.Module] = [Convolution(dim, num, _KERNEL), Recurrent(num, both_ways=False)]
        for stride in strides:
            layers += [_activation(activation, num), Upsampling(num, num // 2, stride)]
            layers += [Residual(num // 2, kernel, activation)]
            num //= 2
        layers += [_activation(activation, num), Convolution(num, 1, _KERNEL)]
        self.model = nn.Sequential(*layers)


def build(config: dict[str, Any]) -> Any:
    """A module of `encoder`, `decoder` and the centroids `[codes, D]` of each `quantizer`, without storage."""
    num, dim, strides, kernel, activation = (
        config[key] for key in ("n_filters", "dimension", "strides", "residual_kernel_size", "activation")
    )
    with torch.device("meta"):
        model = nn.Module()
        model.encoder = SeanetEncoder(num, dim, strides, kernel, activation)
        model.decoder = SeanetDecoder(num, dim, strides, kernel, activation)
        model.quantizer = nn.ParameterList(torch.empty(config["codebook_size"], dim) for _ in range(config["n_q"]))
    return model


def through(layers: Iterable[nn.Module], x_BCN: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
    """What `layers` give, and how many positions of it hold for each segment."""
    for layer in layers:
        if isinstance(layer, Convolution | Upsampling | Residual):
            x_BCN, valid = layer(x_BCN, valid)
        else:
            x_BCN = layer(x_BCN)
    return x_BCN, valid


def reach_of(layers: Iterable[nn.Module], first: int, last: int) -> tuple[int, int]:
    """The first and the last position of the input that those of what `layers` give are made of."""
    for layer in reversed(list(layers)):
        if isinstance(layer, Convolution | Upsampling | Residual):
            first, last = layer.sees(first, last)
    return first, last


def _activation(name: str, num: int) -> nn.Module:
    return SnakeParameter(num) if name == "Snake" else nn.ELU()


def _reflect(padded_BCN: Tensor, left: int, right: int, stride: int, valid: list[int]) -> None:
    """Write before and after each segment, `left` positions into `padded_BCN`, what it is reflected to.

    After it, that is `right` positions and those to a whole stride. A segment that is no longer than what either end
    is padded with is lengthened with zeros to one position more before it is reflected, and cut after (`pad1d` of
    encodec and SpeechTokenizer).
    """
    rows, targets, sources = [], [], []
    for row, num in enumerate(valid):
        after = right + -num % stride
        mirror = max(num, left + 1, after + 1) - 1
        for position in (*range(-left, 0), *range(num, num + after)):
            rows.append(row)
            targets.append(left + position)
            sources.append(left + (abs(position) if position <= mirror else 2 * mirror - position))
    rows_M, targets_M, sources_M = torch.tensor([rows, targets, sources], device=padded_BCN.device)
    ends_M = left + torch.tensor(valid, device=padded_BCN.device)[rows_M]
    edge_MC = padded_BCN[rows_M, :, sources_M].masked_fill((sources_M >= ends_M)[:, None], 0.0)
    padded_BCN[rows_M, :, targets_M] = edge_MC


def piecewise(
    layers: Sequence[nn.Module], pieces: Iterable[Tensor], num_positions: int, *, hop: int = 1
) -> Iterator[Tensor]:
    """What `layers` give, `hop` positions for each, of a segment of so many that comes in `pieces` `[1, C, n]`.

    A piece is given out once all that its positions see has come; as much is kept for those after it.
    """
    before, after = reach_of(layers, 0, hop - 1)
    before, after = -before, after
    held_BCN, given, come = torch.empty(0), 0, 0  # of those held, so many are given out already
    for piece_BCN in pieces:
        come += piece_BCN.shape[2]
        held_BCN = torch.cat([held_BCN, piece_BCN], dim=2) if held_BCN.numel() else piece_BCN
        ready = held_BCN.shape[2] - (after if come < num_positions else 0)
        if ready <= given:
            continue
        out_BCN, _ = through(layers, held_BCN, [held_BCN.shape[2]])
        yield out_BCN[..., given * hop : ready * hop]
        first = max(0, ready - before)
        given = ready - first
        held_BCN = held_BCN[..., first:].clone()


class BothWays:
    """A bidirectional LSTM of two layers: of several segments at once, or of one that comes in stretches."""

    def __init__(self, lstm: nn.LSTM) -> None:
        self._forward = [_one_way(lstm, layer, "") for layer in range(2)]
        self._backward = [_one_way(lstm, layer, "_reverse") for layer in range(2)]

    def whole(self, x_BCT: Tensor, valid: Sequence[int]) -> Tensor:
        """`[B, 2C, T]`, what is given added to it, of segments of which the first so many frames hold."""
        x_TBC = x_BCT.permute(2, 0, 1)
        turned_TB = torch.arange(x_TBC.shape[0])[:, None].repeat(1, len(valid))
        for row, num in enumerate(valid):
            turned_TB[:num, row] = turned_TB[:num, row].flip(0)
        rows_B, turned_TB = torch.arange(len(valid), device=x_TBC.device), turned_TB.to(x_TBC.device)
        y_TBC = x_TBC
        for ahead, back in zip(self._forward, self._backward, strict=True):
            back_TBC = back(y_TBC[turned_TB, rows_B])[0][turned_TB, rows_B]
            y_TBC = torch.cat([ahead(y_TBC)[0], back_TBC], dim=2)
        return _with_given(y_TBC, x_TBC)

    def stretches(self, given: Callable[[int], Tensor], count: int) -> Iterator[Tensor]:
        """`[1, 2C, t]` of each stretch; `given` says what one is given, `[1, C, t]`, and is asked three times for it.

        What the second layer is given depends on the whole segment. So the first layer goes ahead through all of it,
        then it and the second come back, then both go ahead again. Of each stretch no more is kept than the states that
        the LSTMs enter it with, so that all is exact.
        """
        (ahead_1, ahead_2), (back_1, back_2) = self._forward, self._backward
        entered: list[dict[str, States | None]] = []
        state: States | None = None
        for number in range(count):
            entered.append({"ahead_1": state})
            state = ahead_1(_time_first(given(number)), state)[1]
        first: States | None = None
        second: States | None = None
        for number in reversed(range(count)):
            x_TBC, states = _time_first(given(number)), entered[number]
            states |= {"back_1": first, "back_2": second}
            back_TBC, first = back_1(x_TBC.flip(0), first)
            middle_TBC = torch.cat([ahead_1(x_TBC, states["ahead_1"])[0], back_TBC.flip(0)], dim=2)
            second = back_2(middle_TBC.flip(0), second)[1]
        state = None
        for number, states in enumerate(entered):
            x_TBC = _time_first(given(number))
            back_TBC = back_1(x_TBC.flip(0), states["back_1"])[0].flip(0)
            middle_TBC = torch.cat([ahead_1(x_TBC, states["ahead_1"])[0], back_TBC], dim=2)
            ahead_TBC, state = ahead_2(middle_TBC, state)
            back_TBC = back_2(middle_TBC.flip(0), states["back_2"])[0].flip(0)
            yield _with_given(torch.cat([ahead_TBC, back_TBC], dim=2), x_TBC)


def _one_way(lstm: nn.LSTM, layer: int, suffix: str) -> nn.LSTM:
    """One layer of `lstm` in one direction."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    own = {f"{name}_l0": lstm.get_parameter(f"{name}_l{layer}{suffix}") for name in names}
    alone = nn.LSTM(own["weight_ih_l0"].shape[1], lstm.hidden_size, device="meta")
    alone.load_state_dict(own, assign=True)
    alone.flatten_parameters()
    return alone.requires_grad_(False)


def _time_first(x_BCT: Tensor) -> Tensor:
    return x_BCT.permute(2, 0, 1)


def _with_given(y_TBC: Tensor, x_TBC: Tensor) -> Tensor:
    return (y_TBC + x_TBC.repeat(1, 1, 2)).permute(1, 2, 0)
