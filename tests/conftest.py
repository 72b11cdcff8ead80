"""What tests share: the shipped samples, a small finished dataset, a store, the optional recordings beside the repo."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import weights_lyra
from filelock import FileLock
from object_store import Swift, require_swift, start_swift
from wavemill.jobs.cli import main
from wavemill.jobs.codebook import FitOptions, fit_codebook
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.demo import LEFT_OUT, SAMPLES
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.streams import StreamConfig
from wavemill.storage.root import Root
from wavemill.tokenizers.numerics import use_one_thread
from wavemill.tokenizers.tokenizer import TokenizerConfig

use_one_thread()  # as workers do; with two, Griffin-Lim is many times slower

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared" / "data" / "dev"

SEMANTIC = StreamConfig(name="semantic", tokenizer=TokenizerConfig(tokenizer="mfcc-kmeans"))
ACOUSTIC = StreamConfig(name="acoustic", tokenizer=TokenizerConfig(tokenizer="mel-rvq"))
STREAMS = (SEMANTIC, ACOUSTIC)


@pytest.fixture(scope="session")
def samples() -> Path:
    """The speech and the broken files that ship with wavemill."""
    return SAMPLES


@pytest.fixture(scope="session")
def dev_recordings() -> Path:
    """Real recordings beside the repository; tests that need them are skipped elsewhere."""
    if not (SHARED / "MANIFEST.csv").exists():
        pytest.skip("needs the development recordings, which are not beside this clone")
    return SHARED


@pytest.fixture(scope="session")
def lyra_weights() -> Path:
    """Lyra's published files beside the repository; tests that need them are skipped elsewhere."""
    return weights_lyra.require()


@pytest.fixture(scope="session")
def fitted_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the samples' corpus in ten shards and small codebooks, but no streams. Copy it to change it."""
    return _made_once(tmp_path_factory, "fitted", lambda path: _fit(Root(path)))


def _fit(root: Root) -> None:
    """The samples' corpus in ten shards, and small codebooks."""
    sources = [f"speech={SAMPLES / 'manifest.jsonl'}", f"broken={SAMPLES / 'broken'}"]
    build_corpus(root, sources, CorpusPolicy(), shard_hours=0.009)
    fit_codebook(root, TokenizerConfig(tokenizer="mfcc-kmeans"), FitOptions(leave_out_speakers=LEFT_OUT))
    fit_codebook(root, TokenizerConfig(tokenizer="mel-rvq"), FitOptions(size=64, leave_out_speakers=LEFT_OUT))


@pytest.fixture(scope="session")
def finished_root(fitted_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fitted_root` with both streams made inline: the undisturbed run. Copy it to change it."""

    def make(path: Path) -> None:
        shutil.copytree(fitted_root, path)
        tokenize(Root(path), STREAMS, InlineEngine, TokenizeOptions())

    return _made_once(tmp_path_factory, "finished", make)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a folder by name, once for all processes of a run."""
    return lambda name, make: _made_once(tmp_path_factory, name, make)


@pytest.fixture
def ray_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No other test that asks for this has a cluster meanwhile: two would starve each other's workers."""
    base, _ = _shared_by_run(tmp_path_factory)
    with FileLock(base / "ray.lock"):
        yield


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Swift:
    """An object store on this machine, one for all processes of a run. `on_swift` has clients find it."""
    require_swift()
    base, run = _shared_by_run(tmp_path_factory)
    with FileLock(base / "swift.lock"):
        if not (base / "swift.json").exists():
            (base / "swift.json").write_text(json.dumps(start_swift(run)))
    return Swift(json.loads((base / "swift.json").read_text()))


@pytest.fixture(scope="session")
def made_in_store(swift: Swift, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `finished_root` is, made in the object store from the first recording on. Copy it to change it."""

    def make(path: Path) -> None:
        uri = f"s3://{swift.bucket()}/made/here"
        with swift.environment():
            _fit(Root(uri))
            tokenize(Root(uri), STREAMS, InlineEngine, TokenizeOptions())
        path.write_text(uri)

    return _made_once(tmp_path_factory, "in-store", make).read_text()


@pytest.fixture
def on_swift(swift: Swift) -> Iterator[Swift]:
    """`swift`, as the store that all clients find, in this process and those it starts; without faults at first."""
    swift.clear()
    with swift.environment():
        yield swift
    swift.clear()


def _shared_by_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder that all processes of a parallel run share, and the process that outlives the others."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent, os.getppid()) if "PYTEST_XDIST_WORKER" in os.environ else (base, os.getpid())


def _made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A root that the first process of a parallel run makes and the others find."""
    base, _ = _shared_by_run(tmp_path_factory)
    path, made = base / name / "root", base / f"{name}.made"
    with FileLock(base / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(path.parent, ignore_errors=True)  # of a process that was killed
            path.parent.mkdir()
            make(path)
            made.touch()
    return path


@pytest.fixture
def copy_root(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a root into the test's own folder."""

    def copy(root: Path) -> Path:
        target = tmp_path / f"root-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(root, target)
        return target

    return copy


@pytest.fixture(scope="session")
def wavemill() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own."""

    def run(
        *arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "wavemill.jobs.cli", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=timeout, check=False
        )

    return run


@pytest.fixture
def in_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs the command line in this process: the same function, without two seconds of imports each time."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["wavemill", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(stopped.value.code or 0), said.out, said.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
