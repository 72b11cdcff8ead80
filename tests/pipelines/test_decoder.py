"""The decoder's child process: what hangs, crashes or bloats it costs one recording, and nobody else notices."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import SAMPLES, STREAMS
from numpy.typing import NDArray
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines import audio
from wavemill.pipelines.audio import Limits, Probe, Span
from wavemill.pipelines.decoder import Decoder, DecoderSettings
from wavemill.pipelines.entries import AudioError
from wavemill.pipelines.opened import OpenRecording
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.quarantine import quarantined
from wavemill.pipelines.recordings import Opener, Place
from wavemill.storage.codes import open_corpus, open_stream, read_codes
from wavemill.storage.root import Root

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from killing import alive, committed, descendants, finish, tokenize_process, wait_until_gone

pytestmark = pytest.mark.timeout(120)
RATE = 16_000
NOISE = (0.2 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
HASTY = DecoderSettings(deadline_s=2)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    ours = Decoder(HASTY)
    yield ours
    ours.close()


def record(path: Path, samples: NDArray[np.float32] = NOISE, rate: int = RATE) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def place_of(path: Path) -> Place:
    return Place(source_root=str(path.parent), path=path.name)


def probe(decoder: Decoder, path: Path) -> Probe:
    with Opener().open(place_of(path)) as opened:
        return decoder.probe(opened, Limits())


def decode(decoder: Decoder, path: Path, spans: list[Span], format: str = "wav") -> list[NDArray[np.float32]]:
    """Each span's samples `[n, C]`."""
    pieces: list[list[NDArray[np.float32]]] = [[] for _ in spans]
    with Opener().open(place_of(path)) as opened:
        for index, piece_NC in decoder.decode(opened, format=format, spans=spans):
            pieces[index].append(piece_NC)
    return [np.concatenate(found) for found in pieces]


def kind_of(decoder: Decoder, path: Path) -> str:
    with pytest.raises(AudioError) as caught:
        probe(decoder, path)
    return caught.value.kind


def children() -> set[int]:
    return alive(descendants(os.getpid()))


def zombies() -> set[int]:
    return descendants(os.getpid()) - children() - _LEFT


_LEFT: set[int] = set()  # zombies of tests that ran before in this process: trainers' workers wait to be collected


@pytest.fixture(autouse=True)
def _blames_no_other_test() -> None:
    _LEFT.clear()
    _LEFT.update(zombies())


# What the child does is what would be done here


def test_samples_through_the_child_are_those_decoded_here_bit_for_bit(decoder: Decoder) -> None:
    one_of_each = {path.suffix: path for path in sorted((SAMPLES / "speech").iterdir()) if path.suffix != ".txt"}
    assert len(one_of_each) >= 7
    for path in one_of_each.values():
        with path.open("rb") as file:
            size = path.stat().st_size
            here = audio.probe(file, size, Limits())
            assert probe(decoder, path) == here
            third = here.num_samples // 3
            spans = [
                Span(0, third),
                Span(third + 7, third, (0, audio.MIX)),
                Span(2 * third + 7, here.num_samples - 2 * third - 7),
            ]
            ours: list[list[NDArray[np.float32]]] = [[] for _ in spans]
            for index, piece_NC in audio.decode(file, size, format=here.format, spans=spans):
                ours[index].append(piece_NC)
        theirs = decode(decoder, path, spans, here.format)
        for span, mine, other in zip(spans, ours, theirs, strict=True):
            assert other.shape == (span.num_samples, len(span.channels))
            assert np.concatenate(mine).tobytes() == other.tobytes(), path.name


def test_five_hundred_probes_are_made_by_one_child_that_keeps_nothing_open(decoder: Decoder, tmp_path: Path) -> None:
    path = record(tmp_path / "a.wav")
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"no audio")
    before = children()
    probe(decoder, path)
    [child] = children() - before
    ours = _open_files(os.getpid())
    for _ in range(250):
        assert probe(decoder, path).num_samples == RATE
        assert kind_of(decoder, bad) == "not-audio"
    assert children() - before == {child}
    assert _open_files(os.getpid()) == ours
    assert _open_files(child) <= 6  # three standard ones, the socket, and what the last request was about


def _open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# Hangs


