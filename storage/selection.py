"""What a trainer reads: streams, codebooks, rows, packing and order, checked before anything is read."""

import functools
import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as arrow_dataset
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..tokenizers.spec import StreamSpec, UserError, did_you_mean
from .codes import open_corpus, open_stream, stream_spec
from .layouts import Layout, largest_vocabulary
from .packing import PackingMethod
from .pins import Pinned, read_pin
from .root import Root
from .schema import CORPUS_SCHEMA
from .table import Snapshot


@dataclass(frozen=True, slots=True)
class Pack:
    """How segments become sequences of `length` tokens.

    `layout` is any callable from a `Segment` to its tokens. `vocab_size` is the trainer's: tokens beyond it are
    refused. See `PackingMethod` for the ways to share sequences.
    """

    layout: Layout
    length: int
    method: PackingMethod = PackingMethod.CONCATENATE
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is read, and in which order: all that a reader needs, without deltalake."""

    root_uri: str
    streams: dict[str, Snapshot]
    num_codebooks: dict[str, int]
    corpus: Snapshot | None  # where rows are chosen by its columns
    where: Any  # a pyarrow expression over the corpus, or None
    pack: Pack | None
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
    def versions(self) -> dict[str, int]:
        """The table version each stream, and the corpus if it is read, is pinned to."""
        versions = {name: snapshot.version for name, snapshot in self.streams.items()}
        return versions if self.corpus is None else {**versions, "corpus": self.corpus.version}

    @property
    def bytes_to_read(self) -> NDArray[np.int64]:
        """Bytes by shard number: of each file the share of its codebooks that are read."""
        sizes = np.zeros(max(self.shards, default=-1) + 1, dtype=np.int64)
        for name, snapshot in self.streams.items():
            wanted, there = self.num_codebooks[name], stream_spec(snapshot).num_codebooks
            sizes[self.shards] += [file.size_bytes * wanted // there for file in snapshot.files.values()]
        return sizes

    def identity(self) -> dict[str, Any]:
        """What the order depends on; a state is good for a dataset with the same."""
        told = {
            "codebooks": self.num_codebooks,
            "shuffle": self.shuffle,
            "window_bytes": self.window_bytes,
            "where": None if self.where is None else bytes(self.where.to_substrait(CORPUS_SCHEMA)).hex(),
            "pack": self.pack and [_layout_name(self.pack.layout), self.pack.length, self.pack.method],
            "tables": {name: snapshot.table_id for name, snapshot in self.streams.items()},
        }
        digest = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()
        return {"versions": self.versions, "seed": self.seed, "order": digest}

    @property
    def shape(self) -> str:
        """What its batches hold, in words: datasets with the same can be mixed."""
        if self.pack is not None:
            return f"sequences of {self.pack.length} tokens"
        return "streams " + ", ".join(f"{name} ({count})" for name, count in sorted(self.num_codebooks.items()))


def select(
    root: str,
    streams: Mapping[str, int | None] | Sequence[str],
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
    wanted = dict(streams) if isinstance(streams, Mapping) else dict.fromkeys(streams)
    if not wanted:
        raise UserError("Name at least one stream to read.")
    seed, window_bytes = whole(seed, "seed", least=0), whole(window_bytes, "window_bytes", least=1)
    place = Root(root)
    if pin is not None and versions:
        raise UserError("Both versions and a pin are given: leave out one of them.")
    tables = read_pin(place, pin) if pin is not None else {}
    if pin is None:
        _require_known(versions or {}, wanted, where)
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
        corpus=None if where is None else open_corpus(place, version=pinned.get("corpus")),
        where=_expression(where),
        pack=_checked(pack),
        seed=seed,
        shuffle=shuffle,
        window_bytes=window_bytes,
    )
    _require_corpus(selection)
    _require_clock(selection)
    _require_vocabulary(selection)
    return selection


def filter_columns(where: Any) -> list[str]:
    """Columns of the corpus that an expression speaks of (or more: it cannot be asked)."""
    told = str(where)
    return [name for name in CORPUS_SCHEMA.names if name in told]


def _books(name: str, snapshot: Snapshot, count: int | None) -> int:
    spec = stream_spec(snapshot)
    if spec.dim:
        raise UserError(
            f"Stream {name!r} holds frames of {spec.dim} numbers, not codes. Read its shards with "
            "storage.codes.read_codes(..., more=True), or export it."
        )
    there = spec.num_codebooks
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
    for name, spec in selection.specs.items():
        if spec.chunk_length and getattr(layout, "stream", name) == name:
            raise UserError(
                f"Stream {name!r} is made of chunks that overlap: frames of two then stand for the same samples. The "
                "layout does not say that it takes such a stream; give a function of your own that has "
                "`takes_chunks = True`, or read the stream without a pack."
            )


def _require_vocabulary(selection: Selection) -> None:
    pack = selection.pack
    if pack is None:
        return
    stream = getattr(pack.layout, "stream", None)
    if stream is not None and stream not in selection.streams:
        raise UserError(
            f"The layout takes stream {stream!r}; the streams to read are {', '.join(selection.streams)}."
            f"{did_you_mean(str(stream), list(selection.streams))}"
        )
    needed = largest_vocabulary(pack.layout, selection.specs, selection.num_codebooks)
    if needed is not None and pack.vocab_size is not None and needed > pack.vocab_size:
        raise UserError(
            f"The layout gives {needed:,} different tokens ({selection.num_codebooks[str(stream)]} codebook(s) of "
            f"{selection.specs[str(stream)].codebook_size:,} in stream {stream!r}); the vocabulary has "
            f"{pack.vocab_size:,}. Read fewer codebooks, or widen the vocabulary."
        )


def _checked(pack: Pack | None) -> Pack | None:
    if pack is None:
        return None
    if pack.length < 1:
        raise UserError(f"Sequences of {pack.length} tokens were asked for; they must have 1 or more.")
    if not callable(pack.layout):
        raise UserError(f"The layout {pack.layout!r} cannot be called: give one of storage.layouts, or a function.")
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


def _require_known(versions: Mapping[str, int], wanted: Mapping[str, Any], where: Any) -> None:
    there = [*wanted] if where is None else [*wanted, "corpus"]
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


def _layout_name(layout: Any) -> list[Any]:
    """What tells layouts apart: a name, and what simple parameters an object or a `functools.partial` has."""
    if isinstance(layout, functools.partial):
        return [*_layout_name(layout.func), _simple(layout.args), _simple(layout.keywords)]
    if hasattr(layout, "__qualname__"):
        return [layout.__module__, layout.__qualname__]
    fields = {name: getattr(layout, name) for name in getattr(layout, "__dataclass_fields__", ())}
    return [type(layout).__module__, type(layout).__qualname__, _simple(fields or getattr(layout, "__dict__", {}))]


def _simple(value: Any) -> Any:
    """Numbers, strings and what is made of them; of anything else that it is there."""
    if isinstance(value, dict):
        return {str(key): _simple(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_simple(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__qualname__


def require_same(ours: dict[str, Any], theirs: dict[str, Any], part: int) -> None:
    """Raise `UserError` if two identities differ: the state of one is no state of the other."""
    which = f"Dataset {part} of the mixture" if part else "The dataset"
    if theirs.get("versions") != ours["versions"]:
        raise UserError(
            f"{which} has versions {ours['versions']}, the state was saved with {theirs.get('versions')}: rows would "
            "be repeated or left out. Build it with versions=state['datasets'][...]['versions'], or with the pin."
        )
    if theirs.get("seed") != ours["seed"]:
        raise UserError(f"{which} has seed {ours['seed']}, the state was saved with seed {theirs.get('seed')}.")
    if theirs.get("order") != ours["order"]:
        raise UserError(
            f"{which} reads other tables or codebooks, or shuffles, filters or packs otherwise than the one that the "
            "state was saved with. Build it as it was."
        )
