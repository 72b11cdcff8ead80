"""Names of sources and speakers that a person gives, held against those that the corpus has."""

from collections.abc import Collection

from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Snapshot
from ..tokenizers.spec import UserError, did_you_mean

_LISTED = 20


def require_named(root: Root, corpus: Snapshot, column: str, names: Collection[str], *, flag: str) -> None:
    """Raise `UserError` for the first of `names` that no segment has in `column`, "source" or "speaker"."""
    missing, there = set(names), set[str]()
    for shard in corpus.files:
        if not missing:
            return
        found = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA, columns=[column])[column]
        there |= set(found.unique().to_pylist()) - {None}
        missing -= there
    if missing:
        name = min(missing)
        listed = ", ".join(sorted(there)[:_LISTED]) + (", ..." if len(there) > _LISTED else "")
        raise UserError(
            f"{flag} {name!r}: the corpus in {root} has no {column} of that name; there are: {listed or 'none'}."
            f"{did_you_mean(name, there)}"
        )
