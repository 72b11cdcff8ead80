"""Rows of a corpus that are one segment together: which they are, and which no shard alone can tell."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from .layouts import GroupBy, Grouping
from .parquet import ParquetShard
from .root import Root
from .schema import CORPUS_SCHEMA
from .table import Snapshot

Key = tuple[str, ...]  # what the rows of a group share

_SHARED_BY = {GroupBy.PAIR: ["source", "pair"], GroupBy.PARENT: ["parent"]}  # columns of the corpus
_NUMBERED_BY = {GroupBy.PAIR: [], GroupBy.PARENT: ["separated"]}
_SHARDS_AT_ONCE = 8  # of the corpus: in a store each takes its time


def group_columns(by: GroupBy) -> list[str]:
    """The columns of the corpus that say which rows are one segment together."""
    return _SHARED_BY[by] + _NUMBERED_BY[by]


def groups_of(table: pa.Table, grouping: Grouping, apart: Collection[Key]) -> dict[Key, list[int] | None]:
    """By group of a shard the rows of its members, in their order; None: it cannot be told which these are.

    Groups are in the order of their first rows. A pair has exactly as many rows as members, all in this shard: of three
    rows any may be the wrong one. Of separated children the first are members; their numbers must be there, each once.
    `apart` are pairs with rows in several shards.
    """
    columns = [table[name].to_pylist() for name in _SHARED_BY[grouping.by]]
    rows_of: dict[Key, list[int]] = {}
    for row, key in enumerate(zip(*columns, strict=True)):
        if None not in key:
            rows_of.setdefault(key, []).append(row)
    if grouping.by is GroupBy.PAIR:
        return {
            key: rows if len(rows) == grouping.num_members and key not in apart else None
            for key, rows in rows_of.items()
        }
    numbers = table["separated"].to_pylist()
    return {key: _first_children(rows, numbers, grouping.num_members) for key, rows in rows_of.items()}


def _first_children(rows: list[int], numbers: list[int | None], num_members: int) -> list[int] | None:
    """The rows with the numbers 0, 1, ..."""
    numbered = sorted((number, row) for row in rows if (number := numbers[row]) is not None and number < num_members)
    return [row for _, row in numbered] if [number for number, _ in numbered] == list(range(num_members)) else None


def pairs_apart(root: Root, corpus: Snapshot) -> frozenset[Key]:
    """The pairs of a corpus that have rows in several of its shards.

    Reads two columns of each shard, `source` and `pair`, once where a dataset is opened: for a million pairs some 2.5
    core-seconds and 120 MB. What is kept is the pairs found, of which `corpus build` makes few where the rows of a pair
    are neighbours. Raises `CorruptFile`.
    """

    def pairs_of(shard: int) -> pa.Table:
        file = ParquetShard(root, corpus.path(shard), corpus.files[shard].size_bytes, schema=CORPUS_SCHEMA)
        table = file.read(_SHARED_BY[GroupBy.PAIR])
        return _counted(table.filter(table["pair"].is_valid())).drop_columns("count_all")

    if not corpus.files:
        return frozenset()
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        counted = _counted(pa.concat_tables(pool.map(pairs_of, corpus.files)))
    found = counted.filter(pa.array(counted["count_all"].to_numpy() > 1))
    return frozenset(zip(*(found[name].to_pylist() for name in _SHARED_BY[GroupBy.PAIR]), strict=True))


def _counted(pairs: pa.Table) -> pa.Table:
    """Distinct pairs, and how often each is there."""
    return pairs.group_by(_SHARED_BY[GroupBy.PAIR], use_threads=False).aggregate([([], "count_all")])
