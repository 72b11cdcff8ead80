"""Drawing tokens from a model, one step at a time: only those that may stand at a step.

Axes: S steps, D width, Q columns, V tokens of a column.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...pipelines.layouts.vocabulary import Block
from ...storage.layouts import Codes
from ...tokenizers.spec import UserError
from .model import Cache, TokenModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn: of the `top_k` likeliest (None: of all), at a temperature; 0 takes the likeliest.

    Raises `UserError` for what cannot be drawn by.
    """

    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature is {self.temperature:g}; it must be a number, 0 or greater.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k is {self.top_k}; it must be 1 or greater.")


@dataclass(slots=True, kw_only=True)
class Drawer:
    """Draws from logits; the same seed, the same tokens. All draws are made on the CPU, whatever the device."""

    sampling: Sampling
    generator: torch.Generator
    cached: bool = True  # keys and values of the steps before; without them all is computed at each step
    on_draw: Callable[[str, int, int], None] = field(default=lambda stage, done, total: None)

    def draw(self, logits: Tensor, legal: Tensor) -> Tensor:
        """Tokens `[...]` of logits `[..., V]`, among those that are `legal` `[V]`."""
        scores = logits.detach().double().cpu().masked_fill(~legal, -math.inf)
        if self.sampling.temperature == 0:
            return scores.argmax(dim=-1)
        if self.sampling.top_k is not None:
            likeliest = scores.topk(min(self.sampling.top_k, int(legal.sum())), dim=-1)
            scores = torch.full_like(scores, -math.inf).scatter(-1, likeliest.indices, likeliest.values)
        chances = torch.softmax(scores / self.sampling.temperature, dim=-1)
        drawn = torch.multinomial(chances.reshape(-1, chances.shape[-1]), 1, generator=self.generator)
        return drawn.reshape(chances.shape[:-1])


def legal_tokens(size: int, blocks: Iterable[Block]) -> Tensor:
    """`[V]` bool of a column of so many tokens: those of the blocks."""
    legal_V = torch.zeros(size, dtype=torch.bool)
    for block in blocks:
        legal_V[block.offset : block.end] = True
    return legal_V


class Context:
    """The steps of one segment as far as they are known, before a model that says what comes next."""

    def __init__(self, model: TokenModel, *, cached: bool = True) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._cache = Cache() if cached else None
        self._steps: list[Codes] = []  # that the model has not seen yet; without a cache all of them

    def add(self, steps: Codes) -> None:
        """Put steps `[S]`, or `[S, Q]` of several columns, behind the others."""
        if len(steps):
            self._steps.append(steps)

    def hidden(self) -> Tensor:
        """The hidden vector `[D]` behind the last step, of which there must be one since the last call."""
        tokens = torch.from_numpy(np.concatenate(self._steps).astype(np.int64)).to(self._device)[None]
        before = 0 if self._cache is None else self._cache.num_steps
        positions_1S = before + torch.arange(tokens.shape[1], device=self._device)[None]
        hidden_1SD = self._model(tokens, torch.ones_like(positions_1S), positions_1S, cache=self._cache)
        if self._cache is not None:
            self._steps = []
        return hidden_1SD[0, -1]
