"""kill -9 at random times of a run on Ray, driver or worker, then the same command again."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from wavemill.tokenizers.tokenizer import TokenizerConfig

sys.path.insert(0, str(Path(__file__).parent))
from conftest import LEFT_OUT, STREAMS
from killing import committed, descendants, finish, tokenize_process, wait_until_gone
from tally import tally
from test_killed_runs import kill_at
from wavemill.jobs.codebook import FitOptions, fit_codebook
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.root import Root

KILLS = 6
SLOW_SHARD = "shard-before-write=sleep:0.2"  # twice a shard: 30 shards on two workers last six seconds and more
PLACES = ["shard-written@3", "after-fence", "before-commit-acoustic"]  # the others: see test_matrix.py

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_alone")]


@pytest.fixture(scope="module")
def long_root(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples in some 30 shards, with codebooks."""
    path = tmp_path_factory.mktemp("long") / "root"
    sources = [f"speech={samples / 'manifest.jsonl'}", f"broken={samples / 'broken'}"]
    result = build_corpus(Root(path), sources, CorpusPolicy(), shard_hours=0.0028)
    assert result.num_shards >= 24
    fit_codebook(Root(path), TokenizerConfig(tokenizer="mfcc-kmeans"), FitOptions(leave_out_speakers=LEFT_OUT))
    fit_codebook(Root(path), TokenizerConfig(tokenizer="mel-rvq"), FitOptions(size=64, leave_out_speakers=LEFT_OUT))
    return path


@pytest.fixture(scope="module")
def undisturbed(long_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    path = tmp_path_factory.mktemp("undisturbed") / "root"
    shutil.copytree(long_root, path)
    tokenize(Root(path), STREAMS, InlineEngine, TokenizeOptions())
    return committed(path)


def test_runs_killed_at_random_times_end_like_an_undisturbed_run(
    long_root: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
):
    seed = int(os.environ.get("WAVEMILL_KILL_SEED", time.time_ns() % 10**6))
    print(f"\nseed {seed} (WAVEMILL_KILL_SEED={seed} repeats it)")
    generator = random.Random(seed)
    undisturbed_s = None
    for number in range(KILLS):
        root = tmp_path / "root"
        shutil.copytree(long_root, root)
        if undisturbed_s is None:
            undisturbed_s = _whole_run(root)
            assert committed(root) == undisturbed
            shutil.rmtree(root)
            shutil.copytree(long_root, root)
            print(f"an undisturbed run takes {undisturbed_s:.1f} s")
        victim = generator.choice(["driver", "driver", "worker"])
        after_s = generator.uniform(0.5, undisturbed_s)
        process = tokenize_process(root, failpoints=SLOW_SHARD)
        time.sleep(after_s)
        family = descendants(process.pid)
        workers = [pid for pid in family if b"ray::RayWorker" in _command(pid)]
        killed_s = time.monotonic()
        if victim == "worker" and workers:
            os.kill(generator.choice(workers), signal.SIGKILL)
            status, _, said = finish(process, timeout=300)
            assert status == 0, said
        else:
            process.kill()
            process.communicate()
            assert wait_until_gone({pid for pid in family if b"Agent" not in _command(pid)}, timeout=30) == set()
        tally("ray", runs=1, most_s=time.monotonic() - killed_s)
        before = {name: len(files) for name, files in committed(root).items()} if (root / "streams").exists() else {}
        status, summary, said = finish(tokenize_process(root), timeout=300)
        assert status == 0, said
        assert committed(root) == undisturbed, f"kill {number} of the {victim} after {after_s:.1f} s, seed {seed}"
        print(
            f"kill {number + 1}: {victim} after {after_s:.1f} s, {before} shards were in, "
            f"the next run did {int(summary['shards'])}: byte for byte the undisturbed run's",
            flush=True,
        )
        shutil.rmtree(root)


@pytest.mark.parametrize("failpoint", PLACES)
def test_a_run_on_ray_killed_at_a_failpoint_is_finished_by_the_same_command_on_ray(
    failpoint: str, fitted_root: Path, finished_root: Path, tmp_path: Path
):
    """In the driver or, for the places in a worker, in every worker: that run may give up, the next must not."""
    root = tmp_path / "root"
    shutil.copytree(fitted_root, root)
    status, _, _ = finish(tokenize_process(root, failpoints=kill_at(failpoint)), timeout=300)
    assert status in ((0, 1) if failpoint.startswith("shard-") else (-signal.SIGKILL,))
    status, _, said = finish(tokenize_process(root), timeout=300)
    assert status == 0, said
    assert committed(root) == committed(finished_root)
    tally("ray", runs=1)


def _whole_run(root: Path) -> float:
    started = time.monotonic()
    status, _, said = finish(tokenize_process(root, failpoints=SLOW_SHARD), timeout=600)
    assert status == 0, said
    return time.monotonic() - started


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
