"""What training hides from a model of masked tokens, and in what order parallel decoding uncovers it.

All are functions of a batch's steps and a `torch.Generator`: the same generator, the same masks. `ids` are those of
`PackedBatch.segment_ids`, 0 where nothing may be masked: padding, and what a layout or a trainer gives.

Axes: B sequences, L steps, Q levels (codebooks of a frame), M segments of a sequence.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from ...tokenizers.spec import StreamSpec, UserError
from .grid import GridPlan, side_by_side


@dataclass(frozen=True, slots=True)
class masked:
    """Units with a `<mask>` in the vocabulary, to be predicted from both sides: one column for each codebook.

    As HuBERT (Hsu et al. 2021) and, over product-quantized codes, vq-wav2vec's BERT (Baevski et al. 2020) see them.
    Which units are masked is the training's draw (masks.py), so no step of the layout is one.
    """

    stream: str
    codebooks: int | None = None  # None: all that are read

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.stream: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> GridPlan:
        columns = side_by_side("masked", self.stream, specs, self.codebooks)
        return GridPlan.of(columns, {self.stream: Fraction(1)}, specs, masked=[self.stream])


class LevelMasks(NamedTuple):
    """`[B, L, Q]` bool: codes that the model sees as `<mask>`, and those of them that it is asked for."""

    hidden_BLQ: Tensor
    asked_BLQ: Tensor


def soundstorm_masks(
    ids_BL: Tensor, positions_BL: Tensor, num_levels: int, generator: torch.Generator, *, prompt: bool = True
) -> LevelMasks:
    """One level of each segment to predict, a part of its frames masked; SoundStorm (Borsos et al. 2023), section 3.2.

    Each segment draws a level, a prompt of fewer frames than it has (`prompt`), and a share cos(u) of the frames behind
    the prompt, u uniform in [0, pi/2). In these frames the level is hidden and asked for; finer levels are hidden in
    all frames behind the prompt; coarser levels, and the prompt, are given. The share is rounded up to whole frames,
    which are drawn without replacement where the paper tosses a coin for each: so a segment always asks for something.
    """
    num_BM = _counts(ids_BL)
    level_BM = torch.randint(num_levels, num_BM.shape, generator=generator, device=generator.device).to(ids_BL.device)
    if prompt:
        prompt_BM = (_uniform(num_BM, generator) * num_BM).floor()
        ids_BL = ids_BL * (positions_BL >= _of_steps(prompt_BM, ids_BL))
        num_BM = _counts(ids_BL, num_BM.shape[1])
    share_BM = torch.cos(_uniform(num_BM, generator) * (math.pi / 2))
    drawn_BL = choose(ids_BL, (share_BM * num_BM).ceil().long(), generator)
    level_BL1 = _of_steps(level_BM, ids_BL)[..., None]
    levels_Q = torch.arange(num_levels, device=ids_BL.device)
    asked_BLQ = drawn_BL[..., None] & (levels_Q == level_BL1)
    finer_BLQ = (ids_BL > 0)[..., None] & (levels_Q > level_BL1)
    return LevelMasks(asked_BLQ | finer_BLQ, asked_BLQ)


def span_masks(ids_BL: Tensor, generator: torch.Generator, *, share_of_starts: float = 0.08, span: int = 10) -> Tensor:
    """`[B, L]` bool: spans from a share of each segment's steps on, drawn without replacement, which may overlap.

    HuBERT (Hsu et al. 2021) by default, 0.56 of the steps of a long segment; with `share_of_starts` 0.065 wav2vec 2.0
    (Baevski et al. 2020), with 0.15 and `span` 1 BERT (Devlin et al. 2019). A span ends with its segment. The number of
    starts is rounded up or down at random, so that short segments have as many on average; each has one at least.
    """
    num_BM = _counts(ids_BL)
    starts_BM = (share_of_starts * num_BM + _uniform(num_BM, generator)).floor().long().clamp(min=1)
    start_BL = choose(ids_BL, torch.minimum(starts_BM, num_BM), generator)
    step_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    last_start_BL = torch.where(start_BL, step_L, -span).cummax(dim=1).values
    its_id_BL = ids_BL.gather(1, last_start_BL.clamp(min=0))
    return (ids_BL > 0) & (step_L - last_start_BL < span) & (its_id_BL == ids_BL)


def hide(
    codes: Tensor,
    hidden: Tensor,
    mask_token: int,
    codebook_size: int,
    generator: torch.Generator,
    *,
    shares: Sequence[float] = (0.8, 0.1, 0.1),
) -> Tensor:
    """Codes as the model sees them: `mask_token` for those hidden, but some of them other codes, and some as they are.

    `shares` of these three, in the order of BERT's 80/10/10 (Devlin et al. 2019); `(1, 0, 0)` masks all, as HuBERT and
    SoundStorm do. Codes and `hidden` have one shape, any.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"Shares of masked, random and kept codes are {list(shares)}; give three that add up to 1.")
    drawn = torch.rand(codes.shape, generator=generator, device=generator.device).to(codes.device)
    random = torch.randint(codebook_size, codes.shape, generator=generator, device=generator.device).to(codes)
    seen = torch.where(drawn < shares[0] + shares[1], random, codes)
    seen = torch.where(drawn < shares[0], mask_token, seen)
    return torch.where(hidden, seen, codes)


