"""Small random streams to lay out, and what every layout promises of them.

Axes: see storage/layouts.py.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st
from wavemill.pipelines.layouts.plan import LayoutPlan
from wavemill.pipelines.layouts.vocabulary import Vocabulary
from wavemill.storage.codes import open_corpus
from wavemill.storage.layouts import Laid, StreamRows
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, code_columns, stream_schema
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import FrameRule, StreamSpec, num_frames

Rows = dict[str, StreamRows]


def spec(num_codebooks: int = 1, codebook_size: int = 7, **more: Any) -> StreamSpec:
    """A stream of 50 frames a second, of toy codes unless `more` says otherwise."""
    clock = {"sample_rate": 16_000, "decode_sample_rate": 0, "hop_length": 320, "window_length": 320}
    made: dict[str, Any] = {"tokenizer": "toy", "frame_rule": FrameRule.FLOOR, **clock, **more}
    return StreamSpec(num_codebooks=num_codebooks, codebook_size=codebook_size, **made)


def text_spec(size: int = 7, **more: Any) -> StreamSpec:
    """A stream of text ids: one codebook and no clock."""
    return spec(1, size, tokenizer="text-tokens", frame_rule=FrameRule.FREE, **more)


def specs(**streams: tuple[int, int]) -> dict[str, StreamSpec]:
    """Streams as (codebooks, codebook size): `specs(semantic=(1, 7), acoustic=(3, 5))`."""
    return {name: spec(num_codebooks, size) for name, (num_codebooks, size) in streams.items()}


def rows(specs: Mapping[str, StreamSpec], **codes: Sequence[Any]) -> Rows:
    """Rows by hand: of each stream for each segment its codes `[K][T]`, or `[T]` where there is one codebook."""
    return {name: _end_to_end(specs[name], [np.array(each) for each in segments]) for name, segments in codes.items()}


def _end_to_end(spec: StreamSpec, segments: Sequence[np.ndarray]) -> StreamRows:
    books = max(spec.num_codebooks, 1)
    shaped = [each.reshape(books, -1).astype(_stored(spec)) for each in segments]
    counts_N = np.array([each.shape[1] for each in shaped], dtype=np.int64)
    codes_KT = np.concatenate([np.empty((books, 0), dtype=_stored(spec)), *shaped], axis=1)
    return StreamRows(counts_N, _locked(codes_KT))


@st.composite
def rows_of_streams(
    draw: st.DrawFn,
    specs: Mapping[str, StreamSpec],
    *,
    max_segments: int = 4,
    max_frames: int = 6,
    clocked: bool = False,
    together: Iterable[str] = (),
) -> Rows:
    """Up to so many segments, of 0 frames or more: what a shard's files may hold of these streams.

    `clocked`: streams with a clock have the frames of one number of samples a segment, the fastest up to `max_frames`;
    `together`: these have the same number of frames.
    """
    num_segments = draw(st.integers(0, max_segments))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.lists(st.integers(0, max_frames), min_size=num_segments, max_size=num_segments))
    hop_s = min((1 / spec.frame_rate for spec in specs.values() if spec.has_clock), default=Fraction(0))
    lengths_s = [count * hop_s + draw(st.sampled_from([0, hop_s / 3, hop_s * 3 / 4])) for count in share]
    made = {}
    for name, each in specs.items():
        counts = draw(st.lists(st.integers(0, max_frames), min_size=num_segments, max_size=num_segments))
        if name in together:
            counts = share
        if clocked and each.has_clock:
            counts = [num_frames(int(length_s * each.sample_rate), each) for length_s in lengths_s]
        made[name] = random_rows(each, counts, rng)
    return made


def random_rows(spec: StreamSpec, counts: Sequence[int], rng: np.random.Generator) -> StreamRows:
    """Segments of so many frames, as a file holds them: small integers or float16 that nobody may write to."""
    counts_N = np.array(counts, dtype=np.int64).reshape(-1)
    total = int(counts_N.sum())
    if spec.dim:
        return StreamRows(counts_N, (), *_locked([rng.normal(size=(total, spec.dim)).astype(np.float16)]))
    codes_KT = rng.integers(0, spec.codebook_size, (spec.num_codebooks, total)).astype(_stored(spec))
    durations = _locked([rng.integers(1, 5, total).astype(np.int32)])[0] if spec.durations else None
    return StreamRows(counts_N, _locked(codes_KT), durations_T=durations)


def _stored(spec: StreamSpec) -> type[np.integer]:
    return np.int16 if spec.codebook_size <= 32_768 else np.int32


def _locked(arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
    found = [np.ascontiguousarray(array) for array in arrays]
    for array in found:
        array.setflags(write=False)
    return found


def segment_of(rows: Rows, index: int) -> Rows:
    """One segment's rows."""
    alone = {}
    for name, each in rows.items():
        begin = int(each.begins_N[index])
        span = slice(begin, begin + int(each.counts_N[index]))
        alone[name] = StreamRows(
            each.counts_N[index : index + 1],
            [book[span] for book in each.books],
            None if each.frames_TD is None else each.frames_TD[span],
            None if each.durations_T is None else each.durations_T[span],
        )
    return alone


