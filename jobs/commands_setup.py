"""Commands around the work: the demo, recipes, the doctor."""

import os
from typing import Annotated, Any

import typer

from .console import JsonOption, app, print_json, say

recipe_app = typer.Typer(help="Write and check recipes: a whole dataset in one file, for `run`.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file; see `wavemill recipe init`.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A value in the recipe's place: tokenize.workers=2. Repeatable."),
]


@app.command()
def demo(
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Where the demo's dataset goes.")] = "demo",
    engine: Annotated[str, typer.Option(help="ray or inline.")] = "ray",
) -> None:
    """Tokenize the speech that ships with wavemill, read it back as batches and play it back as sound."""
    from .demo import run_demo

    run_demo(to, engine=engine)


@app.command()
def run(
    context: typer.Context,
    recipe: RecipeArgument,
    set_: SetOption = None,
    to: Annotated[str | None, typer.Option(metavar="ROOT", help="The dataset's folder.")] = None,
    engine: Annotated[str | None, typer.Option(help="ray or inline.")] = None,
    address: Annotated[str | None, typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    json_: JsonOption = False,
) -> None:
    """Do all that a recipe says: corpus, codebooks, tokens, views. The same command again adds what is new or missing.

    Flags go before what the recipe says. Kill it anywhere: what was committed stays.
    """
    from .recipe_file import load_recipe
    from .run_recipe import run_recipe

    flags: dict[str, tuple[str, Any]] = {
        "--to": ("root", to if to is None or "://" in to else os.path.abspath(os.path.expanduser(to))),
        "--engine": ("tokenize.engine", engine),
        "--workers": ("tokenize.workers", workers),
        "--device": ("tokenize.device", device),
    }
    cluster = {"--address": ("tokenize.address", address)}
    origin = context.get_parameter_source("address")
    from_environment = origin is not None and origin.name == "ENVIRONMENT"
    loaded = load_recipe(recipe, sets=set_ or (), flags=flags if from_environment else flags | cluster)
    if from_environment and loaded.tokenize.address is None:
        loaded = load_recipe(recipe, sets=set_ or (), flags=flags | cluster)
    summary = run_recipe(loaded)
    if json_:
        print_json(summary)


@recipe_app.command("init")
def recipe_init(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Where it goes.")] = "recipe.yaml",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a recipe in which every key stands with its default and a comment."""
    from .recipe_file import write_recipe

    write_recipe(file, force=force)
    say(f"Wrote {file}. Name your recordings in corpus.sources, then: wavemill run {file}")


@recipe_app.command("check")
def recipe_check(recipe: RecipeArgument, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Say what is wrong with a recipe, or what running it would do. Writes nothing."""
    from ..storage.root import Root
    from .recipe_file import load_recipe
    from .run_recipe import plan, require_ready

    loaded = load_recipe(recipe, sets=set_ or ())
    require_ready(loaded, Root(loaded.root))
    steps = plan(loaded)
    print_json({"recipe": loaded.model_dump(), "steps": steps}) if json_ else print("\n".join(steps))


@app.command()
def doctor(
    root: Annotated[str | None, typer.Argument(metavar="[ROOT]", help="A dataset's folder, to be or there.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Start Ray on this machine and stop it again.")] = False,
    json_: JsonOption = False,
) -> None:
    """Look at this machine: versions, decoders, devices, memory, disks, and whether ROOT can hold a dataset.

    Exit status 1 if something does not work; what is only worth knowing is a warning.
    """
    from .doctor import diagnose, show_checks

    checks = diagnose(root, start_ray=ray)
    if json_:
        print_json([check.to_json() for check in checks])
    else:
        show_checks(checks)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)
