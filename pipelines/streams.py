"""Streams: what each is made with, its tokenizer, and whether a run fits what is written."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..storage.codes import list_streams, stream_spec
from ..storage.joined import OF_WAVEFORMS
from ..storage.root import Root
from ..storage.schema import require_stream_name
from ..storage.table import Snapshot, read_snapshot
from ..tokenizers.codebook import Codebook
from ..tokenizers.numerics import use_one_thread
from ..tokenizers.registry import (
    describe,
    describe_tokenizer,
    load_tokenizer,
    require_tokenizer,
    takes_codebook,
    why_no_codebook,
)
from ..tokenizers.spec import StreamSpec, UserError, did_you_mean
from ..tokenizers.tokenizer import Description, Mode, Output, SourceStream, TokenizerConfig, fingerprint_hash
from ..tokenizers.unit_bpe import UnitModel
from .audio import DECODER_VERSION
from .policy import CorpusPolicy
from .resample import VERSION as RESAMPLER_VERSION

STREAMS = "streams"
CODEBOOKS = "codebooks"
CTC = ".ctc"  # after a stream's name: the model that merges its frames


class StreamMismatch(UserError):
    """A stream in the root was made with something else than this run has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """What a stream is made with: `name=tokenizer:codebook,weights=...` on the command line."""

    name: str
    tokenizer: TokenizerConfig
    codebook: str | None = None  # of the root; None: the one of the tokenizer's name, or the tokenizer's own
    of: str | None = None  # of derived tokens: the stream that they are made of

    @property
    def codebook_name(self) -> str | None:
        """The codebook or the model of units of the root that the stream uses, or None if it needs none."""
        needed = takes_codebook(self.tokenizer) or require_tokenizer(self.tokenizer.tokenizer).needs_units
        if self.codebook is None and needed:
            return self.tokenizer.tokenizer
        return self.codebook

    @property
    def folder(self) -> str:
        return f"{STREAMS}/{self.name}"


def load_stream_tokenizer(root: Root, stream: StreamConfig, beside: Sequence[StreamConfig] = (), *, device: str) -> Any:
    """The tokenizer of a stream, with its codebook from the root: see `TokenizerEntry`.

    `beside` are the streams of the run, which come before those of the root as what it is made of. Raises `UserError`.
    """
    _require_source_named(stream)
    source = _source(root, stream, beside, frozenset())
    name, codebook = _stream_codebook(root, stream)
    return load_tokenizer(stream.tokenizer, codebook, codebook_name=name, source=source, device=device)


def describe_stream(
    root: Root, stream: StreamConfig, beside: Sequence[StreamConfig] = (), *, made_later: Collection[str] = ()
) -> Description:
    """What a stream's tokenizer will be, without building its model. Raises `UserError`.

    `made_later` are codebooks and models of units that need not be there yet: a stream of one of these is described
    without its part.
    """
    _require_source_named(stream)
    described = describe(stream.tokenizer)  # what is wrong with it is told before a codebook that it lacks
    source = _source(root, stream, beside, made_later)
    entry = require_tokenizer(stream.tokenizer.tokenizer)
    # features that a codebook is named for become codes, unless something else was asked for
    quantized = entry.needs_codebook and stream.tokenizer.output in (None, Output.CODES)
    if stream.codebook_name in made_later and (quantized or entry.needs_units):
        return described
    name, codebook = _stream_codebook(root, stream)
    return describe_tokenizer(stream.tokenizer, codebook, codebook_name=name, source=source)


def sources_first(streams: Sequence[StreamConfig]) -> list[StreamConfig]:
    """The streams, each after the one that it is made of. Raises `UserError` if they are made of one another."""
    left, done = list(streams), list[StreamConfig]()
    while left:
        waiting = {stream.name for stream in left}
        ready = [stream for stream in left if stream.of not in waiting]
        if not ready:
            told = ", ".join(f"{stream.name} of {stream.of}" for stream in left)
            raise UserError(f"Streams are made of one another: {told}. One has to begin with audio or text.")
        done += ready
        left = [stream for stream in left if stream.of in waiting]
    return done


def _require_source_named(stream: StreamConfig) -> None:
    """Raise `UserError` unless a stream says what it is made of if, and only if, it is made of another."""
    name, takes = stream.tokenizer.tokenizer, require_tokenizer(stream.tokenizer.tokenizer).takes
    if takes == "codes" and stream.of is None:
        raise UserError(f"Tokenizer {name} makes tokens of another stream's codes: add of=STREAM.")
    if takes != "codes" and stream.of is not None:
        raise UserError(f"Tokenizer {name} takes {takes}, no other stream: leave out of={stream.of}.")


