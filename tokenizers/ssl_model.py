"""The forward pass of HuBERT, WavLM, wav2vec 2.0 and data2vec up to one layer, of one segment or of several padded.

The parameters are transformers'; the pass is our own, so that nothing leaks from padding and nothing is computed that
the layer does not need. It differs from transformers' in rounding only:

- the group norm after the first convolution of base models is folded into it. Mean and variance of a channel follow
  from mean and covariance of the windows of the waveform, taken in float64 over the segment's own samples (or over the
  whole recording that it is a part of);
- convolutions are matrix products over time-major frames, a block of frames at a time, so that what they give stays in
  the cache (CPU) or does not fill the memory (GPU);
- on a CPU a positional convolution, up to 128 taps wide, goes through the FFT (overlap-save);
- WavLM's gated bias (Chen et al. 2022, section III-B) is given to fused attention as its mask.

In bfloat16 the products, convolutions and attention are; the first convolution, the positional one, the transformer's
residual stream and its norms stay float32.

Axes: B segments, N samples, T frames, C channels of the convolutions, D dimensions of the transformer, H heads, K taps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear, attend, joint_linear, layer_norm, linear, same, split_heads

_CPU_BLOCK = {torch.float32: 64, torch.bfloat16: 128}  # frames: 8 MB after the first convolution
_GPU_BLOCK = 1_536  # frames: 30 s
_STATISTICS_BLOCK = 1 << 17  # windows of the first convolution: 41 s


class SslModel:
    """What transformers' HubertModel, WavLMModel, Wav2Vec2Model or Data2VecAudioModel computes, up to its last layer.

    `model` may have fewer layers than it was published with, or none; its weight norms are multiplied out.
    """

    def __init__(self, model: nn.Module, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        parts = cast(Any, model)
        self._device = torch.device(device)
        self._dtype = dtype
        self._block = _CPU_BLOCK[dtype] if self._device.type == "cpu" else _GPU_BLOCK
        convs = list(parts.feature_extractor.conv_layers)
        self.hop_length = math.prod(conv.conv.stride[0] for conv in convs)
        self.window_length = 1
        for conv in reversed(convs):
            self.window_length = (self.window_length - 1) * conv.conv.stride[0] + conv.conv.kernel_size[0]
        self._first = _FirstConv(convs[0], self._device)
        self._convs = [_Conv(conv, self._device, dtype) for conv in convs[1:]]
        projection = parts.feature_projection
        has_norm = getattr(projection, "feat_proj_layer_norm", True)
        self._frame_norm = layer_norm(projection.layer_norm, self._device) if has_norm else same
        self._project = linear(projection.projection, self._device, dtype)
        encoder = parts.encoder
        embedding = encoder.pos_conv_embed  # data2vec has several
        self._positions = [_PositionConv(each, self._device) for each in getattr(embedding, "layers", [embedding])]
        self._norm_first = bool(getattr(parts.config, "do_stable_layer_norm", False))  # data2vec's is always last
        self._norm = same if self._norm_first else layer_norm(encoder.layer_norm, self._device)
        self._layers = [_Layer(layer, self._norm_first, self._device, dtype) for layer in encoder.layers]
        bias = getattr(encoder.layers[0].attention, "rel_attn_embed", None) if self._layers else None
        self._bias = None if bias is None else _PositionBias(encoder.layers[0].attention, self._device)

    def num_frames(self, num_samples: int) -> int:
        return 0 if num_samples < self.window_length else (num_samples - self.window_length) // self.hop_length + 1

    def statistics(self, spans: Callable[[int, int], Tensor], num_samples: int) -> "Statistics | None":
        """What the group norm has to know of a waveform of `num_samples`, at least one window, read span by span.

        None where there is no group norm. Memory does not grow with the waveform.
        """
        return self._first.statistics(spans, num_samples)

    def frames(
        self, waveforms_BN: Tensor, lengths: Sequence[int], statistics: Sequence["Statistics | None"] = ()
    ) -> Tensor:
        """Layer-normed frames `[B, T, C]` float32 that the transformer's input and wav2vec 2.0's codes are made of.

        `lengths` are the samples that are each segment's own, at least one window; what the frames past them hold has
        no meaning, and the frames before depend on no other samples. `statistics` are those of the recordings that the
        segments are parts of; without, the segments' own are taken.
        """
        return self._frame_norm(self._convolve(waveforms_BN, lengths, statistics).float())

    def __call__(
        self, waveforms_BN: Tensor, lengths: Sequence[int], statistics: Sequence["Statistics | None"] = ()
    ) -> Tensor:
        """The last layer's output `[B, T, D]` float32, as `frames`; without layers, what the first would be given."""
        return self.at(waveforms_BN, lengths, statistics, layers=(len(self._layers),))

    def at(
        self,
        waveforms_BN: Tensor,
        lengths: Sequence[int],
        statistics: Sequence["Statistics | None"] = (),
        *,
        layers: Sequence[int],
    ) -> Tensor:
        """Outputs of several layers side by side `[B, T, L * D]`, each as it is alone; 0 is what the first is given."""
        frames_BTC = self.frames(waveforms_BN, lengths, statistics)
        own_BT = self._own(lengths, frames_BTC.shape[1])
        hidden_BTD = self._project(frames_BTC.to(self._dtype)).float()
        place_BTD = hidden_BTD
        for position in self._positions:
            place_BTD = position(place_BTD, own_BT)
        hidden_BTD = self._norm(hidden_BTD + place_BTD)
        mask = None if own_BT is None else own_BT[:, None, None, :]
        bias_HTT = None if self._bias is None else self._bias(hidden_BTD.shape[1]).to(self._dtype)
        kept = {0: hidden_BTD} if 0 in layers else {}
        for number, layer in enumerate(self._layers, start=1):
            hidden_BTD = layer(hidden_BTD, mask, bias_HTT)
            if number in layers:
                kept[number] = hidden_BTD
        return kept[layers[0]] if len(layers) == 1 else torch.cat([kept[number] for number in layers], dim=2)

    def _own(self, lengths: Sequence[int], num_frames: int) -> Tensor | None:
        """Which frames are the segments' own `[B, T]`; None for one that is not padded, which needs no masks.

        Of several, masks are never left out: whether they are must not depend on what else is in the batch.
        """
        own_B = [self.num_frames(length) for length in lengths]
        if own_B == [num_frames]:
            return None
        return torch.arange(num_frames, device=self._device) < torch.tensor(own_B, device=self._device)[:, None]

    def _convolve(
        self, waveforms_BN: Tensor, lengths: Sequence[int], statistics: Sequence["Statistics | None"]
    ) -> Tensor:
        first = self._first.fit(waveforms_BN, lengths, statistics)
        num_frames = self.num_frames(waveforms_BN.shape[1])
        blocks = []
        for begin in range(0, num_frames, self._block):
            end = min(begin + self._block, num_frames)
            last = (end - 1) * self.hop_length + self.window_length
            frames_BTC = first(waveforms_BN[:, begin * self.hop_length : last]).to(self._dtype)
            for conv in self._convs:
                frames_BTC = conv(frames_BTC)
            blocks.append(frames_BTC)
        return torch.cat(blocks, dim=1)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean and covariance of the windows that the first convolution sees of a waveform, float64."""

    mean_K: Tensor
    covariance_KK: Tensor


class _FirstConv:
    """The first convolution with its norm and activation, in float32."""

    def __init__(self, layer: Any, device: torch.device) -> None:
        conv = layer.conv
        self._num_taps, self._stride = conv.kernel_size[0], conv.stride[0]
        self._weight_KC = conv.weight[:, 0].t().to(device).contiguous()
        channels = self._weight_KC.shape[1]
        self._bias_C = torch.zeros(channels, device=device) if conv.bias is None else conv.bias.to(device)
        norm = getattr(layer, "layer_norm", None)
        self._group_norm = norm.to(device) if isinstance(norm, nn.GroupNorm) else None
        self._norm = layer_norm(norm, device) if isinstance(norm, nn.LayerNorm) else same
        self._activation = layer.activation

    def statistics(self, spans: Callable[[int, int], Tensor], num_samples: int) -> Statistics | None:
        if self._group_norm is None:
            return None
        num_windows = (num_samples - self._num_taps) // self._stride + 1
        sum_K = torch.zeros(self._num_taps, dtype=torch.float64, device=self._weight_KC.device)
        sum_KK = torch.zeros(self._num_taps, self._num_taps, dtype=torch.float64, device=self._weight_KC.device)
        for begin in range(0, num_windows, _STATISTICS_BLOCK):
            end = min(begin + _STATISTICS_BLOCK, num_windows)
            span_N = spans(begin * self._stride, (end - 1) * self._stride + self._num_taps)
            windows_TK = span_N.unfold(0, self._num_taps, self._stride).double()
            sum_K += windows_TK.sum(dim=0)
            sum_KK += windows_TK.t() @ windows_TK
        mean_K = sum_K / num_windows
        return Statistics(mean_K, sum_KK / num_windows - mean_K.outer(mean_K))

    def fit(
        self, waveforms_BN: Tensor, lengths: Sequence[int], statistics: Sequence[Statistics | None]
    ) -> Callable[[Tensor], Tensor]:
        """The convolution of spans of these waveforms, `[B, n]` to `[B, T, C]`, the group norm folded in."""
        weight_BKC = self._weight_KC.expand(len(lengths), -1, -1)
        bias_B1C = self._bias_C.expand(len(lengths), 1, -1)
        if self._group_norm is not None:
            if not statistics:
                rows = zip(waveforms_BN, lengths, strict=True)
                statistics = [self.statistics(partial(_span, row_N), length) for row_N, length in rows]
            folded = [self._fold(each) for each in statistics if each is not None]
            weight_BKC = torch.stack([weight_KC for weight_KC, _ in folded])
            bias_B1C = torch.stack([bias_C[None] for _, bias_C in folded])

        def convolve(span_BN: Tensor) -> Tensor:
            windows_BTK = span_BN.unfold(1, self._num_taps, self._stride).contiguous()
            return self._activation(self._norm(torch.baddbmm(bias_B1C, windows_BTK, weight_BKC)))

        return convolve

    def _fold(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Weights `[K, C]` and biases `[C]` that convolve and normalize: the convolution's own bias falls away."""
        norm = cast(nn.GroupNorm, self._group_norm)
        weight_KC = self._weight_KC.double()
        variance_C = (weight_KC * (statistics.covariance_KK @ weight_KC)).sum(dim=0).clamp_min(0.0)
        scale_C = norm.weight.double() * torch.rsqrt(variance_C + norm.eps)
        return (weight_KC * scale_C).float(), (norm.bias.double() - scale_C * (statistics.mean_K @ weight_KC)).float()


