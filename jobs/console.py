"""What the commands share: the Typer applications, options that several of them take, and printing."""

import json
import re
import sys
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="wavemill",
    help="Turn folders of audio into semantic and acoustic token datasets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
corpus_app = typer.Typer(help="Build and look at the table of segments that jobs work on.", no_args_is_help=True)
codebook_app = typer.Typer(help="Fit codebooks, look at them, bring your own or take them out.", no_args_is_help=True)
app.add_typer(corpus_app, name="corpus")
app.add_typer(codebook_app, name="codebook")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")

RootArgument = Annotated[str, typer.Argument(metavar="ROOT", help="The dataset's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
MovedOption = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="NAME=PATH", help="Where a source is now, if it has moved. May be repeated."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]
WeightsOption = Annotated[
    str | None, typer.Option(metavar="PLACE", help="A folder or a hub id; default: the published ones.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Of a hub id: a commit, a branch or a tag.")]
LayerOption = Annotated[int | None, typer.Option(min=0, help="Of features; default: the tokenizer's own.")]
LocalOnlyOption = Annotated[bool, typer.Option("--local-files-only", help="Never ask the network for weights.")]
MovedWeightsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="STREAM=PLACE",
        help="Where weights are now: a folder, a hub id. STREAM.ctc: those of reduce=ctc. Repeatable.",
    ),
]


def print_json(value: Any) -> None:
    """Print a value for programs; characters that a terminal might obey are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    print("".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text))


def plain(text: str) -> str:
    """Text from outside without control characters, safe on a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def say(message: str) -> None:
    """Tell a person something, on stderr; URLs in it lose the keys and signatures that they came with."""
    from ..storage.stores import redacted

    print(_URL.sub(lambda found: redacted(found[0]), message), file=sys.stderr, flush=True)


def fail(error: Exception | str, *, status: int) -> NoReturn:
    say(f"Error: {plain(str(error))}")
    sys.exit(status)
