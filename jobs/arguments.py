"""Command-line values to what the jobs take. Each mistake is a `UserError` that says what was expected."""

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..tokenizers.spec import UserError, did_you_mean

if TYPE_CHECKING:
    from ..pipelines.streams import StreamConfig
    from ..tokenizers.tokenizer import TokenizerConfig


_STREAM_KEYS = ("weights", "revision", "layer", "num_codebooks", "mode", "output", "reduce", "language", "task", "of")
_NEXT_KEY = re.compile(r",(?=[A-Za-z_]+=)")  # a comma within a folder's name is none
_EXPECTED_STREAM = "expected NAME=TOKENIZER or NAME=TOKENIZER:CODEBOOK, then ,KEY=VALUE if need be."


def parse_streams(arguments: list[str] | None, *, local_files_only: bool = False) -> list["StreamConfig"]:
    """Streams from NAME=TOKENIZER[:CODEBOOK][,KEY=VALUE...]; both baselines if none are named."""
    from ..pipelines.streams import StreamConfig
    from ..storage.schema import require_stream_name

    streams = []
    for argument in arguments or ["semantic=mfcc-kmeans", "acoustic=mel-rvq"]:
        name, equals, rest = argument.partition("=")
        made_with, *settings = _NEXT_KEY.split(rest)
        tokenizer, _, codebook = made_with.partition(":")
        if not equals or not tokenizer or "," in made_with:
            raise UserError(f"--stream {argument!r}: {_EXPECTED_STREAM}")
        require_stream_name(name)
        values = _stream_values(settings, argument)
        of = values.pop("of", None)
        config = tokenizer_config(
            tokenizer, **values, local_files_only=local_files_only, where=f"--stream {argument!r}"
        )
        streams.append(StreamConfig(name=name, tokenizer=config, codebook=codebook or None, of=of))
    names = [stream.name for stream in streams]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"Two streams are called {twice!r}. Give each a name of its own: NAME=TOKENIZER.")
    return streams


def _stream_values(settings: list[str], argument: str) -> dict[str, Any]:
    """Values by key. Raises `UserError` for keys that are unknown or twice, and numbers that are none."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in _STREAM_KEYS:
            there = ", ".join(_STREAM_KEYS)
            near = did_you_mean(key, _STREAM_KEYS)
            raise UserError(f"--stream {argument!r}: there is no key {key!r}; there are: {there}.{near}")
        if key in values:
            raise UserError(f"--stream {argument!r}: {key} is there twice; keep one.")
        if not value:
            raise UserError(f"--stream {argument!r}: {key} is empty; give it a value or leave it out.")
        if key in ("layer", "num_codebooks"):
            if not (value.isascii() and value.isdecimal()):
                raise UserError(f"--stream {argument!r}: {key} is {value!r}; expected a whole number.")
            values[key] = int(value)
        else:
            values[key] = value
    return values


def tokenizer_config(
    tokenizer: str,
    *,
    weights: str | None = None,
    revision: str | None = None,
    layer: int | None = None,
    num_codebooks: int | None = None,
    mode: str = "exact",
    output: str | None = None,
    reduce: str | None = None,
    language: str | None = None,
    task: str | None = None,
    local_files_only: bool = False,
    where: str = "",
) -> "TokenizerConfig":
    """What options ask of a tokenizer. `where` is what a mistake in the mode begins with."""
    from ..tokenizers.tokenizer import Mode, Output, TokenizerConfig

    for key, value, kind in (("mode", mode, Mode), ("output", output, Output)):
        there = [each.value for each in kind]
        if value is not None and value not in there:
            begin = f"{where}: there" if where else "There"
            raise UserError(
                f"{begin} is no {key} {value!r}; there are: {', '.join(there)}.{did_you_mean(value, there)}"
            )
    return TokenizerConfig(
        tokenizer=tokenizer,
        weights=None if weights is None else place_of_weights(weights),
        revision=revision,
        local_files_only=local_files_only,
        layer=layer,
        num_codebooks=num_codebooks,
        mode=Mode(mode),
        output=None if output is None else Output(output),
        reduce=None if reduce is None else _place_of_guide(reduce),
        language=language,
        task=task,
    )


def _place_of_guide(reduce: str) -> str:
    """A reduction with the place of its model's weights as `place_of_weights` gives it."""
    way, _, weights = reduce.partition(":")
    return f"{way}:{place_of_weights(weights)}" if way == "ctc" and weights else reduce


