"""What a trainer reads: streams, codebooks, rows, packing and order, checked before anything is read."""

import hashlib
import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as arrow_dataset
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..tokenizers.spec import StreamSpec, UserError, did_you_mean
from .codes import open_corpus, open_stream, stream_spec
from .groups import Key, pairs_apart
from .identity import layout_name
from .joined import require_pinned, require_same_corpus, require_same_shards, require_same_tokens
from .layouts import GroupBy, Grouping, Layout, Plan, PlannedLayout, grouping_of, member, require_made, stream_of
from .packing import PackingMethod
from .pins import read_pin
from .root import Root
from .schema import CORPUS_SCHEMA
from .table import Snapshot


@dataclass(frozen=True, slots=True)
class Pack:
    """How segments become sequences of `length` tokens.

    `layout` is a `PlannedLayout`, or any callable from a `Segment` to its tokens. `vocab_size` is the trainer's: tokens
    beyond it are refused. See `PackingMethod` for the ways to share sequences.
    """

    layout: Layout | PlannedLayout
    length: int  # steps
    method: PackingMethod = PackingMethod.CONCATENATE
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is read, and in which order: all that a reader needs, without deltalake."""

    root_uri: str
    streams: dict[str, Snapshot]
    num_codebooks: dict[str, int]
    corpus: Snapshot | None  # where rows are chosen, or belong together, by its columns
    where: Any  # a pyarrow expression over the corpus, or None
    pack: Pack | None
    plan: Plan | None  # of a layout that can plan
    seed: int
    shuffle: bool
    window_bytes: int
    pairs_apart: frozenset[Key] = frozenset()  # pairs of the corpus with rows in several shards

    @property
    def shards(self) -> list[int]:
        return list(next(iter(self.streams.values())).files)

    @property
    def specs(self) -> dict[str, StreamSpec]:
        return {name: stream_spec(snapshot) for name, snapshot in self.streams.items()}

    @property
    def grouping(self) -> Grouping | None:
        """Which rows are one segment together."""
        return grouping_of(self.pack.layout) if self.pack else None

    @property
    def columns(self) -> tuple[int, ...]:
        """`(Q,)` where a step has several tokens."""
        num_columns = len(self.plan.column_sizes) if self.plan else 1
        return (num_columns,) if num_columns > 1 else ()

    @property
    def versions(self) -> dict[str, int]:
        """The table version each stream, and the corpus if it is read, is pinned to."""
        versions = {name: snapshot.version for name, snapshot in self.streams.items()}
        return versions if self.corpus is None else {**versions, "corpus": self.corpus.version}

    @property
    def bytes_to_read(self) -> NDArray[np.int64]:
        """Bytes by shard number: of each file the share of its codebooks that are read."""
        sizes = np.zeros(max(self.shards, default=-1) + 1, dtype=np.int64)
        for name, snapshot in self.streams.items():
            spec = stream_spec(snapshot)
            wanted, there = (1, 1) if spec.dim else (self.num_codebooks[name], spec.num_codebooks)
            sizes[self.shards] += [file.size_bytes * wanted // there for file in snapshot.files.values()]
        return sizes

    def identity(self) -> dict[str, Any]:
        """What the order depends on; a state is good for a dataset with the same."""
        told = {
            "codebooks": self.num_codebooks,
            "shuffle": self.shuffle,
            "window_bytes": self.window_bytes,
            "where": None if self.where is None else _filter_hex(self.where),
            "pack": self.pack and [layout_name(self.pack.layout), self.pack.length, self.pack.method],
            "tables": {name: snapshot.table_id for name, snapshot in self.streams.items()},
        }
        digest = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()
        return {"versions": self.versions, "seed": self.seed, "order": digest}

    @property
    def shape(self) -> str:
        """What its batches hold, in words: datasets with the same can be mixed."""
        if self.pack is not None:
            steps = f"sequences of {self.pack.length} tokens"
            wide = [f"{self.columns[0]} columns"] if self.columns else []
            frame_tokens = self.plan.frame_tokens if self.plan else {}
            numbers = [
                f"frames of {name} ({self.specs[stream_of(name)].dim} numbers) at token {token}"
                for name, token in frame_tokens.items()
            ]
            return ", ".join([steps, *wide, *numbers])
        return "streams " + ", ".join(self._stream_shape(name, spec) for name, spec in sorted(self.specs.items()))

    def _stream_shape(self, name: str, spec: StreamSpec) -> str:
        codes = f"{self.num_codebooks[name]} codebook(s) of {spec.codebook_size:,}"
        durations = ", durations" if spec.durations else ""
        return f"{name} ({f'{spec.dim} numbers' if spec.dim else codes}{durations})"


def select(
    root: str,
    streams: Mapping[str, int | None] | Sequence[str] | None,
    *,
    pack: Pack | None,
    seed: int,
    shuffle: bool,
    where: Any,
    versions: Mapping[str, int] | None,
    pin: str | None,
    window_bytes: int,
) -> Selection:
    """Resolve what a `TokenDataset` is given. Raises `UserError` for what is not there or does not belong together."""
    pack = _checked(pack)
    wanted = _wanted(streams, pack)
    needs_corpus = where is not None or (pack is not None and grouping_of(pack.layout) is not None)
    seed, window_bytes = whole(seed, "seed", least=0), whole(window_bytes, "window_bytes", least=1)
    place = Root(root)
    if pin is not None and versions:
        raise UserError("Both versions and a pin are given: leave out one of them.")
    tables = read_pin(place, pin) if pin is not None else {}
    if pin is None:
        _require_known(versions or {}, wanted, needs_corpus=needs_corpus)
    pinned = {name: table.version for name, table in tables.items()} if tables else dict(versions or {})
    snapshots = {name: open_stream(place, name, version=pinned.get(name)) for name in wanted}
    if pin is not None:
        require_pinned(pin, tables, snapshots)
    require_same_corpus(snapshots)
    require_same_shards(snapshots)
    if pack is not None:
        require_same_tokens(getattr(pack.layout, "same_tokens", ()), snapshots)
    selection = Selection(
        root_uri=place.uri,
        streams=snapshots,
        num_codebooks={name: _books(name, snapshots[name], count) for name, count in wanted.items()},
        corpus=open_corpus(place, version=pinned.get("corpus")) if needs_corpus else None,
        where=_expression(where),
        pack=pack,
        plan=None,
        seed=seed,
        shuffle=shuffle,
        window_bytes=window_bytes,
    )
    _require_corpus(selection)
    _require_clock(selection)
    selection = replace(selection, plan=_planned(selection), pairs_apart=_pairs_apart(selection))
    _require_vocabulary(selection)
    return selection


def _wanted(streams: Mapping[str, int | None] | Sequence[str] | None, pack: Pack | None) -> dict[str, int | None]:
    """The streams to read and how many codebooks of each. Raises `UserError` if a layout takes others."""
    layout = pack.layout if pack else None
    taken = layout.streams if isinstance(layout, PlannedLayout) else {}
    if streams is None:
        wanted = dict(taken)
    else:
        wanted = dict(streams) if isinstance(streams, Mapping) else dict.fromkeys(streams)
    if not wanted:
        raise UserError("Name at least one stream to read.")
    for name, books in taken.items():
        if name not in wanted:
            raise UserError(
                f"The layout takes stream {name!r}; the streams to read are {', '.join(wanted)}."
                f"{did_you_mean(name, list(wanted))}"
            )
        if books is not None:
            whole(books, f"The layout's number of codebooks of stream {name!r}")
        if wanted[name] is None:
            wanted[name] = books
    return wanted


def _planned(selection: Selection) -> Plan | None:
    """What a planned layout makes of the streams, by the names that it knows them by."""
    layout, grouping = selection.pack and selection.pack.layout, selection.grouping
    if not isinstance(layout, PlannedLayout):
        return None
    read = {name: replace(spec, num_codebooks=selection.num_codebooks[name]) for name, spec in selection.specs.items()}
    if grouping is not None:
        read = {member(name, index): spec for name, spec in read.items() for index in range(grouping.num_members)}
    plan = layout.plan(read)
    assert 0 not in plan.frame_tokens.values(), "0 stands where there is padding"
    return plan


def _pairs_apart(selection: Selection) -> frozenset[Key]:
    if selection.corpus is None or selection.grouping is None or selection.grouping.by is not GroupBy.PAIR:
        return frozenset()
    return pairs_apart(Root(selection.root_uri), selection.corpus)


def filter_columns(where: Any) -> list[str]:
    """Columns of the corpus that an expression speaks of (or more: it cannot be asked)."""
    told = set(re.findall(r"\w+", str(where)))
    return [name for name in CORPUS_SCHEMA.names if name in told]


def _filter_hex(where: Any) -> str:
    """What tells filters apart in states, whatever other columns the corpus has."""
    schema = pa.schema([CORPUS_SCHEMA.field(name) for name in filter_columns(where)])
    return bytes(where.to_substrait(schema)).hex()


def _books(name: str, snapshot: Snapshot, count: int | None) -> int:
    spec = stream_spec(snapshot)
    there = spec.num_codebooks
    if spec.dim and count is not None:
        raise UserError(f"Stream {name!r} holds frames of {spec.dim} numbers, not codes: name no number of codebooks.")
    if count is None:
        return there
    if not 1 <= whole(count, f"The number of codebooks of stream {name!r}") <= there:
        raise UserError(f"Stream {name!r} has {there} codebooks; {count} were asked for.")
    return int(count)


def _require_corpus(selection: Selection) -> None:
    """Raise `UserError` if rows are chosen or grouped by another corpus than the streams', or one that lacks shards."""
    corpus = selection.corpus
    if corpus is None:
        return
    for name, snapshot in selection.streams.items():
        if snapshot.metadata.get("corpus") not in (None, corpus.table_id):
            by = selection.grouping and selection.grouping.by.value
            cannot = (
                "`where` cannot choose among its segments"
                if selection.where is not None
                else (f"which of its segments belong together by {by!r} cannot be told")
            )
            raise UserError(
                f"Stream {name!r} was made over another corpus than the one that is there now: {cannot}. Restore the "
                "old corpus, or make the stream again."
            )
    missing = sorted(set(selection.shards) - set(corpus.files))
    if missing:
        raise UserError(
            f"The corpus (version {corpus.version}) lacks {len(missing)} shard(s) of the streams, the first being "
            f"{missing[0]}. Name a newer version of it."
        )


