"""Trainers that are stopped: torchdata's loader from its own state, and ranks that are killed and go on as three."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader
from toy_stream import Build, MakeOnce, Row, make_roots, rows, undisturbed

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")


NUM_WORKERS = [0, pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def roots(made_once: MakeOnce) -> tuple[str, str]:
    return make_roots(made_once)


def stateful_loader(build: Build, num_workers: int, state: dict[str, Any] | None = None) -> StatefulDataLoader:
    loader = StatefulDataLoader(build.dataset(batch_size=20), batch_size=None, num_workers=num_workers)
    if state is not None:
        loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


def rows_by_step(build: Build) -> list[list[Row | None]]:
    return [rows(batch) for batch in build.dataset(batch_size=20)]


@pytest.mark.parametrize("num_workers", NUM_WORKERS)
@pytest.mark.parametrize(("num_steps", "packing"), [(0, None), (1, None), (3, "concatenate"), (4, None), (7, "single")])
def test_torchdatas_loader_goes_on_with_the_next_step(
    num_steps: int, packing: str | None, num_workers: int, roots: tuple[str, str]
) -> None:
    build = Build(roots[:1], packing=packing, window_bytes=6_000)
    expected = rows_by_step(build)
    loader = stateful_loader(build, num_workers)
    assert [rows(batch) for batch in islice(loader, num_steps)] == expected[:num_steps]
    state = loader.state_dict()
    found = [rows(batch) for batch in stateful_loader(build, num_workers, state)]
    assert found == expected[num_steps:]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", NUM_WORKERS[1:])
def test_torchdatas_loader_may_be_stopped_again_and_again(num_workers: int, roots: tuple[str, str]) -> None:
    build = Build(roots, weights=(0.6, 0.4), packing="best-fit", window_bytes=1)
    expected = rows_by_step(build)
    found, state = [], None
    for num_steps in (2, 1, 1, 3, None):
        loader = stateful_loader(build, num_workers, state)
        found += [rows(batch) for batch in islice(loader, num_steps)]
        state = loader.state_dict()
    assert found == expected


@pytest.mark.parametrize("num_workers", NUM_WORKERS[1:3])
@pytest.mark.parametrize("before", [None, 3])
@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_torchdatas_loader_with_workers_that_live_on_goes_on_in_a_later_epoch(
    num_steps: int, before: int | None, num_workers: int, roots: tuple[str, str]
) -> None:
    build = Build(roots[:1], window_bytes=6_000)
    dataset = build.dataset(batch_size=20)
    loader = StatefulDataLoader(dataset, batch_size=None, num_workers=num_workers, persistent_workers=True)
    assert [rows(batch) for batch in islice(loader, before)] == rows_by_step(build)[:before]
    dataset.set_epoch(1)
    batches = iter(loader)
    found = [rows(batch) for batch in islice(batches, num_steps)]
    found += [rows(batch) for batch in stateful_loader(build, num_workers, loader.state_dict())]
    assert found == rows_by_step(replace(build, epoch=1))


@pytest.mark.parametrize("num_workers", NUM_WORKERS)
def test_torchdatas_loader_stopped_after_the_last_step_mixes_no_epochs(
    num_workers: int, roots: tuple[str, str]
) -> None:
    build = Build(roots[:1], window_bytes=6_000)
    expected = rows_by_step(build)
    loader = stateful_loader(build, num_workers)
    batches = iter(loader)
    assert [rows(next(batches)) for _ in expected] == expected
    found = [rows(batch) for batch in stateful_loader(build, num_workers, loader.state_dict())]
    assert found in ([], rows_by_step(replace(build, epoch=1)))  # the rest of this epoch, or all of the next


TRAINER = """
import json
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from wavemill.storage.dataset import TokenDataset

rendezvous, root, checkpoint, rank, world_size = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world_size))
dataset = TokenDataset(root, ["toy"], batch_size=2, seed=7, window_bytes=6_000)
embedding, trained = torch.nn.Embedding(50, 4), []
if os.path.exists(checkpoint):
    saved = torch.load(checkpoint)
    embedding.load_state_dict(saved["embedding"])
    dataset.load_state_dict(saved["state"])
    trained = saved["trained"]
model = DistributedDataParallel(embedding)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for batch in DataLoader(dataset, batch_size=None, num_workers=1):
    sys.stdin.readline()  # the test's leave to take this step
    codes_BKT = batch.codes["toy"]
    loss = (model(codes_BKT.clamp(min=0)).square().sum(-1) * (codes_BKT >= 0)).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ids_of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ids_of_ranks, batch.ids)
    trained.append(sum(ids_of_ranks, []))
    if dist.get_rank() == 0:
        saving = {"embedding": embedding.state_dict(), "state": batch.state, "trained": trained}
        torch.save(saving, checkpoint + ".new")
        os.replace(checkpoint + ".new", checkpoint)
        print(json.dumps(trained), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@contextmanager
def running(folder: Path, root: str, world_size: int) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a training run with its checkpoint in a folder; whatever is left of them is killed."""
    script, rendezvous = folder / "trainer.py", folder / f"rendezvous-{world_size}"
    script.write_text(TRAINER)
    ranks = [
        subprocess.Popen(
            [sys.executable, script, rendezvous, root, folder / "checkpoint.pt", str(rank), str(world_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        for rank in range(world_size)
    ]
    try:
        yield ranks
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its DataLoader's workers, too
            process.communicate()


def give_leave(process: subprocess.Popen[str], num_steps: int) -> None:
    assert process.stdin is not None
    process.stdin.write("\n" * num_steps)
    process.stdin.flush()


@pytest.mark.slow
def test_two_ranks_that_are_killed_go_on_as_three_with_nothing_twice_or_left_out(
    tmp_path: Path, roots: tuple[str, str]
) -> None:
    expected = [ids for ids, _ in undisturbed(Build(roots[:1], seed=7, window_bytes=6_000))]
    with running(tmp_path, roots[0], world_size=2) as ranks:
        for process in ranks:
            give_leave(process, 11)
        assert ranks[0].stdout is not None
        saved = [json.loads(ranks[0].stdout.readline()) for _ in range(11)][-1]
        give_leave(ranks[0], 1)  # it is in its twelfth step, or about to be, waiting for the other's gradients
    assert [process.returncode for process in ranks] == [-signal.SIGKILL] * 2
    assert [id_ for step in saved for id_ in step] == expected[:44]
    with running(tmp_path, roots[0], world_size=3) as ranks:
        for process in ranks:
            give_leave(process, 1_000)
        ends = [process.communicate()[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0]
    trained = json.loads(ends[0].splitlines()[-1])
    assert [len(step) for step in trained] == [4] * 11 + [6] * (len(trained) - 11)
    every = [id_ for step in trained for id_ in step]
    assert every[: len(expected)] == expected
    assert set(every[len(expected) :]) <= {""}
    assert len(every) - len(expected) < 6
