"""Commands that train models on a dataset's tokens."""

from typing import Annotated

import typer

from ..tokenizers.spec import UserError, did_you_mean
from .arguments import require_device
from .console import DeviceOption, JsonOption, RootArgument, app, print_json, say

train_app = typer.Typer(help="Train reference models on a dataset's tokens.", no_args_is_help=True)
app.add_typer(train_app, name="train")


@train_app.command("lm")
def lm(
    root: RootArgument,
    layout: Annotated[str, typer.Option(metavar="NAME:KEY=VALUE,...", help="See `wavemill layout list`.")],
    to: Annotated[str, typer.Option(metavar="RUN", help="The run's folder; one that was begun is gone on with.")],
    objective: Annotated[
        str | None,
        typer.Option(metavar="NAME[,KEY=VALUE...]", help="What is learnt; default: what the layout is made for."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="In all; the learning rate falls over them.")] = 1_000,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop then; the same command goes on.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step, of all workers together.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Steps of a sequence.")] = 512,
    packing: Annotated[str, typer.Option(help="concatenate, best-fit or single.")] = "best-fit",
    dim: Annotated[int, typer.Option(min=2, help="Width of the model.")] = 256,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    dropout: Annotated[float, typer.Option(min=0.0)] = 0.1,
    tied: Annotated[bool, typer.Option(help="Heads share the embeddings' matrices.")] = True,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="The highest.")] = 1e-3,
    warmup: Annotated[int, typer.Option(min=0, help="Steps in which the learning rate rises.")] = 100,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.1,
    clip: Annotated[float, typer.Option(min=0.0, help="The largest norm of a gradient; 0: any.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=10**9, help="Of weights, order and draws.")] = 0,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 100,
    save_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 500,
    held_out_batches: Annotated[int, typer.Option(min=1, help="To evaluate on, at most.")] = 32,
    pin: Annotated[str | None, typer.Option(help="A snapshot by name; default: the newest.")] = None,
    engine: Annotated[str, typer.Option(help="inline (this process) or ray.")] = "inline",
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster; default: one on this machine.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes of Ray Train.")] = None,
    loader_workers: Annotated[int, typer.Option(min=0, help="That read, for each process.")] = 0,
    device: DeviceOption = "cpu",
    json_: JsonOption = False,
) -> None:
    """Train a language model on a layout of the dataset. Kill it anywhere: the same command goes on."""
    if engine not in ("inline", "ray"):
        raise UserError(
            f"--engine {engine!r} is unknown; there are: inline, ray.{did_you_mean(engine, ('inline', 'ray'))}"
        )
    if workers is not None and engine == "inline":
        raise UserError("--workers is for --engine ray: inline is this process alone. Leave out one of them.")
    require_device(device, elsewhere=engine == "ray" and address is not None)
    from .lm.model import ModelConfig
    from .lm.settings import TrainSettings
    from .lm.train import Means
    from .train_lm import train_lm

    name, options = _objective(objective)
    settings = TrainSettings(
        root=root,
        layout=layout,
        objective=name,
        options=options,
        model=ModelConfig(dim=dim, num_layers=layers, num_heads=heads, dropout=dropout, tied=tied),
        pin=pin,
        steps=steps,
        batch_size=batch_size,
        length=length,
        packing=packing,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        seed=seed,
        held_out_batches=held_out_batches,
        evaluate_every=evaluate_every,
        save_every=save_every,
    )
    means = Means(device=device, num_workers=loader_workers, minutes=minutes)
    report = train_lm(settings, to, means, ray_workers=(workers or 1) if engine == "ray" else None, address=address)
    if json_:
        print_json(report)
    _say(report, to)


def _objective(text: str | None) -> tuple[str | None, dict[str, str]]:
    """Name and options from NAME[,KEY=VALUE...]."""
    name, *settings = (text or "").split(",")
    options: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals or not value:
            raise UserError(f"--objective {text!r}: expected NAME, or NAME,KEY=VALUE,KEY=VALUE.")
        if key in options:
            raise UserError(f"--objective {text!r}: {key} is there twice; keep one.")
        options[key] = value
    return name or None, options


def _say(report: dict[str, object], to: str) -> None:
    steps, of = report["steps"], report["of"]
    say(
        f"{'Done' if steps == of else 'Stopped'}: step {steps:,} of {of:,}. Held out: {report['held_out_loss']:.3f}, "
        f"at best {report['best_held_out_loss']:.3f} (step {report['best_step']:,}); {report['baseline']}: "
        f"{report['baseline_loss']:.3f}. See {to}/loss.png."
    )
    if steps != of:
        say("The same command goes on from there.")
