"""A store that fails in each way, at each kind of request: the run gets through, or ends in a sentence and can go on.

After each run: exit status 0 if and only if every segment has its row; what is committed is what an undisturbed run
commits, byte for byte; and once the store is sound, the same command completes it.
"""

import json
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import SEMANTIC
from killing import committed, require_whole_at_every_version, table_content
from object_store import Do, Fault, Request, Swift
from wavemill.jobs.codebook import FitOptions, fit_codebook
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.dataset import TokenDataset
from wavemill.storage.pins import read_pin
from wavemill.storage.root import Root
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import RunFailed

MakeOnce = Callable[[str, Callable[[Path], None]], Path]
Content = dict[str, dict[str, bytes]]

STREAM = ("--stream", "semantic=mfcc-kmeans", "--engine", "inline")
LIMIT_S = 120  # a run that a store stops is over by then, on a busy machine, too
SHARD_HOURS = 0.0012


@dataclass(frozen=True)
class Run:
    """A small corpus with its codebook in a bucket, the command that tokenizes it, and what that is to give."""

    swift: Swift
    uri: str
    undisturbed: Content
    in_process: Callable[..., CompletedProcess[str]]

    def tokenize(self, *faults: Fault) -> CompletedProcess[str]:
        """Run the command, under these faults. Raises `AssertionError` unless the invariants hold behind it."""
        self.swift.clear()
        self.swift.set_faults(*faults)
        return self.again()

    def again(self) -> CompletedProcess[str]:
        """Run the command under the faults that are left."""
        started = time.monotonic()
        done = self.in_process("tokenize", self.uri, *STREAM, "--json")
        assert time.monotonic() - started < LIMIT_S, done.stderr
        assert "Traceback" not in done.stderr
        with self.swift.environment(AWS_ENDPOINT_URL=self.swift.plain_endpoint):
            ours = committed(self.uri)
            require_whole_at_every_version(Root(self.uri))
        for name, files in ours.items():
            assert files.items() <= self.undisturbed[name].items(), done.stderr
        assert (done.returncode == 0) == (ours == self.undisturbed), (done.returncode, done.stderr)
        if done.returncode:
            assert done.returncode == 1 or self.struck("flip"), done.stderr  # 2: what was read does not fit together
            require_sentence(done.stderr)
        return done

    def complete(self) -> None:
        """Run the command without faults."""
        done = self.tokenize()
        assert done.returncode == 0, done.stderr

    def struck(self, do: str) -> list[Request]:
        return [request for request in self.swift.requests() if request.fault == do]


def require_sentence(said: str) -> None:
    """One line behind "Error:", which says what to do and holds nothing of the libraries' insides."""
    [told] = [line for line in said.splitlines() if line.startswith("Error:")]
    assert told.endswith("."), told
    assert not re.search(r"\x1b|↳|<\?xml|<Error|<Code", told), told


@pytest.fixture(scope="session")
def small_root(samples: Path, made_once: MakeOnce) -> Path:
    """Six clips in three shards, with a codebook; beside it, called `finished`, the same with its stream."""

    def make(path: Path) -> None:
        build_corpus(Root(path), [_clips(samples)], CorpusPolicy(), shard_hours=SHARD_HOURS)
        fit_codebook(Root(path), SEMANTIC.tokenizer, FitOptions(size=20))
        shutil.copytree(path, path.with_name("finished"))
        tokenize(Root(path.with_name("finished")), [SEMANTIC], InlineEngine, TokenizeOptions())

    return made_once("small", make)


@pytest.fixture
def run(small_root: Path, on_swift: Swift, in_process: Callable[..., CompletedProcess[str]]) -> Run:
    uri = on_swift.upload(small_root, f"s3://{on_swift.bucket()}/data/set")
    undisturbed = committed(small_root.with_name("finished"))
    assert len(undisturbed["semantic"]) >= 3
    return Run(on_swift, uri, undisturbed, in_process)


def _clips(samples: Path) -> str:
    return f"speech={samples / 'speech'}/en_anna_0[1-6].*"


WRITES = {
    "a trial": ("PUT", "tmp/writable"),
    "a race": ("PUT", "tmp/race"),
    "a table": ("PUT", r"semantic/_delta_log/0+0\.json"),
    "a fence": ("PUT", r"semantic/_delta_log/0+1\.json"),
    "a shard": ("PUT", r"semantic/shard-000001"),
    "a commit": ("PUT", r"semantic/_delta_log/0+2\.json"),
}
READS = {
    "the corpus's log": ("GET", r"corpus/_delta_log/\d+\.json"),
    "the corpus's listing": ("GET", r"list-type=2.*corpus.*_delta_log"),
    "a shard of the corpus": ("GET", "corpus/shard-000001"),
    "the codebook": ("GET", "codebooks/mfcc"),
    "the stream's log": ("GET", r"semantic/_delta_log/\d+\.json"),
    "the stream's listing": ("GET", r"list-type=2.*semantic.*_delta_log"),
}
COMMITS = ("a table", "a fence", "a commit")


