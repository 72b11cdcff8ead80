"""The command line. Heavy imports happen inside commands, so that `--help` answers at once."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..tokenizers.spec import RunFailed, UserError
from .arguments import parse_bytes, parse_moved, parse_seconds, parse_streams, parse_versions, require_device

app = typer.Typer(
    name="wavemill",
    help="Turn folders of audio into semantic and acoustic token datasets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
corpus_app = typer.Typer(help="Build and look at the table of segments that jobs work on.", no_args_is_help=True)
codebook_app = typer.Typer(help="Fit codebooks.", no_args_is_help=True)
app.add_typer(corpus_app, name="corpus")
app.add_typer(codebook_app, name="codebook")

RootArgument = Annotated[str, typer.Argument(metavar="ROOT", help="The dataset's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
MovedOption = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="NAME=PATH", help="Where a source is now, if it has moved. May be repeated."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]


def main() -> None:
    """Run the command line: exit status 0 done, 1 the run or the data failed, 2 a mistake, 130 interrupted."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except UserError as error:
        _fail(error, status=2)
    except RunFailed as error:
        _fail(error, status=1)
    except _Interrupted:
        _say("Stopped. What was committed stays; the same command goes on from there.")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}. What was committed stays; run the command again.", status=1)


@app.callback()
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"wavemill {installed('wavemill')}")
        raise typer.Exit


@corpus_app.command("build")
def corpus_build(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]SOURCE...", help="Folders, quoted globs, audio files or JSONL manifests."),
    ],
    to: Annotated[str, typer.Option(metavar="ROOT", help="The dataset's folder; created if need be.")],
    window: Annotated[
        str | None,
        typer.Option(metavar="30s", help="Cut recordings into windows of this length; default: whole."),
    ] = None,
    channels: Annotated[str, typer.Option(help="What becomes of several channels: mix (their mean).")] = "mix",
    shard_hours: Annotated[float, typer.Option(min=0.001, help="Hours of audio per shard, the unit of work.")] = 0.5,
    json_: JsonOption = False,
) -> None:
    """Find recordings, read their headers and add what is new to the corpus of ROOT."""
    from ..pipelines.corpus import CHANNEL_POLICIES, CorpusPolicy
    from ..storage.root import Root
    from .corpus import build_corpus
    from .progress import Progress

    if channels not in CHANNEL_POLICIES:
        raise UserError(f"--channels {channels!r} is unknown; there is: {', '.join(CHANNEL_POLICIES)}.")
    policy = CorpusPolicy(window_s=parse_seconds(window) if window else None, channels=channels)
    root = Root(to)
    with Progress("corpus") as progress:
        result = build_corpus(
            root,
            sources,
            policy,
            shard_hours=shard_hours,
            on_shard=lambda table: progress.advance(
                segments=table.num_rows,
                audio_s=sum(table["duration_s"].to_pylist()),
                errors=table.num_rows - table["error"].null_count,
            ),
        )
    counts = result.counts
    if json_:
        fields = ("new", "known", "replaced", "twice", "errors", "duration_s")
        _print_json({name: getattr(counts, name) for name in fields} | {"skipped": result.skipped})
    if result.skipped:
        listed = ", ".join(f"{count:,} {suffix}" for suffix, count in result.skipped.items())
        _say(f"Passed over, being no audio: {_plain(listed)}.")
    if counts.twice:
        _say(f"{counts.twice:,} entries were named twice and are in once.")
    if counts.replaced:
        _say(
            f"{counts.replaced:,} recordings have other bytes now than when they were added: their rows stay, and will "
            "become errors (changed) if they are tokenized. To add the new ones, give the source another name."
        )
    if not counts.new and not counts.known and not counts.replaced:
        raise UserError(f"No audio was found in {', '.join(sources)}.")
    _say(
        f"{counts.new:,} new segments ({counts.duration_s / 3600:.2f} h, {counts.errors:,} with errors) "
        f"in {result.num_shards:,} new shards, {counts.known:,} known already, in {root}."
    )


@corpus_app.command("show")
def corpus_show(root: RootArgument, json_: JsonOption = False) -> None:
    """Show what a corpus holds."""
    from ..pipelines.inspection import describe_corpus
    from ..storage.root import Root
    from .show import show_corpus
    from .tokenize import open_corpus

    place = Root(root)
    described = describe_corpus(place, open_corpus(place))
    _print_json(described) if json_ else show_corpus(described)


