"""A decoder-only Transformer in plain PyTorch: rotary positions, RMSNorm, SwiGLU, attention within packed segments.

`Decoder` turns vectors into vectors; `TokenModel` puts embeddings before it, one for each column of a layout, summed
(MusicGen, Copet et al. 2023), and a head for each behind it. The parts are those of LLaMA (Touvron et al. 2023).

Axes: B sequences, L steps, P steps that a cache holds, D width, H heads, E = D / H, Q columns, V tokens of a column,
M steps that hold a frame of numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...tokenizers.spec import UserError

_FRAMES_OF = "of-"  # before a stream's name: `type` alone, or `keys`, is one of nn.ModuleDict's own


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The size of a model. Raises `UserError` for a width that does not go into its heads."""

    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    dropout: float = 0.0
    tied: bool = True  # heads are the embeddings' matrices
    rotary_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.dim < 2 or self.num_layers < 1 or self.num_heads < 1 or self.dim % (2 * self.num_heads):
            raise UserError(
                f"A model of width {self.dim} with {self.num_heads} head(s) and {self.num_layers} layer(s) cannot be: "
                "the width is a multiple of twice the heads, and there is a layer. Choose others."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"A dropout of {self.dropout:g} was asked for; it must be 0 or more, and less than 1.")

    @property
    def hidden_dim(self) -> int:
        """Width inside of a feed-forward part: 8/3 of the outer, up to a multiple of 32 (Shazeer 2020)."""
        return -(-8 * self.dim // 96) * 32


@dataclass(slots=True)
class Cache:
    """Keys and values `[B, H, P, E]` of each layer of the steps before, for generation a few steps at a time."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    segment_ids_BP: Tensor | None = None

    @property
    def num_steps(self) -> int:
        return 0 if self.segment_ids_BP is None else self.segment_ids_BP.shape[1]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's new steps; all that it has then."""
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], dim=2)
            self.values[layer] = torch.cat([self.values[layer], value], dim=2)
        return self.keys[layer], self.values[layer]