def uncovered_by_iteration(num_frames: int, num_iterations: int) -> list[int]:
    """How many frames each iteration of parallel decoding uncovers: few at first, then more; together all.

    After iteration i of n, floor(cos(pi/2 x i/n) x frames) are still masked: the cosine schedule of MaskGIT (Chang et
    al. 2022), which SoundStorm goes through once a level (16 iterations for the first, 1 for each other). Every
    iteration uncovers a frame at least; with fewer frames than iterations there are fewer iterations.
    """
    if num_iterations < 1:
        raise UserError(f"{num_iterations} iterations of parallel decoding were asked for; there must be 1 or more.")
    left, uncovered = num_frames, []
    for iteration in range(1, num_iterations + 1):
        share = math.cos(math.pi / 2 * iteration / num_iterations) if iteration < num_iterations else 0.0
        after = min(math.floor(share * num_frames), left - 1)
        if left:
            uncovered.append(left - after)
            left = after
    return uncovered


def most_confident(scores_BL: Tensor, hidden_BL: Tensor, num_B: Tensor) -> Tensor:
    """`[B, L]` bool: of each sequence's hidden steps so many with the highest scores; of equals the earlier."""
    order_BL = scores_BL.argsort(dim=1, descending=True, stable=True)
    return hidden_BL & (_place_of(order_BL, ~hidden_BL) < num_B[:, None])


def choose(ids_BL: Tensor, num_BM: Tensor, generator: torch.Generator) -> Tensor:
    """`[B, L]` bool: of the steps of each segment m (m from 1) of a sequence `num_BM[:, m]` at random; of 0 none.

    Each set of as many steps is as likely as any other.
    """
    drawn_BL = torch.rand(ids_BL.shape, generator=generator, device=generator.device).to(ids_BL.device)
    place_BL = _place_of(drawn_BL.argsort(dim=1, stable=True), ids_BL)
    counts_BM = _counts(ids_BL, num_BM.shape[1], padding=True)
    rank_BL = place_BL - _of_steps(counts_BM.cumsum(1) - counts_BM, ids_BL)
    return (ids_BL > 0) & (rank_BL < _of_steps(num_BM, ids_BL))


def _place_of(order_BL: Tensor, group_BL: Tensor) -> Tensor:
    """Each step's place if all stand by group, and in a group in an order."""
    order_BL = order_BL.gather(1, group_BL.gather(1, order_BL).argsort(dim=1, stable=True))
    step_BL = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    return torch.empty_like(order_BL).scatter_(1, order_BL, step_BL)


def _counts(ids_BL: Tensor, num: int | None = None, *, padding: bool = False) -> Tensor:
    """Steps of each segment `[B, M]`; column 0, padding, has none unless asked for."""
    num = int(ids_BL.max()) + 1 if num is None else num
    counts_BM = torch.zeros(len(ids_BL), num, dtype=torch.int64, device=ids_BL.device)
    counts_BM.scatter_add_(1, ids_BL.long(), torch.ones_like(ids_BL, dtype=torch.int64))
    if not padding:
        counts_BM[:, 0] = 0
    return counts_BM


def _of_steps(values_BM: Tensor, ids_BL: Tensor) -> Tensor:
    """Each step's segment's value."""
    return values_BM.gather(1, ids_BL.long())


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Float64 in [0, 1), so that counts are not rounded."""
    drawn = torch.rand(like.shape, dtype=torch.float64, generator=generator, device=generator.device)
    return drawn.to(like.device)
