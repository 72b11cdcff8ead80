"""Codebooks of a root brought from elsewhere and taken elsewhere, as files."""

import os
from typing import Any

import torch

from ..pipelines.centroids import export_bytes, read_centroids
from ..pipelines.streams import CODEBOOKS, read_codebook
from ..storage.codes import open_corpus
from ..storage.root import Root
from ..storage.schema import require_stream_name
from ..tokenizers.codebook import Codebook
from ..tokenizers.registry import describe_features
from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import TokenizerConfig


def import_codebook(
    root: Root, path: str, config: TokenizerConfig, *, name: str | None = None, replace: bool = False
) -> dict[str, Any]:
    """Write the centroids of a file from elsewhere as a codebook of the root; the header it got.

    They belong to the features that `config` names, which only the person can know. Raises `UserError` for centroids
    that cannot be theirs.
    """
    described = describe_features(config)
    name = name or config.tokenizer
    require_stream_name(name)
    open_corpus(root)
    relative = place_for(root, name, replace=replace)
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


def export_codebook(root: Root, name: str, path: str) -> dict[str, Any]:
    """Write a codebook's centroids to a `.npy` file or a flat FAISS index elsewhere; what was written.

    Raises `UserError` for a codebook that there is not, and a path that cannot be written or names another kind.
    """
    codebook = read_codebook(root, name)
    content = export_bytes(codebook, path, name=name)
    folder, _, file = path.rpartition("/")
    place = Root(folder or ".")
    if place.is_local and not os.path.isdir(place.uri):
        raise UserError(f"--to {path!r}: there is no folder {folder}. Make it first.")
    place.require_writable()
    place.write_bytes(file, content)
    shape = list(codebook.centroids_QCD.shape)
    return {"codebook": name, "path": path, "shape": shape, "groups": codebook.groups, "spherical": codebook.spherical}


def place_for(root: Root, name: str, *, replace: bool) -> str:
    """Where a codebook of a name goes. Raises `UserError` if there is one that must not be replaced."""
    relative = f"{CODEBOOKS}/{name}.safetensors"
    if root.exists(relative) and not replace:
        raise UserError(
            f"There is a codebook {name!r} in {root} already. Give the new one another --name, or --replace the old "
            "one (streams made with it will refuse the new one)."
        )
    return relative
