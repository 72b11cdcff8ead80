"""Two hundred poisoned recordings of more than 25 kinds: each is accounted for, in bounded memory, and harms nobody."""

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from killing import descendants, failpoints_env, finish
from tally import tally
from test_bad_audio import BROKEN
from wavemill.pipelines.error_classes import ERROR_CLASSES
from wavemill.storage.codes import open_corpus, open_stream, read_codes
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from zygote import zygote

FILES = 200
MOST_BYTES = 1 << 30  # of any one process
DEADLINE_S = 2
GOOD = ("de_jonas_12.flac", "en_anna_11.flac", "es_mateo_12.flac")
STREAMS = ("semantic", "acoustic")

# of the decoder, for recordings that are good in themselves: what is done to it, and the error that comes of it
FATAL = {
    "hang": ("sleep:1000", "decoder-hang"),
    "segfault": ("segfault", "decoder-crash"),
    "kill": ("kill", "decoder-crash"),  # as the kernel does where memory is short
    "eat": ("eat:4096", "decoder-memory"),  # more than it may have
    "raise": ("raise", "decoder-crash"),
}


def _other_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = reversed(content[len(content) // 2 :])
    path.write_bytes(content)


# between the build and the run
LATER: dict[str, tuple[Callable[[Path], object], str]] = {
    "other-bytes": (_other_bytes, "changed"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + bytes(100)), "changed"),
    "gone": (lambda path: path.unlink(), "missing"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "not-a-file"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not-a-file"),
}


@dataclass(frozen=True, slots=True)
class Poison:
    """What must become of each file: its class, or any."""

    classes: dict[str, str]
    failpoints: str


def make_poison(folder: Path, samples: Path, generator: random.Random, *, files: int) -> Poison:
    """Fill a folder with so many files: each kind as it is, then each cut somewhere or with bytes of no meaning."""
    contents = {kind: make() for kind, (make, _) in BROKEN.items()}
    classes: dict[str, str] = {}
    failpoints = []
    for kind, (_, expected) in BROKEN.items():
        classes[f"{kind}.wav"] = expected
        (folder / f"{kind}.wav").write_bytes(contents[kind])
    for name, (action, expected) in FATAL.items():
        classes[f"fatal-{name}.flac"] = expected
        shutil.copy(samples / "speech" / GOOD[0], folder / f"fatal-{name}.flac")
        failpoints.append(f"decoder-fatal-{name}.flac={action}")
    for name, (_, expected) in LATER.items():
        classes[f"later-{name}.flac"] = expected
        shutil.copy(samples / "speech" / GOOD[0], folder / f"later-{name}.flac")
    number = 0
    while len(classes) < files:
        kind = generator.choice([kind for kind, content in contents.items() if len(content) > 20])
        name = f"{number:03d} {kind}.wav"
        number += 1
        content = bytearray(contents[kind])
        if generator.random() < 0.5:
            del content[generator.randrange(1, len(content)) :]
        else:
            begin = generator.randrange(len(content))
            end = min(len(content), begin + generator.randrange(1, 2_000))
            content[begin:end] = generator.randbytes(end - begin)
        (folder / name).write_bytes(content)
        classes[name] = ""
    return Poison(classes, ",".join(failpoints))


class Watch:
    """The most memory that a process, or any that it started, had at one time."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.peak_bytes = 0
        self._process = process
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while self._process.poll() is None:
            for pid in {self._process.pid, *descendants(self._process.pid)}:
                try:
                    told = Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]
                except (OSError, IndexError):
                    continue
                self.peak_bytes = max(self.peak_bytes, int(told) << 10)
            time.sleep(0.1)

    def close(self) -> None:
        self._thread.join()


def command(*arguments: str | Path, failpoints: str = "") -> tuple[int, str, int]:
    """The command line in a process of its own, whose memory is all its own: status, what was said, peak bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "wavemill.jobs.cli", *map(str, arguments)],
        env={**os.environ, **failpoints_env(failpoints)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    watch = Watch(process)
    said = process.communicate(timeout=400)[1].decode()
    watch.close()
    return process.returncode, said, watch.peak_bytes


def outcomes(root: Root) -> dict[str, tuple[str | None, list[np.ndarray | None]]]:
    """For each path the error, or none, and the codes of all streams."""
    corpus = open_corpus(root)
    streams = [open_stream(root, name) for name in STREAMS]
    found = {}
    for shard in corpus.files:
        rows = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
        parts = [read_codes(root, stream, shard) for stream in streams]
        for place, row in enumerate(rows):
            errors = {part.errors[place] for part in parts}
            assert len(errors) == 1, f"{row['path']}: streams do not agree: {errors}"
            assert row["path"] not in found
            found[row["path"]] = errors.pop(), [part.codes(place) for part in parts]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_poisoned_recording_is_accounted_for_and_its_neighbours_have_their_codes(
    samples: Path, fitted_root: Path, tmp_path: Path
) -> None:
    seed = int(os.environ.get("WAVEMILL_POISON_SEED", time.time_ns() % 10**6))
    print(f"\nseed {seed} (WAVEMILL_POISON_SEED={seed} repeats it)")
    source, roots = tmp_path / "source", {name: tmp_path / name for name in ("poisoned", "clean")}
    for folder in (source, tmp_path / "good"):
        folder.mkdir()
        for name in GOOD:
            shutil.copy(samples / "speech" / name, folder)
    poison = make_poison(source, samples, random.Random(seed), files=FILES)
    peak = 0
    for name, folder in (("poisoned", source), ("clean", tmp_path / "good")):
        shutil.copytree(fitted_root / "codebooks", roots[name] / "codebooks")
        status, said, bytes_then = command("corpus", "build", f"speech={folder}", "--to", roots[name])
        assert status == 0, said
        peak = max(peak, bytes_then)
    for name, (change, _) in LATER.items():
        change(source / f"later-{name}.flac")
    for name, failpoints in (("poisoned", poison.failpoints), ("clean", "")):
        options = ("--engine", "inline", "--max-error-share", "1", "--deadline", f"{DEADLINE_S}s")
        status, said, bytes_then = command("tokenize", roots[name], *options, failpoints=failpoints)
        assert status == 0, said
        assert "Traceback" not in said
        peak = max(peak, bytes_then)
    found, alone = outcomes(Root(roots["poisoned"])), outcomes(Root(roots["clean"]))
    known = (None, *ERROR_CLASSES)
    accounted = sum(path in found and found[path][0] in known for path in poison.classes)
    kinds = len(BROKEN) + len(FATAL) + len(LATER)
    tally("poison", files=len(poison.classes), accounted=accounted, most_kinds=kinds, most_mib=peak / 2**20)
    assert found.keys() == {*poison.classes, *GOOD}
    for path, expected in poison.classes.items():
        error, codes = found[path]
        assert error in ((expected,) if expected else known), f"{path}: {error}"
        assert all((codes_KT is None) == (error is not None) for codes_KT in codes), path
    for path in GOOD:
        for ours, theirs in zip(found[path][1], alone[path][1], strict=True):
            assert ours is not None
            assert theirs is not None
            assert np.array_equal(ours, theirs)
    classes = Counter(error for path, (error, _) in found.items() if path in poison.classes)
    print(f"{dict(classes.most_common())}; the largest process had {peak / 1e6:.0f} MB")
    assert peak < MOST_BYTES


def test_only_bad_input_stops_past_the_limit_and_says_what_to_do(
    samples: Path, fitted_root: Path, tmp_path: Path
) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    make_poison(source, samples, random.Random(0), files=len(BROKEN) + len(FATAL) + len(LATER))
    for path in source.glob("*.flac"):
        path.unlink()
    shutil.copytree(fitted_root / "codebooks", root / "codebooks")
    status, _, said = finish(zygote().start("corpus", "build", source, "--to", root))
    assert status == 0, said
    status, _, said = finish(zygote().start("tokenize", root, "--engine", "inline"))
    assert status == 1
    assert f"{len(BROKEN)} of {len(BROKEN)} segments so far could not be tokenized: over the limit of 5.0%" in said
    assert "Mend the input, or raise --max-error-share, and run the command again." in said
    tally("junk", runs=1)
