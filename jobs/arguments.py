"""Command-line values to what the jobs take. Each mistake is a `UserError` that says what was expected."""

import os
from typing import TYPE_CHECKING

from ..tokenizers.spec import UserError

if TYPE_CHECKING:
    from ..pipelines.tokenize import StreamConfig


def parse_streams(arguments: list[str] | None) -> list["StreamConfig"]:
    """Streams from NAME=TOKENIZER[:CODEBOOK]; both baselines if none are named."""
    from ..pipelines.tokenize import StreamConfig
    from ..storage.schema import require_stream_name
    from ..tokenizers.tokenizer import TokenizerConfig

    streams = []
    for argument in arguments or ["semantic=mfcc-kmeans", "acoustic=mel-rvq"]:
        name, equals, rest = argument.partition("=")
        tokenizer, _, codebook = rest.partition(":")
        if not equals or not tokenizer:
            raise UserError(f"--stream {argument!r}: expected NAME=TOKENIZER or NAME=TOKENIZER:CODEBOOK.")
        require_stream_name(name)
        streams.append(
            StreamConfig(name=name, tokenizer=TokenizerConfig(tokenizer=tokenizer), codebook=codebook or None)
        )
    names = [stream.name for stream in streams]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"Two streams are called {twice!r}. Give each a name of its own: NAME=TOKENIZER.")
    return streams


def parse_moved(arguments: list[str] | None) -> dict[str, str]:
    """Where sources are now, from NAME=FOLDER."""
    moved = {}
    for argument in arguments or ():
        name, equals, path = argument.partition("=")
        if not equals or not os.path.isdir(os.path.expanduser(path)):
            raise UserError(f"--source {argument!r}: expected NAME=FOLDER with a folder that exists.")
        moved[name] = os.path.abspath(os.path.expanduser(path))
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


def require_device(device: str) -> None:
    """Raise `UserError` for a device that is unknown or not there."""
    if device == "cpu":
        return
    import torch

    if not device.startswith("cuda"):
        raise UserError(f"--device {device!r} is unknown; there are: cpu, cuda.")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU on this machine. Use --device cpu.")