def num_segments(rows: Rows) -> int:
    return len(next(iter(rows.values())).counts_N)


def require_invertible(plan: LayoutPlan, rows: Rows, held: Mapping[str, Sequence[int]] | None = None) -> Laid:
    """What a plan promises of any rows; gives them laid out.

    `held`: which codebooks of which streams the layout holds (of streams of numbers: none of them), if not all of all.
    """
    if held is None:
        held = {name: range(len(each.books)) for name, each in rows.items()}
    before = {name: [book.copy() for book in each.books] for name, each in rows.items()}
    planned = {
        name: each if name in plan.read_to_plan else StreamRows(each.counts_N, ()) for name, each in rows.items()
    }
    steps_N = plan.num_steps(planned)
    laid = plan.lay(rows)
    assert steps_N.shape == (num_segments(rows),)
    _require_shape(plan, laid, int(steps_N.sum()))
    ends_N = np.cumsum(steps_N)
    for index in range(len(steps_N)):
        part = _steps(plan, laid, int(ends_N[index] - steps_N[index]), int(ends_N[index]))
        alone = segment_of(rows, index)
        require_same_laid(plan.lay(alone), part)
        found = plan.invert(part)
        assert found.keys() == held.keys()
        for name, books in held.items():
            _require_same_rows(found[name], alone[name], books)
    for name, books in before.items():
        for old, new in zip(books, rows[name].books, strict=True):
            np.testing.assert_array_equal(old, new)  # rows are the reader's
    again = Vocabulary.from_json(json.loads(json.dumps(plan.vocabulary.to_json())))
    assert again == plan.vocabulary
    assert tuple(again.column_sizes) == tuple(plan.column_sizes)
    return laid


def _require_shape(plan: LayoutPlan, laid: Laid, num_steps: int) -> None:
    sizes = list(plan.column_sizes)
    assert laid.tokens.shape == ((num_steps,) if len(sizes) == 1 else (num_steps, len(sizes)))
    assert np.issubdtype(laid.tokens.dtype, np.integer)
    columns = laid.tokens.reshape(num_steps, len(sizes)).T
    for column, (tokens_S, size) in enumerate(zip(columns, sizes, strict=True)):
        assert ((tokens_S >= 0) & (tokens_S < size)).all()
        assert all(plan.vocabulary.said(int(token), column) for token in np.unique(tokens_S))
    assert laid.loss_S is None or (laid.loss_S.shape == (num_steps,) and laid.loss_S.dtype == np.bool_)
    assert laid.frames.keys() == plan.frame_tokens.keys()
    for stream, token in plan.frame_tokens.items():
        assert len(laid.frames[stream]) == (columns[0] == token).sum()


def _steps(plan: LayoutPlan, laid: Laid, begin: int, end: int) -> Laid:
    """Some of the steps."""
    first = laid.tokens if laid.tokens.ndim == 1 else laid.tokens[:, 0]
    frames = {}
    for stream, token in plan.frame_tokens.items():
        skipped = int((first[:begin] == token).sum())
        frames[stream] = laid.frames[stream][skipped : skipped + int((first[begin:end] == token).sum())]
    return Laid(laid.tokens[begin:end], None if laid.loss_S is None else laid.loss_S[begin:end], frames)


def require_same_laid(one: Laid, other: Laid) -> None:
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert (one.loss_S is None) == (other.loss_S is None)
    if one.loss_S is not None:
        np.testing.assert_array_equal(one.loss_S, other.loss_S)
    assert one.frames.keys() == other.frames.keys()
    for stream in one.frames:
        np.testing.assert_array_equal(one.frames[stream], other.frames[stream])


def _require_same_rows(found: StreamRows, expected: StreamRows, books: Sequence[int]) -> None:
    np.testing.assert_array_equal(found.counts_N, expected.counts_N)
    assert len(found.books) == len(books)
    for book, codes_T in zip(books, found.books, strict=True):
        np.testing.assert_array_equal(codes_T, expected.books[book])
    if found.frames_TD is not None:
        np.testing.assert_array_equal(found.frames_TD, expected.frames_TD)
    if found.durations_T is not None:
        np.testing.assert_array_equal(found.durations_T, expected.durations_T)


