"""Adapters: modules that turn frames of features into vectors that a language model takes among its embeddings.

Both take frames `[B, T, C]` of any float type and how many of them count `[B]`, as the unpacked batches of a
`TokenDataset` have them, and give vectors `[B, S, D]` with how many of these count `[B]`, 0 behind. What stands behind
a segment's frames, and what else is in its batch, has no part in its vectors.

Axes: B segments, T frames, C numbers of a frame, S vectors, D width of the language model, W inner width.
"""

import math

import torch
from torch import Tensor, nn

from ...tokenizers.spec import UserError


class Projector(nn.Module):
    """Every `stack` frames side by side through a perceptron: ceil(T / stack) vectors.

    The frame-by-frame projection of SLAM-ASR (Ma et al. 2024) and Ultravox. The last stack is filled up with zeros.
    """

    def __init__(self, dim: int, out_dim: int, *, stack: int = 1, width: int | None = None) -> None:
        super().__init__()
        _require(dim, out_dim, stack)
        self.stack = stack
        width = out_dim if width is None else width
        self.norm = nn.RMSNorm(dim * stack, eps=1e-6)
        self.feed = nn.Sequential(nn.Linear(dim * stack, width), nn.GELU(), nn.Linear(width, out_dim))

    def forward(self, frames_BTC: Tensor, num_frames_B: Tensor) -> tuple[Tensor, Tensor]:
        frames_BTC = _without_padding(frames_BTC, num_frames_B, self.norm.weight.dtype)
        num_B = -(-num_frames_B // self.stack)
        short = -frames_BTC.shape[1] % self.stack
        stacked_BSX = nn.functional.pad(frames_BTC, (0, 0, 0, short)).unflatten(1, (-1, self.stack)).flatten(2)
        return _without_padding(self.feed(self.norm(stacked_BSX)), num_B, stacked_BSX.dtype), num_B


class Resampler(nn.Module):
    """As many vectors as there are learned queries, 32, however long the segment is: queries that look at the frames.

    The Q-Former of BLIP-2 (Li et al. 2023) without its text, as SALMONN (Tang et al. 2024) has it for speech: in each
    layer queries attend to each other, then to the frames. Frames have sinusoidal positions (Vaswani et al. 2017),
    and there is one learned key beside them, which is all that a segment without frames has.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        num_queries: int = 32,
        width: int = 256,
        num_layers: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        _require(dim, out_dim, num_queries, num_layers, num_heads)
        if width < 2 or width % (2 * num_heads):
            raise UserError(f"A resampler of width {width} has {num_heads} heads; take a multiple of twice the heads.")
        self.queries_SW = nn.Parameter(torch.randn(num_queries, width) * 0.02)
        self.nothing_W = nn.Parameter(torch.randn(width) * 0.02)
        self.into = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.layers = nn.ModuleList(_ResamplerLayer(width, num_heads) for _ in range(num_layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_dim))

    def forward(self, frames_BTC: Tensor, num_frames_B: Tensor) -> tuple[Tensor, Tensor]:
        frames_BTC = _without_padding(frames_BTC, num_frames_B, self.queries_SW.dtype)
        num, length = frames_BTC.shape[:2]
        frames_BTW = self.into(frames_BTC)
        frames_BTW = frames_BTW + _positions(length, frames_BTW.shape[-1]).to(frames_BTW)
        keys_BTW = torch.cat([self.nothing_W.expand(num, 1, -1), frames_BTW], dim=1)
        is_padding_BT = torch.arange(-1, length, device=keys_BTW.device) >= num_frames_B[:, None]
        x_BSW = self.queries_SW.expand(num, -1, -1)
        for layer in self.layers:
            x_BSW = layer(x_BSW, keys_BTW, is_padding_BT)
        return self.out(x_BSW), torch.full_like(num_frames_B, x_BSW.shape[1])


class _ResamplerLayer(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.among = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.across = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BSW: Tensor, keys_BTW: Tensor, is_padding_BT: Tensor) -> Tensor:
        among, across, feed = self.norms
        asked_BSW = among(x_BSW)
        x_BSW = x_BSW + self.among(asked_BSW, asked_BSW, asked_BSW, need_weights=False)[0]
        seen = self.across(across(x_BSW), keys_BTW, keys_BTW, key_padding_mask=is_padding_BT, need_weights=False)
        x_BSW = x_BSW + seen[0]
        return x_BSW + self.feed(feed(x_BSW))


def _without_padding(x_BTX: Tensor, num_B: Tensor, dtype: torch.dtype) -> Tensor:
    """0 behind so many, whatever is there."""
    is_there_BT = torch.arange(x_BTX.shape[1], device=x_BTX.device) < num_B[:, None]
    return x_BTX.to(dtype).masked_fill(~is_there_BT[..., None], 0.0)


def _positions(length: int, width: int) -> Tensor:
    """Sines and cosines `[T, W]` of frames' places."""
    rates = torch.exp(-math.log(10_000.0) / (width // 2) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _require(*sizes: int) -> None:
    """Raise `UserError` unless all are 1 or more."""
    if min(sizes) < 1:
        raise UserError(f"An adapter of sizes {', '.join(map(str, sizes))} cannot be; each must be 1 or more.")
