"""Codebooks of a root, with their story: fitted on a sample of the corpus."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ..pipelines.named import require_named
from ..pipelines.sample import SampleReport
from ..pipelines.sample_plan import SamplePlan, plan_sample
from ..pipelines.sampled import Sampled, SampleGone
from ..pipelines.tokenize import Work
from ..storage.codes import open_corpus
from ..storage.failpoints import failpoint
from ..storage.root import Root
from ..storage.schema import require_stream_name
from ..tokenizers.codebook import Codebook
from ..tokenizers.fit import MIN_FRAMES_PER_CENTROID, FitPlan, Fitted, faiss_version, fit, require_backend
from ..tokenizers.numerics import use_exact_math, use_one_thread
from ..tokenizers.registry import describe_features
from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import Description, TokenizerConfig
from .codebook_files import place_for
from .engine import Engine, InlineEngine
from .fit_facts import distances, mean_square, phones
from .fit_sample import highest, sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How codebooks are fitted; None takes the tokenizer's own default."""

    name: str | None = None
    size: int | None = None
    num_codebooks: int | None = None  # of all groups
    groups: int = 1
    spherical: bool = False
    refine: bool = False
    backend: str = "auto"
    budget_bytes: int = 64 * 1024 * 1024  # of the frames of one layer
    memory_bytes: int = 1024**3  # of frames held in memory; more are spilled to a file
    stratify: str | None = None
    seed: int = 0
    leave_out_speakers: frozenset[str] = frozenset()
    replace: bool = False
    device: str = "cpu"
    source_roots: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One codebook of a fit."""

    name: str
    relative: str
    layer: int | None
    plan: FitPlan


def fit_codebook(root: Root, config: TokenizerConfig, options: FitOptions, **how: Any) -> dict[str, Any]:
    """`fit_codebooks` of one layer and one size."""
    [header] = fit_codebooks(root, config, options, **how)
    return header


def fit_codebooks(
    root: Root,
    config: TokenizerConfig,
    options: FitOptions,
    engine: Callable[[], Engine] = InlineEngine,
    *,
    layers: Sequence[int] = (),
    sizes: Sequence[int] = (),
    on_start: Callable[[int], None] = lambda segments: None,
    on_report: Callable[[SampleReport], None] = lambda report: None,
    on_stage: Callable[[str, int], None] = lambda name, stage: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """Sample once, fit each size at each layer, write `codebooks/<name>.safetensors`; the headers they got.

    Several layers or sizes add `-l<layer>` and `-k<size>` to the name. Raises `UserError` before anything is sampled
    for all that can be known before; nothing is written unless all is fitted.
    """
    started = time.monotonic()
    require_backend(options.backend)
    _require_once(layers, "--layers")
    _require_once(sizes, "--sizes")
    configs = [replace(config, layer=layer) for layer in sorted(layers)] if layers else [config]
    each = [describe_features(one) for one in configs]
    described = {_layer_of(one): one for one in each}
    corpus = open_corpus(root)
    require_named(root, corpus, "source", dict(options.source_roots), flag="--source")
    require_named(root, corpus, "speaker", options.leave_out_speakers, flag="--leave-out-speaker")
    wanted = _wanted(root, config, described, options, sizes)
    spec, dim = each[0].spec, each[0].dim or 0
    plan = plan_sample(
        root,
        corpus,
        spec,
        budget_frames=max(1, options.budget_bytes // (4 * dim)),
        seed=options.seed,
        column=options.stratify,
        leave_out=options.leave_out_speakers,
    )
    _require_frames(plan, max(one.plan.size for one in wanted), dim, options)
    root.require_writable()
    use_one_thread()
    use_exact_math()
    work = Work(
        root_uri=root.uri,
        corpus=corpus,
        streams=(),
        device=options.device,
        source_roots=dict(options.source_roots),
        decode_threads=2,
        decode_ahead_bytes=256 * 1024 * 1024,
    )
    opened = replace(config, layer=highest(tuple(described)))
    told = {"on_start": on_start, "on_report": on_report, "on_note": on_note}
    sampled_s, num_frames, codebooks = 0.0, 0, []
    for last in (False, True):
        try:
            with sampled(work, opened, described, plan, engine, **told) as sample:
                sampled_s, num_frames = time.monotonic() - started, sample.num_frames
                fitted = _fit_all(sample, wanted, described, options, on_stage)
                story = {"corpus_version": corpus.version, **_story_of_sample(sample, plan, options)}
                codebooks = _codebooks(wanted, fitted, described, dim, story)
                failpoint("before-codebooks")
                for one, codebook in zip(wanted, codebooks, strict=True):
                    root.write_bytes(one.relative, codebook.to_bytes())
            break
        except SampleGone:
            if last:
                raise
            on_note("another fit of the same sample has ended and removed it: sampling once more")
    seconds = {"sample_s": round(sampled_s, 2), "fit_s": round(time.monotonic() - started - sampled_s, 2)}
    return [
        {
            "codebook": one.name,
            **codebook.header,
            "enough_frames": num_frames >= MIN_FRAMES_PER_CENTROID * one.plan.size,
            **seconds,
        }
        for one, codebook in zip(wanted, codebooks, strict=True)
    ]


def _codebooks(
    wanted: Sequence[_Wanted],
    fitted: Sequence[tuple[torch.Tensor, dict[str, Any]]],
    described: dict[int | None, Description],
    dim: int,
    story: dict[str, Any],
) -> list[Codebook]:
    """The codebooks with their headers."""
    fitted_with = [
        {"codebook": one.name, "layer": one.layer, "size": one.plan.size, **_errors(facts)}
        for one, (_, facts) in zip(wanted, fitted, strict=True)
    ]
    return [
        Codebook(
            centroids_KCE,
            {
                "tokenizer": described[one.layer].config.tokenizer,
                **described[one.layer].fingerprint,
                **_shape(one.plan, dim, story["frames"]),
                **story,
                **facts,
                "fitted_with": fitted_with,
            },
        )
        for one, (centroids_KCE, facts) in zip(wanted, fitted, strict=True)
    ]


def _fit_all(
    sample: Sampled,
    wanted: Sequence[_Wanted],
    described: dict[int | None, Description],
    options: FitOptions,
    on_stage: Callable[[str, int], None],
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Centroids and figures of each codebook; the frames of one layer at a time are in memory or in a file."""
    found: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {}
    for layer, about in described.items():
        with tempfile.TemporaryDirectory(prefix="wavemill-fit-") as scratch:
            frames_ND = sample.frames(layer, about.dim or 0, memory_bytes=options.memory_bytes, scratch=Path(scratch))
            for one in wanted:
                if one.layer == layer:
                    fitted = fit(frames_ND, one.plan, on_progress=lambda done, _, name=one.name: on_stage(name, done))
                    found[one.name] = fitted.centroids_KCE, _facts(sample, frames_ND, fitted, one.plan)
            del frames_ND
    return [found[one.name] for one in wanted]


