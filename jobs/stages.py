"""The stages of making a dataset as a person sees them: live progress, then sentences on stderr about the result.

Commands of one stage and `wavemill run`, which does all of them, share these; nothing here prints to stdout.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..pipelines.audio import Limits
from ..pipelines.decoder import DecoderSettings
from ..pipelines.export import export_webdataset
from ..pipelines.policy import CorpusPolicy
from ..pipelines.streams import StreamConfig
from ..storage.codes import CORPUS
from ..storage.root import Root
from ..storage.table import Snapshot
from ..tokenizers.fit import MIN_FRAMES_PER_CENTROID
from ..tokenizers.registry import require_tokenizer
from ..tokenizers.spec import UserError, did_you_mean
from ..tokenizers.tokenizer import TokenizerConfig
from .codebook import FitOptions, fit_codebooks
from .codebook_files import export_codebook, import_codebook
from .console import plain, say
from .corpus import BuildResult, SourceArgument, build_corpus
from .engine import Engine, InlineEngine
from .fit_report import error_of
from .progress import Progress
from .repair import Repaired, look, mend
from .tokenize import Summary, TokenizeOptions
from .tokenize import tokenize as run_tokenize

ENGINES = ("ray", "inline")


def build_stage(
    root: Root,
    sources: Sequence[str | SourceArgument],
    policy: CorpusPolicy,
    *,
    shard_hours: float,
    limits: Limits | None = None,
    separate: str | None = None,
    decoder: DecoderSettings | None = None,
) -> BuildResult:
    """Add what is new in the sources to the corpus of `root`. Raises `UserError` if there is no audio at all."""
    failed: list[dict[str, Any]] = []  # the first, for example

    def on_shard(table: pa.Table) -> None:
        errors = table.num_rows - table["error"].null_count
        progress.advance(segments=table.num_rows, audio_s=sum(table["duration_s"].to_pylist()), errors=errors)
        if errors and not failed:
            failed.extend(table.filter(table["error"].is_valid()).slice(0, 1).to_pylist())

    with Progress("corpus") as progress:
        result = build_corpus(
            root,
            sources,
            policy,
            shard_hours=shard_hours,
            limits=limits or Limits(),
            separate=separate,
            decoder=decoder,
            on_shard=on_shard,
            on_warning=say,
        )
    counts = result.counts
    if result.skipped:
        say(f"Passed over, being no audio: {_listed(result.skipped)}.")
    if not counts.new and not counts.known and not counts.replaced:
        named = plain(", ".join(_names(sources)))
        if not counts.left_out:
            raise UserError(f"No audio was found in {named}.")
        raise UserError(f"Nothing of {named} is left: {_listed(counts.left_out)}. Loosen the filters.")
    if counts.left_out:
        say(f"Left out: {_listed(dict(counts.left_out.most_common()))}.")
    if counts.twice:
        say(f"{counts.twice:,} entries were named twice and are in once.")
    if counts.replaced:
        say(
            f"{counts.replaced:,} recordings have other bytes now than when they were added: their rows stay, and will "
            "become errors (changed) if they are tokenized. To add the new ones, give the source another name."
        )
    say(
        f"{counts.new:,} new segments ({counts.duration_s / 3600:.2f} h, {counts.errors:,} with errors) "
        f"in {result.num_shards:,} new shards, {counts.known:,} known already, in {root}."
    )
    if failed and counts.errors == counts.new:
        where = os.path.join(failed[0]["source_root"], failed[0]["path"])
        say(
            f"Warning: none of the new segments can be read. The first is {plain(where)}: {failed[0]['error']} "
            f"({plain(failed[0]['error_message'])}). Relative paths in a manifest count from the manifest's own folder."
        )
    return result


def build_figures(result: BuildResult) -> dict[str, Any]:
    """What a build did, for programs."""
    names = ("new", "known", "replaced", "twice", "errors", "duration_s")
    figures = {name: getattr(result.counts, name) for name in names}
    return figures | {"left_out": dict(result.counts.left_out), "skipped": result.skipped}


def fit_stage(
    root: Root,
    config: TokenizerConfig,
    options: FitOptions,
    *,
    engine: str,
    address: str | None = None,
    workers: int | None = None,
    layers: Sequence[int] = (),
    sizes: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Fit codebooks on a sample of the corpus of `root`; their headers."""
    make_engine = _engine_maker(engine, address, workers)
    with Progress(f"sampling for {config.tokenizer}") as progress:
        headers = fit_codebooks(
            root,
            config,
            options,
            make_engine,
            layers=layers,
            sizes=sizes,
            on_report=lambda report: progress.advance(
                segments=report.segments + report.errors, audio_s=report.duration_s, errors=report.errors
            ),
            on_stage=lambda name, stage: say(f"{name}: fitted codebook {stage}"),
            on_note=say,
        )
    for header in headers:
        _say_fitted(header)
    return headers


