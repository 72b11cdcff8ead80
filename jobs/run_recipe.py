"""All of a recipe, in order: corpus, codebooks, tokens, views. What is done already is kept, so running is resuming."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..pipelines.centroids import read_centroids
from ..pipelines.decoder import DecoderSettings
from ..pipelines.streams import CODEBOOKS, StreamConfig, describe_stream, sources_first
from ..storage.codes import open_corpus, open_stream
from ..storage.root import Root
from ..storage.table import Snapshot, read_snapshot
from ..tokenizers.codebook import Codebook as StoredCodebook
from ..tokenizers.registry import FITTED_ON, describe, describe_features, require_tokenizer, takes_codebook
from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import Description, Mode, Output, TokenizerConfig
from .arguments import parse_bytes, require_device
from .codebook import FitOptions
from .console import plain, say
from .corpus import SourceArgument
from .recipe import Codebook, Export, Recipe
from .recipe_units import fit_stage_of_units, lacking_units, rounds
from .stages import (
    build_figures,
    build_stage,
    export_stage,
    exported,
    fit_stage,
    import_stage,
    is_whole,
    snapshot_versions,
    tokenize_figures,
    tokenize_stage,
    words_of,
)
from .tokenize import Summary, TokenizeOptions


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Do what a recipe says, telling each stage on stderr; what was done, for programs.

    Raises `UserError` before anything is written where that can be known, and `RunFailed` from the stages.
    """
    root = Root(recipe.root)
    require_ready(recipe, root)
    turns = rounds(streams_of(recipe), lacking_units(root, recipe.units))
    steps = 2 + sum(bool(streams) + bool(models) for streams, models in turns) + bool(recipe.export)
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
    asked_for = codebooks_of(recipe)
    say(f"[2/{steps}] codebooks: {', '.join(each.codebook_name for each in asked_for) or 'none'}")
    codebooks = [_make(root, codebook, recipe) for codebook in asked_for]
    made, units, step = Summary(), [], 2
    for streams, models in turns:
        if streams:
            step += 1
            say(
                f"[{step}/{steps}] tokenize: {', '.join(f'{each.name}={each.tokenizer.tokenizer}' for each in streams)}"
            )
            made = made.and_then(_tokenize(root, streams, recipe, decoder))
        if models:
            step += 1
            say(f"[{step}/{steps}] units: {', '.join(model.name for model in models)}")
            units += [fit_stage_of_units(root, model) for model in models]
    views = []
    if recipe.export:
        say(f"[{steps}/{steps}] export: {', '.join(export.view for export in recipe.export)}")
        views = _export(recipe, root)
    say(f"The dataset is in {root}")
    return {
        "root": root.uri,
        "corpus": build_figures(built),
        "codebooks": codebooks,
        "units": units,
        "tokenize": tokenize_figures(made),
        "export": views,
    }


def _tokenize(root: Root, streams: list[StreamConfig], recipe: Recipe, decoder: DecoderSettings) -> Summary:
    asked = recipe.tokenize
    options = TokenizeOptions(
        device=asked.device, max_error_share=asked.max_error_share, any_numerics=asked.any_numerics, decoder=decoder
    )
    return tokenize_stage(root, streams, options, engine=asked.engine, address=asked.address, workers=asked.workers)


def require_ready(recipe: Recipe, root: Root) -> None:
    """Raise `UserError` for what would stop a run later on: tokenizers, codebooks, the device, sources."""
    asked = recipe.tokenize
    require_device(asked.device, elsewhere=asked.engine == "ray" and asked.address is not None)
    for number, source in enumerate(recipe.corpus.sources):
        there = os.path.exists(source.path) or "://" in source.path
        if not there and not (glob.has_magic(source.path) and next(glob.iglob(source.path, recursive=True), None)):
            raise UserError(f"corpus.sources[{number}]: there is no file or folder {plain(source.path)!r}.")
    separate = recipe.corpus.separate
    if separate is not None and not os.path.isfile(separate):
        raise UserError(f"corpus.separate: there is no file {plain(separate)!r}.")
    codebooks = {codebook.codebook_name: codebook for codebook in codebooks_of(recipe)}
    for name, codebook in codebooks.items():
        with _told_of(f"The codebook {name!r}"):
            described = describe_features(_codebook_config(codebook, recipe))
        header = _header(root, name)
        if header is not None:
            _require_same_fit(root, codebook, header, described)
        elif codebook.file is not None:
            read_centroids(codebook.file, described)
    rounds(streams_of(recipe), lacking_units(root, recipe.units))
    for stream in sources_first(streams_of(recipe)):
        _require_stream_ready(recipe, root, stream, codebooks)