def strike(do: Do, kinds: Iterable[str], **how: Any) -> list[Fault]:
    """One fault for each kind of request."""
    places = WRITES | READS
    return [Fault(do=do, methods=places[kind][0], match=places[kind][1], **{"times": 1, **how}) for kind in kinds]


@pytest.mark.parametrize("do", ["lose", pytest.param("lose-reset", marks=pytest.mark.slow)])
def test_writes_whose_answers_are_lost_are_found_done(do: Do, run: Run):
    done = run.tokenize(*strike(do, WRITES))
    assert done.returncode == 0, done.stderr
    assert len(run.struck(do)) == len(WRITES)
    assert json.loads(done.stdout)["shards"] == len(run.undisturbed["semantic"])


@pytest.mark.slow
def test_commits_that_conflict_with_nothing_are_made_again(run: Run):
    done = run.tokenize(*strike("409", COMMITS))
    assert done.returncode == 0, done.stderr
    assert len(run.struck("409")) == len(COMMITS)


@pytest.mark.slow
def test_a_burst_of_refusals_is_waited_out(run: Run):
    done = run.tokenize(Fault(do="503", share=0.2, times=25, seed=1))
    assert done.returncode == 0, done.stderr
    assert len(run.struck("503")) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("do", ["cut", "reset-body"])
def test_bodies_that_break_off_are_fetched_again(do: Do, run: Run):
    done = run.tokenize(*strike(do, READS))
    assert done.returncode == 0, done.stderr
    assert len(run.struck(do)) == len(READS)


@pytest.mark.slow
def test_a_bit_that_flips_on_its_way_is_noticed_and_read_again(run: Run):
    done = run.tokenize(*strike("flip", ["a shard of the corpus"]))
    assert done.returncode == 0, done.stderr
    assert len(run.struck("flip")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "times", "said"), [("a shard of the corpus", 2, "is damaged"), ("the codebook", 1, "codebook")]
)
def test_bits_that_flip_on_every_way_stop_the_run_by_name(kind: str, times: int, said: str, run: Run):
    done = run.tokenize(*strike("flip", [kind], times=times))
    assert len(run.struck("flip")) == times
    assert done.returncode
    assert said in done.stderr
    run.complete()


@pytest.mark.slow
def test_a_shard_that_flips_on_its_way_to_the_store_is_sent_again_or_named(run: Run):
    run.tokenize(*strike("flip", ["a shard"]))
    assert len(run.struck("flip")) == 1
    run.complete()


@pytest.mark.slow
def test_a_run_whose_credentials_expire_says_so_and_goes_on_with_new_ones(run: Run):
    first = Fault(do="403", methods="PUT", match="semantic/shard-", skip=1)
    done = run.tokenize(first, Fault(do="403", match="semantic/_delta_log/0+2"))
    assert done.returncode == 1
    assert "credentials" in done.stderr
    run.complete()


@pytest.mark.slow
def test_slow_answers_only_take_longer(run: Run):
    done = run.tokenize(*strike("slow", ["a shard", "a commit", "a shard of the corpus"], seconds=1.0))
    assert done.returncode == 0, done.stderr
    assert len(run.struck("slow")) == 3


@pytest.mark.slow
def test_a_corpus_is_built_though_the_answers_to_its_writes_are_lost(
    samples: Path, small_root: Path, on_swift: Swift, in_process: Callable[..., CompletedProcess[str]]
):
    uri = f"s3://{on_swift.bucket()}/data/set"
    on_swift.set_faults(
        *(
            Fault(do="lose", methods="PUT", match=rf"corpus/_delta_log/0+{version}\.json", times=1)
            for version in range(3)
        ),
        Fault(do="lose-reset", methods="PUT", match="corpus/shard-", times=2),
    )
    done = in_process("corpus", "build", _clips(samples), "--to", uri, "--shard-hours", str(SHARD_HOURS))
    assert done.returncode == 0, done.stderr
    assert len([request for request in on_swift.requests() if request.fault]) == 5
    assert table_content(Root(uri), "corpus") == table_content(Root(small_root), "corpus")


@pytest.mark.slow
def test_codebooks_and_pins_are_written_though_answers_are_lost(run: Run, tmp_path: Path):
    run.complete()
    centroids = tmp_path / "centroids.npy"
    np.save(centroids, np.random.default_rng(0).normal(size=(20, 39)).astype(np.float32))
    for command, path in (
        (["codebook", "import", run.uri, centroids, "mfcc-kmeans", "--name", "second"], "codebooks/second.safetensors"),
        (["codebook", "fit", run.uri, "mfcc-kmeans", "--name", "third", "--size", "20"], "codebooks/third.safetensors"),
        (["pin", run.uri, "base"], "pins/base.json"),
        (["export", run.uri], "webdataset/plain/index.json"),
    ):
        run.swift.clear()
        run.swift.set_faults(Fault(do="lose", methods="PUT", match=path, times=1))
        done = run.in_process(*command)
        assert done.returncode == 0, done.stderr
        assert len(run.struck("lose")) == 1
        assert run.swift.keys(f"{run.uri}/{path.rpartition('/')[0]}").count(path.rpartition("/")[2]) == 1
    assert list(read_pin(Root(run.uri), "base")) == ["corpus", "semantic"]


