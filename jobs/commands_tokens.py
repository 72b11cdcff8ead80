"""Commands that make, check, play back and hand on tokens."""

from typing import Annotated

import typer

from ..tokenizers.spec import UserError, did_you_mean
from .arguments import parse_moved, parse_seconds, parse_streams, parse_versions, parse_weights, require_device
from .console import (
    DeviceOption,
    JsonOption,
    LocalOnlyOption,
    MovedOption,
    MovedWeightsOption,
    RootArgument,
    app,
    plain,
    print_json,
    say,
)


@app.command()
def tokenize(
    root: RootArgument,
    stream: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TOKENIZER[:CODEBOOK][,KEY=VALUE...]",
            help="A stream to make. May be repeated. Keys: weights, revision, layer, num_codebooks, mode, output, "
            "reduce, language, task, of. Default: semantic=mfcc-kmeans and acoustic=mel-rvq. `wavemill tokenizers` "
            "lists tokenizers.",
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="ray or inline (this process).")] = "ray",
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster; default: one on this machine.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: one per CPU core, or per GPU.")] = None,
    device: DeviceOption = "cpu",
    max_error_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Stop when more than this share of segments fails.")
    ] = 0.05,
    any_numerics: Annotated[bool, typer.Option(help="Let one stream mix machines whose rounding may differ.")] = False,
    deadline: Annotated[
        str, typer.Option(help="A decoder without a sign of life for so long is stopped, its file quarantined.")
    ] = "60s",
    local_files_only: LocalOnlyOption = False,
    source: MovedOption = None,
    json_: JsonOption = False,
) -> None:
    """Turn every segment into tokens. Kill it anywhere: the same command goes on; when all is done it does nothing."""
    from ..pipelines.decoder import DecoderSettings
    from ..storage.root import Root
    from .stages import tokenize_figures, tokenize_stage
    from .tokenize import TokenizeOptions

    require_device(device, elsewhere=engine == "ray" and address is not None)
    options = TokenizeOptions(
        device=device,
        max_error_share=max_error_share,
        source_roots=parse_moved(source),
        any_numerics=any_numerics,
        decoder=DecoderSettings(deadline_s=parse_seconds(deadline, "--deadline", least_s=1)),
    )
    streams = parse_streams(stream, local_files_only=local_files_only)
    summary = tokenize_stage(Root(root), streams, options, engine=engine, address=address, workers=workers)
    if json_:
        print_json(tokenize_figures(summary))


@app.command()
def decode(
    root: RootArgument,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID...]", help="Segments; default: the first few.")
    ] = None,
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Where the WAV files go.")] = "decoded",
    stream: Annotated[str, typer.Option(help="An acoustic stream.")] = "acoustic",
    codebooks: Annotated[int | None, typer.Option(min=1, help="Only the first so many: lower fidelity.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many segments if no ids are given.")] = 5,
    weights: MovedWeightsOption = None,
    local_files_only: LocalOnlyOption = False,
    json_: JsonOption = False,
) -> None:
    """Write the sound that acoustic tokens stand for."""
    from ..pipelines.listen import decode_segments
    from ..storage.codes import open_corpus
    from ..storage.root import Root

    place = Root(root)
    written = []
    for sound in decode_segments(
        place,
        open_corpus(place),
        stream,
        ids=frozenset(ids or ()),
        limit=limit,
        num_codebooks=codebooks,
        folder=to,
        weights=parse_weights(weights, [stream]),
        local_files_only=local_files_only,
    ):
        written.append({name: getattr(sound, name) for name in sound.__slots__})
        if not json_:
            print(f"{sound.path}  {sound.duration_s:.1f} s  from {plain(sound.source_path)}")
    if json_:
        print_json(written)


@app.command()
def verify(
    root: RootArgument,
    sample: Annotated[int, typer.Option(min=0, help="Segments to tokenize again, alone.")] = 20,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: MovedWeightsOption = None,
    local_files_only: LocalOnlyOption = False,
    source: MovedOption = None,
    json_: JsonOption = False,
) -> None:
    """Read everything back with checksums, compare streams with the corpus row by row, tokenize a sample again."""
    from ..pipelines.named import require_named
    from ..pipelines.verify import verify as check
    from ..storage.codes import list_streams, open_corpus
    from ..storage.root import Root
    from .progress import Progress

    place = Root(root)
    corpus = open_corpus(place)
    require_named(place, corpus, "source", moved := parse_moved(source), flag="--source")
    moved_weights = parse_weights(weights, list_streams(place))
    with Progress("verify", total_segments=corpus.num_rows) as progress:
        verdict = check(
            place,
            corpus,
            sample=sample,
            seed=seed,
            source_roots=moved,
            weights=moved_weights,
            local_files_only=local_files_only,
            on_shard=lambda segments, audio_s: progress.advance(segments=segments, audio_s=audio_s, errors=0),
        )
    if json_:
        print_json({name: getattr(verdict, name) for name in verdict.__slots__})
    for problem in verdict.problems:
        say(f"- {plain(problem)}")
    say(
        f"{'Whole' if not verdict.num_problems else 'NOT WHOLE'}: {verdict.segments:,} segments, "
        f"{verdict.stream_rows:,} stream rows in {verdict.files:,} files; {verdict.tokenized_again:,} segments "
        f"tokenized again alone, {verdict.codes_different:,} of {verdict.codes_compared:,} codes differ; "
        f"{verdict.num_problems:,} problems."
    )
    if verdict.num_problems:
        raise typer.Exit(1)