def _require_stream_ready(recipe: Recipe, root: Root, stream: StreamConfig, codebooks: dict[str, Codebook]) -> None:
    """Raise `UserError` for a stream whose tokenizer cannot be had, or whose codebook is missing or not its own."""
    if require_tokenizer(stream.tokenizer.tokenizer).takes != "audio":
        made_later = {name for name in codebooks if _header(root, name) is None}
        made_later |= {model.name for model in lacking_units(root, recipe.units)}
        with _told_of(f"streams.{stream.name}"):
            describe_stream(root, stream, streams_of(recipe), made_later=made_later)
        return
    book, header = stream.codebook_name, None
    if book is not None:
        header = _header(root, book)
    if header is not None:
        _require_made_for(stream, stream.tokenizer.tokenizer, str(header.get("tokenizer")))
    with _told_of(f"streams.{stream.name}"):
        described = describe(stream.tokenizer)
        if header is not None or stream.codebook_name is None:
            describe_stream(root, stream)
            return
    assert book is not None, "a tokenizer that needs a codebook names one"
    if book not in codebooks:
        raise UserError(
            f"streams.{stream.name} needs the codebook {book!r}, which is neither in the recipe's codebooks "
            f"({', '.join(codebooks) or 'none'}) nor in {root}. Add it to codebooks, or name another."
        )
    _require_made_for(stream, stream.tokenizer.tokenizer, codebooks[book].tokenizer)
    ours = described.fingerprint
    theirs = describe(_codebook_config(codebooks[book], recipe)).fingerprint
    for part in FITTED_ON:
        if ours.get(part) != theirs.get(part):
            raise UserError(
                f"streams.{stream.name} uses {part} {_short(ours.get(part))}, its codebook {book!r} is made for {part} "
                f"{_short(theirs.get(part))}. Give both the same {part}."
            )


