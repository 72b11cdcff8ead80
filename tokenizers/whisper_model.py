"""The forward pass of Whisper's encoder up to one layer (Radford et al. 2022): always over 30 s, silence included.

The parameters are transformers', and so is the pass, but for rounding. In bfloat16 the products and attention are; the
two convolutions before them, the residual stream and the norms stay float32.

Axes: B segments, M bands, F log-mel frames, T frames, D dimensions.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import attend, joint_linear, layer_norm, linear, split_heads


class WhisperEncoder:
    """What transformers' WhisperEncoder computes, up to its last layer; `model` may have fewer than published.

    With `whole`, the last is the published model's last, and the norm behind it belongs to it.
    """

    def __init__(
        self, model: nn.Module, *, whole: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        parts = cast(Any, model)
        place = torch.device(device)
        self._dtype = dtype
        self._convs = [conv.to(place) for conv in (parts.conv1, parts.conv2)]
        self._position_TD = parts.embed_positions.weight.to(place)
        self._layers = [_Layer(layer, place, dtype) for layer in parts.layers]
        self._last_norm = layer_norm(parts.layer_norm, place) if whole else None

    def at(self, mel_BMF: Tensor, layers: Sequence[int]) -> Tensor:
        """Outputs of several layers side by side `[B, T, L * D]` float32; 0 is what the first layer is given."""
        for conv in self._convs:
            mel_BMF = F.gelu(conv(mel_BMF))
        hidden_BTD = mel_BMF.transpose(1, 2) + self._position_TD
        kept = {0: hidden_BTD} if 0 in layers else {}
        for number, layer in enumerate(self._layers, start=1):
            hidden_BTD = layer(hidden_BTD)
            if number in layers:
                kept[number] = hidden_BTD
        if self._last_norm is not None and len(self._layers) in layers:
            kept[len(self._layers)] = self._last_norm(hidden_BTD)
        return torch.cat([kept[number] for number in layers], dim=2)


class _Layer:
    """Attention and network, each behind a norm."""

    def __init__(self, layer: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        attention = layer.self_attn
        self._num_heads = attention.num_heads
        self._attention_norm = layer_norm(layer.self_attn_layer_norm, device)
        self._joint = joint_linear((attention.q_proj, attention.k_proj, attention.v_proj), device, dtype)
        self._out = linear(attention.out_proj, device, dtype)
        self._network_norm = layer_norm(layer.final_layer_norm, device)
        self._up = linear(layer.fc1, device, dtype)
        self._activation = layer.activation_fn
        self._down = linear(layer.fc2, device, dtype)

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        joint_BTE = self._joint(self._attention_norm(hidden_BTD).to(self._dtype))
        hidden_BTD = hidden_BTD + self._out(attend(*split_heads(joint_BTE, self._num_heads), None)).float()
        normed_BTD = self._network_norm(hidden_BTD).to(self._dtype)
        return hidden_BTD + self._down(self._activation(self._up(normed_BTD))).float()
