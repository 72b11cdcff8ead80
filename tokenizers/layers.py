"""Parts of transformers that several models share: products laid out for oneDNN, norms, heads.

Axes: B segments, T frames, D dimensions, E of several products side by side, H heads, d dimensions of a head.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TYPICAL_ROWS = 512  # for which oneDNN chooses a layout


class Linear:
    """x W^T + b. On a CPU the weights are laid out for oneDNN once, as torch.compile does, not at every call."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        self._weight_OI = weight_OI.to(device=device, dtype=dtype).contiguous()
        self._bias_O = None if bias_O is None else bias_O.to(device=device, dtype=dtype)
        onednn = torch.ops.mkldnn
        self._packed = device.type == "cpu" and dtype in _onednn_types() and hasattr(onednn, "_linear_pointwise")
        if self._packed:
            self._weight_OI = onednn._reorder_linear_weight(self._weight_OI, _TYPICAL_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight_OI, self._bias_O, "none", [], "")
        return F.linear(x, self._weight_OI, self._bias_O)


def _onednn_types() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return ()
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if fast else (torch.float32,)


def linear(module: nn.Linear, device: torch.device, dtype: torch.dtype) -> Linear:
    return Linear(module.weight, module.bias, device, dtype)


def joint_linear(modules: Sequence[nn.Linear], device: torch.device, dtype: torch.dtype) -> Linear:
    """Several products of one input side by side; a bias that one of them lacks is zero."""
    biases = [each.weight.new_zeros(each.out_features) if each.bias is None else each.bias for each in modules]
    return Linear(torch.cat([each.weight for each in modules]), torch.cat(biases), device, dtype)


def layer_norm(
    module: nn.LayerNorm, device: torch.device, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """A layer norm over the last axis; one without weights has none here."""
    weight = None if module.weight is None else module.weight.to(device=device, dtype=dtype)
    bias = None if module.bias is None else module.bias.to(device=device, dtype=dtype)
    return lambda x: F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def split_heads(joint_BTE: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, H, T, d]` of what `joint_linear` of the three gives."""
    batch, num_frames, _ = joint_BTE.shape
    query, key, value = joint_BTE.view(batch, num_frames, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return query, key, value


def attend(query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, mask: Tensor | None) -> Tensor:
    """Attention `[B, T, D]`; the mask says which keys count, or is added to the scores."""
    attended_BHTd = F.scaled_dot_product_attention(query_BHTd, key_BHTd, value_BHTd, attn_mask=mask)
    return attended_BHTd.transpose(1, 2).flatten(2)


def same(x: Tensor) -> Tensor:
    return x
