"""Any layout with numbers in front of each segment.

Axes: N segments, S steps end to end, Q columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...storage.layouts import Grouping, Ints, Laid, PlannedLayout, StreamRows, grouping_of, member, require_made
from ...tokenizers.spec import StreamSpec, UserError
from .continuous import require_numbers
from .plan import LayoutPlan, NamedLayout
from .sequence import put
from .vocabulary import Block, Vocabulary

_CONDITION = "<condition>"


@dataclass(frozen=True)
class ConditionedPlan:
    """A `LayoutPlan` of another one, with the frames of a stream of numbers in front."""

    inner: LayoutPlan
    stream: str  # as the plan knows it
    token: str
    vocabulary: Vocabulary

    @property
    def column_sizes(self) -> Sequence[int]:
        return self.vocabulary.column_sizes

    @property
    def frame_tokens(self) -> Mapping[str, int]:
        return {self.stream: self.vocabulary.token(self.token), **self.inner.frame_tokens}

    @property
    def read_to_plan(self) -> Sequence[str]:
        return self.inner.read_to_plan

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        return rows[self.stream].counts_N + self.inner.num_steps(rows)

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        condition, inner_N, inner = rows[self.stream], self.inner.num_steps(rows), self.inner.lay(rows)
        assert condition.frames_TD is not None
        steps_N = condition.counts_N + inner_N
        begin_N = np.cumsum(steps_N) - steps_N + condition.counts_N
        tokens = np.empty((int(steps_N.sum()), *inner.tokens.shape[1:]), dtype=self.vocabulary.dtype)
        tokens[:] = self._condition()
        put(tokens, begin_N, inner.tokens, inner_N)
        loss_S = np.zeros(len(tokens), dtype=bool)
        put(loss_S, begin_N, np.ones(len(inner.tokens), dtype=bool) if inner.loss_S is None else inner.loss_S, inner_N)
        return Laid(tokens, loss_S, {self.stream: condition.frames_TD, **inner.frames})

    def invert(self, laid: Laid) -> dict[str, StreamRows]:
        is_condition_S = laid.tokens == self._condition()
        if is_condition_S.ndim > 1:
            is_condition_S = is_condition_S.all(axis=1)
        count = int(is_condition_S.sum())
        if not is_condition_S[:count].all():
            raise ValueError(f"{self.token} behind other steps")
        frames = dict(laid.frames)
        if (frames_TD := frames.pop(self.stream, None)) is None or len(frames_TD) != count:
            raise ValueError(f"not as many frames of {self.stream} as there are {self.token}, {count}")
        loss_S = None if laid.loss_S is None else laid.loss_S[count:]
        found = self.inner.invert(Laid(laid.tokens[count:], loss_S, frames))
        return {self.stream: StreamRows(np.array([count], dtype=np.int64), (), frames_TD), **found}

    def held(self, rows: Mapping[str, StreamRows]) -> dict[str, StreamRows]:
        """What `invert` gives of one segment."""
        behind = {name: each for name, each in rows.items() if name != self.stream}
        held_behind = getattr(self.inner, "held", dict)(behind)
        return {self.stream: rows[self.stream], **held_behind}

    def _condition(self) -> Ints:
        """The token, in each column."""
        tokens_Q = np.array([self.vocabulary.token(self.token, column) for column in range(len(self.column_sizes))])
        return tokens_Q if len(tokens_Q) > 1 else tokens_Q[0]


@dataclass(frozen=True, slots=True)
class conditioned:
    """Another layout with the numbers of a stream in front of each segment, which are given and not predicted.

    The vector of a segment or of its text (`wavlm-sv`, `text-embedding`, output "embedding"): one step in front, the
    conditioning of MusicLM (Agostinelli et al. 2023) and MusicGen (Copet et al. 2023). Streams of more frames stand in
    front as a whole: features before a text are what adapters feed a language model (SALMONN: Tang et al. 2023). These
    steps have the token `<condition>`, the last of each column, and their numbers in `Laid.frames`. A segment whose
    stream has no frame has no such step: it is one without a condition. A layout that is conditioned already can be
    once more; its next token is called `<condition STREAM>`. Of a group's members the first gives the condition.
    """

    stream: str
    layout: NamedLayout

    def __post_init__(self) -> None:
        require_made(self.layout)
        if not isinstance(self.layout, PlannedLayout):
            raise UserError(
                f"Layout conditioned takes another layout behind its numbers; found {self.layout!r}. Give one of "
                "wavemill.pipelines.layouts, such as flatten(...)."
            )

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.stream: None, **self.layout.streams}

    @property
    def grouping(self) -> Grouping | None:
        return grouping_of(self.layout)

    @property
    def takes_chunks(self) -> bool:
        return getattr(self.layout, "takes_chunks", False)

    @property
    def same_tokens(self) -> Sequence[tuple[str, str]]:
        return getattr(self.layout, "same_tokens", ())

    def plan(self, specs: Mapping[str, StreamSpec]) -> ConditionedPlan:
        if self.stream in self.layout.streams:
            raise UserError(
                f"Layout conditioned takes another stream than the layout behind it, which has {self.stream!r}, too. "
                "Name another one."
            )
        stream = self.stream if self.grouping is None else member(self.stream, 0)
        require_numbers("conditioned", specs, stream)
        inner = self.layout.plan(specs)
        token = f"<condition {self.stream}>" if inner.vocabulary.has(_CONDITION) else _CONDITION
        ends = enumerate(inner.vocabulary.column_sizes)
        blocks = [Block(token, None, column, end, 1) for column, end in ends]
        return ConditionedPlan(inner, stream, token, Vocabulary((*inner.vocabulary.blocks, *blocks)))