def _source(
    root: Root, stream: StreamConfig, beside: Sequence[StreamConfig], made_later: Collection[str]
) -> SourceStream | None:
    """What a stream is made of, or None if it is of audio or text. Raises `UserError` for what it cannot be made of."""
    if stream.of is None:
        return None
    named = {each.name: each for each in sources_first(beside)}
    if stream.of in named:
        described = describe_stream(root, named[stream.of], beside, made_later=made_later)
        source = _source_stream(stream.of, described.spec, described.fingerprint)
    else:
        require_stream_name(stream.of)
        snapshot = read_snapshot(root, f"{STREAMS}/{stream.of}")
        if snapshot is None:
            there = sorted({*named, *list_streams(root)} - {stream.name})
            raise UserError(
                f"There is no stream {stream.of!r} to make {stream.name!r} of, neither in this run nor in {root}; "
                f"there are: {', '.join(there) or 'none'}.{did_you_mean(stream.of, there)}"
            )
        source = source_of_table(stream.of, snapshot)
    if source.spec.dim:
        raise UserError(
            f"Stream {stream.name!r} cannot be made of {stream.of!r}, which holds frames of {source.spec.dim} numbers. "
            "Name a stream of codes."
        )
    return source


def source_of_table(name: str, snapshot: Snapshot) -> SourceStream:
    """What derived tokens are told of a stream of the root: the same as of one that is being made."""
    return _source_stream(name, stream_spec(snapshot), snapshot.metadata["fingerprint"])


def _source_stream(name: str, spec: StreamSpec, fingerprint: dict[str, str]) -> SourceStream:
    parts = {part: value for part, value in without_revision(fingerprint).items() if part not in OF_WAVEFORMS}
    return SourceStream(name, spec, parts)


def _stream_codebook(root: Root, stream: StreamConfig) -> tuple[str, Codebook | UnitModel | None]:
    name, entry = stream.codebook_name, require_tokenizer(stream.tokenizer.tokenizer)
    if name is None:
        return "", None
    if entry.needs_units:
        return name, read_unit_model(root, name)
    if entry.takes != "audio":
        raise UserError(f"Tokenizer {stream.tokenizer.tokenizer} takes no codebook: leave out {name!r}.")
    if not entry.needs_codebook:
        raise UserError(f"Tokenizer {stream.tokenizer.tokenizer} {why_no_codebook(entry)}: leave out {name!r}.")
    return name, load_codebook(root, name, stream.tokenizer)


def full_fingerprint(fingerprint: dict[str, str], corpus: Snapshot) -> dict[str, str]:
    """A tokenizer's fingerprint with the rules that turned files into its waveforms, where it takes any."""
    if "text" in fingerprint:
        return dict(fingerprint)
    policy = CorpusPolicy.from_json(corpus.metadata["policy"])
    return {
        **fingerprint,
        "decoder": DECODER_VERSION,
        "resampler": RESAMPLER_VERSION,
        "transforms": policy.transforms_fingerprint(),
        "separator": policy.separate or "none",
    }


def stream_config(
    name: str, snapshot: Snapshot, *, weights: Mapping[str, str] | None = None, local_files_only: bool = False
) -> StreamConfig:
    """What a stream was made with; `weights` says where weights are now, if they have moved.

    Those of stream NAME by NAME, those of the CTC model that merges its frames by NAME.ctc. Raises `UserError` if it
    has none.
    """
    metadata = snapshot.metadata
    config = dict(metadata["tokenizer"])
    weights = weights or {}
    moved: dict[str, Any] = {"weights": weights[name], "revision": None} if name in weights else {}
    if (guide := weights.get(name + CTC)) is not None:
        if not str(config.get("reduce")).startswith("ctc:"):
            raise UserError(f"Stream {name!r} was made with no CTC model: leave out {name}{CTC}={guide}.")
        moved["reduce"] = f"ctc:{guide}"
    output = config.get("output")  # tables from before there were others have none
    here = {
        "mode": Mode(config["mode"]),
        "output": None if output is None else Output(output),
        "local_files_only": local_files_only,
    }
    tokenizer = TokenizerConfig(**{**config, **here, **moved})
    return StreamConfig(name=name, tokenizer=tokenizer, codebook=metadata["codebook"], of=metadata.get("of"))


