"""Streams: what each is made with, its tokenizer, and whether a run fits what is written."""

from dataclasses import dataclass

from ..storage.root import Root
from ..storage.schema import require_stream_name
from ..storage.table import Snapshot
from ..tokenizers.codebook import Codebook
from ..tokenizers.numerics import use_one_thread
from ..tokenizers.registry import describe, describe_tokenizer, load_tokenizer, require_tokenizer
from ..tokenizers.spec import UserError, did_you_mean
from ..tokenizers.tokenizer import Description, Mode, Tokenizer, TokenizerConfig, fingerprint_hash
from .audio import DECODER_VERSION
from .policy import CorpusPolicy
from .resample import VERSION as RESAMPLER_VERSION

STREAMS = "streams"
CODEBOOKS = "codebooks"


class StreamMismatch(UserError):
    """A stream in the root was made with something else than this run has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """What a stream is made with: `name=tokenizer:codebook,weights=...` on the command line."""

    name: str
    tokenizer: TokenizerConfig
    codebook: str | None = None  # of the root; None: the one of the tokenizer's name, or the tokenizer's own

    @property
    def codebook_name(self) -> str | None:
        """The codebook of the root that the stream uses, or None if its tokenizer has codebooks of its own."""
        name = self.tokenizer.tokenizer
        return (self.codebook or name) if require_tokenizer(name).needs_codebook else self.codebook

    @property
    def folder(self) -> str:
        return f"{STREAMS}/{self.name}"


def load_stream_tokenizer(root: Root, stream: StreamConfig, *, device: str) -> Tokenizer:
    """The tokenizer of a stream, with its codebook from the root. Raises `UserError`."""
    name, codebook = _stream_codebook(root, stream)
    return load_tokenizer(stream.tokenizer, codebook, codebook_name=name, device=device)


def describe_stream(root: Root, stream: StreamConfig) -> Description:
    """What a stream's tokenizer will be, without building its model. Raises `UserError`."""
    describe(stream.tokenizer)  # what is wrong with it is told before a codebook that it lacks
    name, codebook = _stream_codebook(root, stream)
    return describe_tokenizer(stream.tokenizer, codebook, codebook_name=name)


def _stream_codebook(root: Root, stream: StreamConfig) -> tuple[str, Codebook | None]:
    name = stream.codebook_name
    if not require_tokenizer(stream.tokenizer.tokenizer).needs_codebook and name is not None:
        raise UserError(f"Tokenizer {stream.tokenizer.tokenizer} has codebooks of its own: leave out {name!r}.")
    if name is None:
        return "", None
    return name, load_codebook(root, name, stream.tokenizer)


def full_fingerprint(fingerprint: dict[str, str], corpus: Snapshot) -> dict[str, str]:
    """A tokenizer's fingerprint with the rules that turned files into its waveforms."""
    policy = CorpusPolicy.from_json(corpus.metadata["policy"])
    return {
        **fingerprint,
        "decoder": DECODER_VERSION,
        "resampler": RESAMPLER_VERSION,
        "transforms": policy.transforms_fingerprint(),
        "separator": policy.separate or "none",
    }


def stream_config(
    name: str, snapshot: Snapshot, *, weights: str | None = None, local_files_only: bool = False
) -> StreamConfig:
    """What a stream was made with; `weights` says where its weights are now, if they have moved."""
    metadata = snapshot.metadata
    config = dict(metadata["tokenizer"])
    moved = {"weights": weights, "revision": None} if weights else {}
    here = {"mode": Mode(config["mode"]), "local_files_only": local_files_only}
    tokenizer = TokenizerConfig(**{**config, **here, **moved})
    return StreamConfig(name=name, tokenizer=tokenizer, codebook=metadata["codebook"])


def open_stream_tokenizer(
    root: Root,
    name: str,
    snapshot: Snapshot,
    corpus: Snapshot,
    *,
    weights: str | None = None,
    local_files_only: bool = False,
) -> Tokenizer:
    """The tokenizer that a stream was made with, on the CPU, in a process set to one thread as workers are.

    `weights` says where its weights are now, if they have moved. Raises `StreamMismatch` if it is no longer the same.
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
    named = [file.removesuffix(".safetensors") for file in root.list(CODEBOOKS)]
    return (
        f"There is no codebook {name!r} in {root}; there are: {', '.join(named) or 'none'}.{did_you_mean(name, named)}"
    )