class Decoder(nn.Module):
    """Vectors `[B, L, D]` to hidden vectors `[B, L, D]`.

    A step sees those of its own segment, `causal` or all of them; so packed sequences give what each segment alone
    gives. Padding, segment 0, sees padding. With a cache, the steps given follow those in it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BLD: Tensor,
        segment_ids_BL: Tensor,
        positions_BL: Tensor,
        cache: Cache | None = None,
        *,
        causal: bool = True,
    ) -> Tensor:
        known_BP = segment_ids_BL
        if cache is not None and cache.segment_ids_BP is not None:
            known_BP = torch.cat([cache.segment_ids_BP, segment_ids_BL], dim=1)
        seen_BLP = segment_ids_BL[:, :, None] == known_BP[:, None, :]
        if causal:
            num, all_ = segment_ids_BL.shape[1], known_BP.shape[1]
            seen_BLP = seen_BLP & torch.ones(num, all_, dtype=torch.bool, device=x_BLD.device).tril(all_ - num)
        turn = _turns(positions_BL, self.config)
        x_BLD = self.drop(x_BLD)
        for index, layer in enumerate(self.layers):
            x_BLD = layer(x_BLD, seen_BLP[:, None], turn, cache, index)
        if cache is not None:
            cache.segment_ids_BP = known_BP
        return self.norm(x_BLD)


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = _Attention(config)
        self.feed_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.feed = _FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x_BLD: Tensor, seen_B1LP: Tensor, turn: tuple[Tensor, Tensor], cache: Cache | None, index: int
    ) -> Tensor:
        x_BLD = x_BLD + self.drop(self.attention(self.attention_norm(x_BLD), seen_B1LP, turn, cache, index))
        return x_BLD + self.drop(self.feed(self.feed_norm(x_BLD)))


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.into = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        _init(self.into)
        _init(self.out, scale=1 / math.sqrt(2 * config.num_layers))

    def forward(
        self, x_BLD: Tensor, seen_B1LP: Tensor, turn: tuple[Tensor, Tensor], cache: Cache | None, index: int
    ) -> Tensor:
        num, length, dim = x_BLD.shape
        heads = self.into(x_BLD).view(num, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [B, H, L, E] each
        query, key = _turned(query, turn), _turned(key, turn)
        if cache is not None:
            key, value = cache.extend(index, key, value)
        mixed = functional.scaled_dot_product_attention(query, key, value.to(key.dtype), attn_mask=seen_B1LP)
        return self.out(mixed.transpose(1, 2).reshape(num, length, dim))


class _FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.into = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.out = nn.Linear(config.hidden_dim, config.dim, bias=False)
        _init(self.into)
        _init(self.out, scale=1 / math.sqrt(2 * config.num_layers))

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate, up = self.into(x_BLD).chunk(2, dim=-1)
        return self.out(functional.silu(gate) * up)


class TokenModel(nn.Module):
    """A decoder between embeddings and heads of a layout's columns.

    The head of a column is its embedding's matrix (Press and Wolf 2017), or one of its own. Steps that hold a frame of
    numbers (`frame_tokens`: by stream its token in the first column, `frame_dims`: by stream the numbers) have it
    normalized and projected onto their embedding.
    """

    def __init__(
        self,
        config: ModelConfig,
        column_sizes: Sequence[int],
        frame_tokens: Mapping[str, int] | None = None,
        frame_dims: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.frame_tokens = dict(frame_tokens or {})
        self.embeddings = nn.ModuleList(nn.Embedding(size, config.dim) for size in column_sizes)
        self.decoder = Decoder(config)
        heads = () if config.tied else column_sizes
        self.heads = nn.ModuleList(nn.Linear(config.dim, size, bias=False) for size in heads)
        self.frames = nn.ModuleDict(
            {
                _FRAMES_OF + stream: nn.Sequential(
                    nn.LayerNorm(dim, elementwise_affine=False), nn.Linear(dim, config.dim)
                )
                for stream, dim in (frame_dims or {}).items()
            }
        )
        for each in [*self.embeddings, *self.heads, *(part[1] for part in self.frames.values())]:  # type: ignore[index]
            _init(each)

    @property
    def column_sizes(self) -> list[int]:
        return [embedding.num_embeddings for embedding in self.embeddings]  # type: ignore[misc]

    def forward(
        self,
        tokens: Tensor,
        segment_ids_BL: Tensor,
        positions_BL: Tensor,
        frames: Mapping[str, Tensor] | None = None,
        cache: Cache | None = None,
        *,
        causal: bool = True,
    ) -> Tensor:
        """Hidden vectors `[B, L, D]` of tokens `[B, L]`, or `[B, L, Q]` of several columns."""
        x_BLD = self.embed(tokens, frames)
        return self.decoder(x_BLD, segment_ids_BL, positions_BL, cache, causal=causal)

    def embed(self, tokens: Tensor, frames: Mapping[str, Tensor] | None = None) -> Tensor:
        """The vectors `[B, L, D]` of steps; `frames` has by stream `[M, D]`, as a `PackedBatch` has them."""
        tokens_BLQ = tokens[..., None] if tokens.ndim == 2 else tokens
        x_BLD = self.embeddings[0](tokens_BLQ[..., 0])
        for column in range(1, len(self.embeddings)):
            x_BLD = x_BLD + self.embeddings[column](tokens_BLQ[..., column])
        for name, project in self.frames.items():
            stream = name.removeprefix(_FRAMES_OF)
            places = torch.nonzero(tokens_BLQ[..., 0] == self.frame_tokens[stream], as_tuple=True)
            given_MD = project((frames or {})[stream].float()).to(x_BLD.dtype)
            x_BLD = x_BLD.index_put(places, given_MD, accumulate=True)
        return x_BLD

    def logits(self, hidden: Tensor, column: int = 0) -> Tensor:
        """`[..., V]` of hidden vectors `[..., D]`."""
        if self.heads:
            return self.heads[column](hidden)
        return functional.linear(hidden, self.embeddings[column].weight)  # type: ignore[arg-type]


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _turns(positions_BL: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, 1, L, E/2]` of rotary positions (Su et al. 2021), in float32 under autocast, too."""
    half = config.dim // config.num_heads // 2
    rates = config.rotary_base ** (-torch.arange(half, device=positions_BL.device, dtype=torch.float32) / half)
    angles = positions_BL[:, None, :, None].float() * rates
    return angles.cos(), angles.sin()


def _turned(x_BHLE: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    first, second = x_BHLE.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHLE.dtype)


def _init(module: nn.Module, *, scale: float = 1.0) -> None:
    """Normal, 0.02 wide; what adds to the residual narrower by the number of layers (GPT-2, Radford et al. 2019)."""
    assert isinstance(module, nn.Linear | nn.Embedding)
    nn.init.normal_(module.weight, std=0.02 * scale)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
