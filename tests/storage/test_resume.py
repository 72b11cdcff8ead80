"""Training goes on where it stopped: on other numbers of ranks and workers, in the order of the undisturbed run."""

import copy
import json
import random
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.utils.data._utils.worker as torch_worker
from tally import tally
from torch.utils.data import DataLoader
from toy_stream import EVEN, PACKINGS, Build, Feed, MakeOnce, Row, make_roots, rows, segments_by_shard, undisturbed
from wavemill.storage.batches import PackedBatch, TokenBatch
from wavemill.storage.order import Mixture
from wavemill.storage.root import Root


@pytest.fixture(scope="session")
def roots(made_once: MakeOnce) -> tuple[str, str]:
    return make_roots(made_once)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"seed": 1, "epoch": 2}, ["00-02", "00-09", "00-16", "00-10", "00-13"]),
        ({"seed": 1, "epoch": 3}, ["00-16", "00-09", "00-14", "00-02", "00-05"]),
        ({"seed": 2, "epoch": 2}, ["11-03", "11-19", "11-02", "11-10", "11-06"]),
        ({"seed": 1, "epoch": 2, "window_bytes": 64 << 20}, ["00-02", "11-00", "05-04", "01-16", "06-06"]),
    ],
)
def test_epochs_begin_as_they_did_in_the_first_release(
    how: dict[str, int], expected: list[str], roots: tuple[str, str]
) -> None:
    # whoever changes this makes saved states repeat segments and skip others: their `order` must change, too
    assert [ids for ids, _ in undisturbed(Build(roots[:1], **how))][:5] == [f"first-{id_}" for id_ in expected]


@pytest.mark.parametrize("where", [None, EVEN])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("window_bytes", [1, 6_000, 64 << 20])
def test_an_undisturbed_epoch_holds_every_token_of_every_good_segment_once(
    packing: str | None, where: Any, window_bytes: int, roots: tuple[str, str]
) -> None:
    build = Build(roots[:1], packing=packing, where=where, window_bytes=window_bytes)
    expected = {}
    for segments in segments_by_shard("first", 12).values():
        for row, (id_, codes_KT) in enumerate(segments.items()):
            if codes_KT is not None and (where is None or row % 2 == 0):
                flat = np.add(codes_KT, [[0], [50]]).T.reshape(-1).tolist()
                expected[id_] = [*codes_KT[0, ::-1].tolist(), 50] if packing == "backwards" else flat
    found: dict[str, list[int]] = defaultdict(list)
    if packing is None:
        for ids, codes_KT in undisturbed(build):
            assert ids not in found
            found[ids] = [code + 50 * book for frame in zip(*codes_KT, strict=True) for book, code in enumerate(frame)]
    else:
        for ids, tokens_L, segment_L, *_ in undisturbed(build):
            for number, id_ in enumerate(ids, 1):
                found[id_] += [token for token, segment in zip(tokens_L, segment_L, strict=True) if segment == number]
        expected = {id_: tokens for id_, tokens in expected.items() if tokens}  # nothing is packed as nothing
    if packing == "best-fit":  # pieces of a segment that was cut may lie in any order
        assert {id_: sorted(tokens) for id_, tokens in found.items()} == {
            id_: sorted(tokens) for id_, tokens in expected.items()
        }
    else:
        assert found == expected


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.2, 0.8)])
def test_a_mixture_takes_from_each_dataset_in_that_ones_own_order(
    weights: tuple[float, float], roots: tuple[str, str]
) -> None:
    mixed = Build(roots, weights=weights, packing="best-fit")
    parts = [undisturbed(replace(mixed, roots=(root,), weights=(1.0,), seed=part)) for part, root in enumerate(roots)]
    mixture, expected = Mixture(weights), []
    while mixture.source(len(expected))[1] < len(parts[mixture.source(len(expected))[0]]):
        part, number = mixture.source(len(expected))
        expected.append(parts[part][number])
    assert undisturbed(mixed) == expected