def _require_clock(selection: Selection) -> None:
    """Raise `UserError` for a layout of a chunked stream that does not say that it takes one."""
    layout = selection.pack and selection.pack.layout
    if layout is None or getattr(layout, "takes_chunks", False):
        return
    taken = layout.streams if isinstance(layout, PlannedLayout) else selection.specs
    for name, spec in selection.specs.items():
        if spec.chunk_length and name in taken:
            raise UserError(
                f"Stream {name!r} is made of chunks that overlap: frames of two then stand for the same samples. The "
                "layout does not say that it takes such a stream; give a function of your own that has "
                "`takes_chunks = True`, or read the stream without a pack."
            )


def _require_vocabulary(selection: Selection) -> None:
    pack, plan = selection.pack, selection.plan
    if pack is None or plan is None:
        return
    needed = max(plan.column_sizes)
    if pack.vocab_size is not None and needed > pack.vocab_size:
        read = ", ".join(
            f"{selection.num_codebooks[name]} codebook(s) of {spec.codebook_size:,} in stream {name!r}"
            for name, spec in selection.specs.items()
            if not spec.dim
        )
        raise UserError(
            f"The layout gives {needed:,} different tokens ({read}); the vocabulary has {pack.vocab_size:,}. Read "
            "fewer codebooks, or widen the vocabulary."
        )


