"""Each mistake gets one clear sentence, an exit status, no traceback, and nothing is written. See mistakes.txt."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from random_weights import make_weights
from wavemill.pipelines.error_classes import ERROR_CLASSES
from wavemill.pipelines.layouts.registry import LAYOUTS
from wavemill.pipelines.sources import SOURCE_KINDS
from wavemill.storage.root import Root
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.registry import REGISTRY, describe
from wavemill.tokenizers.tokenizer import TokenizerConfig

Wavemill = Callable[..., CompletedProcess[str]]
MadeOnce = Callable[[str, Callable[[Path], None]], Path]

_LINES = (Path(__file__).parent / "mistakes.txt").read_text().splitlines()
MISTAKES = [
    (line.removeprefix("$ wavemill "), *_LINES[number + 1].split(" ", 1))
    for number, line in enumerate(_LINES)
    if line.startswith("$ wavemill ")
]
_WHAT_FITS = {
    "{kinds}": ", ".join(SOURCE_KINDS),
    "{classes}": ", ".join(ERROR_CLASSES),
    "{tokenizers}": ", ".join(sorted(REGISTRY)),
    "{layouts}": ", ".join(LAYOUTS),
}


@pytest.fixture(scope="session")
def weights(made_once: MadeOnce) -> Path:
    """Small random weights of published tokenizers, and broken ones."""
    return made_once("weights", _put_weights)


@pytest.fixture(scope="session")
def published_root(fitted_root: Path, weights: Path, made_once: MadeOnce) -> Path:
    """`fitted_root` with codebooks for layer 1 of the HuBERT in `weights`: one that fits, one of other dimensions."""

    def make(path: Path) -> None:
        shutil.copytree(fitted_root, path)
        described = describe(TokenizerConfig(tokenizer="hubert-base", weights=str(weights / "hubert"), layer=1))
        assert described.dim is not None
        for name, dim in (("hubert-base", described.dim), ("narrow", described.dim - 1)):
            header = {"tokenizer": "hubert-base", **described.fingerprint}
            content = Codebook(torch.randn(1, 8, dim), header).to_bytes()
            Root(path).write_bytes(f"codebooks/{name}.safetensors", content)

    return made_once("published", make)


def sentence(done: CompletedProcess[str], *, status: int = 2) -> str:
    """The one line that was said on stderr; no traceback, nothing on stdout."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return line.removeprefix("Error: ")


def test_the_table_holds_more_than_a_hundred_mistakes_and_each_sentence_ends():
    assert len(MISTAKES) > 100
    assert len({command for command, _, _ in MISTAKES}) == len(MISTAKES)
    # what to run or a suggestion may come last; all else ends with a full stop
    for command, _, says in MISTAKES:
        assert says.startswith("Error: "), command
        assert says.endswith((".", "?", ")", ')"')) or " See: " in says or ": wavemill " in says, says


@pytest.mark.parametrize(("command", "status", "says"), MISTAKES, ids=[command for command, _, _ in MISTAKES])
def test_a_mistake_gets_this_sentence_and_writes_nothing(
    command: str,
    status: str,
    says: str,
    samples: Path,
    fitted_root: Path,
    finished_root: Path,
    published_root: Path,
    weights: Path,
    tmp_path: Path,
    in_process: Wavemill,
):
    _put_mistaken_files(tmp_path, samples)
    roots = {"{fitted}": fitted_root, "{finished}": finished_root, "{published}": published_root}
    places = {"{tmp}": tmp_path, "{samples}": samples, "{weights}": weights, **roots}
    before = [_tree(path) for path in (tmp_path, weights, *roots.values())]
    done = in_process(*(_filled(argument, places) for argument in shlex.split(command)))
    expected = re.escape(_filled(says.removeprefix("Error: "), {**places, **_WHAT_FITS}))
    expected = expected.replace(r"\{number\}", r"[\d,]+").replace(r"\{hash\}", "[0-9a-f]+")
    assert re.fullmatch(expected, sentence(done, status=int(status)))
    assert [_tree(path) for path in (tmp_path, weights, *roots.values())] == before