class _Conv:
    """A later convolution with its norm, if any, and activation: a matrix product over windows of frames."""

    def __init__(self, layer: Any, device: torch.device, dtype: torch.dtype) -> None:
        conv = layer.conv
        self._num_taps, self._stride = conv.kernel_size[0], conv.stride[0]
        self._linear = Linear(conv.weight.permute(0, 2, 1).flatten(1), conv.bias, device, dtype)
        norm = getattr(layer, "layer_norm", None)
        self._norm = same if norm is None else layer_norm(norm, device, dtype)
        self._activation = layer.activation

    def __call__(self, frames_BTC: Tensor) -> Tensor:
        batch, num_frames, channels = frames_BTC.shape
        shape = (batch, (num_frames - self._num_taps) // self._stride + 1, self._num_taps * channels)
        windows_BTC = frames_BTC.as_strided(shape, (num_frames * channels, self._stride * channels, 1))
        return self._activation(self._norm(self._linear(windows_BTC)))


class _PositionConv:
    """The convolution that tells the transformer where a frame is: zeros before the first and after the last."""

    def __init__(self, embedding: Any, device: torch.device) -> None:
        conv = embedding.conv
        self._batch_norm = None if getattr(embedding, "batch_norm", None) is None else embedding.batch_norm.to(device)
        norm = getattr(embedding, "layer_norm", None)
        self._norm = same if norm is None else layer_norm(norm, device)
        self._activation = embedding.activation
        self._groups, self._num_taps = conv.groups, conv.kernel_size[0]
        self._weight = conv.weight.to(device)
        self._bias_D = conv.bias.to(device)
        self._fft = 1 << (2 * self._num_taps - 1).bit_length()
        if device.type == "cpu":
            dim = self._weight.shape[0]
            weight_GOIK = self._weight.view(self._groups, dim // self._groups, dim // self._groups, self._num_taps)
            self._spectrum_FGIO = torch.fft.rfft(weight_GOIK, n=self._fft).conj().permute(3, 0, 2, 1).contiguous()

    def __call__(self, hidden_BTD: Tensor, own_BT: Tensor | None) -> Tensor:
        if self._batch_norm is not None:
            hidden_BTD = self._batch_norm(hidden_BTD.transpose(1, 2)).transpose(1, 2)
        if own_BT is not None:
            hidden_BTD = hidden_BTD.masked_fill(~own_BT[:, :, None], 0.0)
        if hidden_BTD.device.type == "cpu":
            return self._activation(self._norm(self._by_fft(hidden_BTD) + self._bias_D))
        hidden_BDT = F.conv1d(
            hidden_BTD.transpose(1, 2), self._weight, self._bias_D, padding=self._num_taps // 2, groups=self._groups
        )
        return self._activation(self._norm(hidden_BDT[:, :, : hidden_BTD.shape[1]].transpose(1, 2)))

    def _by_fft(self, hidden_BTD: Tensor) -> Tensor:
        batch, num_frames, dim = hidden_BTD.shape
        step = self._fft - self._num_taps + 1  # outputs of a block that no other block's frames touch
        num_blocks = -(-num_frames // step)
        left = self._num_taps // 2
        right = (num_blocks - 1) * step + self._fft - left - num_frames
        blocks_BSDn = F.pad(hidden_BTD, (0, 0, left, right)).unfold(1, self._fft, step)
        spectrum = torch.fft.rfft(blocks_BSDn).view(batch * num_blocks, self._groups, dim // self._groups, -1)
        product_FGRO = spectrum.permute(3, 1, 0, 2) @ self._spectrum_FGIO
        sums_RDn = torch.fft.irfft(product_FGRO.permute(2, 1, 3, 0).reshape(batch * num_blocks, dim, -1), n=self._fft)
        outputs_BTD = sums_RDn[:, :, :step].transpose(1, 2).reshape(batch, num_blocks * step, dim)
        return outputs_BTD[:, :num_frames]


class _PositionBias:
    """WavLM's bias of attention `[H, T, T]` by the distance of key and query, in buckets (Raffel et al. 2020)."""

    def __init__(self, attention: Any, device: torch.device) -> None:
        self._bucket_of = attention._relative_positions_bucket
        self._embedding = attention.rel_attn_embed.weight.to(device)

    def __call__(self, num_frames: int) -> Tensor:
        distances = torch.arange(1 - num_frames, num_frames, device=self._embedding.device)
        bias_Hn = self._embedding[self._bucket_of(distances)].t()
        return bias_Hn.unfold(1, num_frames, 1).flip(1)  # row i begins at distance -i


class _Layer:
    """One layer of the transformer; layer norms come before attention and network, or after them."""

    def __init__(self, layer: Any, norm_first: bool, device: torch.device, dtype: torch.dtype) -> None:
        self._norm_first = norm_first
        self._dtype = dtype
        self._attention = _Attention(layer.attention, device, dtype)
        self._attention_norm = layer_norm(layer.layer_norm, device)
        self._up = linear(layer.feed_forward.intermediate_dense, device, dtype)
        self._activation = layer.feed_forward.intermediate_act_fn
        self._down = linear(layer.feed_forward.output_dense, device, dtype)
        self._final_norm = layer_norm(layer.final_layer_norm, device)
        adapter = getattr(layer, "adapter_layer", None)
        self._adapter = None if adapter is None else adapter.to(device)

    def __call__(self, hidden_BTD: Tensor, mask: Tensor | None, bias_HTT: Tensor | None) -> Tensor:
        if self._norm_first:
            normed_BTD = self._attention_norm(hidden_BTD).to(self._dtype)
            hidden_BTD = hidden_BTD + self._attention(normed_BTD, mask, bias_HTT)
            hidden_BTD = hidden_BTD + self._network(self._final_norm(hidden_BTD))
        else:
            attended_BTD = self._attention(hidden_BTD.to(self._dtype), mask, bias_HTT)
            hidden_BTD = self._attention_norm(hidden_BTD + attended_BTD)
            hidden_BTD = self._final_norm(hidden_BTD + self._network(hidden_BTD))
        return hidden_BTD if self._adapter is None else hidden_BTD + self._adapter(hidden_BTD)

    def _network(self, hidden_BTD: Tensor) -> Tensor:
        return self._down(self._activation(self._up(hidden_BTD.to(self._dtype))))


class _Attention:
    """Self-attention; with WavLM's bias where a layer has a gate for it."""

    def __init__(self, attention: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._num_heads = attention.num_heads
        self._joint = joint_linear((attention.q_proj, attention.k_proj, attention.v_proj), device, dtype)
        self._out = linear(attention.out_proj, device, dtype)
        self._gate: _Gate | None = _Gate(attention, device, dtype) if hasattr(attention, "gru_rel_pos_linear") else None

    def __call__(self, hidden_BTD: Tensor, mask: Tensor | None, bias_HTT: Tensor | None) -> Tensor:
        heads = split_heads(self._joint(hidden_BTD), self._num_heads)
        if self._gate is not None and bias_HTT is not None:
            gated_BHTT = self._gate(hidden_BTD) * bias_HTT
            mask = gated_BHTT if mask is None else gated_BHTT.masked_fill_(~mask, -torch.inf)
        return self._out(attend(*heads, mask))


class _Gate:
    """How much of the bias a query takes `[B, H, T, 1]`."""

    def __init__(self, attention: Any, device: torch.device, dtype: torch.dtype) -> None:
        linear = attention.gru_rel_pos_linear  # two gates, each the sum of four outputs
        self._weight = linear.weight.unflatten(0, (2, 4)).sum(dim=1).to(device=device, dtype=dtype)
        self._bias = linear.bias.unflatten(0, (2, 4)).sum(dim=1).to(device=device, dtype=dtype)
        self._scale_H11 = attention.gru_rel_pos_const[0].to(device=device, dtype=dtype)
        self._num_heads = attention.num_heads

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        heads_BHTd = hidden_BTD.unflatten(2, (self._num_heads, -1)).transpose(1, 2)
        update, reset = torch.sigmoid(F.linear(heads_BHTd, self._weight, self._bias)).chunk(2, dim=-1)
        return update * (reset * self._scale_H11 - 1.0) + 2.0


def _span(waveform_N: Tensor, begin: int, end: int) -> Tensor:
    return waveform_N[begin:end]