@app.command()
def repair(
    root: RootArgument,
    errors: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS", help="Also try segments with such errors once more; all: any. May be repeated."),
    ] = None,
    accept: Annotated[
        bool, typer.Option(help="Take damaged shards as they come out now, even if differently.")
    ] = False,
    engine: Annotated[str, typer.Option(help="ray or inline (this process).")] = "ray",
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster; default: one on this machine.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: one per CPU core, or per GPU.")] = None,
    device: DeviceOption = "cpu",
    weights: MovedWeightsOption = None,
    local_files_only: LocalOnlyOption = False,
    source: MovedOption = None,
    json_: JsonOption = False,
) -> None:
    """Make shards again whose files are damaged or gone, byte for byte; and, if asked to, those with errors."""
    from ..pipelines.error_classes import ERROR_CLASSES
    from ..storage.codes import list_streams
    from ..storage.root import Root
    from .repair import ANY_ERROR
    from .stages import repair_stage
    from .tokenize import TokenizeOptions

    require_device(device, elsewhere=engine == "ray" and address is not None)
    for kind in errors or ():
        if kind not in (ANY_ERROR, *ERROR_CLASSES):
            near = did_you_mean(kind, (ANY_ERROR, *ERROR_CLASSES))
            raise UserError(
                f"--errors {kind!r}: there is no such class of errors; `wavemill quarantine` shows them.{near}"
            )
    place = Root(root)
    repaired = repair_stage(
        place,
        TokenizeOptions(device=device, source_roots=parse_moved(source)),
        engine=engine,
        address=address,
        workers=workers,
        errors=frozenset(errors or ()),
        accept=accept,
        weights=parse_weights(weights, list_streams(place)),
        local_files_only=local_files_only,
    )
    if json_:
        print_json({name: getattr(repaired, name) for name in repaired.__slots__})
    if repaired.problems:
        raise typer.Exit(1)


@app.command()
def export(
    root: RootArgument,
    format: Annotated[str, typer.Option(help="webdataset.")] = "webdataset",
    stream: Annotated[list[str] | None, typer.Option(help="A stream to export; default: all. May be repeated.")] = None,
    at: Annotated[
        list[str] | None, typer.Option(metavar="STREAM=VERSION", help="Pin a table version. May be repeated.")
    ] = None,
    view: Annotated[str, typer.Option(help="The export's name, below ROOT/webdataset/.")] = "plain",
    json_: JsonOption = False,
) -> None:
    """Write plain tars of a pinned snapshot."""
    from ..storage.codes import CORPUS, list_streams, open_corpus, open_stream
    from ..storage.root import Root
    from ..storage.schema import require_stream_name
    from ..storage.table import read_snapshot
    from .stages import export_stage

    if format != "webdataset":
        raise UserError(f"--format {format!r} is unknown; there is: webdataset.")
    require_stream_name(view)
    place = Root(root)
    versions = parse_versions(at)
    corpus = open_corpus(place)
    if CORPUS in versions:
        corpus = read_snapshot(place, CORPUS, version=versions[CORPUS]) or corpus
        if not corpus.files:
            raise UserError(f"The corpus in {place} is empty at version {versions[CORPUS]}. Pin a later one.")
    names = stream or list_streams(place)
    if not names:
        raise UserError(f"There is no stream in {place} yet; make some with `wavemill tokenize {place}`.")
    stray = sorted(set(versions) - {CORPUS, *names})
    if stray:
        raise UserError(f"--at pins {stray[0]!r}, but what is exported is {', '.join([CORPUS, *names])}.")
    streams = {name: open_stream(place, name, version=versions.get(name)) for name in names}
    index = export_stage(place, corpus, streams, view=view)
    if json_:
        print_json(index)