@codebook_app.command("fit")
def codebook_fit(
    root: RootArgument,
    tokenizer: Annotated[str, typer.Argument(help="mfcc-kmeans or mel-rvq.")],
    name: Annotated[str | None, typer.Option(help="The codebook's name; default: the tokenizer's.")] = None,
    size: Annotated[int | None, typer.Option(min=2, max=1 << 20, help="Centroids per codebook.")] = None,
    num_codebooks: Annotated[int | None, typer.Option(min=1, max=64, help="Residual codebooks.")] = None,
    budget: Annotated[str, typer.Option(metavar="64MB", help="Bytes of sampled frames to fit on.")] = "64MB",
    seed: Annotated[int, typer.Option(min=0, max=10**9)] = 0,
    leave_out_speaker: Annotated[
        list[str] | None, typer.Option(help="A speaker to keep for measuring. May be repeated.")
    ] = None,
    replace: Annotated[bool, typer.Option(help="Overwrite a codebook of this name.")] = False,
    device: DeviceOption = "cpu",
    source: MovedOption = None,
    json_: JsonOption = False,
) -> None:
    """Fit a tokenizer's codebook on a sample of the corpus, by FAISS k-means (residual k-means for mel-rvq)."""
    from ..storage.root import Root
    from ..tokenizers.fit import MIN_FRAMES_PER_CENTROID
    from .codebook import FitOptions, fit_codebook
    from .progress import Progress

    require_device(device)
    options = FitOptions(
        name=name,
        size=size,
        num_codebooks=num_codebooks,
        budget_bytes=parse_bytes(budget),
        seed=seed,
        leave_out_speakers=frozenset(leave_out_speaker or ()),
        replace=replace,
        device=device,
        source_roots=tuple(parse_moved(source).items()),
    )
    with Progress(f"sampling for {tokenizer}") as progress:
        header = fit_codebook(
            Root(root),
            tokenizer,
            options,
            on_segment=lambda duration_s, failed: progress.advance(segments=1, audio_s=duration_s, errors=failed),
            on_stage=lambda stage: _say(f"fitted codebook {stage}"),
        )
    if json_:
        _print_json(header)
    _say(
        f"Codebook {header['codebook']}: {header['num_codebooks']} x {header['size']:,} centroids of {header['dim']} "
        f"dimensions on {header['frames']:,} frames ({header['frames_per_centroid']:,} per centroid) of "
        f"{header['segments']:,} segments; mean square {header['mean_square']:,.1f} -> "
        f"{header['mean_square_error'][-1]:,.1f}."
    )
    if not header["enough_frames"]:
        _say(
            f"Warning: under {MIN_FRAMES_PER_CENTROID} frames per centroid, so centroids follow single frames. "
            "Give more audio, a larger --budget or a smaller --size."
        )


@app.command()
def tokenize(
    root: RootArgument,
    stream: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TOKENIZER[:CODEBOOK]",
            help="A stream to make. May be repeated. Default: semantic=mfcc-kmeans and acoustic=mel-rvq.",
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
    source: MovedOption = None,
    json_: JsonOption = False,
) -> None:
    """Turn every segment into tokens. Kill it anywhere: the same command goes on; when all is done it does nothing."""
    from ..storage.root import Root
    from .engine import Engine, InlineEngine
    from .progress import Progress
    from .tokenize import TokenizeOptions
    from .tokenize import tokenize as run

    if engine not in ("ray", "inline"):
        raise UserError(f"--engine {engine!r} is unknown; there are: ray, inline.")
    if not 0 <= max_error_share <= 1:
        raise UserError(f"--max-error-share {max_error_share} is no share; write 0.05 for 5 %.")
    require_device(device)

    def make_engine() -> Engine:
        if engine == "inline":
            return InlineEngine()
        from .ray_engine import RayEngine

        return RayEngine(address=address, num_workers=workers)

    options = TokenizeOptions(
        device=device, max_error_share=max_error_share, source_roots=parse_moved(source), any_numerics=any_numerics
    )
    place = Root(root)
    with Progress("tokenize") as progress:
        summary = run(
            place,
            parse_streams(stream),
            make_engine,
            options,
            on_start=progress.expect,
            on_report=lambda report: progress.advance(
                segments=report.num_segments, audio_s=report.duration_s, errors=report.num_errors
            ),
        )
    if json_:
        _print_json({name: getattr(summary, name) for name in summary.__dataclass_fields__})
    if not summary.shards:
        _say(f"Nothing to do: every segment of the corpus has its row in {place}.")
        return
    _say(
        f"{summary.segments:,} segments, {summary.duration_s / 3600:.2f} h in {summary.wall_s:.1f} s "
        f"({summary.duration_s / summary.wall_s:,.0f} x realtime), {summary.errors:,} errors. Worker time: "
        f"decode {summary.decode_s:.1f} s, encode {summary.encode_s:.1f} s, write {summary.write_s:.1f} s; "
        f"driver commits {summary.commit_s:.1f} s."
    )
    if summary.errors:
        _say(f"See the errors with: wavemill quarantine {root}")


