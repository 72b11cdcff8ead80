"""One real segment from near: laid out, and taken back.

Axes: see storage/layouts.py.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from ...storage.layouts import Laid, StreamRows, grouping_of, member, stream_of
from ...storage.parquet import read_parquet
from ...storage.root import Root
from ...storage.rows import TakenRows, read_rows, take_rows
from ...storage.schema import stream_schema
from ...storage.selection import Pack, Selection, select
from ...tokenizers.spec import FrameRule, StreamSpec, UserError
from .plan import LayoutPlan, NamedLayout, rows_of
from .timed import NUM_TIMES

_LEAST_STEPS = 24  # of a segment that shows something
_TIMED = ("whisper-text", "word-tokens")  # words between times
_TIME_S = Fraction(1, 50)
_PARTS = 1 << 14  # of a segment's length, where it may be cut


@dataclass(frozen=True, slots=True)
class LaidSegment:
    """A segment's streams, by the names that the layout knows them by, and what it makes of them."""

    layout: NamedLayout
    ids: tuple[str, ...]  # of each member, where several rows of the corpus are one segment
    shard: int
    specs: dict[str, StreamSpec]
    plan: LayoutPlan
    rows: dict[str, StreamRows]
    laid: Laid

    def inverted(self) -> dict[str, StreamRows]:
        """What the steps say of the streams. Raises `ValueError` for tokens that no segment gives."""
        return self.plan.invert(self.laid)

    def with_rows(self, rows: dict[str, StreamRows]) -> "LaidSegment":
        """The same with other frames."""
        return replace(self, rows=rows, laid=self.plan.lay(rows))


def lay_out(root: Root, layout: NamedLayout, segment: str | None = None) -> LaidSegment:
    """A segment of a dataset in its newest snapshot; None: a short one of the first that have frames of all streams.

    Raises `UserError` for a layout that the dataset cannot give, or a segment that is not there or has an error.
    """
    selection = select(
        root.uri,
        None,
        pack=Pack(layout, 1),
        seed=0,
        shuffle=False,
        where=None,
        versions=None,
        pin=None,
        window_bytes=1,
    )
    for shard in selection.shards:
        taken = take_rows(selection, root, shard)
        if not len(taken):
            continue
        index = _short_one(selection, taken) if segment is None else _place(_ids(taken), segment)
        if index is not None:
            return _laid(selection, layout, taken, index)
    if segment is not None:
        raise _not_there(root, selection, segment)
    raise UserError(f"No segment in {root} has frames of {', '.join(selection.streams)}: there is nothing to lay out.")


def beginning(segment: LaidSegment, *, max_steps: int) -> LaidSegment:
    """As much of a segment, from its beginning, as has at most so many steps; of each stream one frame or more.

    Streams with a clock are cut at one time, those without one at the same share; of words with times whole ones stay.
    """
    of_specs = [(segment.specs[name], rows) for name, rows in segment.rows.items()]
    whole_s = max(_length_s(*each) for each in of_specs) or max(_last_time_s(*each) for each in of_specs)
    parts = 1 << 12  # of the whole length
    most = bisect_right(
        range(1, parts + 1), max_steps, key=lambda part: _steps(segment, Fraction(part, parts), whole_s)
    )
    return segment.with_rows(_cut(segment, Fraction(max(most, 1), parts), whole_s))


def differing(segment: LaidSegment, inverted: Mapping[str, StreamRows]) -> list[str]:
    """The streams of which the inverse gives something else than the table has, of all that the layout holds."""
    held_rows = getattr(segment.plan, "held", lambda rows: rows)(segment.rows)
    return [stream for stream, rows in inverted.items() if not _same(rows, held_rows[stream])]


def amounts(inverted: Mapping[str, StreamRows]) -> dict[str, tuple[int, int]]:
    """By stream how many codebooks and frames the inverse gives."""
    return {stream: (len(rows.books), int(rows.counts_N.sum())) for stream, rows in inverted.items()}


