"""The job that samples frames to fit codebooks on: every chosen shard through the workers, each exactly once.

What is sampled lies below tmp/ in the root, in a folder named by all that decides it, until the fit has ended: a run
that was killed is taken up there by the same command.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress

from ..pipelines.sample import Layers, SampleReport, SampleWork
from ..pipelines.sample_plan import SamplePlan
from ..pipelines.sampled import Sampled, SampleGone, sampled_before
from ..pipelines.streams import full_fingerprint, without_revision
from ..pipelines.tokenize import ShardTask, Work
from ..storage.failpoints import failpoint
from ..storage.root import Root
from ..storage.schema import FORMAT_VERSION
from ..storage.vacuum import SAMPLES
from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import Description, TokenizerConfig
from .engine import Engine
from .tokenize import require_fingerprints

_VERSION = f"1/{FORMAT_VERSION}"  # of the files, and of the choice of frames


@contextmanager
def sampled(
    work: Work,
    config: TokenizerConfig,
    described: Mapping[int | None, Description],
    plan: SamplePlan,
    engine: Callable[[], Engine],
    *,
    on_start: Callable[[int], None],
    on_report: Callable[[SampleReport], None],
    on_note: Callable[[str], None],
) -> Iterator[Sampled]:
    """The frames of `plan` at each of the layers that are described, made where they are not there yet.

    They are removed when the context is left, but not on what running again may mend: lost workers, an interrupt.
    """
    root, layers = Root(work.root_uri), tuple(described)
    folder = f"{SAMPLES}{_key(work, described, plan)}"
    done = sampled_before(root, folder) & set(plan.shards)
    tasks = [ShardTask(shard=shard, streams=()) for shard in plan.shards if shard not in done]
    if done:
        on_note(f"taking up {len(done):,} of {len(plan.shards):,} shards sampled before")
    on_start(sum(work.corpus.files[task.shard].num_rows for task in tasks))
    try:
        if tasks:
            sampling = SampleWork(work=work, config=config, layers=layers, plan=plan, folder=folder)
            _run(sampling, tasks, described[layers[-1]], engine, on_report)
        yield Sampled(root, folder, plan)
    except (UserError, SampleGone):
        _remove(root, folder)
        raise
    _remove(root, folder)


def _run(
    work: SampleWork,
    tasks: Sequence[ShardTask],
    described: Description,
    engine: Callable[[], Engine],
    on_report: Callable[[SampleReport], None],
) -> None:
    name = described.config.tokenizer
    expected = {name: described.fingerprint}
    with closing(engine()) as running:
        require_fingerprints({name: running.start(work, len(tasks))}, expected)
        report: SampleReport
        for report in running.run(tasks):
            failpoint("sample-received")
            require_fingerprints({name: report.fingerprint}, expected)
            on_report(report)


def _key(work: Work, described: Mapping[int | None, Description], plan: SamplePlan) -> str:
    """All that decides which frames are taken and what they are, in sixteen hexadecimal digits."""
    parts = {
        "version": _VERSION,
        "corpus": [work.corpus.table_id, work.corpus.version],
        "features": [without_revision(full_fingerprint(each.fingerprint, work.corpus)) for each in described.values()],
        "seed": plan.seed,
        "column": plan.column,
        "leave_out": sorted(plan.leave_out),
        "frames": plan.num_frames,
        "device": work.device,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _remove(root: Root, folder: str) -> None:
    root.below(folder).remove_tree()
    if root.is_local:
        with suppress(OSError):  # others may have something there
            os.rmdir(os.path.join(root.uri, "tmp"))


def highest(layers: Layers) -> int | None:
    """The layer that features are opened for, to have all of these."""
    return max((layer for layer in layers if layer is not None), default=None)
