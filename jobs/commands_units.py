"""Commands about units: models that join frequent ones to tokens."""

from typing import Annotated

import typer

from .arguments import parse_bytes
from .console import JsonOption, RootArgument, app, print_json, say

units_app = typer.Typer(help="Fit models that join frequent units to tokens.", no_args_is_help=True)
app.add_typer(units_app, name="units")


@units_app.command("fit")
def fit(
    root: RootArgument,
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="A finished stream of one codebook.")],
    name: Annotated[str, typer.Option(help="The model's name: --stream b=bpe:NAME,of=STREAM.")] = "bpe",
    size: Annotated[int, typer.Option(min=2, max=1 << 20, help="Tokens, the units themselves among them.")] = 5_000,
    budget: Annotated[str, typer.Option(metavar="64MB", help="Bytes of units to fit on, four each.")] = "64MB",
    seed: Annotated[int, typer.Option(min=0, max=10**9, help="Of the sample.")] = 0,
    replace: Annotated[bool, typer.Option(help="Overwrite a model of this name.")] = False,
    json_: JsonOption = False,
) -> None:
    """Fit byte pairs on the units of a stream, a sample of its segments that fits the budget."""
    from ..storage.root import Root
    from .units import fit_units

    story = fit_units(
        Root(root),
        stream,
        name=name,
        size=size,
        budget_units=max(1, parse_bytes(budget) // 4),
        seed=seed,
        replace=replace,
    )
    say(
        f"Model of units {name}: {story['num_units']:,} units and {story['size'] - story['num_units']:,} joined ones, "
        f"fitted on {story['units']:,} units of {story['segments']:,} segments of stream {stream}."
    )
    if story["size"] < size:
        say(f"Warning: {size:,} tokens were asked for, but no other pair is there twice. Give more audio or budget.")
    if json_:
        print_json(story)