@contextmanager
def _told_of(place: str) -> Iterator[None]:
    """Say of a mistake where in the recipe it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _require_made_for(stream: StreamConfig, tokenizer: str, made_for: str) -> None:
    if made_for != tokenizer:
        raise UserError(
            f"streams.{stream.name} uses tokenizer {tokenizer!r}, its codebook {stream.codebook_name!r} is one for "
            f"{made_for!r}. Name a codebook of its own tokenizer."
        )


def plan(recipe: Recipe) -> list[str]:
    """What a run of the recipe would do now, in one sentence per step. Nothing is written."""
    root = Root(recipe.root)
    corpus = read_snapshot(root, "corpus")
    have = "a new folder" if corpus is None else f"{corpus.num_rows:,} segments at corpus version {corpus.version}"
    lines = [f"root: {root} ({have})"]
    lines.append(f"corpus: adds what is new in {_sources(recipe)}; {recipe.corpus.policy().words()}")
    for codebook in codebooks_of(recipe):
        header = _header(root, codebook.codebook_name)
        words = _made_words(codebook, recipe) if header is None else _kept(header)
        lines.append(f"codebook {codebook.codebook_name}: {words}")
    for stream in streams_of(recipe):
        snapshot = read_snapshot(root, stream.folder)
        done = len(snapshot.files) if snapshot else 0
        of = f"; {done:,} of {len(corpus.files):,} shards are done" if corpus else ""
        book = f", with codebook {stream.codebook_name}" if stream.codebook_name else ""
        made_of = f" of {stream.of}" if stream.of else ""
        words = f"{stream.tokenizer.tokenizer}{made_of}{words_of(stream.tokenizer)}, mode {stream.tokenizer.mode}{book}"
        lines.append(f"stream {stream.name}: {words}{of}")
    lacking = lacking_units(root, recipe.units)
    for model in recipe.units:
        words = f"fitted on {model.stream}, {model.size:,} tokens" if model in lacking else "kept as it is"
        lines.append(f"units {model.name}: {words}")
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


def streams_of(recipe: Recipe) -> list[StreamConfig]:
    """The streams as jobs take them."""
    return [
        StreamConfig(
            name=name,
            tokenizer=TokenizerConfig(
                tokenizer=stream.tokenizer,
                weights=stream.weights,
                revision=stream.revision,
                local_files_only=recipe.tokenize.local_files_only,
                layer=stream.layer,
                num_codebooks=stream.num_codebooks,
                mode=Mode(stream.mode),
                output=None if stream.output is None else Output(stream.output),
                reduce=stream.reduce,
                language=stream.language,
                task=stream.task,
            ),
            codebook=stream.codebook,
            of=stream.of,
        )
        for name, stream in recipe.streams.items()
    ]


def codebooks_of(recipe: Recipe) -> list[Codebook]:
    """The codebooks that a recipe names; of one that names none, those of the streams that need theirs."""
    if "codebooks" in recipe.model_fields_set:
        return recipe.codebooks
    needed: dict[str, Codebook] = {}
    for stream in streams_of(recipe):
        config = stream.tokenizer
        if stream.codebook is None and takes_codebook(config):
            needed.setdefault(
                config.tokenizer,
                Codebook(
                    tokenizer=config.tokenizer, weights=config.weights, revision=config.revision, layer=config.layer
                ),
            )
    return list(needed.values())


def _codebook_config(codebook: Codebook, recipe: Recipe) -> TokenizerConfig:
    return TokenizerConfig(
        tokenizer=codebook.tokenizer,
        weights=codebook.weights,
        revision=codebook.revision,
        local_files_only=recipe.tokenize.local_files_only,
        layer=codebook.layer,
    )


def _sources(recipe: Recipe) -> str:
    return plain(", ".join(source.argument() for source in recipe.corpus.sources))


def _header(root: Root, name: str) -> dict[str, Any] | None:
    """The header of a codebook of the root, or None if there is none."""
    try:
        content = root.read_bytes(f"{CODEBOOKS}/{name}.safetensors")
    except FileNotFoundError:
        return None
    return StoredCodebook.from_bytes(content, name=name).header


def _require_same_fit(root: Root, codebook: Codebook, header: dict[str, Any], described: Description) -> None:
    """Raise `UserError` if a codebook that is there was made otherwise than the recipe says."""
    asked = {
        "tokenizer": ("tokenizer", codebook.tokenizer),
        "weights": ("weights", described.fingerprint.get("weights")),
        "layer": ("layer", described.fingerprint.get("layer")),
        "file": ("imported_from", codebook.file and os.path.basename(codebook.file)),
        "size": ("size", codebook.size),
        "num_codebooks": ("num_codebooks", codebook.num_codebooks),
        "groups": ("groups", codebook.groups),
        "spherical": ("spherical", codebook.spherical),
        "refine": ("refine", codebook.refine),
        "stratify": ("stratify", codebook.stratify),
        "budget": ("budget_bytes", parse_bytes(codebook.budget)),
        "seed": ("seed", codebook.seed),
        "leave_out_speakers": ("speakers_left_out", sorted(codebook.leave_out_speakers)),
    }
    for key, (in_header, value) in asked.items():
        theirs = header.get(in_header, _PLAIN.get(in_header))
        theirs = theirs["column"] if in_header == "stratify" and theirs else theirs
        if key in codebook.model_fields_set and value is not None and theirs != value:
            raise UserError(
                f"The codebook {codebook.codebook_name!r} in {root} was made with {key} {_short(theirs)}, the recipe "
                f"says {_short(value)}. It is kept: give the new one another name, or take {key} out of the recipe."
            )


_PLAIN = {"groups": 1, "spherical": False, "refine": False}  # what a header that does not say has


def _short(value: Any) -> str:
    """A value in a sentence: of a hash, its first digits."""
    return value[:16] if isinstance(value, str) and len(value) == 64 else str(value)


def _make(root: Root, codebook: Codebook, recipe: Recipe) -> dict[str, Any]:
    """Fit a codebook or take it from its file, unless it is there already."""
    name, config = codebook.codebook_name, _codebook_config(codebook, recipe)
    header = _header(root, name)
    if header is not None:
        say(f"Codebook {name}: {_kept(header)}.")
        return {"codebook": name, "fitted": False}
    if codebook.file is not None:
        return {**import_stage(root, codebook.file, config, name=name), "fitted": False}
    options = FitOptions(
        name=name,
        size=codebook.size,
        num_codebooks=codebook.num_codebooks,
        groups=codebook.groups,
        spherical=codebook.spherical,
        refine=codebook.refine,
        stratify=codebook.stratify,
        budget_bytes=parse_bytes(codebook.budget),
        seed=codebook.seed,
        leave_out_speakers=frozenset(codebook.leave_out_speakers),
        device=recipe.tokenize.device,
    )
    asked = recipe.tokenize
    [fitted] = fit_stage(root, config, options, engine=asked.engine, address=asked.address, workers=asked.workers)
    return {**fitted, "fitted": True}


def _kept(header: dict[str, Any]) -> str:
    return f"there already, {header.get('num_codebooks')} x {header.get('size')}, kept"


def _made_words(codebook: Codebook, recipe: Recipe) -> str:
    of = f"{codebook.tokenizer}{words_of(_codebook_config(codebook, recipe))}"
    if codebook.file is not None:
        return f"is taken from {codebook.file} for {of}"
    size = "the tokenizer's own size" if codebook.size is None else f"{codebook.size:,} centroids"
    return f"is fitted for {of}: {size}, {codebook.budget} of frames, seed {codebook.seed}"


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