def place_of_weights(weights: str) -> str:
    """A folder that exists as an absolute path, since workers run elsewhere; anything else as it is."""
    path = os.path.expanduser(weights)
    return os.path.abspath(path) if os.path.isdir(path) else weights


def parse_weights(arguments: list[str] | None, streams: Iterable[str]) -> dict[str, str]:
    """Where the weights of streams are now, from STREAM=PLACE, or STREAM.ctc=PLACE for the model of `reduce=ctc`.

    `streams` are those that can be named.
    """
    from ..pipelines.streams import CTC

    there = sorted(streams)
    places = {}
    for argument in arguments or ():
        name, equals, place = argument.partition("=")
        if not equals or not place:
            raise UserError(f"--weights {argument!r}: expected STREAM=PLACE, a folder or a hub id.")
        if name.removesuffix(CTC) not in there:
            near = did_you_mean(name, there)
            raise UserError(
                f"--weights {argument!r}: there is no stream {name!r} here; there are: {', '.join(there)}.{near}"
            )
        places[name] = place_of_weights(place)
    return places


def parse_moved(arguments: list[str] | None) -> dict[str, str]:
    """Where sources are now, from NAME=FOLDER; a folder may be a prefix in a store, by its URI."""
    from ..pipelines.files import is_folder, whole_path

    moved = {}
    for argument in arguments or ():
        name, _, path = argument.partition("=")
        place = whole_path(os.path.expanduser(path))
        if not path or not is_folder(place):
            raise UserError(f"--source {argument!r}: expected NAME=FOLDER with a folder that exists.")
        moved[name] = place
    return moved


def parse_versions(arguments: list[str] | None) -> dict[str, int]:
    """Table versions from STREAM=VERSION."""
    versions = {}
    for argument in arguments or ():
        name, _, version = argument.partition("=")
        if not (version.isascii() and version.isdecimal()):
            raise UserError(f"--at {argument!r}: expected STREAM=VERSION with a whole number.")
        versions[name] = int(version)
    return versions


def parse_seconds(text: str, flag: str = "--window", *, least_s: float = 0.1, most_s: float = 12 * 3600) -> float:
    """A length of time in seconds from 300ms, 30s, 2.5min or 1h."""
    for suffix, factor in (("ms", 0.001), ("min", 60), ("s", 1), ("m", 60), ("h", 3600), ("", 1)):
        if text.endswith(suffix):
            try:
                seconds = float(text.removesuffix(suffix)) * factor
            except ValueError:
                break
            if least_s <= seconds <= most_s:
                return seconds
            raise UserError(f"{flag} {text!r} is {seconds:g} s; accepted are {least_s:g} s to {most_s / 3600:g} h.")
    raise UserError(f"{flag} {text!r} is no length of time; write 30s, 2.5min or 1h.")


def parse_bytes(text: str, flag: str = "--budget") -> int:
    """A number of bytes from 64MB or 2GB."""
    for suffix, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1), ("", 1)):
        if text.upper().endswith(suffix):
            try:
                size = int(float(text[: len(text) - len(suffix)]) * factor)
            except (ValueError, OverflowError):
                break
            if size > 0:
                return size
            break
    raise UserError(f"{flag} {text!r} is no number of bytes; write 64MB or 2GB.")


def require_device(device: str, *, elsewhere: bool = False) -> None:
    """Raise `UserError` for a device that is unknown or, unless the work is done `elsewhere`, not there."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device!r} is unknown; there are: cpu, cuda.")
    if device == "cpu" or elsewhere:
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU on this machine. Use --device cpu.")


def parse_numbers(text: str | None, flag: str, *, least: int, most: int) -> tuple[int, ...]:
    """Whole numbers from 6,9,12; none from None."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and least <= int(part) <= most for part in parts):
        raise UserError(
            f"{flag} {text!r}: expected whole numbers from {least:,} to {most:,} with commas, such as 6,9,12."
        )
    return tuple(int(part) for part in parts)
