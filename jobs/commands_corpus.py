"""Commands that make a corpus."""

from typing import Annotated

import typer

from .arguments import parse_bytes, parse_seconds
from .console import JsonOption, RootArgument, corpus_app, print_json

_CUTTING, _FILTERS, _SOUND, _LIMITS = "Segments", "Filters", "Sound", "Limits on each recording"


@corpus_app.command("build")
def corpus_build(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]SOURCE...",
            help="Folders, quoted globs, audio files, manifests, tars, tables; `wavemill corpus kinds` lists them.",
        ),
    ],
    to: Annotated[str, typer.Option(metavar="ROOT", help="The dataset's folder; created if need be.")],
    kind: Annotated[str, typer.Option(help="What the sources are, where that cannot be seen.")] = "auto",
    text_column: Annotated[str | None, typer.Option(help="The transcript's column in manifests and tables.")] = None,
    audio_column: Annotated[str | None, typer.Option(help="The audio's column in manifests and tables.")] = None,
    shard_hours: Annotated[float, typer.Option(min=0.001, help="Hours of audio per shard, the unit of work.")] = 0.5,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="30s", help="Cut recordings into windows of this length; default: whole.", rich_help_panel=_CUTTING
        ),
    ] = None,
    vad: Annotated[
        bool, typer.Option("--vad", help="Cut recordings into speech (extra: vad).", rich_help_panel=_CUTTING)
    ] = False,
    vad_threshold: Annotated[
        float, typer.Option(help="Probability that counts as speech.", rich_help_panel=_CUTTING)
    ] = 0.5,
    min_speech: Annotated[str, typer.Option(help="Shorter speech is none.", rich_help_panel=_CUTTING)] = "250ms",
    max_speech: Annotated[str, typer.Option(help="Longer speech is cut at a pause.", rich_help_panel=_CUTTING)] = "30s",
    min_silence: Annotated[str, typer.Option(help="Shorter pauses join.", rich_help_panel=_CUTTING)] = "300ms",
    pad: Annotated[str, typer.Option(help="Kept before and after speech.", rich_help_panel=_CUTTING)] = "100ms",
    channels: Annotated[
        str, typer.Option(help="mix (their mean), first, or split (a segment each).", rich_help_panel=_CUTTING)
    ] = "mix",
    separate: Annotated[
        str | None,
        typer.Option(metavar="WEIGHTS", help="Conv-TasNet: child segments per talker.", rich_help_panel=_CUTTING),
    ] = None,
    min_duration: Annotated[
        str | None, typer.Option(metavar="1s", help="Leave out shorter ones.", rich_help_panel=_FILTERS)
    ] = None,
    max_duration: Annotated[
        str | None, typer.Option(metavar="30s", help="Leave out longer ones.", rich_help_panel=_FILTERS)
    ] = None,
    min_level: Annotated[
        float | None, typer.Option(metavar="-60", help="Leave out quieter ones, dBFS.", rich_help_panel=_FILTERS)
    ] = None,
    max_clipping: Annotated[
        float | None, typer.Option(metavar="0.01", help="Most clipped samples, a share.", rich_help_panel=_FILTERS)
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Only this language. May be repeated.", rich_help_panel=_FILTERS)
    ] = None,
    speaker: Annotated[
        list[str] | None, typer.Option(help="Only this speaker. May be repeated.", rich_help_panel=_FILTERS)
    ] = None,
    trim_silence: Annotated[
        float | None, typer.Option(metavar="-50", help="Cut quieter ends off, dBFS.", rich_help_panel=_SOUND)
    ] = None,
    loudness: Annotated[
        float | None, typer.Option(metavar="-23", help="Bring each segment to so many LUFS.", rich_help_panel=_SOUND)
    ] = None,
    max_bytes: Annotated[str, typer.Option(metavar="64GB", help="Size.", rich_help_panel=_LIMITS)] = "64GB",
    max_channels: Annotated[int, typer.Option(min=1, help="Channels.", rich_help_panel=_LIMITS)] = 64,
    min_sample_rate: Annotated[int, typer.Option(min=1, help="Hz.", rich_help_panel=_LIMITS)] = 4_000,
    max_sample_rate: Annotated[int, typer.Option(min=1, help="Hz.", rich_help_panel=_LIMITS)] = 768_000,
    max_recording: Annotated[str, typer.Option(metavar="100h", help="Length.", rich_help_panel=_LIMITS)] = "100h",
    max_expansion: Annotated[
        int, typer.Option(min=1, help="Decoded bytes per byte of the file.", rich_help_panel=_LIMITS)
    ] = 10_000,
    deadline: Annotated[
        str, typer.Option(help="A decoder without a sign of life for so long is stopped.", rich_help_panel=_LIMITS)
    ] = "60s",
    json_: JsonOption = False,
) -> None:
    """Find recordings, read their headers and add what is new to the corpus of ROOT."""
    from ..pipelines.audio import Limits
    from ..pipelines.decoder import DecoderSettings
    from ..pipelines.policy import CorpusPolicy, Filters, Transforms, VadPolicy
    from ..storage.root import Root
    from .corpus import SourceArgument
    from .stages import build_figures, build_stage

    speech = VadPolicy(
        threshold=vad_threshold,
        min_speech_s=parse_seconds(min_speech, "--min-speech", least_s=0),
        max_speech_s=parse_seconds(max_speech, "--max-speech"),
        min_silence_s=parse_seconds(min_silence, "--min-silence", least_s=0),
        pad_s=parse_seconds(pad, "--pad", least_s=0),
    )
    policy = CorpusPolicy(
        window_s=parse_seconds(window) if window else None,
        channels=channels,
        vad=speech if vad else None,
        filters=Filters(
            min_duration_s=parse_seconds(min_duration, "--min-duration", least_s=0) if min_duration else None,
            max_duration_s=parse_seconds(max_duration, "--max-duration", least_s=0) if max_duration else None,
            min_level_db=min_level,
            max_clipping=max_clipping,
            languages=tuple(language or ()),
            speakers=tuple(speaker or ()),
        ),
        transforms=Transforms(trim_silence_db=trim_silence, loudness_lufs=loudness),
    )
    limits = Limits(
        max_bytes=parse_bytes(max_bytes, "--max-bytes"),
        max_channels=max_channels,
        min_sample_rate=min_sample_rate,
        max_sample_rate=max_sample_rate,
        max_duration_s=parse_seconds(max_recording, "--max-recording", most_s=1e6),
        max_expansion=max_expansion,
    )
    result = build_stage(
        Root(to),
        [
            SourceArgument(argument=source, kind=kind, text_column=text_column, audio_column=audio_column)
            for source in sources
        ],
        policy,
        shard_hours=shard_hours,
        limits=limits,
        separate=separate,
        decoder=DecoderSettings(deadline_s=parse_seconds(deadline, "--deadline", least_s=1)),
    )
    if json_:
        print_json(build_figures(result))


@corpus_app.command("kinds")
def corpus_kinds(json_: JsonOption = False) -> None:
    """List the kinds of sources that a corpus can be built from."""
    from ..pipelines.sources import SOURCE_KINDS
    from .show import show_kinds

    print_json(SOURCE_KINDS) if json_ else show_kinds(SOURCE_KINDS)


@corpus_app.command("show")
def corpus_show(root: RootArgument, json_: JsonOption = False) -> None:
    """Show what a corpus holds."""
    from ..pipelines.inspection import describe_corpus
    from ..storage.codes import open_corpus
    from ..storage.root import Root
    from .show import show_corpus

    place = Root(root)
    described = describe_corpus(place, open_corpus(place))
    print_json(described) if json_ else show_corpus(described)