def _checked(pack: Pack | None) -> Pack | None:
    if pack is None:
        return None
    if pack.length < 1:
        raise UserError(f"Sequences of {pack.length} tokens were asked for; they must have 1 or more.")
    require_made(pack.layout)
    if not (callable(pack.layout) or isinstance(pack.layout, PlannedLayout)):
        raise UserError(
            f"The layout {pack.layout!r} cannot be called: give one of wavemill.pipelines.layouts, or a function."
        )
    return Pack(pack.layout, pack.length, one_of(PackingMethod, pack.method, "method"), pack.vocab_size)


def _expression(where: Any) -> Any:
    """A pyarrow expression that holds for the corpus. Raises `UserError`."""
    if where is None:
        return None
    try:
        expression = where if isinstance(where, arrow_dataset.Expression) else pq.filters_to_expression(where)
        found = arrow_dataset.dataset(CORPUS_SCHEMA.empty_table()).to_table(columns={"taken": expression})
        _filter_hex(expression)
    except (pa.ArrowException, ValueError, TypeError, AttributeError) as error:
        told = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"`where` does not fit the corpus: {told}. Its columns are {', '.join(CORPUS_SCHEMA.names)}."
        ) from error
    if found.schema.field("taken").type != pa.bool_():
        raise UserError(f"`where` gives {found.schema.field('taken').type} values, not true or false: compare them.")
    return expression


def _require_known(versions: Mapping[str, int], wanted: Mapping[str, Any], *, needs_corpus: bool) -> None:
    there = [*wanted, "corpus"] if needs_corpus else [*wanted]
    stray = sorted(set(versions) - set(there))
    if stray:
        raise UserError(f"A version is pinned for {stray[0]!r}, but the streams to read are {', '.join(there)}.")


def whole(value: Any, what: str, *, least: int | None = None) -> int:
    """A whole number that was given. Raises `UserError`."""
    try:
        number = operator.index(value)  # NumPy's integers, too
    except TypeError as error:
        raise UserError(f"{what} is {value!r}; expected a whole number.") from error
    if least is not None and number < least:
        raise UserError(f"{what} is {number}; it must be {least} or more.")
    return number


def one_of(kind: Any, name: str, what: str) -> Any:
    """The member of an enumeration that was named. Raises `UserError`."""
    try:
        return kind(name)
    except ValueError as error:
        known = [member.value for member in kind]
        raise UserError(
            f"{what} {name!r} is unknown; there are: {', '.join(known)}.{did_you_mean(name, known)}"
        ) from error
