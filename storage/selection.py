"""What a trainer reads: streams, codebooks, rows, packing and order, checked before anything is read."""

import hashlib
import json
import operator
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
from .identity import layout_name
from .layouts import Grouping, Layout, Plan, PlannedLayout, grouping_of, member, stream_of
from .packing import PackingMethod
from .pins import Pinned, read_pin
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
            "where": None if self.where is None else bytes(self.where.to_substrait(CORPUS_SCHEMA)).hex(),
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
        each = [
            f"{name} ({f'{spec.dim} numbers' if spec.dim else self.num_codebooks[name]})"
            for name, spec in sorted(self.specs.items())
        ]
        return "streams " + ", ".join(each)


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
        _require_pinned(pin, tables, snapshots)
    _require_same_corpus(snapshots)
    _require_same_shards(snapshots)
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
    selection = replace(selection, plan=_planned(selection))
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


def filter_columns(where: Any) -> list[str]:
    """Columns of the corpus that an expression speaks of (or more: it cannot be asked)."""
    told = str(where)
    return [name for name in CORPUS_SCHEMA.names if name in told]


def _books(name: str, snapshot: Snapshot, count: int | None) -> int:
    spec = stream_spec(snapshot)
    there = spec.num_codebooks
    if spec.dim and count is not None:
        raise UserError(f"Stream {name!r} holds frames of {spec.dim} numbers, not codes: name no number of codebooks.")
    if count is None:
        return there
    if not 1 <= count <= there:
        raise UserError(f"Stream {name!r} has {there} codebooks; {count} were asked for.")
    return int(count)


def _require_pinned(pin: str, tables: Mapping[str, Pinned], snapshots: Mapping[str, Snapshot]) -> None:
    """Raise `UserError` for streams that the pin does not name, or that were made anew since."""
    for name, snapshot in snapshots.items():
        if name not in tables:
            raise UserError(
                f"Pin {pin!r} names no stream {name!r}; it names {', '.join(tables)}. Pin again under another name."
            )
        if snapshot.table_id != tables[name].table_id:
            raise UserError(
                f"Stream {name!r} is another table than the one that pin {pin!r} names: it was made anew since. Pin "
                "again under another name."
            )


def _require_same_shards(snapshots: Mapping[str, Snapshot]) -> None:
    every = set().union(*(snapshot.files for snapshot in snapshots.values()))
    for name, snapshot in snapshots.items():
        missing = sorted(every - set(snapshot.files))
        if missing:
            raise UserError(
                f"Stream {name!r} (version {snapshot.version}) lacks {len(missing)} shard(s) that other streams have, "
                f"the first being {missing[0]}. Finish it with `wavemill tokenize`, or pin older versions of the rest."
            )
    (first_name, first), *rest = snapshots.items()
    for name, snapshot in rest:
        for shard, file in first.files.items():
            if snapshot.files[shard].num_rows != file.num_rows:
                raise UserError(
                    f"Streams {first_name!r} and {name!r} hold {file.num_rows} and {snapshot.files[shard].num_rows} "
                    f"segments in shard {shard}: they were not made from the same corpus. Make one of them again."
                )


def _require_same_corpus(snapshots: Mapping[str, Snapshot]) -> None:
    (first_name, first), *rest = snapshots.items()
    for name, snapshot in rest:
        if snapshot.metadata.get("corpus") != first.metadata.get("corpus"):
            raise UserError(
                f"Streams {first_name!r} and {name!r} were made over different corpora: their segments do not join. "
                "Read them apart, or make one of them again."
            )


def _require_corpus(selection: Selection) -> None:
    """Raise `UserError` if rows are chosen by another corpus than the streams', or by one that lacks shards."""
    corpus = selection.corpus
    if corpus is None:
        return
    for name, snapshot in selection.streams.items():
        if snapshot.metadata.get("corpus") not in (None, corpus.table_id):
            raise UserError(
                f"Stream {name!r} was made over another corpus than the one that is there now: `where` cannot choose "
                "among its segments. Restore the old corpus, or make the stream again."
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
    if isinstance(pack.layout, type):
        name = pack.layout.__name__
        raise UserError(f"The layout {name} was given without what it takes: write {name}(...), with its streams.")
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
        expression.to_substrait(CORPUS_SCHEMA)  # what tells filters apart in states
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


def whole(value: Any, what: str, *, least: int) -> int:
    """A whole number that was given. Raises `UserError`."""
    try:
        number = operator.index(value)  # NumPy's integers, too
    except TypeError as error:
        raise UserError(f"{what} is {value!r}; expected a whole number.") from error
    if number < least:
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
