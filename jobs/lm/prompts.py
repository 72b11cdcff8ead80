"""A recording as the streams of a dataset have it: decoded, transformed and tokenized as its own segments were."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...pipelines.corpus import BuildCounts, Known, new_rows
from ...pipelines.derived import hearing_ones, tokens_of_row
from ...pipelines.entries import AudioError
from ...pipelines.policy import CorpusPolicy, Filters
from ...pipelines.reading import Reader, Row
from ...pipelines.resample import resampled_length
from ...pipelines.sources import open_source
from ...pipelines.streams import open_stream_tokenizer
from ...pipelines.tokenize import encode_segment
from ...storage.codes import open_corpus, open_stream
from ...storage.root import Root
from ...storage.schema import CORPUS_SCHEMA
from ...storage.table import Snapshot
from ...tokenizers.spec import StreamSpec, UserError, num_frames
from ...tokenizers.tokenizer import TextTokenizer, Tokens, UnitTokenizer, WordTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a recording is in each of some streams, and what made that of it."""

    path: str
    num_samples: int  # of the recording, as far as it is taken
    sample_rate: int  # Hz, the recording's
    tokens: Mapping[str, Tokens]
    tokenizers: Mapping[str, Any]

    def samples_after(self, seconds: float) -> int:
        """Samples of the prompt and so many seconds more."""
        return self.num_samples + round(seconds * self.sample_rate)

    def frames_of(self, num_samples: int, spec: StreamSpec) -> int:
        """Frames that so many samples of the prompt's rate have in a stream with a clock."""
        return num_frames(resampled_length(num_samples, self.sample_rate, spec.sample_rate), spec)


def read_prompt(
    path: str,
    root: Root,
    versions: Mapping[str, int],
    *,
    seconds: float | None = None,
    text: str | None = None,
    weights: Mapping[str, str] | None = None,
    local_files_only: bool = False,
) -> Prompt:
    """A recording, or its first so many seconds, in the streams that `versions` names, by their tables' tokenizers.

    `text` is what is said: a transcript, or the one beside the recording followed by more, as `spoken` puts it. Raises
    `UserError` for a recording that cannot be read or is too short, a transcript that is missing, or a tokenizer that
    is no longer the one that the stream was made with.
    """
    corpus = open_corpus(root)
    snapshots = {name: open_stream(root, name, version=version) for name, version in versions.items()}
    _add_sources(root, snapshots)
    tokenizers = {
        name: open_stream_tokenizer(root, name, each, corpus, weights=weights, local_files_only=local_files_only)
        for name, each in snapshots.items()
    }
    row = _row(path, root, CorpusPolicy.from_json(corpus.metadata["policy"]))
    if seconds is not None:
        row["num_samples"] = min(row["num_samples"], max(1, round(seconds * row["sample_rate"])))
    row["text"] = row["text"] if text is None else text
    tokens: dict[str, Tokens] = {}
    hearing = hearing_ones(tokenizers)
    if hearing:
        with Reader(root) as reader:
            waveforms = next(reader.read([row], {tokenizer.spec.sound for tokenizer in hearing.values()}))
        if isinstance(waveforms, AudioError):
            raise _unreadable(path, waveforms)
        tokens |= encode_segment(waveforms, hearing)
    for name, tokenizer in tokenizers.items():
        if isinstance(tokenizer, TextTokenizer | WordTokenizer):
            _require_words(path, name, row, tokenizer)
            tokens[name] = tokens_of_row(row, tokenizer)
    _add_units(tokens, snapshots, tokenizers)
    for name in hearing:
        if not tokens[name].num_frames:
            raise UserError(
                f"The prompt {path} is too short: its {row['num_samples'] / row['sample_rate']:.3f} s have no frame of "
                f"stream {name!r}. Give a longer one."
            )
    return Prompt(
        path=path,
        num_samples=row["num_samples"],
        sample_rate=row["sample_rate"],
        tokens={name: tokens[name] for name in versions},
        tokenizers=tokenizers,
    )


def spoken(path: str, prompt_text: str | None, text: str) -> str:
    """What is said in the prompt (None: what the file beside it says), then what is to be said.

    Raises `UserError` if nobody knows the former.
    """
    if prompt_text is None:
        _require_there(path)
        [entry] = open_source(f"prompt={path}", exclude="", kind="file").entries
        prompt_text = entry.text
    if not prompt_text:
        raise UserError(
            f"Nobody knows what is said in {path}: there is no {Path(path).with_suffix('.txt').name} beside it. Say it "
            "with --prompt-text."
        )
    return f"{prompt_text.strip()} {text.strip()}"


def _row(path: str, root: Root, policy: CorpusPolicy) -> Row:
    """The recording as a row of a corpus of whole recordings, with the transforms and the channel of this one."""
    _require_there(path)
    source = open_source(f"prompt={path}", exclude=root.uri, kind="file")
    channels = "first" if policy.channels == "split" else policy.channels
    whole = replace(policy, window_s=None, vad=None, filters=Filters(), separate=None, channels=channels)
    rows = list(new_rows([source], Known(), whole, BuildCounts(), num_threads=1))
    if not rows:
        raise UserError(f"The prompt {path} is silent: the corpus's transforms leave nothing of it. Give another one.")
    [row] = pa.Table.from_pylist([{**rows[0], "shard": 0}], schema=CORPUS_SCHEMA).to_pylist()
    if row["error"] is not None:
        raise _unreadable(path, AudioError(row["error"], row["error_message"] or ""))
    return row


def _require_there(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"There is no recording {path!r} to go on from. Name an audio file.")


def _unreadable(path: str, error: AudioError) -> UserError:
    return UserError(f"The prompt {path} cannot be read: {error.kind} ({error.message}). Give another recording.")


def _require_words(path: str, name: str, row: Row, tokenizer: TextTokenizer | WordTokenizer) -> None:
    if isinstance(tokenizer, WordTokenizer):
        raise UserError(
            f"Stream {name!r} has words at their times, which nobody knows of {path}. Name runs of a stream of plain "
            "text (text-tokens)."
        )
    if row["text"] is None:
        raise UserError(f"Stream {name!r} is of what is said, which nobody knows of {path}: give --text.")


def _add_sources(root: Root, snapshots: dict[str, Snapshot]) -> None:
    """Add the streams that derived ones are made of."""
    waiting = list(snapshots)
    while waiting:
        source = snapshots[waiting.pop()].metadata.get("of")
        if source is not None and source not in snapshots:
            snapshots[source] = open_stream(root, source)
            waiting.append(source)


def _add_units(tokens: dict[str, Tokens], snapshots: Mapping[str, Snapshot], tokenizers: Mapping[str, Any]) -> None:
    """Add what derived streams make of the others, each after the one that it is made of."""
    left = [name for name, tokenizer in tokenizers.items() if isinstance(tokenizer, UnitTokenizer)]
    while left:
        for name in [name for name in left if snapshots[name].metadata["of"] in tokens]:
            tokens[name] = tokenizers[name].tokens_of_tokens(tokens[snapshots[name].metadata["of"]])
            left.remove(name)
