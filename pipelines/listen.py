"""Codes back to sound files."""

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import soundfile
from torch import Tensor

from ..storage.codes import open_stream, read_codes, stream_spec
from ..storage.parquet import read_parquet
from ..storage.root import Root, require_no_keys
from ..storage.schema import CORPUS_SCHEMA
from ..storage.stores import has_scheme, open_store, store_errors
from ..storage.table import Snapshot
from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import sound_of
from .resample import resampled_length
from .stored import stored_tokens
from .streams import open_stream_tokenizer


@dataclass(frozen=True, slots=True)
class Decoded:
    """A sound file that was written."""

    id: str
    source_path: str
    text: str | None
    path: str
    duration_s: float


def decode_segments(
    root: Root,
    corpus: Snapshot,
    stream: str,
    *,
    ids: frozenset[str],
    limit: int,
    num_codebooks: int | None,
    folder: str,
    weights: Mapping[str, str] | None = None,
    local_files_only: bool = False,
) -> Iterator[Decoded]:
    """Decode the segments named by `ids`, or the first `limit` of the stream, to `<folder>/<id>.wav`.

    `folder` is a path, or a prefix in an object store. Sound is cut to the segment's own length; codecs whose strides
    are odd give a few samples less than whole hops. `weights` says where the stream's weights are now, if they have
    moved. Raises `UserError` for a stream without a decoder, a number of codebooks it does not have, or ids that are
    not there or have an error.
    """
    snapshot = open_stream(root, stream)
    spec = stream_spec(snapshot)
    if not spec.decode_sample_rate:
        why = "these frames know no way back to sound" if spec.dim else "semantic tokens do not say how it sounds"
        raise UserError(f"Stream {stream!r} ({spec.tokenizer}) cannot be decoded: {why}. Name an acoustic stream.")
    books = spec.num_codebooks if num_codebooks is None else num_codebooks
    if spec.dim and num_codebooks is not None:
        raise UserError(f"Stream {stream!r} has frames of {spec.dim} numbers, no codebooks; leave out --codebooks.")
    if not spec.dim and not 1 <= books <= spec.num_codebooks:
        raise UserError(f"Stream {stream!r} has {spec.num_codebooks} codebooks; {books} were asked for.")
    tokenizer = open_stream_tokenizer(
        root, stream, snapshot, corpus, weights=weights, local_files_only=local_files_only
    )
    _require_codes(root, snapshot, ids)
    folder = folder.rstrip("/") or "/"
    require_no_keys(folder)
    store, place = open_store(folder if has_scheme(folder) else os.path.abspath(folder))
    if not has_scheme(folder):
        if Path(folder).exists() and not Path(folder).is_dir():
            raise UserError(f"{folder} is a file; name a folder for the sound.")
        Path(folder).mkdir(parents=True, exist_ok=True)
    wanted = set(ids)
    left = len(wanted) if wanted else limit
    for shard in snapshot.files:
        if left == 0:
            break
        rows = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
        codes = read_codes(root, snapshot, shard, num_codebooks=books, more=True)
        if codes.ids != [row["id"] for row in rows]:
            raise UserError(
                f"Stream {stream!r} does not hold the corpus's segments in shard {shard}; run `wavemill verify`."
            )
        for number, row in enumerate(rows):
            if left == 0 or (wanted and row["id"] not in wanted):
                continue
            tokens = stored_tokens(codes, number)
            if tokens is None:
                continue
            num_samples = resampled_length(row["num_samples"], row["sample_rate"], spec.decode_sample_rate)
            sound_N = sound_of(tokenizer, tokens)[..., :num_samples]
            path = f"{folder}/{row['id']}.wav"
            with store_errors(path):
                store.pipe_file(f"{place}/{row['id']}.wav", wav_bytes(sound_N, spec.decode_sample_rate))
            wanted.discard(row["id"])
            left -= 1
            yield Decoded(row["id"], row["path"], row["text"], path, sound_N.shape[-1] / spec.decode_sample_rate)


def wav_bytes(sound_N: Tensor, sample_rate: int) -> bytes:
    """A WAV file of 16 bits a sample; of sound `[N]`, or `[channels, N]`."""
    content = io.BytesIO()
    shaped = sound_N.t().numpy() if sound_N.ndim > 1 else sound_N.numpy()
    soundfile.write(content, shaped, sample_rate, format="WAV", subtype="PCM_16")
    return content.getvalue()


def _require_codes(root: Root, snapshot: Snapshot, ids: frozenset[str]) -> None:
    """Raise `UserError` if one of `ids` is not in the stream or has an error there."""
    wanted = set(ids)
    for shard in snapshot.files if ids else ():
        codes = read_codes(root, snapshot, shard, num_codebooks=0)
        for place, segment in enumerate(codes.ids):
            if segment in ids and codes.errors[place] is not None:
                raise UserError(
                    f"Segment {segment} has no codes: {codes.errors[place]} ({codes.error_messages[place]})."
                )
            wanted.discard(segment)
    if wanted:
        raise UserError(f"There is no segment {sorted(wanted)[0]!r} in {root.join(snapshot.folder)}.")