def _say_fitted(header: dict[str, Any]) -> None:
    say(
        f"Codebook {header['codebook']}: {header['num_codebooks']} x {header['size']:,} centroids of {header['dim']} "
        f"dimensions on {header['frames']:,} frames ({header['frames_per_centroid']:,} per centroid) of "
        f"{header['segments']:,} segments; mean square {header['mean_square']:,.4g} -> {error_of(header):,.4g}."
    )
    if not header["enough_frames"]:
        say(
            f"Warning: under {MIN_FRAMES_PER_CENTROID} frames per centroid, so centroids follow single frames. "
            "Give more audio, a larger budget or a smaller size."
        )


def import_stage(
    root: Root, path: str, config: TokenizerConfig, *, name: str | None = None, replace: bool = False
) -> dict[str, Any]:
    """Take centroids from a file into `root` as a codebook; its header."""
    header = import_codebook(root, path, config, name=name, replace=replace)
    say(
        f"Codebook {header['codebook']}: {header['num_codebooks']} x {header['size']:,} centroids of {header['dim']} "
        f"dimensions for {config.tokenizer}{words_of(config)}, from {plain(header['imported_from'])}."
    )
    return header


def export_codebook_stage(root: Root, name: str, path: str) -> dict[str, Any]:
    """Write a codebook of `root` to a file that other programs read; what was written."""
    figures = export_codebook(root, name, path)
    say(f"Codebook {name}: {' x '.join(map(str, figures['shape']))} numbers in {plain(path)}.")
    return figures


def words_of(config: TokenizerConfig) -> str:
    """`, layer 9 of facebook/hubert-base-ls960`: what a configuration adds to the tokenizer's name, or nothing."""
    entry = require_tokenizer(config.tokenizer)
    if entry.weights is None:
        return ""
    weights = config.weights or entry.weights
    revision = f" at revision {config.revision}" if config.revision else ""
    if entry.kind == "text":
        return f", {plain(weights)}{revision}"
    if entry.layer is not None:
        part = f"layer {entry.layer if config.layer is None else config.layer}"
    else:
        part = f"{config.num_codebooks or entry.spec.num_codebooks} codebooks"
    return f", {part} of {plain(weights)}{revision}"


def tokenize_stage(
    root: Root,
    streams: Sequence[StreamConfig],
    options: TokenizeOptions,
    *,
    engine: str,
    address: str | None = None,
    workers: int | None = None,
) -> Summary:
    """Tokenize what the streams lack of the corpus of `root`."""
    with Progress("tokenize") as progress:
        summary = run_tokenize(
            root,
            streams,
            _engine_maker(engine, address, workers),
            options,
            on_start=progress.expect,
            on_report=lambda report: progress.advance(
                segments=report.num_segments, audio_s=report.duration_s, errors=report.num_errors
            ),
            on_warning=say,
        )
    if not summary.shards:
        say(f"Nothing to do: every segment of the corpus has its row in {root}.")
        return summary
    say(
        f"{summary.segments:,} segments, {summary.duration_s / 3600:.2f} h in {summary.wall_s:.1f} s "
        f"({summary.duration_s / summary.wall_s:,.0f} x realtime), {summary.errors:,} errors. Worker time: "
        f"decode {summary.decode_s:.1f} s, encode {summary.encode_s:.1f} s, write {summary.write_s:.1f} s; "
        f"driver commits {summary.commit_s:.1f} s."
    )
    if summary.errors:
        say(f"See the errors with: wavemill quarantine {root}")
    return summary