def _facts(sample: Sampled, frames_ND: NDArray[np.float32], fitted: Fitted, plan: FitPlan) -> dict[str, Any]:
    codebook = Codebook(fitted.centroids_KCE, _kind(plan))
    agreed = phones(sample, frames_ND, codebook, device=plan.device)
    return {
        "backend": fitted.backend,
        "mean_square": mean_square(frames_ND, spherical=plan.spherical),  # of the frames about their mean
        "mean_square_error": fitted.errors,  # left after each codebook, of its group
        "curves": fitted.curves,  # mean squared distance by iteration, of each codebook
        "cluster_sizes": fitted.cluster_sizes,  # frames of each centroid, of each codebook
        **({"refinements": _refinements(fitted)} if fitted.refinements else {}),
        "distances": distances(frames_ND, codebook, device=plan.device),
        **({"phones": agreed} if agreed else {}),
        "versions": {
            **({"faiss": faiss_version()} if fitted.backend == "faiss" else {}),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
        },
    }


def _refinements(fitted: Fitted) -> list[dict[str, Any]]:
    """The error before and after, of each group, and whether what came after is kept."""
    return [{"before": each.before, "after": each.after, "kept": each.kept} for each in fitted.refinements]


def _story_of_sample(sample: Sampled, plan: SamplePlan, options: FitOptions) -> dict[str, Any]:
    story: dict[str, Any] = {
        "frames": sample.num_frames,
        "segments": sample.num_segments,
        "errors": sample.num_errors,
        "shards": len(plan.shards),
        "speakers": sample.num_speakers,
        "speakers_left_out": sorted(options.leave_out_speakers),
        "seed": options.seed,
        "budget_bytes": options.budget_bytes,
    }
    if plan.column is not None:
        story["stratify"] = {"column": plan.column, "frames": sample.frames_by_value}
    return story