@contextmanager
def worker_of(worker: int, num_workers: int) -> Iterator[None]:
    """What torch sets in the process of a DataLoader's worker."""
    before = torch_worker._worker_info
    torch_worker._worker_info = torch_worker.WorkerInfo(id=worker, num_workers=num_workers, seed=0, dataset=None)
    try:
        yield
    finally:
        torch_worker._worker_info = before


def batches_of_workers(dataset: Feed, num_workers: int) -> Iterator[TokenBatch | PackedBatch]:
    """What a DataLoader gives, its workers' copies read in turn in this process."""
    if num_workers == 0:
        yield from dataset
    workers = deque((worker, iter(copy.copy(dataset))) for worker in range(num_workers))
    while workers:
        worker, reader = workers.popleft()
        with worker_of(worker, num_workers):
            batch = next(reader, None)
        if batch is not None:
            workers.append((worker, reader))
            yield batch


def batches_of_processes(dataset: Feed, num_workers: int, context: str) -> Iterator[TokenBatch | PackedBatch]:
    yield from DataLoader(
        dataset, batch_size=None, num_workers=num_workers, multiprocessing_context=context if num_workers else None
    )


@dataclass(frozen=True)
class Stretch:
    """A run of the trainer, killed after some steps (None: it ends with the epoch)."""

    world_size: int
    num_workers: int
    num_steps: int | None


@dataclass(frozen=True)
class Case:
    build: Build
    batch_size: int
    tail: str
    context: str | None  # None: workers in this process
    stretches: tuple[Stretch, ...]


