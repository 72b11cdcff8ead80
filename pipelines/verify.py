"""Reads everything back with checksums, compares streams with the corpus, and tokenizes a sample again."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..storage.codes import ShardCodes, list_streams, open_stream, read_codes, stream_spec
from ..storage.parquet import CorruptFile, read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.stores import StoreTrouble
from ..storage.table import Snapshot
from ..tokenizers.compare import Comparison, compare_codes
from ..tokenizers.numerics import numerics_class
from ..tokenizers.spec import RunFailed, Sound, StreamSpec, UserError, chunk_frames, num_frames
from ..tokenizers.tokenizer import Mode, TextTokenizer, Tokenizer, Tokens, UnitTokenizer, WordTokenizer
from .derived import hearing_ones, tokens_of_row
from .entries import AudioError
from .reading import Reader, Row, open_reader
from .resample import resampled_length
from .stored import stored_tokens
from .streams import open_stream_tokenizer
from .tokenize import encode_segment, integers_only

_MAX_PROBLEMS = 100


@dataclass(slots=True)
class Verdict:
    """What was checked, and each thing that is not as it should be, in a sentence."""

    segments: int = 0
    stream_rows: int = 0
    files: int = 0
    tokenized_again: int = 0
    codes_compared: int = 0
    codes_different: int = 0
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def blame(self, problem: str) -> None:
        self.num_problems += 1
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)


def verify(
    root: Root,
    corpus: Snapshot,
    *,
    sample: int,
    seed: int,
    source_roots: dict[str, str],
    weights: Mapping[str, str] | None = None,
    local_files_only: bool = False,
    on_shard: Callable[[int, float], None] = lambda segments, audio_s: None,
) -> Verdict:
    """Check a whole dataset; `sample` segments are tokenized alone and compared code by code.

    `weights` says where the weights of streams are now, if they have moved: see `stream_config`.
    """
    verdict = Verdict()
    streams = {name: open_stream(root, name) for name in list_streams(root)}
    if not streams:
        raise UserError(f"There is no stream in {root} yet; make some with `wavemill tokenize {root}`.")
    for name, snapshot in streams.items():
        for shard in sorted(set(corpus.files) ^ set(snapshot.files)):
            where = "lacks" if shard in corpus.files else "has, unlike the corpus,"
            verdict.blame(f"stream {name} {where} shard {shard}: run `wavemill tokenize` again")
    seen: set[str] = set()
    blamed: set[tuple[str, str]] = set()  # stream and segment of rows that are not compared any more
    chosen: list[tuple[int, Row, int]] = []  # the smallest hashes, with row and place in shard
    for shard in corpus.files:
        rows = _corpus_rows(root, corpus, shard, verdict)
        verdict.segments += len(rows)
        for row in rows:
            if row["id"] in seen:
                verdict.blame(f"segment {row['id']} is in the corpus twice, the second time in shard {shard}")
            seen.add(row["id"])
        for name, snapshot in streams.items():
            if shard in snapshot.files:
                blamed |= {(name, segment) for segment in _check_shard(root, name, snapshot, shard, rows, verdict)}
        good = [(_hash(seed, row["id"]), row, place) for place, row in enumerate(rows) if row["error"] is None]
        chosen = sorted(chosen + good, key=lambda entry: entry[0])[:sample]
        on_shard(len(rows), sum(row["duration_s"] for row in rows))
    tokenizers: dict[str, Any] = {}
    for name, snapshot in streams.items():
        try:
            tokenizers[name] = open_stream_tokenizer(
                root, name, snapshot, corpus, weights=weights, local_files_only=local_files_only
            )
        except UserError as error:
            verdict.blame(f"stream {name} cannot be tokenized again: {error}")
    with open_reader(root, corpus.metadata, source_roots) as reader:
        _compare_again(root, streams, tokenizers, chosen, blamed, reader, verdict)
    return verdict


def _corpus_rows(root: Root, corpus: Snapshot, shard: int, verdict: Verdict) -> list[Row]:
    verdict.files += 1
    try:
        return read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
    except CorruptFile as error:
        verdict.blame(f"corpus, shard {shard}: {error}")
        return []


def _check_shard(root: Root, name: str, snapshot: Snapshot, shard: int, rows: list[Row], verdict: Verdict) -> list[str]:
    """Blame what a file says for itself; the segments of the rows whose tokens are of no use."""
    verdict.files += 1
    where = f"stream {name}, shard {shard}"
    try:
        codes = read_codes(root, snapshot, shard, more=True)
    except CorruptFile as error:
        verdict.blame(f"{where}: {error}")
        return []
    verdict.stream_rows += len(codes.ids)
    if not rows:
        return []
    if codes.ids != [row["id"] for row in rows]:
        verdict.blame(f"{where}: its {len(codes.ids)} rows are not the corpus's {len(rows)}, one for one in order")
        return [row["id"] for row in rows]
    spec = stream_spec(snapshot)
    blamed = []
    for place, row in enumerate(rows):
        problem = _row_problem(codes, place, row, spec)
        if problem:
            verdict.blame(f"{where}, segment {row['id']}: {problem}")
            blamed.append(row["id"])
    return blamed


def _row_problem(codes: ShardCodes, place: int, row: Row, spec: StreamSpec) -> str | None:
    error, frames = codes.errors[place], codes.num_frames[place]
    if error is not None:
        return None if frames is None else "it has an error and a number of frames"
    if row["error"] is not None:
        return f"the corpus says {row['error']}, the stream has codes"
    num_samples = resampled_length(row["num_samples"], row["sample_rate"], spec.sample_rate)
    expected = num_frames(num_samples, spec) if spec.has_clock else frames
    countable = (frames is None or frames >= 0) and _equal_lengths(codes, place)
    codes_KT = codes.codes(place) if countable else None
    if codes_KT is None or frames != expected or codes_KT.shape[1] != expected:
        return f"it has {frames} frames, the frame rule gives {expected}"
    try:
        more: list[Any] = [codes.frames(place)] if spec.dim else []
    except ValueError:
        return f"the bytes of its frames are no whole frames of {spec.dim} numbers"
    durations_T = codes.durations(place) if spec.durations else None
    more += [durations_T] if spec.durations else []
    if any(each is None or len(each) != expected for each in more):
        return f"it has {frames} frames, and another number of what belongs to each"
    if durations_T is not None and (durations_T < 0).any():
        return "it has negative durations"
    if spec.chunk_length:
        scales_C, num_chunks = codes.scales(place), len(chunk_frames(num_samples, spec))
        if scales_C is None or len(scales_C) != num_chunks:
            return f"it has loudness scales of another number of chunks than the {num_chunks} of its length"
    if codes_KT.size and (codes_KT.min() < 0 or codes_KT.max() >= spec.codebook_size):
        return f"it has codes outside 0 to {spec.codebook_size - 1}"
    return None


def _equal_lengths(codes: ShardCodes, place: int) -> bool:
    return len({int(offsets[place + 1] - offsets[place]) for _, offsets in codes.books}) <= 1


def _compare_again(
    root: Root,
    streams: dict[str, Snapshot],
    tokenizers: dict[str, Any],
    chosen: list[tuple[int, Row, int]],
    blamed: set[tuple[str, str]],
    reader: Reader,
    verdict: Verdict,
) -> None:
    hearing = hearing_ones(tokenizers)
    sounds = {tokenizer.spec.sound for tokenizer in hearing.values()}
    for shard, members in _by_shard(chosen):
        stored = {
            name: codes for name, snapshot in streams.items() if (codes := _try_read(root, snapshot, shard)) is not None
        }
        for row, place in members:
            written = {
                name: stored_tokens(codes, place) for name, codes in stored.items() if (name, row["id"]) not in blamed
            }
            heard = [name for name in written if name in hearing]
            result = _read_again(row, sounds, reader) if heard else {}
            waveforms: dict[Any, Tensor] = {} if isinstance(result, AudioError) else result
            again: dict[str, Tokens | None] = {}
            if isinstance(result, AudioError):
                for name in heard:
                    if written[name] is not None:
                        verdict.blame(f"stream {name}, segment {row['id']}: its audio cannot be read now ({result})")
            else:
                verdict.tokenized_again += 1
                again |= encode_segment(waveforms, {name: hearing[name] for name in heard})
            again |= _made_of_others(tokenizers, streams, row, written, verdict)
            for name, ours in again.items():
                theirs = written[name]
                if ours is None and theirs is None:
                    continue
                spec = tokenizers[name].spec
                fixed = spec.has_clock or _is_of_here(streams[name])  # without a clock, lengths follow rounding too
                if ours is None or theirs is None or (fixed and _shapes(ours) != _shapes(theirs)):
                    verdict.blame(f"stream {name}, segment {row['id']}: tokenized alone it has codes of another shape")
                    continue
                waveform = waveforms[spec.sound] if name in hearing else None
                found = _compare(tokenizers[name], waveform, ours, theirs)
                _judge(name, row, found, streams[name], verdict)


def _made_of_others(
    tokenizers: dict[str, Any],
    streams: dict[str, Snapshot],
    row: Row,
    written: dict[str, Tokens | None],
    verdict: Verdict,
) -> dict[str, Tokens | None]:
    """What a segment has again, by stream, of its text and of what is written of other streams.

    Blames derived tokens that do not give back what they were made of.
    """
    again: dict[str, Tokens | None] = {}
    for name, ours in written.items():
        tokenizer = tokenizers.get(name)
        of = streams[name].metadata.get("of")
        if isinstance(tokenizer, (TextTokenizer, WordTokenizer)):
            with torch.inference_mode():
                again[name] = tokens_of_row(row, tokenizer)
        elif isinstance(tokenizer, UnitTokenizer) and of in written:  # if not, it is damaged: blamed already
            source = written[of]
            again[name] = None if source is None else tokenizer.tokens_of_tokens(source)
            if source is not None and ours is not None and not _gives_back(tokenizer, ours, source):
                verdict.blame(f"stream {name}, segment {row['id']}: its codes do not give back those of stream {of}")
    return again


def _gives_back(tokenizer: UnitTokenizer, tokens: Tokens, source: Tokens) -> bool:
    return torch.equal(tokenizer.source_of(tokens), source.codes_KT.long())


def _compare(tokenizer: Any, waveform: Tensor | None, ours: Tokens, stored: Tokens) -> Comparison:
    """Codes, with their near-ties; and what there is beside them, and codes that know none."""
    found = Comparison()
    if isinstance(tokenizer, Tokenizer) and waveform is not None:
        found += compare_codes(tokenizer, waveform, ours.codes_KT, stored.codes_KT)
    else:
        found += _same(ours.codes_KT, stored.codes_KT)
    for part in ("frames_TD", "durations_T", "scales_C"):
        if getattr(ours, part) is not None:
            found += _same(getattr(ours, part), getattr(stored, part))
    return found if ours.text == stored.text else found + Comparison(num_codes=1, num_different=1)


def _same(ours: Tensor, stored: Tensor) -> Comparison:
    """What differs, none of it a mismatch: these all follow rounding, which is each numerics class's own."""
    if ours.shape != stored.shape:
        most = max(ours.numel(), stored.numel())
        return Comparison(num_codes=most, num_different=most)
    return Comparison(num_codes=ours.numel(), num_different=int((ours != stored).sum()))


