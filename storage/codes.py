"""A shard of a stream read back: flat arrays of codes, one view per segment."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..tokenizers.spec import StreamSpec, UserError, did_you_mean
from .parquet import read_parquet
from .root import Root
from .schema import code_columns, more_columns, require_stream_name, stream_schema
from .table import Snapshot, read_snapshot

CORPUS = "corpus"


@dataclass(frozen=True, slots=True)
class ShardCodes:
    """Rows of one shard in the order of the corpus. `books[k]` holds (values, offsets) of codebook k.

    What a stream has beside codes is there if it was read, by column: see `schema.more_columns`.
    """

    ids: list[str]
    num_frames: list[int | None]
    errors: list[str | None]
    error_messages: list[str | None]
    books: list[tuple[NDArray[np.integer], NDArray[np.int32]]]
    dim: int = 0  # of frames
    more: dict[str, list[Any]] = field(default_factory=dict)

    def codes(self, row: int) -> NDArray[np.integer] | None:
        """Codes `[K, T]` of a row, or None where it has an error."""
        if self.errors[row] is not None:
            return None
        if not self.books:
            return np.empty((0, self.num_frames[row] or 0), dtype=np.int16)
        return np.stack([values[offsets[row] : offsets[row + 1]] for values, offsets in self.books])

    def frames(self, row: int) -> NDArray[np.float16] | None:
        """Frames `[T, dim]` of a row of a continuous stream, or None where it has an error. Raises `ValueError`."""
        content = self.more["frames"][row]
        return None if content is None else np.frombuffer(content, dtype="<f2").reshape(-1, self.dim)

    def durations(self, row: int) -> NDArray[np.int32] | None:
        """How many frames each frame of a row stands for, `[T]`, or None where it has an error."""
        durations = self.more["durations"][row]
        return None if durations is None else np.asarray(durations, dtype=np.int32)

    def scales(self, row: int) -> NDArray[np.float32] | None:
        """The loudness of each chunk of a row, or None where it has an error."""
        scales = self.more["chunk_scales"][row]
        return None if scales is None else np.asarray(scales, dtype=np.float32)

    def text(self, row: int) -> str | None:
        """The text of a row; None where it has none."""
        return self.more["text"][row]


def stream_folder(name: str) -> str:
    return f"streams/{name}"


def stream_spec(snapshot: Snapshot) -> StreamSpec:
    return StreamSpec.from_json(snapshot.metadata["spec"])


def list_streams(root: Root) -> list[str]:
    return [name for name in root.list("streams") if root.exists(f"streams/{name}/_delta_log")]


def open_corpus(root: Root, *, version: int | None = None) -> Snapshot:
    """The corpus's snapshot, the newest by default. Raises `UserError` if there is none, or nothing in it."""
    corpus = read_snapshot(root, CORPUS, version=version)
    if corpus is None:
        raise UserError(f"There is no corpus in {root}. Build one first: wavemill corpus build YOUR_FOLDER --to {root}")
    if not corpus.files:
        raise UserError(f"The corpus in {root} is empty. Add recordings: wavemill corpus build YOUR_FOLDER --to {root}")
    return corpus


def open_stream(root: Root, name: str, *, version: int | None = None) -> Snapshot:
    """A stream's snapshot, the newest if no version is given. Raises `UserError` if there is no such stream."""
    require_stream_name(name)
    snapshot = read_snapshot(root, stream_folder(name), version=version)
    if snapshot is None:
        there = list_streams(root)
        listed = ", ".join(there) or "none yet; make some with `wavemill tokenize`"
        raise UserError(f"There is no stream {name!r} in {root}; there are: {listed}.{did_you_mean(name, there)}")
    return snapshot


def read_codes(
    root: Root, snapshot: Snapshot, shard: int, *, num_codebooks: int | None = None, more: bool = False
) -> ShardCodes:
    """One shard's rows with the first `num_codebooks` codebooks (all by default); other columns are not read.

    With `more`, what the stream has beside codes is.
    """
    spec = stream_spec(snapshot)
    books = code_columns(spec.num_codebooks if num_codebooks is None else num_codebooks)
    others = more_columns(spec) if more else []
    columns = ["id", "num_frames", "error", "error_message", *books, *others]
    table = read_parquet(root, snapshot.path(shard), schema=stream_schema(spec), columns=columns)
    return ShardCodes(
        ids=table["id"].to_pylist(),
        num_frames=table["num_frames"].to_pylist(),
        errors=table["error"].to_pylist(),
        error_messages=table["error_message"].to_pylist(),
        books=[flat_values(table[name]) for name in books],
        dim=spec.dim,
        more={name: table[name].to_pylist() for name in others},
    )


def flat_values(column: pa.ChunkedArray) -> tuple[NDArray[np.integer], NDArray[np.int32]]:
    """Codes of all rows end to end, and where each row's begin; the last offset is where they end."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no rows at all
        array = pa.array([], type=column.type)
    return array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()
