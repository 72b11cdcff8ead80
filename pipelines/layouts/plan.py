"""What all layouts of this folder are: plans with a vocabulary that can be undone, and a segment through one of them.

Axes: see storage/layouts.py.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ...storage.layouts import Laid, Plan, PlannedLayout, Segment, StreamRows
from ...tokenizers.spec import StreamSpec
from .vocabulary import Vocabulary


class LayoutPlan(Plan, Protocol):
    """A plan whose tokens have names, and that can be undone."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def invert(self, laid: Laid) -> dict[str, StreamRows]:
        """What the steps of one segment say of its streams: exactly what went in, of all that the layout holds.

        Raises `ValueError` for tokens that no segment gives.
        """
        ...


class NamedLayout(PlannedLayout, Protocol):
    """A layout of this folder: its plan can be undone."""

    def plan(self, specs: Mapping[str, StreamSpec]) -> LayoutPlan: ...


def rows_of(segment: Segment) -> dict[str, StreamRows]:
    """One segment as rows that a plan takes."""
    rows = {}
    for name in [*segment.codes, *(name for name in segment.frames if name not in segment.codes)]:
        codes_KT, frames_TD = segment.codes.get(name), segment.frames.get(name)
        durations_T = segment.durations.get(name)
        count = len(frames_TD) if frames_TD is not None else segment.codes[name].shape[1]
        rows[name] = StreamRows(
            np.array([count], dtype=np.int64),
            [] if codes_KT is None else list(codes_KT.numpy()),
            None if frames_TD is None else frames_TD.numpy(),
            None if durations_T is None else durations_T.numpy(),
        )
    return rows


def lay_segment(plan: Plan, segment: Segment) -> Laid:
    """One segment laid out."""
    return plan.lay(rows_of(segment))
