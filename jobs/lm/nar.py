"""The objective of VALL-E's second model: a finer codebook of all frames at once, from the coarser ones and the text.

Axes: B sequences, L steps, C codebooks after the first, M segments of a sequence (0: padding).
"""

import torch
from torch import Tensor

from ...tokenizers.spec import UserError
from .masked import Drawn, HiddenTokens, Hideable
from .objectives import ObjectiveContext


def finer_codebooks(context: ObjectiveContext) -> HiddenTokens:
    """Over layout `vall-e-nar`: each segment draws a codebook after the first, which is predicted in all of its frames.

    VALL-E (Wang et al. 2023), section 4.2.2: the model sees the text and the sum of the coarser codebooks' embeddings,
    and all codebooks of an acoustic prompt, from both sides. The drawn and the finer codebooks are `<pad>`; so the sum
    also says which codebook is asked for, where the paper has adaptive layer norms. Its prompt is another recording of
    the speaker. Here it is the segment's beginning: what the layout gives (`prompt_s`), then a share of the frames,
    drawn between none and option `prompt` (0.5). Raises `UserError`.
    """
    context.require_options("nar", "prompt")
    most = context.number("prompt", 0.5)
    vocabulary = context.plan.vocabulary
    hideable = Hideable.behind("<pad>", vocabulary)
    if hideable is None or not vocabulary.has("<sep>") or 0 in hideable.columns:
        raise UserError(
            "Objective nar fills in codebooks beside a first one that follows a text: take layout vall-e-nar, or "
            "another objective."
        )

    def draw(codes_BLC: Tensor, ids_BL: Tensor, positions_BL: Tensor, generator: torch.Generator) -> Drawn:
        num_levels = len(hideable.columns)
        num_BM = _counts(ids_BL)
        level_BM = torch.randint(num_levels, num_BM.shape, generator=generator).to(ids_BL.device)
        share_BM = torch.rand(num_BM.shape, dtype=torch.float64, generator=generator).to(ids_BL.device)
        prompt_BM = (share_BM * most * num_BM).floor().long()
        is_asked_BL = (ids_BL > 0) & (_place(ids_BL, num_BM) >= prompt_BM.gather(1, ids_BL.long()))
        level_BL1 = level_BM.gather(1, ids_BL.long())[..., None]
        levels_C = torch.arange(num_levels, device=ids_BL.device)
        asked_BLC = is_asked_BL[..., None] & (levels_C == level_BL1)
        hidden_BLC = is_asked_BL[..., None] & (levels_C >= level_BL1)
        return Drawn(torch.where(hidden_BLC, torch.tensor(hideable.tokens).to(codes_BLC), codes_BLC), asked_BLC)

    return HiddenTokens(context, hideable, draw)


def _counts(ids_BL: Tensor) -> Tensor:
    """Steps of each segment `[B, M]`."""
    counts_BM = torch.zeros(len(ids_BL), int(ids_BL.max()) + 1, dtype=torch.int64, device=ids_BL.device)
    return counts_BM.scatter_add_(1, ids_BL.long(), torch.ones_like(ids_BL, dtype=torch.int64))


def _place(ids_BL: Tensor, num_BM: Tensor) -> Tensor:
    """How many steps of its segment stand before each; of steps of segment 0 nothing that means anything."""
    others_BM = num_BM.clone()
    others_BM[:, 0] = 0
    before_BM = others_BM.cumsum(1) - others_BM
    return (ids_BL > 0).long().cumsum(1) - 1 - before_BM.gather(1, ids_BL.long())