def repair_stage(
    root: Root,
    options: TokenizeOptions,
    *,
    engine: str,
    address: str | None = None,
    workers: int | None = None,
    errors: frozenset[str] = frozenset(),
    accept: bool = False,
    weights: Mapping[str, str] | None = None,
    local_files_only: bool = False,
) -> Repaired:
    """Make again what is damaged in the streams of `root`, and what of their errors is asked for."""
    make_engine = _engine_maker(engine, address, workers)
    with Progress("repair: reading") as reading:
        found = look(
            root,
            errors,
            on_shard=lambda segments, audio_s: reading.advance(segments=segments, audio_s=audio_s, errors=0),
        )
    with Progress("repair") as progress:
        repaired = mend(
            root,
            found,
            make_engine,
            options,
            accept=accept,
            weights=weights,
            local_files_only=local_files_only,
            on_start=progress.expect,
            on_report=lambda report: progress.advance(
                segments=report.num_segments, audio_s=report.duration_s, errors=report.num_errors
            ),
            on_warning=say,
        )
    for problem in repaired.problems:
        say(f"- {plain(problem)}")
    say(
        f"{repaired.files:,} files looked at, {repaired.damaged:,} damaged: {repaired.restored:,} are again what they "
        f"were, byte for byte, {repaired.replaced:,} are made anew, {len(repaired.problems):,} problems are left."
    )
    return repaired


def _engine_maker(engine: str, address: str | None, workers: int | None) -> Callable[[], Engine]:
    if engine not in ENGINES:
        raise UserError(
            f"--engine {engine!r} is unknown; there are: {', '.join(ENGINES)}.{did_you_mean(engine, ENGINES)}"
        )

    def make() -> Engine:
        if engine == "inline":
            return InlineEngine()
        from .ray_engine import RayEngine

        return RayEngine(address=address, num_workers=workers)

    return make


def tokenize_figures(summary: Summary) -> dict[str, Any]:
    """What a run did, for programs."""
    return {name: getattr(summary, name) for name in summary.__dataclass_fields__}


def export_stage(root: Root, corpus: Snapshot, streams: dict[str, Snapshot], *, view: str) -> dict[str, Any]:
    """Write a WebDataset view of pinned snapshots; its index."""
    with Progress("export", total_segments=corpus.num_rows) as progress:
        index = export_webdataset(
            root,
            corpus,
            streams,
            view=view,
            on_shard=lambda segments, audio_s, errors: progress.advance(
                segments=segments, audio_s=audio_s, errors=errors
            ),
        )
    say(
        f"{index['samples']:,} samples in {len(index['tars']):,} tars ({index['left_out']:,} with errors left out): "
        f"{root.join(f'webdataset/{view}')}"
    )
    return index


def exported(root: Root, view: str) -> dict[str, Any] | None:
    """The index of a view that was exported, or None. Raises `UserError` for a file that is no index."""
    path = f"webdataset/{view}/index.json"
    try:
        index = json.loads(root.read_bytes(path))
        if not isinstance(index["versions"], dict):
            raise TypeError("its versions are no object")
        for tar in index["tars"]:
            str(tar["name"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root.join(path)} is no index of wavemill's ({error!r}). Remove it, or name another view."
        ) from error
    return index


def is_whole(root: Root, view: str, index: dict[str, Any]) -> bool:
    """Whether all tars that a view's index names are there."""
    return {tar["name"] for tar in index["tars"]} <= set(root.list(f"webdataset/{view}"))


def snapshot_versions(corpus: Snapshot, streams: Mapping[str, Snapshot]) -> dict[str, int]:
    """The versions that a view of these snapshots is exported from, as its index names them."""
    return {CORPUS: corpus.version, **{name: streams[name].version for name in sorted(streams)}}


def _names(sources: Sequence[str | SourceArgument]) -> list[str]:
    return [source if isinstance(source, str) else source.argument for source in sources]


def _listed(counts: Mapping[str, int]) -> str:
    return plain(", ".join(f"{count:,} {name}" for name, count in counts.items()))