def describe(segment: LaidSegment) -> dict[str, Any]:
    """All steps of a segment, for programs."""
    laid, plan = segment.laid, segment.plan
    tokens_SQ = columns_of(laid)
    inverted = segment.inverted()
    return {
        "segments": list(segment.ids),
        "streams": {
            name: {"frames": int(rows.counts_N.sum()), "codebooks": len(rows.books), "dim": segment.specs[name].dim}
            for name, rows in segment.rows.items()
        },
        "steps": len(tokens_SQ),
        "columns": len(plan.column_sizes),
        "column_sizes": [int(size) for size in plan.column_sizes],
        "vocabulary": plan.vocabulary.to_json(),
        "tokens": laid.tokens.tolist(),
        "given": [] if laid.loss_S is None else np.flatnonzero(~laid.loss_S).tolist(),
        "held": {
            stream: {"codebooks": books, "frames": frames} for stream, (books, frames) in amounts(inverted).items()
        },
        "differing": differing(segment, inverted),
    }


def columns_of(laid: Laid) -> np.ndarray:
    """Tokens `[S, Q]`, of layouts of one column, too."""
    return laid.tokens if laid.tokens.ndim == 2 else laid.tokens[:, None]


def frames_before(laid: Laid, plan: LayoutPlan) -> dict[str, np.ndarray]:
    """By stream of numbers, of each step `[S]` how many frames of it lie before."""
    first_S = columns_of(laid)[:, 0]
    return {stream: np.cumsum(first_S == token) - (first_S == token) for stream, token in plan.frame_tokens.items()}


def _steps(segment: LaidSegment, share: Fraction, whole_s: Fraction) -> int:
    return int(segment.plan.num_steps(_cut(segment, share, whole_s))[0])


def _length_s(spec: StreamSpec, rows: StreamRows) -> Fraction:
    """The time of a stream's frames; 0 without a clock."""
    has_rate = spec.frame_rule in (FrameRule.FLOOR, FrameRule.CEIL)
    return int(rows.counts_N.sum()) / spec.frame_rate if has_rate else Fraction(0)


def _last_time_s(spec: StreamSpec, rows: StreamRows) -> Fraction:
    """The latest time in the first window of words with times; 0 of anything else."""
    if spec.tokenizer not in _TIMED:
        return Fraction(0)
    first_time = spec.codebook_size - NUM_TIMES
    times = _first_window(rows.books[0], first_time) - first_time
    return int(times.max(initial=0)) * _TIME_S


def _first_window(ids_T: np.ndarray, first_time: int) -> np.ndarray:
    return ids_T[: int(np.argmax(np.append(ids_T == first_time - 1, True)))]


def _cut(segment: LaidSegment, share: Fraction, whole_s: Fraction) -> dict[str, StreamRows]:
    """The beginning of each stream."""
    if share == 1:
        return segment.rows
    rows = {}
    for name, each in segment.rows.items():
        spec, count = segment.specs[name], int(each.counts_N.sum())
        if spec.frame_rule in (FrameRule.FLOOR, FrameRule.CEIL):
            first = min(count, math.ceil(share * whole_s * spec.frame_rate))
        elif spec.tokenizer in _TIMED:
            first = _whole_words(each.books[0], spec.codebook_size - NUM_TIMES, share * whole_s)
        else:
            first = math.ceil(share * count)
        rows[name] = StreamRows(
            np.array([first]),
            [book[:first] for book in each.books],
            None if each.frames_TD is None else each.frames_TD[:first],
            None if each.durations_T is None else each.durations_T[:first],
        )
    return rows


def _whole_words(ids_T: np.ndarray, first_time: int, until_s: Fraction) -> int:
    """How many ids those are that end, with a time of their first window, before `until_s`."""
    window_T = _first_window(ids_T, first_time)
    times = np.flatnonzero(window_T >= first_time)
    ends = times[1::2]  # each second time ends a span
    in_time = ends[(window_T[ends] - first_time) * _TIME_S <= until_s]
    return int(in_time[-1]) + 1 if len(in_time) else 0


