"""Whether the snapshots of several streams belong together, as far as can be told without reading them."""

from collections.abc import Mapping, Sequence

from ..tokenizers.spec import UserError
from .pins import Pinned
from .table import Snapshot

OF_WAVEFORMS = ("decoder", "resampler", "transforms", "separator")  # of a full fingerprint: no tokenizer's


def require_pinned(pin: str, tables: Mapping[str, Pinned], snapshots: Mapping[str, Snapshot]) -> None:
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


def require_same_shards(snapshots: Mapping[str, Snapshot]) -> None:
    """Raise `UserError` for streams that hold other shards, or other numbers of segments in one."""
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


def require_same_corpus(snapshots: Mapping[str, Snapshot]) -> None:
    """Raise `UserError` for streams over different corpora."""
    (first_name, first), *rest = snapshots.items()
    for name, snapshot in rest:
        if snapshot.metadata.get("corpus") != first.metadata.get("corpus"):
            raise UserError(
                f"Streams {first_name!r} and {name!r} were made over different corpora: their segments do not join. "
                "Read them apart, or make one of them again."
            )


def require_same_tokens(pairs: Sequence[tuple[str, str]], snapshots: Mapping[str, Snapshot]) -> None:
    """Raise `UserError` for two streams that a layout gives the same tokens, though their codes mean other things."""
    for first, second in pairs:
        ours, theirs = (_tokenizer_parts(snapshots[name]) for name in (first, second))
        part = next((part for part in sorted({*ours, *theirs}) if ours.get(part) != theirs.get(part)), None)
        if ours and theirs and part is not None:
            raise UserError(
                f"The layout gives streams {first!r} and {second!r} the same tokens, but their tokenizers differ "
                f"({part}): one token would mean two things. Make one of them again with the tokenizer, weights and "
                "codebook of the other."
            )


def _tokenizer_parts(snapshot: Snapshot) -> dict[str, str]:
    """What a stream's codes mean depends on this; empty where it does not say."""
    parts = snapshot.metadata.get("fingerprint") or {}
    return {part: value for part, value in parts.items() if part not in (*OF_WAVEFORMS, "revision")}
