"""The forward pass of w2v-BERT 2.0 up to one layer, of one segment or of several that are padded.

Conformers (Gulati et al. 2020) with causal convolutions and keys that know their distance (Shaw et al. 2018), from 64
frames before to 8 after. The parameters are transformers'; the pass differs from theirs in rounding only: a query is
multiplied with each of the 73 distances once, not with every key's. Padding is to the right, where causal convolutions
do not look; attention sees a mask.

In bfloat16 the products and attention are; the convolutions, the residual stream and the norms stay float32.

Axes: B segments, T frames, F numbers of an input frame, D dimensions, H heads, P distances, K taps.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear, attend, joint_linear, layer_norm, linear, split_heads


class W2vBertModel:
    """What transformers' Wav2Vec2BertModel computes, up to its last layer; `model` may have fewer than published."""

    def __init__(self, model: nn.Module, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        parts = cast(Any, model)
        self._device = torch.device(device)
        self._dtype = dtype
        self._frame_norm = layer_norm(parts.feature_projection.layer_norm, self._device)
        self._project = linear(parts.feature_projection.projection, self._device, dtype)
        self._layers = [_Layer(layer, self._device, dtype) for layer in parts.encoder.layers]

    def at(self, frames_BTF: Tensor, lengths: Sequence[int], layers: Sequence[int]) -> Tensor:
        """Outputs of several layers side by side `[B, T, L * D]` float32, each as it is alone; 0 is what the first has.

        `lengths` are the frames, at least one, that are each segment's own; what comes past them has no meaning.
        """
        num_frames = frames_BTF.shape[1]
        place_T = torch.arange(num_frames, device=self._device)
        away_TT = place_T - place_T[:, None]
        others_BT = None
        if list(lengths) != [num_frames]:  # of several, masks are never left out: see SslModel
            others_BT = place_T >= torch.tensor(lengths, device=self._device)[:, None]
        hidden_BTD = self._project(self._frame_norm(frames_BTF).to(self._dtype)).float()
        kept = {0: hidden_BTD} if 0 in layers else {}
        for number, layer in enumerate(self._layers, start=1):
            hidden_BTD = layer(hidden_BTD, away_TT, others_BT)
            if number in layers:
                kept[number] = hidden_BTD
        return torch.cat([kept[number] for number in layers], dim=2)


class _Layer:
    """Half a network, attention, convolution, half a network."""

    def __init__(self, layer: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._first_norm = layer_norm(layer.ffn1_layer_norm, device)
        self._first = _Network(layer.ffn1, device, dtype)
        self._attention_norm = layer_norm(layer.self_attn_layer_norm, device)
        self._attention = _Attention(layer.self_attn, device, dtype)
        self._convolution_norm = layer_norm(layer.conv_module.layer_norm, device)
        self._convolution = _Convolution(layer.conv_module, device, dtype)
        self._second_norm = layer_norm(layer.ffn2_layer_norm, device)
        self._second = _Network(layer.ffn2, device, dtype)
        self._final_norm = layer_norm(layer.final_layer_norm, device)

    def __call__(self, hidden_BTD: Tensor, away_TT: Tensor, others_BT: Tensor | None) -> Tensor:
        hidden_BTD = hidden_BTD + 0.5 * self._first(self._first_norm(hidden_BTD).to(self._dtype))
        attended_BTD = self._attention(self._attention_norm(hidden_BTD).to(self._dtype), away_TT, others_BT)
        hidden_BTD = hidden_BTD + attended_BTD
        hidden_BTD = hidden_BTD + self._convolution(self._convolution_norm(hidden_BTD).to(self._dtype))
        hidden_BTD = hidden_BTD + 0.5 * self._second(self._second_norm(hidden_BTD).to(self._dtype))
        return self._final_norm(hidden_BTD)


class _Network:
    """Two products and an activation between them."""

    def __init__(self, network: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._up = linear(network.intermediate_dense, device, dtype)
        self._activation = network.intermediate_act_fn
        self._down = linear(network.output_dense, device, dtype)

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        return self._down(self._activation(self._up(hidden_BTD))).float()


class _Attention:
    """Self-attention whose scores also know how far a key is away, in frames, up to a limit on either side."""

    def __init__(self, attention: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._num_heads = attention.num_heads
        self._joint = joint_linear((attention.linear_q, attention.linear_k, attention.linear_v), device, dtype)
        self._out = linear(attention.linear_out, device, dtype)
        self._before, self._after = attention.left_max_position_embeddings, attention.right_max_position_embeddings
        scaled_Pd = attention.distance_embedding.weight * attention.head_size**-0.5
        self._distance_dP = scaled_Pd.t().to(device=device, dtype=dtype).contiguous()

    def __call__(self, hidden_BTD: Tensor, away_TT: Tensor, others_BT: Tensor | None) -> Tensor:
        query, key, value = split_heads(self._joint(hidden_BTD), self._num_heads)
        scores_BHTP = query @ self._distance_dP
        which_TT = away_TT.clamp(-self._before, self._after) + self._before
        bias_BHTT = scores_BHTP.gather(3, which_TT.expand(*scores_BHTP.shape[:2], -1, -1))
        if others_BT is not None:
            bias_BHTT.masked_fill_(others_BT[:, None, None, :], -torch.inf)
        return self._out(attend(query, key, value, bias_BHTT)).float()


class _Convolution:
    """A gate, a causal convolution of each dimension for itself, a norm and an activation, between two products."""

    def __init__(self, module: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._gate = Linear(module.pointwise_conv1.weight[:, :, 0], None, device, dtype)
        self._taps_D1K = module.depthwise_conv.weight.to(device)
        self._norm = layer_norm(module.depthwise_layer_norm, device)
        self._activation = module.activation
        self._out = Linear(module.pointwise_conv2.weight[:, :, 0], None, device, dtype)

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        gated_BDT = F.glu(self._gate(hidden_BTD).float(), dim=2).transpose(1, 2)
        dim, _, num_taps = self._taps_D1K.shape
        convolved_BDT = F.conv1d(F.pad(gated_BDT, (num_taps - 1, 0)), self._taps_D1K, groups=dim)
        return self._out(self._activation(self._norm(convolved_BDT.transpose(1, 2))).to(self._dtype)).float()