@pytest.mark.parametrize(
    ("module", "command", "says"),
    [
        (
            "faiss",
            "codebook fit {fitted} mel-rvq --name b --backend faiss",
            "Fitting a codebook with FAISS needs FAISS, which is not installed: pip install 'wavemill[cpu]' "
            "(or 'wavemill[gpu]' on a machine with a CUDA GPU, never both).",
        ),
        (
            "tokenizers",
            "units fit {finished} semantic",
            "BPE over units needs the package tokenizers. Install it: pip install 'wavemill[models]'.",
        ),
        (
            "matplotlib",
            "inspect {finished} --png {tmp}/use.png",
            "A picture needs matplotlib: pip install 'wavemill[plots]'.",
        ),
    ],
)
def test_a_missing_extra_is_named(
    module: str,
    command: str,
    says: str,
    fitted_root: Path,
    finished_root: Path,
    tmp_path: Path,
    in_process: Wavemill,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, module, None)
    places = {"{tmp}": tmp_path, "{fitted}": fitted_root, "{finished}": finished_root}
    before = _tree(fitted_root)
    assert sentence(in_process(*(_filled(argument, places) for argument in command.split()))) == says
    assert _tree(fitted_root) == before
    assert _tree(tmp_path) == []


@pytest.mark.slow
def test_a_missing_silero_vad_is_named(samples: Path, tmp_path: Path):
    hides = (
        "import importlib.metadata as packages, sys\n"
        "asked = packages.version\n"
        "def version(name):\n"
        "    if name == 'silero-vad': raise packages.PackageNotFoundError(name)\n"
        "    return asked(name)\n"
        "packages.version = version\n"
        "sys.modules['silero_vad'] = None\n"
    )
    done = _run_python(hides, "corpus", "build", samples / "speech", "--to", tmp_path / "root", "--vad")
    assert sentence(done) == "Cutting at pauses needs Silero VAD: pip install 'wavemill[vad]'."
    assert _tree(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that is to be missing")
def test_a_gpu_that_is_not_there_is_named(fitted_root: Path, in_process: Wavemill):
    says = "--device cuda: PyTorch sees no CUDA GPU on this machine. Use --device cpu."
    assert sentence(in_process("tokenize", fitted_root, "--device", "cuda")) == says


def test_an_object_store_without_credentials_is_told(
    samples: Path, tmp_path: Path, in_process: Wavemill, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        (tmp_path / name).touch()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert sentence(in_process("corpus", "build", samples / "speech", "--to", "s3://no-such-bucket/tokens")) == (
        "s3://no-such-bucket/tokens: no credentials for S3 were found. Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or give this machine a role; for a public bucket set FSSPEC_S3_ANON=1."
    )


@pytest.mark.slow  # it is tried for some seconds; test_hub.py has it without the command
def test_a_hub_that_cannot_be_reached_is_told(fitted_root: Path, tmp_path: Path, wavemill: Wavemill):
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    before, hub_id = _tree(fitted_root), REGISTRY["wav2vec2-codes"].weights
    asked = wavemill("tokenize", fitted_root, "--stream", "s=wav2vec2-codes", env=nobody)
    assert sentence(asked) == (
        f"The weights {hub_id} are not on this machine, and the hub cannot be reached. Fetch them where "
        f"there is a network (`hf download {hub_id}`), or name a folder that holds them."
    )
    offline = wavemill("tokenize", fitted_root, "--stream", "s=wav2vec2-codes", env={**nobody, "HF_HUB_OFFLINE": "1"})
    assert "are not on this machine, and the network must not be asked." in sentence(offline)
    assert _tree(fitted_root) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 256 kB; needs the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_told_and_the_same_command_goes_on_when_there_is_space(
    samples: Path, small_disk: Path, in_process: Wavemill
):
    filling = small_disk / "filling"
    filling.write_bytes(bytes(252 << 10))
    command = ("corpus", "build", samples / "broken", "--to", small_disk / "root")
    told = sentence(in_process(*command), status=1)
    assert re.fullmatch(
        r"(No space left on device( \(os error 28\))?( \([^)]*\))?\. What was committed stays; free some space and run "
        r"the command again"  # in a shard's file, or in the table
        r"|Cannot create the table .*: No space left on device \(os error 28\)\. See that there is space and that it "
        r"may be written to, then run again)\.",
        told,
    )
    filling.unlink()
    done = in_process(*command)
    assert done.returncode == 0
    assert "4 new segments" in done.stderr


def test_a_root_that_may_only_be_read_is_told(samples: Path, small_disk: Path, in_process: Wavemill):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert sentence(in_process("corpus", "build", samples / "broken", "--to", small_disk)) == (
        f"Cannot write to the root {small_disk}: Read-only file system. Name a folder that you may write to."
    )


def test_a_manifest_whose_paths_count_from_elsewhere_is_told_at_once(
    fitted_root: Path, tmp_path: Path, in_process: Wavemill
):
    manifest = tmp_path / "list.jsonl"
    manifest.write_text('{"audio_filepath": "clips/a.wav"}\n{"audio_filepath": "clips/b.wav"}\n')
    built = in_process("corpus", "build", manifest, "--to", tmp_path / "root")
    assert built.returncode == 0
    assert built.stderr.splitlines()[-1] == (
        f"Warning: none of the new segments can be read. The first is {tmp_path}/clips/a.wav: missing (the file is not "
        "there). Relative paths in a manifest count from the manifest's own folder."
    )
    shutil.copytree(fitted_root / "codebooks", tmp_path / "root" / "codebooks")
    done = in_process("tokenize", tmp_path / "root", "--engine", "inline")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: 2 of 2 segments so far could not be tokenized: over the limit of 5.0% (in this run: missing 2; for "
        "example clips/a.wav: the file is not there). Mend the input, or raise --max-error-share, and run the command "
        "again."
    )


@pytest.mark.slow
def test_a_bug_is_one_sentence_and_with_debug_a_traceback(tmp_path: Path):
    breaks = "from wavemill.jobs import demo\ndemo.run_demo = lambda to, engine: {}['nothing']\n"
    done = _run_python(breaks, "demo", "--to", tmp_path / "demo")
    assert sentence(done, status=70) == (
        "This is a bug in wavemill: KeyError: 'nothing'. Run again with wavemill --debug and report it."
    )
    shown = _run_python(breaks, "--debug", "demo", "--to", tmp_path / "demo")
    assert shown.returncode == 70
    assert shown.stderr.startswith("Traceback (most recent call last):")
    assert shown.stderr.endswith("KeyError: 'nothing'\n")


def _run_python(before: str, *arguments: str | Path) -> CompletedProcess[str]:
    """The command line in a process of its own, in which some Python is run first."""
    code = f"{before}from wavemill.jobs.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def _filled(text: str, places: Mapping[str, Path | str]) -> str:
    for name, place in places.items():
        text = text.replace(name, str(place))
    return text


def _tree(path: Path) -> list[tuple[str, int, int]]:
    """What lies below a folder: names, and sizes and times of files."""
    found = sorted(path.rglob("*"))
    stats = [(str(file.relative_to(path)), file.stat(), file.is_file()) for file in found]
    return [(name, stat.st_size * is_file, stat.st_mtime_ns * is_file) for name, stat, is_file in stats]


def _put_mistaken_files(folder: Path, samples: Path) -> None:
    """What mistakes.txt calls {tmp}."""
    (folder / "empty").mkdir()
    (folder / "x" / "speech").mkdir(parents=True)
    (folder / "kaldi").mkdir()
    sources = f"corpus:\n  sources: [{samples / 'speech'}]\n"
    source = {"type": "url", "channels": [0], "source": "https://example.org/a.wav"}
    recording = {"id": "r", "sampling_rate": 16_000, "num_samples": 16_000, "duration": 1, "sources": [source]}
    cut = {"id": "c", "type": "MonoCut", "start": 0, "duration": 1, "channel": 0, "recording": recording}
    texts = {
        "file": "a file, not a folder",
        "bad.jsonl": '{"audio_filepath": "x.wav"}\nthis is not JSON\n',
        "nokey.jsonl": '{"audio_filepath": "x.wav"}\n{"text": "x"}\n',
        "url.jsonl": '{"audio_filepath": "https://example.org/a.wav"}\n',
        "offset.jsonl": '{"audio_filepath": "a.wav", "offset": -1}\n',
        "nopath.csv": "name,text\na.wav,hello\n",
        "quote.csv": 'path,text\na.wav,hello\nb.wav,"never closed\n',
        "cells.csv": "path,text\na.wav,hello,world\n",
        "kaldi/wav.scp": "a sph2pipe -f wav a.sph |\n",
        "cuts.jsonl": json.dumps(cut) + "\n",
        "torn.parquet": "PAR1 nothing",
        "a.zip": "PK\3\4",
        "net.txt": "not weights",
        "labels.csv": "file,start_s,end_s,phone\na.wav,0,soon,AA\n",
        "key.yaml": f"{sources}  windw: 30s\n",
        "type.yaml": f"{sources}tokenize:\n  workers: two\n",
        "tab.yaml": "corpus:\n\tsources: [x]\n",
        "nosource.yaml": "root: x\n",
        "gone.yaml": "corpus:\n  sources: [nowhere]\n",
        "layer.yaml": f"{sources}streams:\n  s: {{tokenizer: mfcc-kmeans, layer: 3}}\n",
        "layr.yaml": f"{sources}streams:\n  s: {{tokenizer: mfcc-kmeans, layr: 3}}\n",
        "km.yaml": f"{sources}codebooks:\n  - {{tokenizer: mfcc-kmeans, file: wide.npy}}\n",
        "kmsize.yaml": f"{sources}codebooks:\n  - {{tokenizer: mfcc-kmeans, file: good.npy, size: 9}}\n",
        "books.yaml": f"{sources}codebooks: [{{tokenizer: mel-rvq}}]\n"
        "streams:\n  s: {tokenizer: mfcc-kmeans, codebook: mel-rvq}\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.csv").write_bytes("path,text\na.wav,Grün\n".encode("latin-1"))
    pq.write_table(pa.table({"n": [1], "said": ["x"]}), folder / "plain.parquet")
    pq.write_table(pa.table({"left": [b"x"], "right": [b"y"]}), folder / "two.parquet")
    safetensors.torch.save_file({"weight": torch.zeros(3)}, folder / "other.safetensors")
    arrays = {
        "good": np.ones((5, 39), np.float32),
        "flat": np.ones(39, np.float32),
        "wide": np.ones((5, 40), np.float32),
        "one": np.ones((1, 39), np.float32),
        "nan": np.full((5, 39), np.nan, np.float32),
        "whole": np.ones((5, 39), np.int64),
        "objects": np.array([[None] * 39] * 5, dtype=object),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "torn.npy").write_bytes((folder / "good.npy").read_bytes()[:-9])
    (folder / "km.bin").write_bytes(pickle.dumps(arrays["good"]))
    (folder / "os.pkl").write_bytes(b"\x80\x04cposix\nsystem\n\x8c\x04true\x85R.")
    (folder / "ivf.index").write_bytes(b"IwFl" + bytes(60))


def _put_weights(folder: Path) -> None:
    """What mistakes.txt calls {weights}."""
    encodec = make_weights("encodec-24khz", folder / "encodec", small=True)
    make_weights("hubert-base", folder / "hubert", small=True)
    make_weights("hubert-base", folder / "other", small=True, seed=1)
    for name in ("pickled", "torn", "lacking", "nojson", "rate"):
        shutil.copytree(encodec, folder / name)
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    content = (encodec / "model.safetensors").read_bytes()
    (folder / "torn" / "model.safetensors").write_bytes(content[: len(content) // 2])
    kept = {name: each for name, each in safetensors.torch.load(content).items() if "decoder.layers.0." not in name}
    safetensors.torch.save_file(kept, folder / "lacking" / "model.safetensors", metadata={"format": "pt"})
    (folder / "nojson" / "config.json").write_text("not JSON")
    config = (encodec / "config.json").read_text()
    (folder / "rate" / "config.json").write_text(config.replace("24000", "48000"))
