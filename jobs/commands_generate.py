"""The command that continues recordings with trained language models."""

from typing import Annotated, Any

import typer

from .arguments import require_device
from .console import DeviceOption, JsonOption, LocalOnlyOption, MovedWeightsOption, app, print_json, say


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The recording to go on from.")],
    to: Annotated[str, typer.Option(metavar="OUT.wav", help="The sound of prompt and continuation.")],
    model: Annotated[
        list[str],
        typer.Option(metavar="RUN", help="A run of `wavemill train lm`. May be repeated: one for each stage."),
    ],
    seconds: Annotated[float | None, typer.Option(help="After the prompt. Default: 5.")] = None,
    prompt_seconds: Annotated[float | None, typer.Option(help="Only the first so many of the recording.")] = None,
    text: Annotated[str | None, typer.Option(help="What is to be said (vall-e).")] = None,
    prompt_text: Annotated[
        str | None, typer.Option(help="What the prompt says; default: what PROMPT.txt beside it does.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the draws; 0: always the likeliest.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the so many likeliest; default: all.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="For the first codebook (soundstorm).")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=10**9, help="The same seed gives the same file.")] = 0,
    root: Annotated[
        str | None, typer.Option(metavar="ROOT", help="Where the runs' dataset is now, if it has moved.")
    ] = None,
    device: DeviceOption = "cpu",
    weights: MovedWeightsOption = None,
    local_files_only: LocalOnlyOption = False,
    json_: JsonOption = False,
) -> None:
    """Continue a recording with trained language models; what their layouts are decides the way."""
    require_device(device)
    from .generate import GenerateOptions
    from .generate import generate as run
    from .lm.drawing import Sampling

    options = GenerateOptions(
        seconds=seconds,
        prompt_seconds=prompt_seconds,
        text=text,
        prompt_text=prompt_text,
        sampling=Sampling(temperature=temperature, top_k=top_k),
        iterations=iterations,
        seed=seed,
        root=root,
        device=device,
        weights=weights or (),
        local_files_only=local_files_only,
    )
    report = run(prompt, to, model, options)
    print_json(report) if json_ else _show(report)
    ended = ", where the model ended" if report["ended"] else ""
    say(f"Wrote {to}: {report['prompt_s']:.2f} s of the prompt, then {report['made_s']:.2f} s{ended}.")


def _show(report: dict[str, Any]) -> None:
    """Print the figures of each codebook beside those of held-out recordings."""
    if not report["codebooks"]:
        return
    print(f"{'':<16}{'frames':>8}  {'bits':>6}  {'held out':>8}  {'repeat':>6}  {'held out':>8}")
    for each in report["codebooks"]:
        held_out = "" if each["held_out_bits"] is None else f"{each['held_out_bits']:.2f}"
        repeat = "" if each["held_out_repeat"] is None else f"{each['held_out_repeat']:,}"
        name = f"{each['stream']}.{each['codebook']}"
        print(f"{name:<16}{each['frames']:>8,}  {each['bits']:>6.2f}  {held_out:>8}  {each['repeat']:>6,}  {repeat:>8}")
    print(
        "bits: entropy of how often each code is there; repeat: frames of the longest span that comes again. Beside "
        "both: held-out recordings, in pieces as long."
    )
