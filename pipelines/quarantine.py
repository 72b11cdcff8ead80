"""The rows that have an error instead of codes."""

from typing import Any

from ..storage.codes import list_streams, open_stream, read_codes
from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Snapshot


def quarantined(root: Root, corpus: Snapshot, *, kind: str | None = None) -> list[dict[str, Any]]:
    """Each segment with an error, in the corpus or in any stream: where it is, the class, the message, who says so.

    Only shards whose statistics count an error are read.
    """
    streams = {name: open_stream(root, name) for name in list_streams(root)}
    found = []
    for shard, file in corpus.files.items():
        bad = {name: snapshot for name, snapshot in streams.items() if _num_errors(snapshot, shard)}
        if not file.num_errors and not bad:
            continue
        rows = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
        parts = {name: read_codes(root, snapshot, shard) for name, snapshot in bad.items()}
        for place, row in enumerate(rows):
            where = {"corpus": (row["error"], row["error_message"])}
            where |= {name: (part.errors[place], part.error_messages[place]) for name, part in parts.items()}
            said = {name: (error, message) for name, (error, message) in where.items() if error is not None}
            if said and (kind is None or any(error == kind for error, _ in said.values())):
                error, message = next(iter(said.values()))
                found.append(
                    {
                        "id": row["id"],
                        "shard": shard,
                        "source": row["source"],
                        "path": row["path"],
                        "member": row["member"],
                        "start_sample": row["start_sample"],
                        "error": error,
                        "error_message": message,
                        "found_in": list(said),
                    }
                )
    return found


def _num_errors(snapshot: Snapshot, shard: int) -> int:
    return snapshot.files[shard].num_errors if shard in snapshot.files else 0
