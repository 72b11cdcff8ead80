"""Commands that look at a dataset."""

from typing import Annotated, Any

import typer

from ..tokenizers.spec import UserError, did_you_mean
from .arguments import parse_moved
from .console import JsonOption, MovedOption, RootArgument, app, print_json, say

PictureOption = Annotated[
    str | None, typer.Option("--png", metavar="FILE.png", help="Draw a picture instead (extra: plots).")
]


@app.command()
def inspect(
    root: RootArgument,
    segment: Annotated[
        str | None, typer.Option(metavar="ID", help="Show this segment: its row, its codes, with --png its sound.")
    ] = None,
    png: PictureOption = None,
    source: MovedOption = None,
    json_: JsonOption = False,
) -> None:
    """Show a dataset: streams, fingerprints, hours, use of codes, bits and bytes, errors; or one segment."""
    _require_picture(png)
    from ..pipelines.inspection import describe_corpus, describe_streams
    from ..pipelines.named import require_named
    from ..storage.codes import open_corpus
    from ..storage.root import Root
    from .show import show_dataset

    place = Root(root)
    corpus = open_corpus(place)
    require_named(place, corpus, "source", moved := parse_moved(source), flag="--source")
    if segment is not None:
        _inspect_segment(place, corpus, segment, png=png, source_roots=moved, json_=json_)
        return
    described = {"corpus": describe_corpus(place, corpus), "streams": describe_streams(place, corpus)}
    if png is not None:
        from ..pipelines.inspection import corpus_durations, stream_usage
        from .charts import draw_use

        usage = {stream["stream"]: stream_usage(place, stream["stream"]) for stream in described["streams"]}
        draw_use(described, usage, corpus_durations(place, corpus), png)
        say(f"Drew {png}.")
    if json_:
        print_json(described)
    elif png is None:
        show_dataset(described)


@app.command()
def quarantine(
    root: RootArgument,
    kind: Annotated[str | None, typer.Option("--class", help="Only errors of this class.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 100,
    json_: JsonOption = False,
) -> None:
    """List the segments that have an error instead of codes, and why."""
    from ..pipelines.error_classes import ERROR_CLASSES
    from ..pipelines.quarantine import quarantined
    from ..storage.codes import open_corpus
    from ..storage.root import Root
    from .show import show_quarantine

    if kind is not None and kind not in ERROR_CLASSES:
        raise UserError(
            f"--class {kind!r} is unknown; there are: {', '.join(ERROR_CLASSES)}.{did_you_mean(kind, ERROR_CLASSES)}"
        )
    place = Root(root)
    rows = quarantined(place, open_corpus(place), kind=kind)
    print_json(rows) if json_ else show_quarantine(rows, limit=limit)


@app.command()
def phones(
    root: RootArgument,
    stream: Annotated[str, typer.Option(help="The stream whose units are measured.")] = "semantic",
    codebook: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Which codebook, from 0, of a stream with several.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv",
            help="Phones with the columns file,start_s,end_s,phone, file as in the corpus; default: its own.",
        ),
    ] = None,
    fold: Annotated[
        bool, typer.Option(help="Take AA0 and AA1 as AA, all names of silence as SIL; or labels as they are.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, max=10**9, help="Of the shuffled baseline.")] = 0,
    png: PictureOption = None,
    json_: JsonOption = False,
) -> None:
    """Measure how well units and phones agree: PNMI, phone purity, cluster purity (as HuBERT does), and by chance."""
    _require_picture(png)
    from ..pipelines.phones import count_phones, describe_phones, read_label_file
    from ..storage.codes import open_corpus
    from ..storage.root import Root
    from .show import show_phones

    place = Root(root)
    corpus = open_corpus(place)
    label_file = read_label_file(labels) if labels is not None else None
    counts = count_phones(place, corpus, stream, codebook=codebook, label_file=label_file, fold=fold)
    facts = describe_phones(counts, stream=stream, codebook=codebook, seed=seed)
    if png is not None:
        from .charts import draw_phones

        draw_phones(facts, counts, png)
        say(f"Drew {png}.")
    print_json(facts) if json_ else show_phones(facts)


def _require_picture(png: str | None) -> None:
    """Raise `UserError`, before anything heavy is imported, if no picture can be drawn or written there."""
    if png is not None:
        from .canvas import require_picture

        require_picture(png)


def _inspect_segment(
    place: Any, corpus: Any, name: str, *, png: str | None, source_roots: dict[str, str], json_: bool
) -> None:
    from ..pipelines.closeup import describe_segment, read_segment, read_sound
    from .show import show_segment

    segment = read_segment(place, corpus, name)
    if png is not None:
        from .pictures import MAX_DRAWN_S, draw_segment

        draw_segment(segment, read_sound(place, corpus, segment.row, source_roots, max_s=MAX_DRAWN_S), png)
        say(f"Drew {png}.")
    if json_:
        print_json(describe_segment(segment))
    elif png is None:
        show_segment(describe_segment(segment))
