"""All of a recipe, in order: corpus, codebooks, tokens, views. What is done already is kept, so running is resuming."""

import glob
import os
from typing import Any

from ..pipelines.decoder import DecoderSettings
from ..pipelines.tokenize import CODEBOOKS, StreamConfig
from ..storage.codes import open_corpus, open_stream
from ..storage.root import Root
from ..storage.table import Snapshot, read_snapshot
from ..tokenizers.codebook import Codebook as FittedCodebook
from ..tokenizers.fit import faiss_version
from ..tokenizers.registry import describe
from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import TokenizerConfig
from .arguments import parse_bytes, require_device
from .codebook import FitOptions
from .console import plain, say
from .corpus import SourceArgument
from .recipe import Codebook, Export, Recipe
from .stages import (
    build_figures,
    build_stage,
    export_stage,
    exported,
    fit_stage,
    is_whole,
    snapshot_versions,
    tokenize_figures,
    tokenize_stage,
)
from .tokenize import TokenizeOptions


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Do what a recipe says, telling each stage on stderr; what was done, for programs.

    Raises `UserError` before anything is written where that can be known, and `RunFailed` from the stages.
    """
    root = Root(recipe.root)
    require_ready(recipe, root)
    steps = 3 + bool(recipe.export)
    say(f"[1/{steps}] corpus: {_sources(recipe)}")
    decoder = DecoderSettings(deadline_s=recipe.corpus.deadline_s)
    built = build_stage(
        root,
        [
            SourceArgument(
                argument=source.argument(),
                kind=source.kind,
                text_column=source.text_column,
                audio_column=source.audio_column,
            )
            for source in recipe.corpus.sources
        ],
        recipe.corpus.policy(),
        shard_hours=recipe.corpus.shard_hours,
        limits=recipe.corpus.limits.limits(),
        separate=recipe.corpus.separate,
        decoder=decoder,
    )
    say(f"[2/{steps}] codebooks: {', '.join(each.codebook_name for each in recipe.codebooks) or 'none'}")
    codebooks = [_fit(root, codebook, device=recipe.tokenize.device) for codebook in recipe.codebooks]
    say(f"[3/{steps}] tokenize: {', '.join(f'{each.name}={each.tokenizer.tokenizer}' for each in _streams(recipe))}")
    asked = recipe.tokenize
    summary = tokenize_stage(
        root,
        _streams(recipe),
        TokenizeOptions(
            device=asked.device,
            max_error_share=asked.max_error_share,
            any_numerics=asked.any_numerics,
            decoder=decoder,
        ),
        engine=asked.engine,
        address=asked.address,
        workers=asked.workers,
    )
    views = []
    if recipe.export:
        say(f"[4/{steps}] export: {', '.join(export.view for export in recipe.export)}")
        views = _export(recipe, root)
    say(f"The dataset is in {root}")
    return {
        "root": root.uri,
        "corpus": build_figures(built),
        "codebooks": codebooks,
        "tokenize": tokenize_figures(summary),
        "export": views,
    }


def require_ready(recipe: Recipe, root: Root) -> None:
    """Raise `UserError` for what would stop a run later on: tokenizers, codebooks, the device, FAISS, sources."""
    require_device(recipe.tokenize.device)
    for number, source in enumerate(recipe.corpus.sources):
        there = os.path.exists(source.path) or "://" in source.path
        if not there and not (glob.has_magic(source.path) and next(glob.iglob(source.path, recursive=True), None)):
            raise UserError(f"corpus.sources[{number}]: there is no file or folder {plain(source.path)!r}.")
    separate = recipe.corpus.separate
    if separate is not None and not os.path.isfile(separate):
        raise UserError(f"corpus.separate: there is no file {plain(separate)!r}.")
    for codebook in recipe.codebooks:
        describe(TokenizerConfig(tokenizer=codebook.tokenizer))
        header = _fitted(root, codebook.codebook_name)
        if header is None:
            faiss_version()
        else:
            _require_same_fit(root, codebook, header)
    fitted = {codebook.codebook_name: codebook.tokenizer for codebook in recipe.codebooks}
    for name, stream in recipe.streams.items():
        describe(TokenizerConfig(tokenizer=stream.tokenizer))
        book = stream.codebook_name
        header = None if book in fitted else _fitted(root, book)
        if book not in fitted and header is None:
            raise UserError(
                f"streams.{name} needs the codebook {book!r}, which is neither in the recipe's codebooks "
                f"({', '.join(fitted) or 'none'}) nor in {root}. Add it to codebooks, or name another."
            )
        made_for = fitted[book] if header is None else header.get("tokenizer")
        if made_for != stream.tokenizer:
            raise UserError(
                f"streams.{name} uses tokenizer {stream.tokenizer!r}, its codebook {book!r} is one for {made_for!r}. "
                "Name a codebook of its own tokenizer."
            )


def plan(recipe: Recipe) -> list[str]:
    """What a run of the recipe would do now, in one sentence per step. Nothing is written."""
    root = Root(recipe.root)
    corpus = read_snapshot(root, "corpus")
    have = "a new folder" if corpus is None else f"{corpus.num_rows:,} segments at corpus version {corpus.version}"
    lines = [f"root: {root} ({have})"]
    lines.append(f"corpus: adds what is new in {_sources(recipe)}; {recipe.corpus.policy().words()}")
    for codebook in recipe.codebooks:
        header = _fitted(root, codebook.codebook_name)
        lines.append(
            f"codebook {codebook.codebook_name}: " + (_fit_words(codebook) if header is None else _kept(header))
        )
    for stream in _streams(recipe):
        snapshot = read_snapshot(root, stream.folder)
        done = len(snapshot.files) if snapshot else 0
        of = f"; {done:,} of {len(corpus.files):,} shards are done" if corpus else ""
        lines.append(f"stream {stream.name}: {stream.tokenizer.tokenizer} with codebook {stream.codebook_name}{of}")
    asked = recipe.tokenize
    where = f"Ray at {asked.address}" if asked.address and asked.engine == "ray" else f"engine {asked.engine}"
    lines.append(
        f"tokenize: {where}, device {asked.device}, workers {asked.workers or 'as many as there are cores'}, stops at "
        f"{asked.max_error_share:.0%} errors"
    )
    for export in recipe.export:
        there = exported(root, export.view)
        state = f"was exported from versions {_versions(there['versions'])}" if there else "is written"
        lines.append(f"export: view {export.view} of {', '.join(_export_streams(recipe, export))} {state}")
    return [plain(line) for line in lines]


def _streams(recipe: Recipe) -> list[StreamConfig]:
    return [
        StreamConfig(name=name, tokenizer=TokenizerConfig(tokenizer=stream.tokenizer), codebook=stream.codebook_name)
        for name, stream in recipe.streams.items()
    ]


def _sources(recipe: Recipe) -> str:
    return plain(", ".join(source.argument() for source in recipe.corpus.sources))


def _fitted(root: Root, name: str) -> dict[str, Any] | None:
    """The header of a codebook of the root, or None if there is none."""
    try:
        content = root.read_bytes(f"{CODEBOOKS}/{name}.safetensors")
    except FileNotFoundError:
        return None
    return FittedCodebook.from_bytes(content, name=name).header


def _require_same_fit(root: Root, codebook: Codebook, header: dict[str, Any]) -> None:
    """Raise `UserError` if a codebook that is there was fitted otherwise than the recipe says."""
    asked = {
        "tokenizer": ("tokenizer", codebook.tokenizer),
        "size": ("size", codebook.size),
        "num_codebooks": ("num_codebooks", codebook.num_codebooks),
        "budget": ("budget_bytes", parse_bytes(codebook.budget)),
        "seed": ("seed", codebook.seed),
        "leave_out_speakers": ("speakers_left_out", sorted(codebook.leave_out_speakers)),
    }
    for key, (in_header, value) in asked.items():
        if key in codebook.model_fields_set and value is not None and header.get(in_header) != value:
            raise UserError(
                f"The codebook {codebook.codebook_name!r} in {root} was fitted with {key} {header.get(in_header)}, the "
                f"recipe says {value}. It is kept: give the new one another name, or take {key} out of the recipe."
            )


def _fit(root: Root, codebook: Codebook, *, device: str) -> dict[str, Any]:
    name = codebook.codebook_name
    header = _fitted(root, name)
    if header is not None:
        say(f"Codebook {name}: {_kept(header)}.")
        return {"codebook": name, "fitted": False}
    options = FitOptions(
        name=name,
        size=codebook.size,
        num_codebooks=codebook.num_codebooks,
        budget_bytes=parse_bytes(codebook.budget),
        seed=codebook.seed,
        leave_out_speakers=frozenset(codebook.leave_out_speakers),
        device=device,
    )
    return {**fit_stage(root, TokenizerConfig(tokenizer=codebook.tokenizer), options), "fitted": True}


def _kept(header: dict[str, Any]) -> str:
    return f"there already, {header.get('num_codebooks')} x {header.get('size')}, kept"


def _fit_words(codebook: Codebook) -> str:
    size = "the tokenizer's own size" if codebook.size is None else f"{codebook.size:,} centroids"
    return f"is fitted for {codebook.tokenizer}: {size}, {codebook.budget} of frames, seed {codebook.seed}"


def _export_streams(recipe: Recipe, export: Export) -> list[str]:
    return list(recipe.streams) if export.streams is None else export.streams


def _export(recipe: Recipe, root: Root) -> list[dict[str, Any]]:
    """Write the views that are not there; `UserError`, after all others are, for one of other versions."""
    corpus = open_corpus(root)
    done: list[dict[str, Any]] = []
    stale: list[str] = []
    for number, export in enumerate(recipe.export):
        streams: dict[str, Snapshot] = {name: open_stream(root, name) for name in _export_streams(recipe, export)}
        index, versions = exported(root, export.view), snapshot_versions(corpus, streams)
        place = root.join(f"webdataset/{export.view}")
        if index is None or index["versions"] == versions:
            written = index is None or not is_whole(root, export.view, index)
            if index is None or written:
                index = export_stage(root, corpus, streams, view=export.view)
            else:
                say(f"View {export.view}: exported already from these versions, in {place}.")
            figures = {"samples": index["samples"], "tars": len(index["tars"]), "left_out": index["left_out"]}
            done.append({"view": export.view, "path": place, "written": written, **figures})
            continue
        stale.append(
            f"{place} was exported from versions {_versions(index['versions'])}; now they are {_versions(versions)}. "
            f"A view never changes under its readers: give export[{number}].view another name, or remove that folder"
        )
    if stale:
        raise UserError(f"{'; '.join(stale)}. (The corpus and the streams in {root} are complete.)")
    return done


def _versions(versions: dict[str, int]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
