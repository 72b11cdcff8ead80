"""Codebooks of a root, with their story: fitted on a sample of the corpus, or brought from elsewhere."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from ..pipelines.centroids import read_centroids
from ..pipelines.named import require_named
from ..pipelines.sample import sample_frames
from ..pipelines.streams import CODEBOOKS
from ..pipelines.tokenize import Work
from ..storage.codes import open_corpus
from ..storage.root import Root
from ..storage.schema import require_stream_name
from ..tokenizers.codebook import Codebook
from ..tokenizers.fit import MIN_FRAMES_PER_CENTROID, faiss_version, fit_residual
from ..tokenizers.numerics import use_exact_math, use_one_thread
from ..tokenizers.registry import describe_features, load_features
from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import TokenizerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How a codebook is fitted; None takes the tokenizer's own default."""

    name: str | None = None
    size: int | None = None
    num_codebooks: int | None = None
    budget_bytes: int = 64 * 1024 * 1024
    seed: int = 0
    leave_out_speakers: frozenset[str] = frozenset()
    replace: bool = False
    device: str = "cpu"
    source_roots: tuple[tuple[str, str], ...] = ()


def fit_codebook(
    root: Root,
    config: TokenizerConfig,
    options: FitOptions,
    *,
    on_segment: Callable[[float, bool], None] = lambda duration_s, failed: None,
    on_stage: Callable[[int], None] = lambda stage: None,
) -> dict[str, Any]:
    """Sample, fit, write `codebooks/<name>.safetensors`; the header it got. Raises `UserError` before it samples."""
    version = faiss_version()
    described = describe_features(config)
    name = options.name or config.tokenizer
    require_stream_name(name)
    corpus = open_corpus(root)
    require_named(root, corpus, "source", dict(options.source_roots), flag="--source")
    require_named(root, corpus, "speaker", options.leave_out_speakers, flag="--leave-out-speaker")
    relative = _place_for(root, name, replace=options.replace)
    size = options.size or described.spec.codebook_size
    num_codebooks = options.num_codebooks or described.spec.num_codebooks
    root.require_writable()
    use_one_thread()
    use_exact_math()
    features = load_features(config, device=options.device)
    started = time.monotonic()
    work = Work(
        root_uri=root.uri,
        corpus=corpus,
        streams=(),
        device=options.device,
        source_roots=dict(options.source_roots),
        decode_threads=2,
        decode_ahead_bytes=256 * 1024 * 1024,
    )
    sample = sample_frames(
        root,
        corpus,
        features,
        work,
        budget_bytes=options.budget_bytes,
        seed=options.seed,
        leave_out=options.leave_out_speakers,
        on_segment=on_segment,
    )
    sampled_s = time.monotonic() - started
    centroids_QCD, errors = fit_residual(
        sample.frames_ND, num_codebooks=num_codebooks, size=size, seed=options.seed, on_stage=on_stage
    )
    variance = float(((sample.frames_ND - sample.frames_ND.mean(axis=0)) ** 2).sum(axis=1).mean())
    header = {
        "tokenizer": config.tokenizer,
        **features.fingerprint,
        "num_codebooks": num_codebooks,
        "size": size,
        "dim": features.dim,
        "corpus_version": corpus.version,
        "frames": len(sample.frames_ND),
        "frames_per_centroid": round(len(sample.frames_ND) / size, 1),
        "segments": sample.num_segments,
        "speakers": sample.num_speakers,
        "speakers_left_out": sorted(options.leave_out_speakers),
        "seed": options.seed,
        "budget_bytes": options.budget_bytes,
        "mean_square": variance,  # of the frames about their mean
        "mean_square_error": errors,  # left after each codebook
        "versions": {"faiss": version, "torch": torch.__version__, "pyarrow": pa.__version__},
    }
    root.write_bytes(relative, Codebook(centroids_QCD, header).to_bytes())
    return {
        "codebook": name,
        **header,
        "enough_frames": len(sample.frames_ND) >= MIN_FRAMES_PER_CENTROID * size,
        "sample_s": round(sampled_s, 2),
        "fit_s": round(time.monotonic() - started - sampled_s, 2),
    }


def import_codebook(
    root: Root, path: str, config: TokenizerConfig, *, name: str | None = None, replace: bool = False
) -> dict[str, Any]:
    """Write the centroids of a `.npy` file as a codebook of the root; the header it got.

    They belong to the features that `config` names, which only the person can know. Raises `UserError` for centroids
    that cannot be theirs.
    """
    described = describe_features(config)
    name = name or config.tokenizer
    require_stream_name(name)
    open_corpus(root)
    relative = _place_for(root, name, replace=replace)
    centroids_QCD, sha256 = read_centroids(path, described)
    root.require_writable()
    num_codebooks, size, dim = centroids_QCD.shape
    header = {
        "tokenizer": config.tokenizer,
        **described.fingerprint,
        "num_codebooks": num_codebooks,
        "size": size,
        "dim": dim,
        "imported_from": os.path.basename(path),
        "sha256": sha256,  # of that file
        "versions": {"torch": torch.__version__},
    }
    root.write_bytes(relative, Codebook(centroids_QCD, header).to_bytes())
    return {"codebook": name, **header}


def _place_for(root: Root, name: str, *, replace: bool) -> str:
    """Where a codebook of a name goes. Raises `UserError` if there is one that must not be replaced."""
    relative = f"{CODEBOOKS}/{name}.safetensors"
    if root.exists(relative) and not replace:
        raise UserError(
            f"There is a codebook {name!r} in {root} already. Give the new one another --name, or --replace the old "
            "one (streams made with it will refuse the new one)."
        )
    return relative