def random_case(number: int, roots: Sequence[str]) -> Case:
    """The same case for the same number, every sixth with processes."""
    choose = random.Random(number)
    context = None
    if number % 6 == 0:
        context = "fork"
        if number >= 60 and number % 60 == 0:
            context = ("spawn", "forkserver")[number // 60 % 2]
    slow_start = context in ("spawn", "forkserver")
    mixed = choose.random() < 0.3
    build = Build(
        roots=tuple(roots) if mixed else (roots[0],),
        weights=choose.choice([(0.7, 0.3), (1.0, 1.0), (0.9, 0.1)]) if mixed else (1.0,),
        packing=choose.choice(PACKINGS),
        where=EVEN if choose.random() < 0.25 else None,
        seed=choose.randrange(3),
        window_bytes=choose.choice([1, 1, 6_000, 64 << 20]),
        epoch=choose.randrange(2),
    )
    batch_size = choose.randint(1, 5)
    num_resumes = 1 if slow_start else choose.randint(1, 5)
    stretches = []
    for stretch in range(num_resumes + 1):
        world_size = choose.randint(1, 2 if slow_start else 4 if context else 8)
        num_workers = 1 if slow_start else choose.randint(0, 2 if context or world_size > 4 else 4)
        num_steps = choose.randrange(100) // (world_size * batch_size)
        stretches.append(Stretch(world_size, num_workers, num_steps if stretch < num_resumes else None))
    return Case(build, batch_size, choose.choice(["pad", "pad", "drop"]), context, tuple(stretches))


def train(case: Case, stretch: Stretch, state: dict[str, Any] | None) -> tuple[list[Row | None], dict[str, Any] | None]:
    """Rows of all ranks, step by step, and the state of the last step; as one reads it from a file."""
    ranks = []
    for rank in range(stretch.world_size):
        dataset = case.build.dataset(
            rank=rank, world_size=stretch.world_size, batch_size=case.batch_size, tail=case.tail
        )
        if state is not None:
            dataset.load_state_dict(state)
        if case.context is None:
            batches = batches_of_workers(dataset, stretch.num_workers)
        else:
            batches = batches_of_processes(dataset, stretch.num_workers, case.context)
        ranks.append(list(islice(batches, stretch.num_steps)))
    found = []
    for step in zip(*ranks, strict=True):
        assert all(batch.state == step[0].state for batch in step)
        found += [row for batch in step for row in rows(batch)]
        state = json.loads(json.dumps(step[0].state))
    return found, state


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[] if number < 20 else pytest.mark.slow) for number in range(500)]
)
def test_any_series_of_stops_gives_the_undisturbed_epoch(number: int, roots: tuple[str, str]) -> None:
    case = random_case(number, roots)
    expected = undisturbed(case.build)
    found: list[Row | None] = []
    state, width, ended = None, 0, False
    for stretch in case.stretches:
        if not ended:
            added, state = train(case, stretch, state)
            found += added
            width = case.batch_size * stretch.world_size
            ended = state is not None and state["cursors"][0][0] > case.build.epoch
    real = [row for row in found if row is not None]
    due_rows = expected if case.tail == "pad" else expected[: len(real)]
    there, due = Counter(map(json.dumps, real)), Counter(map(json.dumps, due_rows))
    tally("resume", cases=1, repeats=(there - due).total(), skips=(due - there).total())
    assert found[: len(real)] == real  # padding comes last
    assert real == expected[: len(real)]
    if case.tail == "pad":
        assert len(real) == len(expected)
        assert ended
        assert len(found) - len(real) < width
    else:
        assert len(found) == len(real)
        assert len(expected) - len(real) < width


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of roots that are read, one entry for each read."""
    read: list[str] = []
    of_ranges, of_files = Root.read_ranges, Root.read_bytes

    def read_ranges(root: Root, relative: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        read.append(relative)
        return of_ranges(root, relative, ranges)

    def read_bytes(root: Root, relative: str) -> bytes:
        read.append(relative)
        return of_files(root, relative)

    monkeypatch.setattr(Root, "read_ranges", read_ranges)
    monkeypatch.setattr(Root, "read_bytes", read_bytes)
    return read


def reads_of_first_batch(dataset: Feed, opened: list[str]) -> list[str]:
    """Files that are read for the first batch, and meanwhile for those behind it."""
    opened.clear()
    threads = set(threading.enumerate())
    batches = iter(dataset)
    next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    for thread in set(threading.enumerate()) - threads:
        thread.join()
    return list(opened)


@pytest.mark.parametrize("packing", [None, "concatenate"])
def test_going_on_late_in_an_epoch_reads_no_more_than_beginning_it(
    packing: str | None, roots: tuple[str, str], opened: list[str]
) -> None:
    build = Build(roots[:1], packing=packing, window_bytes=1)  # each shard is a window
    states = [batch.state for batch in build.dataset(batch_size=4)]
    from_the_start = reads_of_first_batch(build.dataset(batch_size=4), opened)
    for state in states[:-1]:
        dataset = build.dataset(batch_size=4)
        dataset.load_state_dict(state)
        reads = reads_of_first_batch(dataset, opened)
        # three reads a file: of the window that is left off in, of two ahead, and of shard 4, which fills none
        assert len(set(reads)) <= 5
        assert 0 < len(reads) <= min(15, len(from_the_start) + 10)


def test_going_on_reads_the_windows_that_are_left_and_no_others(roots: tuple[str, str], opened: list[str]) -> None:
    build = Build(roots[:1], window_bytes=1)
    batches = list(build.dataset(batch_size=4))
    for step, batch in enumerate(batches[:-1]):
        dataset = build.dataset(batch_size=4)
        dataset.load_state_dict(batch.state)
        opened.clear()
        left = [id_ for later in dataset for id_ in later.ids if id_]
        assert left == [id_ for later in batches[step + 1 :] for id_ in later.ids if id_]
        shards = {Path(file).name[: len("shard-000000")] for file in opened}
        # shard 4, which holds nothing but errors, may stand anywhere
        assert shards - {"shard-000004"} == {f"shard-0000{id_.split('-')[1]}" for id_ in left}
