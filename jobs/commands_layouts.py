"""Commands about layouts: which there are, and one of them on a real segment."""

from typing import Annotated

import typer

from .arguments import parse_weights
from .console import JsonOption, LocalOnlyOption, MovedWeightsOption, RootArgument, app, print_json, say

layout_app = typer.Typer(help="List layouts, and see a segment of a dataset through one.", no_args_is_help=True)
app.add_typer(layout_app, name="layout")


@layout_app.command("list")
def list_(json_: JsonOption = False) -> None:
    """List the layouts: what each is, its paper, its options."""
    from ..pipelines.layouts.registry import ENTRIES
    from .show_layouts import show_layouts

    described = [entry.describe() for entry in ENTRIES]
    print_json(described) if json_ else show_layouts(described)


@layout_app.command("show")
def show(
    layout: Annotated[
        str,
        typer.Argument(
            metavar="LAYOUT[:KEY=VALUE,...]",
            help="A layout and its options, such as delay:stream=acoustic; `wavemill layout list` has them.",
        ),
    ],
    root: RootArgument,
    segment: Annotated[str | None, typer.Option(metavar="ID", help="Default: a short one.")] = None,
    png: Annotated[
        str | None, typer.Option("--png", metavar="FILE.png", help="Draw its first steps, too (extra: plots).")
    ] = None,
    decode: Annotated[
        str | None, typer.Option(metavar="FILE.wav", help="Write the sound of what the inverse gives.")
    ] = None,
    weights: MovedWeightsOption = None,
    local_files_only: LocalOnlyOption = False,
    json_: JsonOption = False,
) -> None:
    """Lay out a segment, take it back, and compare with the table. Exit status 1 if anything differs."""
    from ..pipelines.layouts.closeup import describe, differing, lay_out
    from ..pipelines.layouts.registry import layout_said, parse_layout
    from ..storage.root import Root

    named = parse_layout(layout)
    if png is not None:
        from .canvas import require_picture

        require_picture(png)
    if decode is not None:
        from ..pipelines.layouts.listen import require_wav

        require_wav(decode)
    place = Root(root)
    laid = lay_out(place, named, segment)
    inverted = laid.inverted()
    different = differing(laid, inverted)
    if decode is not None:
        from ..pipelines.layouts.listen import decode_inverted

        moved = parse_weights(weights, named.streams)
        for path in decode_inverted(place, laid, inverted, decode, weights=moved, local_files_only=local_files_only):
            say(f"Wrote {path}.")
    if png is not None:
        from .layout_pictures import draw_layout

        draw_layout(laid, png)
        say(f"Drew {png}.")
    if json_:
        print_json({"layout": layout_said(named), **describe(laid)})
    else:
        from .show_layouts import show_laid

        show_laid(laid, inverted, different)
    if different:
        raise typer.Exit(1)