@app.command()
def inspect(root: RootArgument, json_: JsonOption = False) -> None:
    """Show a dataset at a glance: streams, fingerprints, hours, use of codes, bits and bytes, errors."""
    from ..pipelines.inspection import describe_corpus, describe_streams
    from ..storage.root import Root
    from .show import show_dataset
    from .tokenize import open_corpus

    place = Root(root)
    corpus = open_corpus(place)
    described = {"corpus": describe_corpus(place, corpus), "streams": describe_streams(place, corpus)}
    _print_json(described) if json_ else show_dataset(described)


@app.command()
def decode(
    root: RootArgument,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID...]", help="Segments; default: the first few.")
    ] = None,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the WAV files go.")] = Path("decoded"),
    stream: Annotated[str, typer.Option(help="An acoustic stream.")] = "acoustic",
    codebooks: Annotated[int | None, typer.Option(min=1, help="Only the first so many: lower fidelity.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many segments if no ids are given.")] = 5,
    json_: JsonOption = False,
) -> None:
    """Write the sound that acoustic tokens stand for."""
    from ..pipelines.listen import decode_segments
    from ..storage.root import Root
    from .tokenize import open_corpus

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
    ):
        written.append({name: getattr(sound, name) for name in sound.__slots__})
        if not json_:
            print(f"{sound.path}  {sound.duration_s:.1f} s  from {_plain(sound.source_path)}")
    if json_:
        _print_json(written)


@app.command()
def verify(
    root: RootArgument,
    sample: Annotated[int, typer.Option(min=0, help="Segments to tokenize again, alone.")] = 20,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    source: MovedOption = None,
    json_: JsonOption = False,
) -> None:
    """Read everything back with checksums, compare streams with the corpus row by row, tokenize a sample again."""
    from ..pipelines.verify import verify as check
    from ..storage.root import Root
    from .progress import Progress
    from .tokenize import open_corpus

    place = Root(root)
    corpus = open_corpus(place)
    with Progress("verify", total_segments=corpus.num_rows) as progress:
        verdict = check(
            place,
            corpus,
            sample=sample,
            seed=seed,
            source_roots=parse_moved(source),
            on_shard=lambda segments, audio_s: progress.advance(segments=segments, audio_s=audio_s, errors=0),
        )
    if json_:
        _print_json({name: getattr(verdict, name) for name in verdict.__slots__})
    for problem in verdict.problems:
        _say(f"- {_plain(problem)}")
    _say(
        f"{'Whole' if not verdict.num_problems else 'NOT WHOLE'}: {verdict.segments:,} segments, "
        f"{verdict.stream_rows:,} stream rows in {verdict.files:,} files; {verdict.tokenized_again:,} segments "
        f"tokenized again alone, {verdict.codes_different:,} of {verdict.codes_compared:,} codes differ; "
        f"{verdict.num_problems:,} problems."
    )
    if verdict.num_problems:
        raise typer.Exit(1)


@app.command()
def quarantine(
    root: RootArgument,
    kind: Annotated[str | None, typer.Option("--class", help="Only errors of this class.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 100,
    json_: JsonOption = False,
) -> None:
    """List the segments that have an error instead of codes, and why."""
    from ..pipelines.quarantine import quarantined
    from ..storage.root import Root
    from .show import show_quarantine
    from .tokenize import open_corpus

    place = Root(root)
    rows = quarantined(place, open_corpus(place), kind=kind)
    _print_json(rows) if json_ else show_quarantine(rows, limit=limit)


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
    from ..pipelines.corpus import CORPUS
    from ..pipelines.export import export_webdataset
    from ..storage.codes import list_streams, open_stream
    from ..storage.root import Root
    from ..storage.schema import require_stream_name
    from ..storage.table import read_snapshot
    from .progress import Progress
    from .tokenize import open_corpus

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
    with Progress("export", total_segments=corpus.num_rows) as progress:
        index = export_webdataset(
            place,
            corpus,
            streams,
            view=view,
            on_shard=lambda segments, audio_s, errors: progress.advance(
                segments=segments, audio_s=audio_s, errors=errors
            ),
        )
    if json_:
        _print_json(index)
    _say(
        f"{index['samples']:,} samples in {len(index['tars']):,} tars ({index['left_out']:,} with errors left out): "
        f"{place.join(f'webdataset/{view}')}"
    )


@app.command()
def demo(
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Where the demo's dataset goes.")] = "demo",
    engine: Annotated[str, typer.Option(help="ray or inline.")] = "ray",
) -> None:
    """Tokenize the speech that ships with wavemill, read it back as batches and play it back as sound."""
    from .demo import run_demo

    run_demo(to, engine=engine)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))


def _plain(text: str) -> str:
    """Text from outside without control characters, safe on a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail(error: Exception | str, *, status: int) -> NoReturn:
    _say(f"Error: {_plain(str(error))}")
    sys.exit(status)


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not KeyboardInterrupt, for which Typer has words of its own."""


def _interrupt(number: int, frame: object) -> NoReturn:
    raise _Interrupted


if __name__ == "__main__":
    main()
