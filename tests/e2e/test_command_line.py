"""The command line as a person meets it: the way through, and one sentence for each mistake."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from wavemill.jobs.cli import main

Wavemill = Callable[..., CompletedProcess[str]]


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Wavemill]:
    """Runs the command line in this process: the same function, without two seconds of imports each time."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str) -> CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["wavemill", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return CompletedProcess(arguments, int(stopped.value.code or 0), said.out, said.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def sentence(done: CompletedProcess[str], *, status: int = 2) -> str:
    """The one thing that was said on stderr; no traceback, nothing on stdout."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_the_way_from_a_folder_to_tokens_and_back(wavemill: Wavemill, samples: Path, tmp_path: Path):
    root = tmp_path / "tokens"
    built = wavemill(
        "corpus", "build", samples / "speech", "--to", root, "--window", "2s", "--shard-hours", "0.02", "--json"
    )
    assert built.returncode == 0, built.stderr
    counts = json.loads(built.stdout)
    assert counts["skipped"] == {".txt": 108}
    assert wavemill("codebook", "fit", root, "mfcc-kmeans", "--size", "50").returncode == 0
    fitted = wavemill("codebook", "fit", root, "mel-rvq", "--size", "32", "--num-codebooks", "4", "--json")
    assert json.loads(fitted.stdout)["num_codebooks"] == 4
    done = wavemill("tokenize", root, "--engine", "inline")
    assert done.returncode == 0, done.stderr
    assert "x realtime" in done.stderr
    again = wavemill("tokenize", root, "--engine", "inline")
    assert again.returncode == 0
    assert "Nothing to do" in again.stderr
    shown = json.loads(wavemill("inspect", root, "--json").stdout)
    assert {stream["stream"]: stream["segments"] for stream in shown["streams"]} == {
        "semantic": counts["new"],
        "acoustic": counts["new"],
    }
    assert "mel-rvq@" in wavemill("inspect", root).stdout
    assert json.loads(wavemill("corpus", "show", root, "--json").stdout)["segments"] == counts["new"]
    verified = json.loads(wavemill("verify", root, "--json").stdout)
    assert verified["num_problems"] == verified["codes_different"] == 0
    assert verified["tokenized_again"] == 20
    heard = json.loads(wavemill("decode", root, "--to", tmp_path / "wav", "--limit", "2", "--json").stdout)
    assert len(heard) == 2
    assert all(Path(sound["path"]).stat().st_size > 10_000 for sound in heard)
    exported = json.loads(wavemill("export", root, "--json").stdout)
    assert exported["samples"] == counts["new"] - counts["errors"]
    assert json.loads(wavemill("quarantine", root, "--json").stdout) == []


def test_quarantine_says_why_each_broken_file_has_no_tokens(wavemill: Wavemill, finished_root: Path):
    rows = json.loads(wavemill("quarantine", finished_root, "--json").stdout)
    assert {row["path"]: row["error"] for row in rows} == {
        "cut_short.wav": "truncated",
        "empty.mp3": "empty",
        "error_page.mp3": "not-audio",
        "not_numbers.wav": "non-finite",
    }
    shown = wavemill("quarantine", finished_root)
    assert "web page" in " ".join(shown.stdout.split())


def test_help_is_quick_and_every_command_has_help(wavemill: Wavemill):
    timings = []
    for _ in range(3):
        started = time.monotonic()
        assert wavemill("--help").returncode == 0
        timings.append(time.monotonic() - started)
    print(f"wavemill --help: {min(timings):.2f} s")
    for command in ("demo", "tokenize", "inspect", "decode", "verify", "quarantine", "export"):
        assert "Usage" in wavemill(command, "--help").stdout
    for group, command in (("corpus", "build"), ("corpus", "show"), ("codebook", "fit")):
        assert "Usage" in wavemill(group, command, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["corpus", "build", "{tmp}/nothing", "--to", "{tmp}/root"], "There is no file or folder"),
        (["corpus", "build", "{tmp}/*.wav", "--to", "{tmp}/root"], "matches no file"),
        (["corpus", "build", "{empty}", "--to", "{tmp}/root"], "No audio was found"),
        (["corpus", "build", "{samples}/speech", "--to", "{file}"], "Cannot write to the root"),
        (["corpus", "build", "{samples}/speech", "--to", "/proc/wavemill"], "Cannot write to the root"),
        (["corpus", "build", "{samples}/speech", "--to", "{tmp}/root", "--window", "soon"], "is no length of time"),
        (["corpus", "build", "{samples}/speech", "--to", "{tmp}/root", "--window", "0s"], "accepted are 0.1 s"),
        (["corpus", "build", "{samples}/speech", "--to", "{tmp}/root", "--channels", "left"], "there is: mix"),
        (["corpus", "build", "{samples}/speech", "{samples}/speech", "--to", "{tmp}/root"], "Two sources are called"),
        (["corpus", "build", "{badmanifest}", "--to", "{tmp}/root"], "line 2: this is not JSON"),
        (["corpus", "show", "{tmp}/nothing"], "There is no corpus in"),
        (["codebook", "fit", "{tmp}/nothing", "mel-rvq"], "There is no corpus in"),
        (["codebook", "fit", "{fitted}", "hubert"], "there are: mel-rvq, mfcc-kmeans"),
        (["codebook", "fit", "{fitted}", "mel-rvq"], "There is a codebook 'mel-rvq' in"),
        (["codebook", "fit", "{fitted}", "mel-rvq", "--name", "Big One"], "cannot name a stream or a codebook"),
        (["codebook", "fit", "{fitted}", "mel-rvq", "--name", "b", "--budget", "lots"], "is no number of bytes"),
        (["codebook", "fit", "{fitted}", "mfcc-kmeans", "--name", "b", "--size", "90000"], "at least as many frames"),
        (["tokenize", "{tmp}/nothing"], "There is no corpus in"),
        (["tokenize", "{fitted}", "--stream", "semantic"], "expected NAME=TOKENIZER"),
        (["tokenize", "{fitted}", "--stream", "s=mfcc-kmeans:other"], "There is no codebook 'other'"),
        (["tokenize", "{fitted}", "--stream", "s=mel-rvq:mfcc-kmeans"], "was fitted for tokenizer 'mfcc-kmeans'"),
        (["tokenize", "{fitted}", "--stream", "s=hubert:mel-rvq"], "there are: mel-rvq, mfcc-kmeans"),
        (["tokenize", "{fitted}", "--engine", "spark"], "there are: ray, inline"),
        (["tokenize", "{fitted}", "--device", "tpu"], "there are: cpu, cuda"),
        (["tokenize", "{fitted}", "--source", "speech=/nowhere"], "expected NAME=FOLDER"),
        (["decode", "{finished}", "--stream", "semantic"], "cannot be decoded"),
        (["decode", "{finished}", "--stream", "accoustic"], "there are: acoustic, semantic"),
        (["decode", "{finished}", "nosuchsegment"], "There is no segment 'nosuchsegment'"),
        (["decode", "{finished}", "--codebooks", "9"], "has 8 codebooks; 9 were asked for"),
        (["export", "{fitted}"], "There is no stream in"),
        (["export", "{finished}", "--format", "zarr"], "there is: webdataset"),
        (["export", "{finished}", "--at", "semantic=new"], "expected STREAM=VERSION"),
        (["tokenize", "{fitted}", "--no-such-flag"], "No such option"),
        (["tokenise", "{fitted}"], "No such command"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_gets_one_sentence_and_writes_nothing(
    arguments: list[str],
    expected: str,
    samples: Path,
    fitted_root: Path,
    finished_root: Path,
    tmp_path: Path,
    in_process: Wavemill,
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "bad.jsonl").write_text('{"audio_filepath": "x.wav"}\nthis is not JSON\n')
    places = {
        "tmp": tmp_path,
        "empty": tmp_path / "empty",
        "file": tmp_path / "file",
        "badmanifest": tmp_path / "bad.jsonl",
        "samples": samples,
        "fitted": fitted_root,
        "finished": finished_root,
    }
    before = {path: _tree(path) for path in (tmp_path, fitted_root, finished_root)}
    done = in_process(*(argument.format(**places) for argument in arguments))
    assert expected in " ".join(sentence(done).replace("│", " ").split())
    assert {path: _tree(path) for path in before} == before


def test_a_root_of_another_version_is_refused_and_left_alone(
    wavemill: Wavemill, finished_root: Path, samples: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(finished_root)
    for log in root.glob("*/_delta_log/00000000000000000000.json"):
        log.write_text(log.read_text().replace('\\"wavemill\\": 2', '\\"wavemill\\": 1'))
    before = _tree(root)
    for arguments in (["tokenize", root], ["inspect", root], ["corpus", "build", samples / "speech", "--to", root]):
        assert "was written in wavemill's table format 1; this version reads format 2" in sentence(wavemill(*arguments))
    assert _tree(root) == before


def test_a_codebook_that_changed_under_a_stream_is_refused_by_name(
    wavemill: Wavemill, finished_root: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(finished_root)
    refit = wavemill("codebook", "fit", root, "mfcc-kmeans", "--replace", "--seed", "7")
    assert refit.returncode == 0, refit.stderr
    said = sentence(wavemill("tokenize", root))
    assert 'Stream "semantic"' in said
    assert "codebook differs" in said
    assert "another stream name" in said
    checked = wavemill("verify", root)
    assert checked.returncode == 1
    assert "codebook differs" in checked.stderr


def test_a_run_over_mostly_broken_input_stops_with_a_sentence_and_goes_on_when_told_to(
    wavemill: Wavemill, fitted_root: Path, samples: Path, tmp_path: Path
):
    root = tmp_path / "root"
    assert wavemill("corpus", "build", samples / "broken", "--to", root).returncode == 0
    shutil.copytree(fitted_root / "codebooks", root / "codebooks")
    stopped = wavemill("tokenize", root, "--engine", "inline")
    assert stopped.returncode == 1
    assert "over the limit of 5.0%" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert wavemill("tokenize", root, "--engine", "inline", "--max-error-share", "1").returncode == 0


def test_verify_fails_on_a_flipped_bit(wavemill: Wavemill, finished_root: Path, copy_root: Callable[[Path], Path]):
    root = copy_root(finished_root)
    victim = sorted((root / "streams" / "acoustic").glob("shard-*"))[3]
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 4
    victim.write_bytes(content)
    done = wavemill("verify", root)
    assert done.returncode == 1
    assert victim.name in done.stderr
    assert "NOT WHOLE" in done.stderr


def test_progress_in_a_pipe_is_lines_without_control_characters(
    wavemill: Wavemill, fitted_root: Path, copy_root: Callable[[Path], Path]
):
    done = wavemill("tokenize", copy_root(fitted_root), "--engine", "inline")
    assert "112/112 segments" in done.stderr
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr


def test_a_moved_source_is_found_when_it_is_named(
    wavemill: Wavemill, fitted_root: Path, finished_root: Path, samples: Path, tmp_path: Path
):
    shutil.copytree(samples / "speech", tmp_path / "old" / "speech")
    root = tmp_path / "root"
    assert wavemill("corpus", "build", tmp_path / "old" / "speech", "--to", root).returncode == 0
    shutil.copytree(fitted_root / "codebooks", root / "codebooks")
    os.rename(tmp_path / "old", tmp_path / "new")
    lost = wavemill("tokenize", root, "--engine", "inline")
    assert lost.returncode == 1
    assert "is not there (any more)" in lost.stderr
    assert "--source NAME=FOLDER" in lost.stderr
    found = wavemill("tokenize", root, "--engine", "inline", "--source", f"speech={tmp_path / 'new' / 'speech'}")
    assert found.returncode == 0, found.stderr


def _tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