@st.composite
def disturbed(draw: st.DrawFn, plan: LayoutPlan, tokens: np.ndarray) -> np.ndarray:
    """Tokens of a segment with a step taken out, doubled, moved or of other tokens: perhaps what no segment gives."""
    made = list(tokens)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(made)))
        step = [draw(st.integers(0, size - 1)) for size in plan.column_sizes]
        other = np.array(step[0] if tokens.ndim == 1 else step, dtype=tokens.dtype)
        how = draw(st.sampled_from(["insert", "drop", "double", "move", "change"]))
        if how == "insert" or not made:
            made.insert(place, other)
            continue
        place = min(place, len(made) - 1)
        if how == "double":
            made.insert(place, made[place])
        elif how == "change":
            made[place] = other
        else:
            taken = made.pop(place)
            if how == "move":
                made.insert(draw(st.integers(0, len(made))), taken)
    return np.array(made, dtype=tokens.dtype).reshape(-1, *tokens.shape[1:])


def require_refused_or_true(plan: LayoutPlan, tokens: np.ndarray) -> None:
    """Steps are refused with `ValueError`, or are those of just what is found in them. (Streams of codes only.)"""
    try:
        found = plan.invert(Laid(tokens))
    except ValueError:
        return
    np.testing.assert_array_equal(plan.lay(found).tokens, tokens)


def write_root(path: Path, specs: Mapping[str, StreamSpec], shards: Sequence[Rows], **corpus: Sequence[Any]) -> None:
    """A root with these streams: the rows of each shard, of codes only. `corpus`: further columns of all segments.

    A stream's fingerprint has the first letter of its name as its weights.
    """
    root, begin = Root(path), 0
    create_table(root, "corpus", schema=CORPUS_SCHEMA, metadata={})
    receipts, ids = [], []
    for shard, rows in enumerate(shards):
        count = num_segments(rows)
        ids.append([f"segment-{begin + row:04d}" for row in range(count)])
        filled: dict[str, Any] = {"id": ids[-1], "shard": [shard] * count, "duration_s": [1.0] * count}
        filled |= {name: values[begin : begin + count] for name, values in corpus.items()}
        for field in CORPUS_SCHEMA:
            empty: Any = None if field.nullable else "" if field.type == pa.string() else 0
            filled.setdefault(field.name, [empty] * count)
        receipts.append(write_shard(root, "corpus", shard, pa.Table.from_pydict(filled, schema=CORPUS_SCHEMA)))
        begin += count
    TableWriter(root, "corpus").commit(receipts)
    for name, each in specs.items():
        fingerprint = {"tokenizer": each.tokenizer, "weights": name[0], "revision": name, "resampler": name}
        metadata = {"spec": each.to_json(), "corpus": open_corpus(root).table_id, "fingerprint": fingerprint}
        create_table(root, f"streams/{name}", schema=stream_schema(each), metadata=metadata)
        receipts = []
        for shard, rows in enumerate(shards):
            stream, count = rows[name], len(ids[shard])
            columns: dict[str, Any] = {"id": ids[shard], "shard": [shard] * count, "num_frames": stream.counts_N}
            columns |= {"error": [None] * count, "error_message": [None] * count}
            splits = np.cumsum(stream.counts_N)[:-1]
            for column, book in zip(code_columns(each.num_codebooks), stream.books, strict=True):
                columns[column] = np.split(book, splits) if count else []
            if each.durations:
                columns["durations"] = np.split(stream.durations_T, splits) if count else []
            if each.text:
                columns["text"] = [None] * count
            table = pa.Table.from_pydict(columns, schema=stream_schema(each))
            receipts.append(
                write_shard(root, f"streams/{name}", shard, table, codebook_size=0 if each.dim else each.codebook_size)
            )
        TableWriter(root, f"streams/{name}").commit(receipts)


def with_changes(specs: Mapping[str, StreamSpec], stream: str, **changes: Any) -> dict[str, StreamSpec]:
    """The same streams, one of them of another kind."""
    return {**specs, stream: replace(specs[stream], **changes)}


def refused_kinds(specs: Mapping[str, StreamSpec], stream: str) -> dict[str, dict[str, StreamSpec]]:
    """By what is wrong with them, streams that a layout of codes with a clock cannot take."""
    chunks = {"chunk_length": 48_000, "chunk_stride": 47_520}
    return {
        "numbers": with_changes(specs, stream, dim=4, num_codebooks=0, codebook_size=0),
        "chunks": with_changes(specs, stream, **chunks),
        "missing": {name: each for name, each in specs.items() if name != stream},
    }