def _shapes(tokens: Tokens) -> list[tuple[int, ...]]:
    parts = (tokens.codes_KT, tokens.frames_TD, tokens.durations_T, tokens.scales_C)
    return [tuple(part.shape) for part in parts if part is not None]


def _read_again(row: Row, sounds: set[Sound], reader: Reader) -> Any:
    try:
        return next(reader.read([row], sounds))
    except StoreTrouble:
        raise
    except RunFailed as error:  # the whole source is gone: here a finding like others
        return AudioError("missing", str(error))


def _judge(name: str, row: Row, found: Comparison, stream: Snapshot, verdict: Verdict) -> None:
    """Blame what differs: in the numerics class of this machine all, else codes that are no near-ties.

    Codes of `fast` mode depend on the machine and on shapes, numbers and texts on the machine: of another class these
    are counted only.
    """
    verdict.codes_compared += found.num_codes
    verdict.codes_different += found.num_different
    fast = stream.metadata["tokenizer"]["mode"] == Mode.FAST
    if found.num_different and (_is_of_here(stream) or (found.mismatches and not fast)):
        verdict.blame(
            f"stream {name}, segment {row['id']}: {found.num_different} codes differ when it is tokenized alone"
        )


def _is_of_here(stream: Snapshot) -> bool:
    """Whether this machine gives the very bits that the stream has."""
    anywhere = integers_only(stream.metadata["tokenizer"]["tokenizer"])
    return anywhere or stream.metadata["numerics"] == numerics_class("cpu")


def _by_shard(chosen: list[tuple[int, Row, int]]) -> Iterator[tuple[int, list[tuple[Row, int]]]]:
    shards: dict[int, list[tuple[Row, int]]] = {}
    for _, row, place in chosen:
        shards.setdefault(row["shard"], []).append((row, place))
    yield from sorted(shards.items())


def _try_read(root: Root, snapshot: Snapshot, shard: int) -> ShardCodes | None:
    try:
        return read_codes(root, snapshot, shard, more=True) if shard in snapshot.files else None
    except CorruptFile:
        return None  # blamed already


def _hash(seed: int, segment: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{segment}".encode(), digest_size=8).digest(), "little")
