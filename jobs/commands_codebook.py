"""Commands that make codebooks, look at them, and carry them in and out."""

from typing import Annotated

import typer

from ..tokenizers.spec import UserError
from .arguments import parse_bytes, parse_moved, parse_numbers, require_device, tokenizer_config
from .console import (
    DeviceOption,
    JsonOption,
    LayerOption,
    LocalOnlyOption,
    MovedOption,
    RevisionOption,
    RootArgument,
    WeightsOption,
    codebook_app,
    print_json,
    say,
)

_SAMPLE, _SHAPE, _RUN = "Frames to fit on", "What is fitted", "Workers"

TokenizerArgument = Annotated[str, typer.Argument(metavar="TOKENIZER", help="As `wavemill tokenizers` lists them.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A codebook of the root.")]


@codebook_app.command("fit")
def codebook_fit(
    root: RootArgument,
    tokenizer: TokenizerArgument,
    name: Annotated[str | None, typer.Option(help="The codebook's name; default: the tokenizer's.")] = None,
    weights: WeightsOption = None,
    revision: RevisionOption = None,
    layer: LayerOption = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="6,9,12", help="Several, from one pass: -l6, ... added to names.", rich_help_panel=_SHAPE),
    ] = None,
    local_files_only: LocalOnlyOption = False,
    size: Annotated[
        int | None, typer.Option(min=2, max=1 << 20, help="Centroids per codebook.", rich_help_panel=_SHAPE)
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="100,500", help="Several, from one pass: -k100, ... added to names.", rich_help_panel=_SHAPE
        ),
    ] = None,
    num_codebooks: Annotated[
        int | None, typer.Option(min=1, max=64, help="Residual codebooks, of all groups.", rich_help_panel=_SHAPE)
    ] = None,
    groups: Annotated[
        int, typer.Option(min=1, max=64, help="Cut dimensions into so many equal parts.", rich_help_panel=_SHAPE)
    ] = 1,
    spherical: Annotated[
        bool, typer.Option("--spherical", help="Cluster directions, not lengths.", rich_help_panel=_SHAPE)
    ] = False,
    refine: Annotated[
        bool,
        typer.Option("--refine", help="Fit residual codebooks jointly, if that is better.", rich_help_panel=_SHAPE),
    ] = False,
    backend: Annotated[str, typer.Option(help="auto, torch or faiss.", rich_help_panel=_SHAPE)] = "auto",
    budget: Annotated[
        str, typer.Option(metavar="64MB", help="Bytes of sampled frames, of each layer.", rich_help_panel=_SAMPLE)
    ] = "64MB",
    memory: Annotated[
        str, typer.Option(metavar="1GB", help="More of them than this lie in a file.", rich_help_panel=_SAMPLE)
    ] = "1GB",
    stratify: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Equal shares by source, speaker, language, ...", rich_help_panel=_SAMPLE),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=10**9)] = 0,
    leave_out_speaker: Annotated[
        list[str] | None,
        typer.Option(help="A speaker to keep for measuring. May be repeated.", rich_help_panel=_SAMPLE),
    ] = None,
    replace: Annotated[bool, typer.Option(help="Overwrite a codebook of this name.")] = False,
    engine: Annotated[str, typer.Option(help="inline (this process) or ray.", rich_help_panel=_RUN)] = "inline",
    address: Annotated[
        str | None, typer.Option(help="With ray: a cluster; default: one on this machine.", rich_help_panel=_RUN)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With ray; default: one per CPU core, or per GPU.", rich_help_panel=_RUN)
    ] = None,
    device: DeviceOption = "cpu",
    source: MovedOption = None,
    json_: JsonOption = False,
) -> None:
    """Fit a tokenizer's codebook on a sample of the corpus: k-means, residual for several.

    Kill it anywhere: the same command takes up the shards that were sampled.
    """
    from ..storage.root import Root
    from .codebook import FitOptions
    from .fit_report import fit_figures
    from .stages import fit_stage

    require_device(device, elsewhere=False)
    if layers is not None and layer is not None:
        raise UserError("--layer and --layers are both there; keep one.")
    if sizes is not None and size is not None:
        raise UserError("--size and --sizes are both there; keep one.")
    options = FitOptions(
        name=name,
        size=size,
        num_codebooks=num_codebooks,
        groups=groups,
        spherical=spherical,
        refine=refine,
        backend=backend,
        budget_bytes=parse_bytes(budget),
        memory_bytes=parse_bytes(memory, "--memory"),
        stratify=stratify,
        seed=seed,
        leave_out_speakers=frozenset(leave_out_speaker or ()),
        replace=replace,
        device=device,
        source_roots=tuple(parse_moved(source).items()),
    )
    config = tokenizer_config(
        tokenizer, weights=weights, revision=revision, layer=layer, local_files_only=local_files_only
    )
    headers = fit_stage(
        Root(root),
        config,
        options,
        engine=engine,
        address=address,
        workers=workers,
        layers=parse_numbers(layers, "--layers", least=0, most=1_000),
        sizes=parse_numbers(sizes, "--sizes", least=2, most=1 << 20),
    )
    if json_:
        figures = [fit_figures(header) for header in headers]
        print_json(figures if layers or sizes else figures[0])


@codebook_app.command("report")
def codebook_report(
    root: RootArgument,
    name: NameArgument,
    png: Annotated[
        str | None, typer.Option("--png", metavar="FILE.png", help="Draw a picture instead (extra: plots).")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show how a codebook was fitted: inertia by round, error by size, use of centroids, distances, phones."""
    if png is not None:
        from .canvas import require_picture

        require_picture(png)
    from ..storage.root import Root
    from .fit_report import describe_fit, draw_fit, show_fit

    facts = describe_fit(Root(root), name)
    if png is not None:
        draw_fit(facts, png)
        say(f"Drew {png}.")
    if json_:
        print_json(facts)
    elif png is None:
        show_fit(facts)


@codebook_app.command("import")
def codebook_import(
    root: RootArgument,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help=".npy ([C, D], [stages, C, D]), a pickled scikit-learn k-means, a FAISS index."
        ),
    ],
    tokenizer: TokenizerArgument,
    name: Annotated[str | None, typer.Option(help="The codebook's name; default: the tokenizer's.")] = None,
    weights: WeightsOption = None,
    revision: RevisionOption = None,
    layer: LayerOption = None,
    local_files_only: LocalOnlyOption = False,
    replace: Annotated[bool, typer.Option(help="Overwrite a codebook of this name.")] = False,
    json_: JsonOption = False,
) -> None:
    """Take centroids that were fitted elsewhere. TOKENIZER, layer and weights are those that they were fitted on."""
    from ..storage.root import Root
    from .stages import import_stage

    config = tokenizer_config(
        tokenizer, weights=weights, revision=revision, layer=layer, local_files_only=local_files_only
    )
    header = import_stage(Root(root), file, config, name=name, replace=replace)
    if json_:
        print_json(header)


@codebook_app.command("export")
def codebook_export(
    root: RootArgument,
    name: NameArgument,
    to: Annotated[str, typer.Option(metavar="FILE", help="SOMETHING.npy, or SOMETHING.index for FAISS.")],
    json_: JsonOption = False,
) -> None:
    """Write a codebook's centroids for other programs."""
    from ..storage.root import Root
    from .stages import export_codebook_stage

    figures = export_codebook_stage(Root(root), name, to)
    if json_:
        print_json(figures)