@pytest.mark.slow
def test_a_checkpoint_whose_answer_is_lost_harms_nothing(run: Run, small_root: Path, tmp_path: Path):
    root = tmp_path / "root"
    shutil.copytree(small_root, root)

    class Stopped(Exception):
        pass

    def stop(report: object) -> None:
        raise Stopped

    with pytest.raises(Stopped):  # the table is there and fenced
        tokenize(Root(root), [SEMANTIC], InlineEngine, TokenizeOptions(), on_report=stop)
    while (version := TableWriter(Root(root), "streams/semantic").snapshot.version) < 98:
        pass
    assert version == 98
    run.swift.upload(root, run.uri)
    for do in ("lose", "503"):
        uri = run.swift.copy(run.uri, f"s3://{run.swift.bucket()}/{do}")
        run.swift.clear()
        run.swift.set_faults(Fault(do=do, methods="PUT", match="checkpoint", times=8))
        done = run.in_process("tokenize", uri, *STREAM)
        assert done.returncode == 0, done.stderr
        assert run.struck(do)
        assert committed(uri) == run.undisturbed
        done = run.in_process("tokenize", uri, *STREAM)
        assert "Nothing to do" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [WRITES, READS], ids=["writes", "reads"])
@pytest.mark.parametrize("do", ["500", "503", "403", "409", "reset", "lose", "lose-reset", "cut", "reset-body", "flip"])
def test_requests_that_fail_in_any_way_lose_and_double_nothing(do: Do, kinds: dict[str, tuple[str, str]], run: Run):
    """Each kind of request fails twice; a run that is stopped by it is begun again, until one comes through."""
    done = run.tokenize(*strike(do, kinds, times=2))
    for _ in range(2 * len(kinds)):
        if done.returncode == 0:
            break
        done = run.again()
    assert done.returncode == 0, done.stderr
    struck = run.struck(do)
    for method, match in kinds.values():
        assert [request for request in struck if request.method == method and re.search(match, request.target)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "kind"),
    [
        ("503", "a shard"),
        ("503", "a commit"),
        ("503", "the corpus's log"),
        ("503", "a shard of the corpus"),
        ("reset", "a shard"),
        ("409", "a fence"),
    ],
)
def test_a_request_that_fails_for_ever_ends_the_run_in_a_sentence(do: Do, kind: str, run: Run):
    started = time.monotonic()
    done = run.tokenize(*strike(do, [kind], times=-1))
    print(f"{kind}, {do} for ever: the run ended after {time.monotonic() - started:.0f} s")
    assert done.returncode == 1
    run.complete()


@pytest.mark.slow
def test_a_commit_whose_answers_are_lost_for_ever_is_found_done(run: Run):
    done = run.tokenize(*strike("lose", COMMITS, times=-1))
    assert done.returncode == 0, done.stderr
    assert len(run.struck("lose")) >= len(COMMITS)


@pytest.mark.slow
def test_a_trainer_reads_right_codes_or_is_told(run: Run):
    """Each answer in turn flipped, cut or reset: the epoch is the undisturbed one; flipped again, it ends in words."""
    run.complete()
    expected = _epoch(run.uri)
    run.swift.clear()
    _epoch(run.uri)
    reads = [request for request in run.swift.requests("GET") if "shard-" in request.target]
    assert len(reads) >= 6
    for do in ("flip", "cut", "reset-body", "503"):
        for number in range(len(reads)):
            run.swift.clear()
            run.swift.set_faults(Fault(do=do, methods="GET", match="shard-", skip=number, times=1))
            assert _epoch(run.uri) == expected
            assert run.struck(do)
    damaged = 0
    for number in range(len(reads)):
        run.swift.clear()
        run.swift.set_faults(Fault(do="flip", methods="GET", match="shard-", skip=number, times=len(reads)))
        try:
            assert _epoch(run.uri) == expected  # what flipped is read with the rest, but not used
        except RunFailed as error:
            damaged += "is damaged" in str(error)
    assert damaged >= len(reads) / 2


@pytest.mark.slow
def test_a_store_that_takes_connections_and_never_answers_ends_the_run_in_a_sentence(
    on_swift: Swift, in_process: Callable[..., CompletedProcess[str]]
):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        started = time.monotonic()
        with on_swift.environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}"):
            done = in_process("tokenize", f"s3://{on_swift.bucket()}/data/set", *STREAM)
    print(f"silent for ever: the run ended after {time.monotonic() - started:.0f} s")
    assert done.returncode == 1
    assert time.monotonic() - started < LIMIT_S
    require_sentence(done.stderr)


def _epoch(uri: str) -> list[Any]:
    dataset = TokenDataset(uri, ["semantic"], batch_size=2, seed=1)
    return [(batch.ids, batch.codes["semantic"].tolist()) for batch in dataset]
