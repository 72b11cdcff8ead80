"""Streams that no audio is decoded for: those of the corpus's texts, and those of the codes of another stream.

A row of texts has an error where the corpus has one, a derived row where its source has one: what else a run makes
does not matter.
"""

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch

from ..storage.codes import read_codes
from ..storage.root import Root
from ..storage.table import Snapshot, read_snapshot
from ..tokenizers.spec import RunFailed, UserError
from ..tokenizers.tokenizer import TextTokenizer, Tokens, UnitTokenizer, Word, WordTokenizer
from .batching import require_frame_rule
from .entries import AudioError
from .reading import Row
from .segments import PAUSES
from .stored import stored_tokens
from .streams import STREAMS, StreamConfig, require_same_corpus

Result = Tokens | AudioError  # of a row in a stream


def hearing_ones(tokenizers: Mapping[str, Any]) -> dict[str, Any]:
    """Those that take audio, by the names of their streams."""
    return {
        name: tokenizer
        for name, tokenizer in tokenizers.items()
        if not isinstance(tokenizer, (TextTokenizer, WordTokenizer, UnitTokenizer))
    }


def tokens_of_row(row: Row, tokenizer: TextTokenizer | WordTokenizer) -> Tokens:
    """What a stream has of a row's transcript, or of its words; the pauses that aligners write among these are none."""
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer.tokens_of_text(row["text"])
    if row["words"] is None:
        return tokenizer.tokens_of_words(None)
    rate, words = row["sample_rate"], list[Word]()
    for word in row["words"]:
        label, start = word["label"].strip(), word["start_sample"]
        if label.lower() not in PAUSES:
            words.append(Word(label, Fraction(start, rate), Fraction(start + word["num_samples"], rate)))
    return tokenizer.tokens_of_words(words)


def of_texts(name: str, rows: Sequence[Row], tokenizer: TextTokenizer | WordTokenizer) -> list[Result]:
    """What stream `name` has of each row's transcript or words."""
    results: list[Result] = []
    with torch.inference_mode():
        for row in rows:
            if row["error"] is not None:
                results.append(AudioError(row["error"], row["error_message"] or ""))
                continue
            tokens = tokens_of_row(row, tokenizer)
            require_frame_rule(name, tokens, torch.empty(0), tokenizer.spec)
            results.append(tokens)
    return results


def of_tokens(name: str, source: Sequence[Result], tokenizer: UnitTokenizer) -> list[Result]:
    """What stream `name` has of each row of its source."""
    results: list[Result] = []
    for result in source:
        if isinstance(result, AudioError):
            results.append(result)
            continue
        tokens = tokenizer.tokens_of_tokens(result)
        require_frame_rule(name, tokens, torch.empty(0), tokenizer.spec)
        results.append(tokens)
    return results


def stored_results(root: Root, snapshot: Snapshot, rows: Sequence[Row]) -> list[Result]:
    """What a stream has of a shard's rows, read back. Raises `CorruptFile`, and `RunFailed` if they are other rows."""
    if not rows:
        return []
    shard = rows[0]["shard"]
    codes = read_codes(root, snapshot, shard, more=True)
    if codes.ids != [row["id"] for row in rows]:
        raise RunFailed(
            f"{root.join(snapshot.folder)} does not hold the corpus's segments in shard {shard}; run `wavemill verify`."
        )
    results: list[Result] = []
    for place in range(len(rows)):
        tokens = stored_tokens(codes, place)
        error = AudioError(codes.errors[place] or "", codes.error_messages[place] or "")
        results.append(error if tokens is None else tokens)
    return results


def read_sources(
    root: Root,
    corpus: Snapshot,
    streams: Sequence[StreamConfig],
    snapshots: Mapping[str, Snapshot | None],
    lacking: Mapping[str, Collection[int]],
) -> dict[str, Snapshot]:
    """The tables that derived streams are made of, as far as they are there; `snapshots` are those of the run.

    `lacking` are the shards that each stream of the run is to be made for. Raises `UserError` for a source that is of
    another corpus, or lacks a shard that it is needed for.
    """
    sources: dict[str, Snapshot] = {}
    for stream in streams:
        if stream.of is None:
            continue
        inside = stream.of in snapshots
        snapshot = snapshots[stream.of] if inside else read_snapshot(root, f"{STREAMS}/{stream.of}")
        if snapshot is not None:
            require_same_corpus(root, stream.of, snapshot, corpus)
            sources[stream.of] = snapshot
        made = set(snapshot.files if snapshot else ()) | set(lacking.get(stream.of, ()) if inside else ())
        missing = sorted(set(lacking[stream.name]) - made)
        if missing:
            raise UserError(
                f"Stream {stream.of!r}, which {stream.name!r} is made of, lacks {len(missing):,} shard(s), the first "
                f"being {missing[0]}. Finish it first, or name it in the same command."
            )
    return sources