def open_stream_tokenizer(
    root: Root,
    name: str,
    snapshot: Snapshot,
    corpus: Snapshot,
    *,
    weights: Mapping[str, str] | None = None,
    local_files_only: bool = False,
) -> Any:
    """The tokenizer that a stream was made with, on the CPU, in a process set to one thread as workers are.

    `weights` says where weights are now: see `stream_config`. Raises `StreamMismatch` if it is no longer the same.
    """
    use_one_thread()
    config = stream_config(name, snapshot, weights=weights, local_files_only=local_files_only)
    tokenizer = load_stream_tokenizer(root, config, device="cpu")
    require_same_fingerprint(root, name, snapshot, full_fingerprint(tokenizer.fingerprint, corpus))
    return tokenizer


def require_same_corpus(root: Root, name: str, stream: Snapshot, corpus: Snapshot) -> None:
    """Raise `StreamMismatch` unless the stream was made over this very corpus table."""
    if stream.metadata["corpus"] != corpus.table_id:
        raise StreamMismatch(
            f'Stream "{name}" in {root} was made over another corpus than the one that is there now: its rows are '
            "other segments. Give the new run another stream name, or restore the old corpus."
        )


def require_same_fingerprint(root: Root, name: str, snapshot: Snapshot, ours: dict[str, str]) -> None:
    """Raise `StreamMismatch`, naming the first difference, unless the stream's full fingerprint is ours.

    The revision of weights is told, but does not count: the same weights may come from the hub or from a folder.
    """
    written = snapshot.metadata["fingerprint"]
    if without_revision(written) != without_revision(ours):
        part, theirs, here = first_difference(without_revision(written), without_revision(ours))
        raise StreamMismatch(
            f'Stream "{name}" in {root} was written with {written["tokenizer"]}@{fingerprint_hash(written)}, '
            f"this run has {ours['tokenizer']}@{fingerprint_hash(ours)} ({part} differs: {theirs[:16]} there, "
            f"{here[:16]} here). Give the new run another stream name, or restore the old {part}."
        )


def without_revision(fingerprint: dict[str, str]) -> dict[str, str]:
    """The parts that decide codes: the same weights may come from the hub or from a folder."""
    return {part: value for part, value in fingerprint.items() if part != "revision"}


def first_difference(theirs: dict[str, str], ours: dict[str, str]) -> tuple[str, str, str]:
    """The first part in which two fingerprints or numerics classes differ, and both sides of it."""
    for part in [*theirs, *ours]:
        if theirs.get(part) != ours.get(part):
            return part, str(theirs.get(part)), str(ours.get(part))
    raise AssertionError("there is no difference")


def load_codebook(root: Root, name: str, config: TokenizerConfig) -> Codebook:
    """A codebook of the root, for what `config` names. Raises `UserError` if there is none by that name."""
    try:
        return _read_codebook(root, name)
    except FileNotFoundError as error:
        flags = {
            "name": None if name == config.tokenizer else name,
            "weights": config.weights,
            "revision": config.revision,
            "layer": config.layer,
        }
        given = "".join(f" --{flag} {value}" for flag, value in flags.items() if value is not None)
        raise UserError(
            f"{_missing(root, name)} Fit it first: wavemill codebook fit {root} {config.tokenizer}{given}"
        ) from error


def read_codebook(root: Root, name: str) -> Codebook:
    """A codebook of the root, whatever it is for. Raises `UserError` if there is none by that name."""
    try:
        return _read_codebook(root, name)
    except FileNotFoundError as error:
        raise UserError(_missing(root, name)) from error


def _read_codebook(root: Root, name: str) -> Codebook:
    require_stream_name(name)
    return Codebook.from_bytes(root.read_bytes(f"{CODEBOOKS}/{name}.safetensors"), name=name)


def _missing(root: Root, name: str) -> str:
    named = [file.removesuffix(".safetensors") for file in root.list(CODEBOOKS) if file.endswith(".safetensors")]
    return (
        f"There is no codebook {name!r} in {root}; there are: {', '.join(named) or 'none'}.{did_you_mean(name, named)}"
    )


def unit_model_file(name: str) -> str:
    """Where the model of units of a name lies. Raises `UserError` for what cannot be a name."""
    require_stream_name(name)
    return f"{CODEBOOKS}/{name}.json"


def read_unit_model(root: Root, name: str) -> UnitModel:
    """A model of units of the root. Raises `UserError` if there is none by that name."""
    relative = unit_model_file(name)
    try:
        return UnitModel.from_bytes(root.read_bytes(relative), name=root.join(relative))
    except FileNotFoundError as error:
        named = [file.removesuffix(".json") for file in root.list(CODEBOOKS) if file.endswith(".json")]
        raise UserError(
            f"There is no model of units {name!r} in {root}; there are: {', '.join(named) or 'none'}."
            f"{did_you_mean(name, named)} Fit it first: wavemill units fit {root} STREAM --name {name}"
        ) from error
