"""Commands about tokenizers: what there is, and whether one keeps its promises here."""

from typing import Annotated

import typer

from .arguments import require_device, tokenizer_config
from .console import (
    DeviceOption,
    JsonOption,
    LayerOption,
    LocalOnlyOption,
    RevisionOption,
    WeightsOption,
    app,
    plain,
    print_json,
    say,
)

tokenizers_app = typer.Typer(help="List tokenizers, and check one on your weights and recordings.")
app.add_typer(tokenizers_app, name="tokenizers")


@tokenizers_app.callback(invoke_without_command=True)
def tokenizers(context: typer.Context, json_: JsonOption = False) -> None:
    """List the tokenizers that streams can be made with. `wavemill tokenizers check` tries one on your recordings."""
    if context.invoked_subcommand is not None:
        return
    from ..tokenizers.registry import REGISTRY
    from .show import describe_entries, show_tokenizers

    entries = describe_entries(REGISTRY.values())
    print_json(entries) if json_ else show_tokenizers(entries)


@tokenizers_app.command("check")
def check(
    tokenizer: Annotated[str, typer.Argument(metavar="TOKENIZER", help="As `wavemill tokenizers` lists them.")],
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Recordings: a folder, a file, a quoted glob, a manifest.")
    ],
    weights: WeightsOption = None,
    revision: RevisionOption = None,
    layer: LayerOption = None,
    codebook: Annotated[
        str | None,
        typer.Option(metavar="FILE", help=".npy or .safetensors; default: centroids drawn from the recordings."),
    ] = None,
    mode: Annotated[str, typer.Option(help="exact or fast.")] = "exact",
    num_codebooks: Annotated[int | None, typer.Option(min=1, help="Of codecs: the first so many.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Segments of at most 30 s to take.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of orders, neighbours and centroids.")] = 0,
    device: DeviceOption = "cpu",
    local_files_only: LocalOnlyOption = False,
    json_: JsonOption = False,
) -> None:
    """Encode a few of your recordings in every way that must not matter, and count the codes that differ.

    Exit status 1 if more differ than near-ties explain.
    """
    from ..pipelines.check import CheckOptions, check_tokenizer
    from .show import show_checked

    require_device(device)
    config = tokenizer_config(
        tokenizer,
        weights=weights,
        revision=revision,
        layer=layer,
        num_codebooks=num_codebooks,
        mode=mode,
        local_files_only=local_files_only,
    )
    options = CheckOptions(codebook=codebook, limit=limit, seed=seed, device=device)
    checked = check_tokenizer(config, source, options, on_step=lambda step: say(f"{plain(tokenizer)}: {step}"))
    print_json(checked.to_json()) if json_ else show_checked(checked.to_json())
    if not checked.kept:
        raise typer.Exit(1)
