"""Plain WebDataset tars of a pinned snapshot, for trainers that do not read tables."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("WDS_SECURE", "1")  # webdataset reads it when imported: no shell for `pipe:`, no pickles
from webdataset.writer import TarWriter

from ..storage.codes import ShardCodes, read_codes
from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Snapshot
from ..tokenizers.spec import UserError

_TEXT_COLUMNS = ("path", "duration_s", "sample_rate", "text", "speaker", "language")


def export_webdataset(
    root: Root,
    corpus: Snapshot,
    streams: dict[str, Snapshot],
    *,
    view: str,
    on_shard: Callable[[int, float, int], None] = lambda segments, audio_s, errors: None,
) -> dict[str, Any]:
    """Write `webdataset/<view>/shard-000123.tar` per shard and, last, `index.json`; the index.

    A sample's key is the segment's id (no dots); its files are `<stream>.npy` (codes `[K, T]`) and `json`. Segments
    with an error are left out and counted. The same snapshots give the same bytes. Raises `UserError` for a stream
    that lacks shards, or a view that was exported from other snapshots.
    """
    streams = dict(sorted(streams.items()))
    versions = {"corpus": corpus.version, **{name: snapshot.version for name, snapshot in streams.items()}}
    folder = f"webdataset/{view}"
    _require_same_view(root, folder, versions)
    for name, snapshot in streams.items():
        missing = sorted(set(corpus.files) - set(snapshot.files))
        if missing:
            raise UserError(
                f"Stream {name!r} lacks {len(missing)} shard(s), the first being {missing[0]}. "
                "Finish it with `wavemill tokenize`, then export."
            )
    index: dict[str, Any] = {"versions": versions, "streams": {}, "tars": [], "samples": 0, "left_out": 0}
    for name, snapshot in streams.items():
        index["streams"][name] = {
            "spec": snapshot.metadata["spec"],
            "fingerprint": snapshot.metadata["fingerprint"],
        }
    for shard in corpus.files:
        content, samples, left_out, audio_s = _tar(root, corpus, streams, shard)
        name = f"shard-{shard:06d}.tar"
        root.write_bytes(f"{folder}/{name}", content)
        index["tars"].append({"name": name, "samples": samples, "sha256": hashlib.sha256(content).hexdigest()})
        index["samples"] += samples
        index["left_out"] += left_out
        on_shard(samples + left_out, audio_s, left_out)
    root.write_bytes(f"{folder}/index.json", json.dumps(index, indent=1).encode())
    return index


def _tar(root: Root, corpus: Snapshot, streams: dict[str, Snapshot], shard: int) -> tuple[bytes, int, int, float]:
    rows = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
    parts = {name: read_codes(root, snapshot, shard, more=True) for name, snapshot in streams.items()}
    for name, part in parts.items():
        if part.ids != [row["id"] for row in rows]:
            raise UserError(
                f"Stream {name!r} does not hold the corpus's segments in shard {shard}; run `wavemill verify`."
            )
    sink = io.BytesIO()
    samples = left_out = 0
    audio_s = 0.0
    writer = TarWriter(sink, user="wavemill", group="wavemill", mtime=0)
    for place, row in enumerate(rows):
        if any(part.errors[place] is not None for part in parts.values()):
            left_out += 1
            continue
        sample: dict[str, Any] = {"__key__": row["id"]}
        for name, part in parts.items():
            sample |= _members(name, part, place)
        sample["json"] = {"id": row["id"], **{column: row[column] for column in _TEXT_COLUMNS}}
        writer.write(sample)
        samples += 1
        audio_s += row["duration_s"]
    writer.close()
    return sink.getvalue(), samples, left_out, audio_s


def _members(name: str, part: ShardCodes, place: int) -> dict[str, Any]:
    """What a sample has of a stream: `NAME.npy` are codes `[K, T]`, or the frames of a continuous stream `[T, dim]`."""
    members: dict[str, Any] = {f"{name}.npy": part.frames(place) if "frames" in part.more else part.codes(place)}
    if "durations" in part.more:
        members[f"{name}.durations.npy"] = part.durations(place)
    if "chunk_scales" in part.more:
        members[f"{name}.scales.npy"] = part.scales(place)
    if "text" in part.more and part.text(place) is not None:
        members[f"{name}.txt"] = part.text(place)
    return members


def _require_same_view(root: Root, folder: str, versions: dict[str, int]) -> None:
    try:
        exported = json.loads(root.read_bytes(f"{folder}/index.json"))["versions"]
    except FileNotFoundError:
        return
    if exported != versions:
        raise UserError(
            f"{root.join(folder)} was exported from versions {exported}; now they are {versions}. "
            "Name another --view, or pin the old versions with --at."
        )
