"""Disks that fill up and memory that runs out: a sentence, nothing torn, and the same command finishes it later."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from conftest import STREAMS
from killing import committed, finish, require_whole, require_whole_at_every_version, table_content
from places import EAGER, SHARD_HOURS, Small, small_on_disk
from tally import tally
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.batching import Lane
from wavemill.storage.codes import CORPUS
from wavemill.storage.root import Root
from zygote import Driver, zygote

SIZE_MB = 16
LEFT_KB = (0, 4, 8, 16, 24, 32, 48, 64)  # of a disk that is full at another step each


@pytest.fixture(scope="module")
def small(samples: Path, fitted_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_on_disk(samples, fitted_root, tmp_path_factory.mktemp("small"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount, which is not here")
    if mounted.returncode != 0:
        pytest.skip(f"needs to mount a tmpfs, which this user may not: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, left_kb: int) -> Path:
    """A file that leaves so much of a disk."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(free.f_bavail * free.f_frsize - left_kb * 1024))
    return filler


def tokenizing(root: Path, **env: str) -> Driver:
    options = ("--engine", "inline", "--max-error-share", "1", "--json")
    return zygote().start("tokenize", root, *options, env=env, **EAGER)


@pytest.mark.parametrize("left_kb", [pytest.param(kb, marks=() if kb == 16 else pytest.mark.slow) for kb in LEFT_KB])
def test_a_run_on_a_disk_that_fills_up_says_so_tears_nothing_and_goes_on_when_there_is_space(
    left_kb: int, disk: Path, small: Small
) -> None:
    root = disk / "root"
    shutil.copytree(small.prepared, root)
    filler = fill(disk, left_kb=left_kb)
    status, _, said = finish(tokenizing(root))
    assert status in (1, 2), said
    assert "No space left on device" in said
    assert "Traceback" not in said
    require_whole_at_every_version(Root(root))
    filler.unlink()
    status, _, said = finish(tokenizing(root))
    assert status == 0, said
    assert committed(root) == small.streams
    require_whole(Root(root))
    require_whole_at_every_version(Root(root))
    tally("space", runs=1)


@pytest.mark.slow
@pytest.mark.parametrize("left_kb", LEFT_KB)
def test_a_build_on_a_disk_that_fills_up_says_so_and_goes_on_when_there_is_space(
    left_kb: int, disk: Path, small: Small
) -> None:
    root = disk / "root"
    command = ("corpus", "build", f"speech={small.sources}", "--to", root, "--shard-hours", str(SHARD_HOURS))
    filler = fill(disk, left_kb=left_kb)
    status, _, said = finish(zygote().start(*command, **EAGER))
    if status != 0:
        assert status in (1, 2), said
        assert "No space left on device" in said
        assert "Traceback" not in said
        require_whole_at_every_version(Root(root))
    filler.unlink()
    status, _, said = finish(zygote().start(*command, **EAGER))
    assert status == 0, said
    assert table_content(Root(root), CORPUS) == small.corpus
    tally("space", runs=1)


@pytest.mark.slow
def test_a_run_without_space_for_temporary_files_completes_or_says_so(disk: Path, small: Small) -> None:
    root = small.root()
    fill(disk, left_kb=0)
    status, _, said = finish(tokenizing(Path(root.uri), TMPDIR=str(disk)))
    assert status == 0, said  # a run needs none
    assert committed(root.uri) == small.streams
    tally("space", runs=1)


def test_a_device_out_of_memory_halves_the_batches_of_a_run_and_gives_the_same_codes(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_root(fitted_root)
    tried: list[int] = []
    whole = Lane._encode_batch

    def small_device(lane: Lane, waveforms: list[Tensor], rung: int, size: int) -> list[Tensor] | None:
        def encode(tokenizer: object, waveform_N: Tensor) -> Tensor:
            if size > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return of_class(tokenizer, waveform_N)

        tried.append(size)
        of_class = type(lane.tokenizer).encode
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(lane.tokenizer), "encode", encode)
            return whole(lane, waveforms, rung, size)

    monkeypatch.setattr(Lane, "_encode_batch", small_device)
    tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions(batch_seconds=100.0))
    assert max(tried) > 2
    assert committed(root) == committed(finished_root)
    tally("memory", runs=1)
