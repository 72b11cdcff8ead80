"""The command line as a person meets it: the way through. Mistakes are in test_mistakes.py."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from wavemill.storage.schema import FORMAT_VERSION

Wavemill = Callable[..., CompletedProcess[str]]


def sentence(done: CompletedProcess[str], *, status: int = 2) -> str:
    """The one thing that was said on stderr; no traceback, nothing on stdout."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.slow
def test_the_way_from_a_folder_to_tokens_and_back(wavemill: Wavemill, samples: Path, tmp_path: Path):
    root = tmp_path / "tokens"
    built = wavemill(
        "corpus", "build", samples / "speech", "--to", root, "--window", "2s", "--shard-hours", "0.02", "--json"
    )
    assert built.returncode == 0, built.stderr
    counts = json.loads(built.stdout)
    assert counts["skipped"] == {}  # the transcripts lie beside their recordings
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


def test_quarantine_says_why_each_broken_file_has_no_tokens(in_process: Wavemill, finished_root: Path):
    rows = json.loads(in_process("quarantine", finished_root, "--json").stdout)
    assert {row["path"]: row["error"] for row in rows} == {
        "cut_short.wav": "truncated",
        "empty.mp3": "empty",
        "error_page.mp3": "not-audio",
        "not_numbers.wav": "non-finite",
    }
    shown = in_process("quarantine", finished_root)
    assert "web page" in " ".join(shown.stdout.split())


def test_help_is_quick_and_every_command_has_help(wavemill: Wavemill):
    timings = []
    for _ in range(3):
        started = time.monotonic()
        assert wavemill("--help").returncode == 0
        timings.append(time.monotonic() - started)
    print(f"wavemill --help: {min(timings):.2f} s")
    for command in ("run", "tokenize", "doctor", "corpus build", "codebook fit", "recipe init"):
        assert f"wavemill {command}" in wavemill(*command.split(), "--help").stdout
    assert wavemill("--version").stdout.startswith("wavemill ")


def test_a_root_of_another_version_is_refused_and_left_alone(
    in_process: Wavemill, finished_root: Path, samples: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(finished_root)
    for log in root.glob("*/_delta_log/00000000000000000000.json"):
        log.write_text(log.read_text().replace(f'\\"wavemill\\": {FORMAT_VERSION}', '\\"wavemill\\": 1'))
    before = _tree(root)
    for arguments in (["tokenize", root], ["inspect", root], ["corpus", "build", samples / "speech", "--to", root]):
        assert sentence(in_process(*arguments)) == (
            f"Error: {root}/corpus was written in wavemill's table format 1; this version reads format "
            f"{FORMAT_VERSION}. Use the wavemill that wrote it, or another root.\n"
        )
    assert _tree(root) == before


def test_a_codebook_that_changed_under_a_stream_is_refused_by_name(
    in_process: Wavemill, finished_root: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(finished_root)
    refit = in_process("codebook", "fit", root, "mfcc-kmeans", "--replace", "--seed", "7")
    assert refit.returncode == 0, refit.stderr
    said = sentence(in_process("tokenize", root))
    assert re.fullmatch(
        rf'Error: Stream "semantic" in {root} was written with mfcc-kmeans@[0-9a-f]+, this run has mfcc-kmeans@'
        r"[0-9a-f]+ \(codebook differs: [0-9a-f]+ there, [0-9a-f]+ here\)\. Give the new run another stream name, or "
        r"restore the old codebook\.\n",
        said,
    )
    checked = in_process("verify", root)
    assert checked.returncode == 1
    assert "codebook differs" in checked.stderr


def test_a_run_over_mostly_broken_input_stops_with_a_sentence_and_goes_on_when_told_to(
    in_process: Wavemill, fitted_root: Path, samples: Path, tmp_path: Path
):
    root = tmp_path / "root"
    assert in_process("corpus", "build", samples / "broken", "--to", root).returncode == 0
    shutil.copytree(fitted_root / "codebooks", root / "codebooks")
    stopped = in_process("tokenize", root, "--engine", "inline")
    assert stopped.returncode == 1
    assert stopped.stderr.splitlines()[-1].startswith(
        "Error: 4 of 4 segments so far could not be tokenized: over the limit of 5.0% (in this run: truncated 1, "
        "empty 1, not-audio 1, non-finite 1; for example cut_short.wav: "
    )
    assert stopped.stderr.endswith("Mend the input, or raise --max-error-share, and run the command again.\n")
    assert in_process("tokenize", root, "--engine", "inline", "--max-error-share", "1").returncode == 0


def test_verify_fails_on_a_flipped_bit(in_process: Wavemill, finished_root: Path, copy_root: Callable[[Path], Path]):
    root = copy_root(finished_root)
    victim = sorted((root / "streams" / "acoustic").glob("shard-*"))[3]
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 4
    victim.write_bytes(content)
    done = in_process("verify", root)
    assert done.returncode == 1
    assert victim.name in done.stderr
    assert "NOT WHOLE" in done.stderr


@pytest.mark.slow
def test_progress_in_a_pipe_is_lines_without_control_characters(
    wavemill: Wavemill, fitted_root: Path, copy_root: Callable[[Path], Path]
):
    done = wavemill("tokenize", copy_root(fitted_root), "--engine", "inline")
    assert "112/112 segments" in done.stderr
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr


@pytest.mark.slow
def test_a_moved_source_is_found_when_it_is_named(
    in_process: Wavemill, fitted_root: Path, finished_root: Path, samples: Path, tmp_path: Path
):
    shutil.copytree(samples / "speech", tmp_path / "old" / "speech")
    root = tmp_path / "root"
    assert in_process("corpus", "build", tmp_path / "old" / "speech", "--to", root).returncode == 0
    shutil.copytree(fitted_root / "codebooks", root / "codebooks")
    os.rename(tmp_path / "old", tmp_path / "new")
    lost = in_process("tokenize", root, "--engine", "inline")
    assert lost.returncode == 1
    assert lost.stderr.splitlines()[-1] == (
        f"Error: The source folder {tmp_path}/old/speech is not there (any more), so its recordings cannot be read. "
        "Mount it, or say where it is now with --source NAME=FOLDER; then run the command again."
    )
    found = in_process("tokenize", root, "--engine", "inline", "--source", f"speech={tmp_path / 'new' / 'speech'}")
    assert found.returncode == 0, found.stderr


def _tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
