"""Models of units of a root, with their story: fitted on a sample of a stream."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..pipelines.streams import source_of_table, unit_model_file
from ..storage.codes import open_stream, read_codes
from ..storage.root import Root
from ..storage.table import Snapshot
from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import fingerprint_hash
from ..tokenizers.unit_bpe import UnitModel, fit_bpe, library_version, require_one_codebook


def fit_units(
    root: Root, stream: str, *, name: str, size: int, budget_units: int, seed: int, replace: bool = False
) -> dict[str, Any]:
    """Fit byte pairs on some `budget_units` units of a stream and write `codebooks/<name>.json`; its story.

    The sample are whole segments, chosen by their ids and the seed alone. Raises `UserError` for a stream of several
    codebooks or without units, a budget that takes none of them, a size that leaves no room for pairs, and a name that
    is taken.
    """
    library = library_version()
    relative = unit_model_file(name)
    if root.exists(relative) and not replace:
        raise UserError(
            f"There is a model of units {name!r} in {root} already. Give the new one another --name, or --replace the "
            "old one (streams made with it will refuse the new one)."
        )
    snapshot = open_stream(root, stream)
    source = source_of_table(stream, snapshot)
    require_one_codebook(source)
    num_units = source.spec.codebook_size
    there = sum(sum(num or 0 for num in _counts(root, snapshot, shard)) for shard in snapshot.files)
    if not there:
        raise UserError(f"Stream {stream!r} has no units to fit on. Finish it with `wavemill tokenize`, then fit.")
    root.require_writable()
    sample = _Sample(root, snapshot, seed, share=min(1.0, budget_units / there), most=2 * budget_units)
    merges = fit_bpe(sample, num_units=num_units, size=size)
    if not sample.units:
        raise UserError(
            f"None of the segments of stream {stream!r} that the seed chooses fits a --budget of {4 * budget_units:,} "
            f"bytes, four a unit. Give more: {4 * there:,} takes all {there:,} units."
        )
    story = {
        "model": name,
        "stream": stream,
        "version": snapshot.version,
        "source": fingerprint_hash(source.fingerprint),
        "num_units": num_units,
        "size": UnitModel(num_units, merges).size,
        "size_asked_for": size,
        "segments": sample.segments,
        "units": sample.units,
        "budget_units": budget_units,
        "seed": seed,
        "library": library,
    }
    root.write_bytes(relative, UnitModel(num_units, merges, story).to_bytes())
    return story


def _counts(root: Root, snapshot: Snapshot, shard: int) -> list[int | None]:
    return read_codes(root, snapshot, shard, num_codebooks=0).num_frames


class _Sample:
    """Units of the segments whose hash falls into a share, a shard at a time, `most` in all; counts them."""

    def __init__(self, root: Root, snapshot: Snapshot, seed: int, *, share: float, most: int) -> None:
        self.segments = self.units = 0
        self._root = root
        self._snapshot = snapshot
        self._seed = seed
        self._share = share
        self._most = most

    def __iter__(self) -> Iterator[NDArray[np.integer]]:
        for shard in self._snapshot.files:
            codes = read_codes(self._root, self._snapshot, shard)
            for place, segment in enumerate(codes.ids):
                codes_KT = codes.codes(place) if self._chooses(segment) else None
                if codes_KT is None or self.units + codes_KT.shape[1] > self._most:
                    continue
                self.segments += 1
                self.units += codes_KT.shape[1]
                yield codes_KT[0]

    def _chooses(self, segment: str) -> bool:
        digest = hashlib.blake2b(f"{self._seed}/{segment}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self._share * 2**64