def _kind(plan: FitPlan) -> dict[str, Any]:
    """What decides codes beside the numbers, said where it is not the plain thing."""
    return {
        **({"groups": plan.groups} if plan.groups > 1 else {}),
        **({"spherical": True} if plan.spherical else {}),
    }


def _shape(plan: FitPlan, dim: int, num_frames: int) -> dict[str, Any]:
    return {
        "num_codebooks": plan.groups * plan.num_stages,
        "size": plan.size,
        "dim": dim,
        **_kind(plan),
        **({"refine": True} if plan.refine else {}),
        "frames_per_centroid": round(num_frames / plan.size, 1),
    }


def _errors(facts: dict[str, Any]) -> dict[str, Any]:
    agreed = facts.get("phones")
    return {
        "mean_square": facts["mean_square"],
        "mean_square_error": facts["mean_square_error"],
        **({"pnmi": agreed["pnmi"], "phone_purity": agreed["phone_purity"]} if agreed else {}),
    }


def _wanted(
    root: Root,
    config: TokenizerConfig,
    described: dict[int | None, Description],
    options: FitOptions,
    sizes: Sequence[int],
) -> list[_Wanted]:
    """The codebooks that are asked for. Raises `UserError` for those that cannot be, or that are there."""
    about = next(iter(described.values()))
    spec, groups = about.spec, options.groups
    if (about.dim or 0) % groups:
        raise UserError(
            f"--groups {groups}: the {about.dim} dimensions of {config.tokenizer} cannot be cut into {groups} equal "
            "parts. Name a number that divides them."
        )
    usual = spec.num_codebooks if spec.num_codebooks % groups == 0 else groups
    num_codebooks = options.num_codebooks or usual
    if num_codebooks % groups:
        raise UserError(
            f"--num-codebooks {num_codebooks}: {groups} groups have as many codebooks each; name a multiple of "
            f"{groups}."
        )
    if options.spherical and (num_codebooks > 1 or spec.decode_sample_rate):
        why = "are decoded to sound" if spec.decode_sample_rate else f"would have {num_codebooks} codebooks"
        raise UserError(
            "--spherical is for one codebook of directions: the lengths of frames are lost, and tokens of "
            f"{config.tokenizer} {why}. Leave it out."
        )
    base = options.name or config.tokenizer
    every = sorted(sizes) or [options.size or spec.codebook_size]
    found = []
    for layer in described:
        for size in every:
            name = f"{base}{f'-l{layer}' * (len(described) > 1)}{f'-k{size}' * (len(every) > 1)}"
            require_stream_name(name)
            plan = FitPlan(
                size=size,
                num_stages=num_codebooks // groups,
                groups=groups,
                seed=options.seed,
                spherical=options.spherical,
                refine=options.refine,
                backend=options.backend,
                device=options.device,
            )
            found.append(_Wanted(name, place_for(root, name, replace=options.replace), layer, plan))
    return found


def _layer_of(described: Description) -> int | None:
    layer = described.fingerprint.get("layer")
    return None if layer is None else int(layer)


def _require_once(values: Sequence[int], flag: str) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise UserError(f"{flag} names {twice[0]} twice; name each once.")


def _require_frames(plan: SamplePlan, size: int, dim: int, options: FitOptions) -> None:
    """Raise `UserError` if there will be fewer frames than centroids, which can be known before they are computed."""
    there = sum(stratum.num_frames for stratum in plan.strata.values())
    if plan.num_frames >= size:
        return
    if there < size:
        raise UserError(
            f"There are {there:,} frames to fit {size:,} centroids on; there must be at least as many frames as "
            "centroids. Give more audio, a larger --budget, or a smaller --size."
        )
    raise UserError(
        f"A --budget of {options.budget_bytes:,} bytes holds {plan.num_frames:,} frames of {dim} dimensions, too few "
        f"to fit {size:,} centroids on. Give at least {4 * dim * size:,} bytes, better {MIN_FRAMES_PER_CENTROID} times "
        "that, or a smaller --size."
    )