def test_a_hang_is_ended_at_its_deadline_and_the_next_recording_is_read(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAVEMILL_FAILPOINTS", "decoder-hang.wav=sleep:1000")
    good, hanging = record(tmp_path / "good.wav"), record(tmp_path / "hang.wav")
    assert probe(decoder, good).num_samples == RATE
    before = children()
    started = time.monotonic()
    assert kind_of(decoder, hanging) == "decoder-hang"
    assert 2 * HASTY.deadline_s <= time.monotonic() - started < 20  # two attempts, and a child's start
    assert probe(decoder, good).num_samples == RATE
    assert len(children()) == len(before)
    assert not zombies()


def test_a_run_with_hangs_and_crashes_ends_in_time_and_the_neighbours_codes_are_the_same(
    fitted_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a-good", "b-hang", "c-good", "d-segfault", "e-kill", "f-raise", "g-good"):
        record(source / f"{name}.wav")
    root, alone = prepared(fitted_root, tmp_path / "root", source), prepared(fitted_root, tmp_path / "alone", source)
    tokenize(alone, STREAMS, InlineEngine, TokenizeOptions())
    failpoints = (
        "b-hang.wav=sleep:1000,decoder-d-segfault.wav=segfault,decoder-e-kill.wav=kill,decoder-f-raise.wav=raise"
    )
    monkeypatch.setenv("WAVEMILL_FAILPOINTS", f"decoder-{failpoints}")
    started = time.monotonic()
    tokenize(root, STREAMS, InlineEngine, TokenizeOptions(max_error_share=1, decoder=HASTY))
    assert time.monotonic() - started < 60
    assert errors_of(root) == {
        "b-hang.wav": ("decoder-hang", "2 s"),
        "d-segfault.wav": ("decoder-crash", "SIGSEGV"),
        "e-kill.wav": ("decoder-crash", "killed"),
        "f-raise.wav": ("decoder-crash", "status 1"),
    }
    ours, theirs = codes_of(root), codes_of(alone)
    assert theirs.keys() > ours.keys() == {"a-good.wav", "c-good.wav", "g-good.wav"}
    assert all(np.array_equal(codes_KT, theirs[path]) for path, codes_KT in ours.items())
    assert not zombies()


def prepared(fitted_root: Path, path: Path, source: Path) -> Root:
    """A root with codebooks and the corpus of a folder."""
    shutil.copytree(fitted_root / "codebooks", path / "codebooks")
    build_corpus(Root(path), [f"x={source}"], CorpusPolicy(), shard_hours=1)
    return Root(path)


def errors_of(root: Root) -> dict[str, tuple[str, str]]:
    """Class and the telling word of each recording's error."""
    words = ("2 s", "SIGSEGV", "killed", "status 1")
    return {
        row["path"]: (row["error"], next(word for word in words if word in row["error_message"]))
        for row in quarantined(root, open_corpus(root))
    }


def codes_of(root: Root) -> dict[str, NDArray[Any]]:
    """Acoustic codes by path."""
    from wavemill.storage.parquet import read_parquet
    from wavemill.storage.schema import CORPUS_SCHEMA

    corpus, snapshot = open_corpus(root), open_stream(root, "acoustic")
    found = {}
    for shard in corpus.files:
        part = read_codes(root, snapshot, shard)
        for number, row in enumerate(read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()):
            if (codes_KT := part.codes(number)) is not None:
                found[row["path"]] = codes_KT
    return found


# Crashes


@pytest.mark.parametrize(("action", "word"), [("segfault", "SIGSEGV"), ("kill", "killed"), ("raise", "status 1")])
def test_a_crash_that_repeats_is_told_with_its_signal_and_costs_one_recording(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, word: str
) -> None:
    monkeypatch.setenv("WAVEMILL_FAILPOINTS", f"decoder-bad.wav={action}")
    good, bad = record(tmp_path / "good.wav"), record(tmp_path / "bad.wav")
    with pytest.raises(AudioError, match=word) as caught:
        probe(decoder, bad)
    assert caught.value.kind == "decoder-crash"
    with pytest.raises(AudioError, match=word):
        decode(decoder, bad, [Span(0, RATE)])
    assert np.array_equal(decode(decoder, good, [Span(0, RATE)])[0][:, 0], NOISE)


@pytest.mark.parametrize("action", ["segfault", "kill", "sleep:1000"])
def test_what_happens_only_once_was_not_the_recordings_fault(
    fitted_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "once").mkdir()
    for name in ("a.wav", "b.wav"):
        record(tmp_path / "source" / name)
    root = prepared(fitted_root, tmp_path / "root", tmp_path / "source")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(tmp_path / "root", undisturbed)
    tokenize(Root(undisturbed), STREAMS, InlineEngine, TokenizeOptions())
    monkeypatch.setenv("WAVEMILL_FAILPOINTS", f"decoder-a.wav={action}")
    monkeypatch.setenv("WAVEMILL_FAILPOINTS_ONCE", str(tmp_path / "once"))
    tokenize(root, STREAMS, InlineEngine, TokenizeOptions(decoder=HASTY))
    assert (tmp_path / "once" / "decoder-a.wav").exists()
    assert committed(tmp_path / "root") == committed(undisturbed)


def test_a_child_that_dies_in_the_middle_is_replaced_and_no_sample_comes_twice(
    decoder: Decoder, tmp_path: Path
) -> None:
    samples = (0.2 * np.random.default_rng(1).standard_normal((6_000_000, 2))).astype(np.float32)
    path = record(tmp_path / "long.wav", samples)
    spans = [Span(0, 2_500_000, (0, 1)), Span(3_000_000, 3_000_000, (1,))]
    before = children()
    found: list[list[NDArray[np.float32]]] = [[], []]
    killed = False
    with Opener().open(place_of(path)) as opened:
        for index, piece_NC in decoder.decode(opened, format="wav", spans=spans):
            found[index].append(piece_NC)
            if index == 1 and not killed:
                killed = True
                for child in children() - before:
                    os.kill(child, signal.SIGKILL)
    assert np.array_equal(np.concatenate(found[0]), samples[:2_500_000])
    assert np.array_equal(np.concatenate(found[1])[:, 0], samples[3_000_000:, 1])


def test_a_decoder_that_does_not_start_blames_no_recording(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wavemill.tokenizers.spec import RunFailed

    path = record(tmp_path / "a.wav")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RunFailed, match="does not start"):
        probe(decoder, path)
    assert not zombies()


# Memory


def test_a_recording_that_needs_more_memory_than_allowed_is_told_and_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAVEMILL_FAILPOINTS", "decoder-bloat.wav=eat:600")
    good, bad = record(tmp_path / "good.wav"), record(tmp_path / "bloat.wav")
    for memory_bytes, kind in ((300 << 20, "decoder-memory"), (2 << 30, None)):
        decoder = Decoder(DecoderSettings(memory_bytes=memory_bytes))
        try:
            if kind is None:
                assert probe(decoder, bad).num_samples == RATE
            else:
                assert kind_of(decoder, bad) == kind
            assert probe(decoder, good).num_samples == RATE
        finally:
            decoder.close()


# Confinement


def test_the_child_can_write_no_file_dump_no_core_and_open_few_files(decoder: Decoder, tmp_path: Path) -> None:
    before = children()
    probe(decoder, record(tmp_path / "a.wav"))
    [child] = children() - before
    limits = {
        line[:25].strip(): line[25:].split()[:2] for line in Path(f"/proc/{child}/limits").read_text().splitlines()
    }
    assert limits["Max file size"] == ["0", "0"]
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max open files"] == ["64", "64"]
    assert int(limits["Max address space"][1]) < 8 << 30
    assert os.getsid(child) != os.getsid(0)


def test_the_child_needs_no_names_only_the_descriptor_it_is_given(decoder: Decoder, tmp_path: Path) -> None:
    path = record(tmp_path / "a.wav")
    decoy = (np.arange(RATE) % 100 / 1000).astype(np.float32)
    with Opener().open(place_of(path)) as opened:
        path.unlink()
        record(path, decoy)
        assert decoder.probe(opened, Limits()).num_samples == RATE
        pieces = [piece_NC for _, piece_NC in decoder.decode(opened, format="wav", spans=[Span(0, RATE)])]
    assert np.array_equal(np.concatenate(pieces)[:, 0], NOISE)


GREEDY = """#!{python}
import socket, struct, sys, time
link = socket.socket(fileno=int(sys.argv[4]))
link.sendall(struct.pack("<cII", b"A", 0, 0))
link.recv(1 << 16)
while True:
    for begin, end in ((0, 1 << 40), (900, 1 << 63), (1 << 40, 1 << 50), (7, 3), (1_001, 1_002)):
        link.sendall(struct.pack("<cII", b"W", 0, 16) + struct.pack("<QQ", begin, end))
        (size,) = struct.unpack("<I", link.recv(4, socket.MSG_WAITALL))
        assert not size or len(link.recv(size, socket.MSG_WAITALL)) == size
    time.sleep(0.05)
"""


def test_a_child_that_asks_for_bytes_gets_only_the_recordings_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what lies in a store the child has no descriptor; here is one that a hostile recording has taken over."""
    asked: list[tuple[int, int]] = []

    class Store:
        def read(self, begin: int, end: int) -> bytes:
            asked.append((begin, end))
            return bytes(min(end - begin, 100))

        def close(self) -> None: ...

    child = tmp_path / "child"
    child.write_text(GREEDY.format(python=sys.executable))
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    greedy = Decoder(HASTY)
    started = time.monotonic()
    with (
        OpenRecording(content=Store(), offset=5_000, size=1_000, name="a.wav", version=None) as opened,
        pytest.raises(AudioError) as caught,
    ):
        greedy.probe(opened, Limits())
    greedy.close()
    assert caught.value.kind == "decoder-hang"
    assert time.monotonic() - started < 30
    assert len(asked) > 20
    assert all(5_000 <= begin < end <= 6_000 for begin, end in asked)


def test_the_child_imports_nothing_from_the_folder_it_is_started_in(tmp_path: Path) -> None:
    """As the script `wavemill` does not, though a dataset that somebody is in may hold a numpy.py."""
    for name in ("numpy", "soundfile", "av", "json", "struct", "wavemill"):
        (tmp_path / f"{name}.py").write_text("open('touched', 'w')\n")
    record(tmp_path / "a.wav")
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, str(tmp_path / "a.wav")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "16000" in done.stdout
    assert not (tmp_path / "touched").exists()


PROBE = """
import os, signal, sys
from wavemill.pipelines.audio import Limits
from wavemill.pipelines.decoder import Decoder, DecoderSettings
from wavemill.pipelines.recordings import Opener, Place
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
decoder = Decoder(DecoderSettings())
def probe(path):
    with Opener().open(Place(source_root=os.path.dirname(path), path=os.path.basename(path))) as opened:
        print(decoder.probe(opened, Limits()).num_samples, flush=True)
try:
    for path in sys.argv[1:]:
        probe(path)
    if len(sys.argv) > 2:
        signal.pause()
except KeyboardInterrupt:
    probe(sys.argv[1])
decoder.close()
"""


def started(*paths: Path, failpoints: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROBE, *map(str, paths)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "WAVEMILL_FAILPOINTS": failpoints},
        start_new_session=True,
    )


def test_interrupting_the_group_as_ctrl_c_does_leaves_the_child_at_work(tmp_path: Path) -> None:
    path = record(tmp_path / "a.wav")
    process = started(path, path)
    assert process.stdout is not None
    assert [process.stdout.readline(), process.stdout.readline()] == ["16000\n"] * 2
    [child] = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "16000\n"  # by the same child: a new one would have taken its place
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert wait_until_gone({child}, timeout=20) == set()


@pytest.mark.parametrize("name", ["idle.wav", "hang.wav"])
def test_a_child_ends_with_its_parent_even_if_it_hangs(tmp_path: Path, name: str) -> None:
    good, last = record(tmp_path / "good.wav"), record(tmp_path / name)
    process = started(good, last, failpoints="decoder-hang.wav=sleep:1000")
    assert process.stdout is not None
    assert process.stdout.readline() == "16000\n"
    found = descendants(process.pid)
    assert len(found) == 1
    process.kill()
    process.communicate()
    assert wait_until_gone(found, timeout=20) == set()


def test_a_reader_that_stops_early_leaves_no_process_and_no_descriptor(decoder: Decoder, tmp_path: Path) -> None:
    path = record(tmp_path / "long.wav", np.resize(NOISE, 5_000_000))
    before, files = children(), _open_files(os.getpid())
    for _ in range(3):
        with Opener().open(place_of(path)) as opened:
            pieces = decoder.decode(opened, format="wav", spans=[Span(0, 5_000_000)])
            next(pieces)
            pieces.close()
        assert children() == before
        assert not zombies()
    assert _open_files(os.getpid()) == files
    assert len(decode(decoder, path, [Span(0, 5_000_000)])[0]) == 5_000_000


# On Ray


@pytest.mark.slow
def test_on_ray_a_hang_and_a_crash_cost_two_recordings(fitted_root: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("a-good", "b-hang", "c-crash", "d-good"):
        record(tmp_path / "source" / f"{name}.wav")
    root = prepared(fitted_root, tmp_path / "root", tmp_path / "source")
    failpoints = "decoder-b-hang.wav=sleep:1000,decoder-c-crash.wav=segfault"
    options = ("--deadline", "2s", "--max-error-share", "1", "--workers", "1")
    process = tokenize_process(tmp_path / "root", *options, failpoints=failpoints)
    status, summary, said = finish(process)
    assert status == 0, said
    assert summary["errors"] == 2
    assert errors_of(root) == {"b-hang.wav": ("decoder-hang", "2 s"), "c-crash.wav": ("decoder-crash", "SIGSEGV")}
    assert codes_of(root).keys() == {"a-good.wav", "d-good.wav"}
