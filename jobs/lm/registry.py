"""All objectives by name, and which of them a layout is trained with unless another is named."""

from typing import Any

from ...pipelines.layouts.plan import LayoutPlan
from ...tokenizers.spec import UserError, did_you_mean
from .latent_head import NextFrame
from .masked import masked_units, soundstorm_levels
from .nar import finer_codebooks
from .objectives import MakeObjective, NextToken, Objective, ObjectiveContext
from .unified_lm import TextModelNext

OBJECTIVES: dict[str, MakeObjective] = {
    "next": NextToken,
    "parallel": NextToken,
    "masked": masked_units,
    "soundstorm": soundstorm_levels,
    "nar": finer_codebooks,
    "unified": TextModelNext,
    "continuous": NextFrame,
}

# by the name of a layout's class; others: `next` of one column, `parallel` of several
_DEFAULTS: dict[str, str] = {
    "masked": "masked",
    "soundstorm": "soundstorm",
    "vall_e_nar": "nar",
    "continuous": "continuous",
}


def objective_of(layout: Any, plan: LayoutPlan) -> str:
    """The name of the objective that a layout is made for."""
    inner = getattr(layout, "layout", layout)  # what `conditioned` stands around
    default = _DEFAULTS.get(type(inner).__name__)
    if default is not None:
        return default
    return "next" if len(plan.column_sizes) == 1 else "parallel"


def make_objective(name: str, context: ObjectiveContext) -> Objective:
    """Raises `UserError` for names that are unknown and options that do not fit."""
    if name not in OBJECTIVES:
        raise UserError(
            f"There is no objective {name!r}; there are: {', '.join(OBJECTIVES)}.{did_you_mean(name, OBJECTIVES)}"
        )
    return OBJECTIVES[name](context)
