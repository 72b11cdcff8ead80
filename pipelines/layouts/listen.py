"""The sound of what a layout's inverse gives."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from ...storage.codes import open_corpus, open_stream
from ...storage.layouts import StreamRows
from ...storage.parquet import read_parquet
from ...storage.root import Root
from ...storage.schema import CORPUS_SCHEMA
from ...tokenizers.spec import UserError
from ...tokenizers.tokenizer import Tokens, sound_of
from ..listen import wav_bytes
from ..resample import resampled_length
from ..streams import open_stream_tokenizer
from .closeup import LaidSegment


def require_wav(path: str) -> None:
    """Raise `UserError` if no sound can be written there. Called before anything is computed."""
    if Path(path).suffix.lower() != ".wav":
        raise UserError(f"--decode {path!r}: the sound is a WAV file; name it SOMETHING.wav.")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--decode {path!r}: there is no folder {Path(path).parent}. Make it first.")


def decode_inverted(
    root: Root,
    segment: LaidSegment,
    inverted: Mapping[str, StreamRows],
    path: str,
    *,
    weights: Mapping[str, str] | None = None,
    local_files_only: bool = False,
) -> Iterator[str]:
    """Write the sound of each stream that has a way back to it, `path`; of several `<path>.<stream>.wav`.

    `weights` says where weights are now, if they have moved. Raises `UserError` if no stream has a decoder.
    """
    streams = [name for name in inverted if segment.specs[name].decode_sample_rate]
    if not streams:
        told = ", ".join(f"{name} ({segment.specs[name].tokenizer})" for name in inverted)
        raise UserError(f"--decode: no stream of the layout has a way back to sound: {told}. Lay out an acoustic one.")
    corpus = open_corpus(root)
    table = read_parquet(root, corpus.path(segment.shard), schema=CORPUS_SCHEMA)
    corpus_rows = {row["id"]: row for row in table.to_pylist()}
    for name in streams:
        stream, _, index = name.partition("@")
        row, spec = corpus_rows[segment.ids[int(index or 0)]], segment.specs[name]
        snapshot = open_stream(root, stream)
        tokenizer = open_stream_tokenizer(
            root, stream, snapshot, corpus, weights=weights, local_files_only=local_files_only
        )
        num_samples = resampled_length(row["num_samples"], row["sample_rate"], spec.decode_sample_rate)
        sound_N = sound_of(tokenizer, _tokens(inverted[name]))[..., :num_samples]
        place = Path(path) if len(streams) == 1 else Path(path).with_suffix(f".{name}.wav")
        try:
            place.write_bytes(wav_bytes(sound_N, spec.decode_sample_rate))
        except OSError as error:
            raise UserError(f"Cannot write the sound {place}: {error.strerror}.") from error
        yield str(place)


def _tokens(rows: StreamRows) -> Tokens:
    count = int(rows.counts_N.sum())
    codes_KT = np.stack(rows.books).astype(np.int64) if rows.books else np.empty((0, count), dtype=np.int64)
    return Tokens(
        codes_KT=torch.from_numpy(codes_KT),
        frames_TD=None if rows.frames_TD is None else torch.from_numpy(rows.frames_TD.copy()),
        durations_T=None if rows.durations_T is None else torch.from_numpy(rows.durations_T.copy()),
    )
