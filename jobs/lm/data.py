"""The batches of a training run: a held-out part by segment, the training part without end, from any state on.

Axes: N rows of a shard that are taken.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import DataLoader

from ...pipelines.layouts.plan import LayoutPlan
from ...pipelines.layouts.registry import parse_layout
from ...storage.batches import PackedBatch
from ...storage.dataset import TokenDataset
from ...storage.layouts import GroupBy, member
from ...storage.packing import PackingMethod
from ...storage.parquet import ParquetShard
from ...storage.root import Root
from ...storage.rows import take_rows
from ...storage.schema import CORPUS_SCHEMA
from ...storage.selection import Pack, Selection, one_of
from ...tokenizers.spec import StreamSpec, UserError
from .registry import objective_of
from .settings import Record, Split, TrainSettings

_KEYS = 4_096  # of so many ids the border of the held-out part is found
_SHARE = 10  # of which it has a tenth
_STRETCHES = 64  # of the names of pairs, at most: of each some are held out


def new_record(settings: TrainSettings) -> Record:
    """What a run over the newest snapshot (or the pinned one) begins with. Raises `UserError`."""
    every = _dataset(settings, pc.field("id").is_valid())
    plan = cast(LayoutPlan, every.selection.plan)
    objective = settings.objective or objective_of(parse_layout(settings.layout), plan)
    return Record(
        settings=replace(settings, objective=objective),
        objective=objective,
        split=_split(every.selection),
        versions=every.versions,
        specs=_specs_read(every.selection),
    )


def training_part(record: Record, *, rank: int = 0, world_size: int = 1) -> TokenDataset:
    """All but the held-out rows, each rank's share of the batches. Raises `UserError`."""
    settings = record.settings
    if settings.batch_size % world_size:
        raise UserError(
            f"--batch-size {settings.batch_size} cannot be shared by {world_size} workers: it counts the sequences of "
            "all of them. Take a multiple."
        )
    return _dataset(
        settings,
        record.split.learnt,
        record.versions,
        batch_size=settings.batch_size // world_size,
        rank=rank,
        world_size=world_size,
    )


def held_out_batches(record: Record) -> list[PackedBatch]:
    """Batches of the held-out part, the same each time. Raises `UserError`."""
    settings = record.settings
    held_out = _dataset(
        settings,
        record.split.held_out,
        record.versions,
        shuffle=False,
        batch_size=settings.batch_size,
        rank=0,
        world_size=1,
    )
    return [cast(PackedBatch, batch) for batch in islice(held_out, settings.held_out_batches)]


def endless(dataset: TokenDataset, num_workers: int = 0) -> Iterator[PackedBatch]:
    """Batches, epoch after epoch, from where the dataset stands."""
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, persistent_workers=num_workers > 0)
    while True:
        yield from cast(Iterator[PackedBatch], iter(loader))
        dataset.set_epoch(dataset.epoch + 1)


def one_epoch(record: Record, *, max_steps: int) -> Iterator[PackedBatch]:
    """The training part once, until it has given so many steps of sequences."""
    part, num_steps = training_part(record), 0
    for batch in part:
        yield cast(PackedBatch, batch)
        num_steps += cast(PackedBatch, batch).tokens.shape[0] * record.settings.length
        if num_steps >= max_steps:
            return


def _dataset(
    settings: TrainSettings, where: Any, versions: Mapping[str, int] | None = None, **more: Any
) -> TokenDataset:
    """Some rows of the dataset as packed sequences of the layout."""
    layout = parse_layout(settings.layout)
    pack = Pack(layout, settings.length, one_of(PackingMethod, settings.packing, "--packing"))
    pin = settings.pin if versions is None else None
    return TokenDataset(settings.root, pack=pack, where=where, seed=settings.seed, versions=versions, pin=pin, **more)


def _split(selection: Selection) -> Split:
    """A tenth of the ids, or of the parents or pairs that rows are grouped by: whole groups.

    Ids and parents are hashes: the lowest are any, and of some the border of all can be told. The names of pairs are
    the user's, and often say where a pair is from: of each stretch of all names in their order some are held out.
    Raises `UserError` if there are not two.
    """
    assert selection.corpus is not None
    column = "id" if selection.grouping is None else selection.grouping.by.value
    is_named = selection.grouping is not None and selection.grouping.by is GroupBy.PAIR
    root, keys = Root(selection.root_uri), set[str]()
    for shard in selection.shards:
        taken = take_rows(selection, root, shard)
        files, corpus = selection.corpus.files, selection.corpus
        file = ParquetShard(root, corpus.path(shard), files[shard].size_bytes, schema=CORPUS_SCHEMA)
        names = file.read([column])[column].to_numpy()
        frames_N = np.sum([frames[taken.members[0]] for frames in taken.frames.values()], axis=0)
        keys.update(names[taken.members[0]][frames_N > 0].tolist())
        if len(keys) >= _KEYS and not is_named:
            break
    if len(keys) < 2:
        raise UserError(
            f"There is {len(keys)} segment to learn from: one is held out, and nothing would be left. Tokenize more "
            "recordings."
        )
    return split_of(keys, column=column, is_named=is_named)


def split_of(keys: Collection[str], *, column: str, is_named: bool) -> Split:
    """A tenth of the keys of a column: the lowest, or where they are names some of each stretch of them."""
    names, num = sorted(keys), max(1, len(keys) // _SHARE)
    if not is_named:
        return Split(column=column, spans=[("", names[num - 1])])
    stretches = min(_STRETCHES, num)
    shares = [(index + 1) * num // stretches - index * num // stretches for index in range(stretches)]
    begins = [index * len(names) // stretches for index in range(stretches)]
    spans = [(names[begin], names[begin + share - 1]) for begin, share in zip(begins, shares, strict=True)]
    return Split(column=column, spans=spans)


def _specs_read(selection: Selection) -> dict[str, StreamSpec]:
    """The streams as they are read, by the names that layouts know them by."""
    specs = {name: replace(spec, num_codebooks=selection.num_codebooks[name]) for name, spec in selection.specs.items()}
    if selection.grouping is None:
        return specs
    members = range(selection.grouping.num_members)
    return {member(name, index): spec for name, spec in specs.items() for index in members}