def _laid(selection: Selection, layout: NamedLayout, taken: TakenRows, index: int) -> LaidSegment:
    read = read_rows(selection, taken)
    rows = rows_of(read.segment(index))
    plan: Any = selection.plan
    corpus_ids = _all_ids(taken)
    known = {name: replace(spec, num_codebooks=selection.num_codebooks[name]) for name, spec in selection.specs.items()}
    if (grouping := grouping_of(layout)) is not None:
        known = {member(name, place): known[name] for name in known for place in range(grouping.num_members)}
    ids = tuple(corpus_ids[int(rows_N[index])] for rows_N in taken.members)
    return LaidSegment(layout, ids, taken.shard, known, plan, rows, plan.lay(rows))


def _short_one(selection: Selection, taken: TakenRows) -> int | None:
    """The shortest segment with frames of all streams and some steps, or the longest with fewer."""
    rows = taken.counts()
    if selection.plan is None:
        return None
    if selection.plan.read_to_plan:
        read = sorted({stream_of(name) for name in selection.plan.read_to_plan})
        rows |= read_rows(selection, taken, read).streams
    steps_N = selection.plan.num_steps(rows)
    has_all_N = np.all([each.counts_N > 0 for each in rows.values()], axis=0)
    if not has_all_N.any():
        return None
    enough_N = has_all_N & (steps_N >= _LEAST_STEPS)
    if enough_N.any():
        return int(np.flatnonzero(enough_N)[np.argmin(steps_N[enough_N])])
    return int(np.flatnonzero(has_all_N)[np.argmax(steps_N[has_all_N])])


def _all_ids(taken: TakenRows) -> list[str]:
    """Ids of all rows of the shard."""
    if taken.corpus_ids is not None:
        return taken.corpus_ids.to_pylist()
    return next(iter(taken.files.values())).read(["id"])["id"].to_pylist()


def _ids(taken: TakenRows) -> list[list[str]]:
    """Of each segment that is taken the ids of its members."""
    every = _all_ids(taken)
    return [[every[row] for row in rows] for rows in zip(*(rows_N.tolist() for rows_N in taken.members), strict=True)]


def _place(ids: list[list[str]], segment: str) -> int | None:
    """The segment of this id, or in which it is a member."""
    return next((index for index, members in enumerate(ids) if segment in members), None)


def _not_there(root: Root, selection: Selection, segment: str) -> UserError:
    """Why a segment is not among those that are taken."""
    for name, snapshot in selection.streams.items():
        schema = stream_schema(selection.specs[name])
        for shard in snapshot.files:
            columns = ["id", "error", "error_message"]
            for row in read_parquet(root, snapshot.path(shard), schema=schema, columns=columns).to_pylist():
                if row["id"] != segment:
                    continue
                if row["error"] is not None:
                    told = f"{row['error']} ({row['error_message']})"
                    return UserError(f"Segment {segment} has no codes in stream {name!r}: {told}. Name another one.")
                if (grouping := selection.grouping) is not None:
                    return UserError(
                        f"Segment {segment} is in no whole group: the layout takes {grouping.num_members} rows of the "
                        f"corpus with the same {grouping.by.value!r}. Name another one."
                    )
    return UserError(f"There is no segment {segment!r} in {root}. `wavemill inspect` and the column `id` show them.")


def _same(ours: StreamRows, theirs: StreamRows) -> bool:
    """Whether one says what the other does, so far as it says something."""
    pairs: list[tuple[Any, Any]] = [(ours.counts_N, theirs.counts_N), *zip(ours.books, theirs.books, strict=False)]
    pairs += [(ours.frames_TD, theirs.frames_TD)] if ours.frames_TD is not None else []
    pairs += [(ours.durations_T, theirs.durations_T)] if ours.durations_T is not None else []
    return all(right is not None and np.array_equal(left, right) for left, right in pairs)
