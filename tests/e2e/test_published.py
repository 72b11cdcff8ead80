"""Published tokenizers through the command line: four families over one corpus, checked, heard, resumed, refused."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import soundfile
from random_weights import make_weights
from wavemill.jobs.cli import main
from wavemill.pipelines.resample import resampled_length
from wavemill.storage.codes import open_stream, stream_spec
from wavemill.storage.root import Root
from wavemill.tokenizers.registry import describe
from wavemill.tokenizers.spec import decoded_samples, num_frames
from wavemill.tokenizers.tokenizer import TokenizerConfig

Wavemill = Callable[..., CompletedProcess[str]]
TOKENIZERS = ("hubert-base", "encodec-24khz", "mimi", "dac-16khz")


def _run(*arguments: str | Path) -> int:
    """The command line in this process; its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before, sys.argv = sys.argv, ["wavemill", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return int(stopped.value.code or 0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Wavemill:
    """Runs a command and holds it to its exit status."""

    def command(*arguments: str | Path, status: int = 0) -> CompletedProcess[str]:
        code = _run(*arguments)
        said = capsys.readouterr()
        assert code == status, said.err
        return CompletedProcess(arguments, code, said.out, said.err)

    return command


@pytest.fixture(scope="module")
def published(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small weights and a root in which one command made a stream of each family."""
    place = tmp_path_factory.mktemp("published")
    for name in TOKENIZERS:
        make_weights(name, place / name, small=True)
    dim = describe(TokenizerConfig(tokenizer="hubert-base", weights=str(place / "hubert-base"), layer=1)).dim
    assert dim is not None
    np.save(place / "km.npy", np.random.default_rng(0).standard_normal((20, dim)))
    root = place / "tokens"
    hubert = ("--weights", place / "hubert-base", "--layer", "1", "--local-files-only")
    sources = [
        f"{name}={samples / 'speech'}/{pattern}" for name, pattern in (("de", "de_frieda_*"), ("en", "en_anna_*"))
    ]
    assert _run("corpus", "build", *sources, "--to", root, "--shard-hours", "0.01") == 0
    assert _run("codebook", "fit", root, "hubert-base", "--size", "20", "--budget", "1MB", *hubert) == 0
    assert _run("codebook", "import", root, place / "km.npy", "hubert-base", "--name", "km", *hubert) == 0
    assert _run("tokenize", root, "--engine", "inline", "--local-files-only", *_streams(place)) == 0
    return place


def _streams(place: Path, **other: Path) -> list[str]:
    """Flags for one stream of each; `other` names weights to take instead."""
    named = (
        f"units=hubert-base,layer=1,weights={other.get('hubert', place / 'hubert-base')}",
        f"encodec=encodec-24khz,num_codebooks=2,weights={other.get('encodec', place / 'encodec-24khz')}",
        f"mimi=mimi,weights={other.get('mimi', place / 'mimi')}",
        f"dac=dac-16khz,num_codebooks=2,weights={other.get('dac', place / 'dac-16khz')}",
    )
    return [argument for stream in named for argument in ("--stream", stream)]


def test_one_command_makes_streams_of_four_families_that_verify_finds_whole(published: Path, run: Wavemill):
    verified = json.loads(run("verify", published / "tokens", "--sample", "3", "--local-files-only", "--json").stdout)
    assert verified["num_problems"] == verified["codes_different"] == 0
    assert verified["tokenized_again"] == 3
    shown = json.loads(run("inspect", published / "tokens", "--json").stdout)
    streams = {stream["stream"]: stream for stream in shown["streams"]}
    assert {name: (each["frame_rate"], each["num_codebooks"]) for name, each in streams.items()} == {
        "units": ("50", 1),
        "encodec": ("75", 2),
        "mimi": ("25/2", 8),
        "dac": ("50", 2),
    }
    assert {stream["segments"] for stream in streams.values()} == {24}
    for stream in streams.values():
        assert stream["errors"] == 0
        assert stream["codebooks"][0]["used_codes"] > 5


def test_tokenizing_again_does_nothing(published: Path, run: Wavemill):
    before = _tree(published / "tokens")
    again = run("tokenize", published / "tokens", "--engine", "inline", "--json", *_streams(published))
    assert json.loads(again.stdout)["shards"] == 0
    assert "Nothing to do" in again.stderr
    assert _tree(published / "tokens") == before


@pytest.mark.parametrize("name", ["hubert", "encodec", "mimi"])
def test_other_weights_under_a_streams_name_are_refused(name: str, published: Path, tmp_path: Path, run: Wavemill):
    tokenizer = {"hubert": "hubert-base", "encodec": "encodec-24khz"}.get(name, name)
    other = make_weights(tokenizer, tmp_path / "other", small=True, seed=1)
    before = _tree(published / "tokens")
    refused = run(
        "tokenize", published / "tokens", "--engine", "inline", *_streams(published, **{name: other}), status=2
    )
    told = refused.stderr.splitlines()[-1]
    if name == "hubert":  # its codebook is the first to know
        assert re.match(r"Error: Codebook hubert-base was fitted on weights [0-9a-f]{16,}, this stream uses ", told)
    else:
        assert re.match(rf'Error: Stream "{name}" in .* \(weights differs: [0-9a-f]+ there, [0-9a-f]+ here\)\.', told)
    assert _tree(published / "tokens") == before


@pytest.mark.parametrize(("stream", "rate"), [("encodec", 24_000), ("mimi", 24_000), ("dac", 16_000)])
def test_sound_of_a_codec_is_as_long_as_the_segment_or_as_its_codes(
    stream: str, rate: int, published: Path, samples: Path, tmp_path: Path, run: Wavemill
):
    spec = stream_spec(open_stream(Root(published / "tokens"), stream))
    decode = ("decode", published / "tokens", "--stream", stream, "--limit", "2", "--to", tmp_path, "--json")
    sounds = json.loads(run(*decode, "--codebooks", "1").stdout)
    assert len(sounds) == 2
    for sound in sounds:
        original = soundfile.info(samples / "speech" / sound["source_path"])
        num_samples = resampled_length(original.frames, original.samplerate, rate)
        decoded = soundfile.info(sound["path"])
        # DAC's odd strides give 8 samples less than whole hops, which may be less than the segment
        assert decoded.frames == min(num_samples, decoded_samples(num_frames(num_samples, spec), spec))
        assert decoded.samplerate == rate
        assert sound["duration_s"] == decoded.frames / rate


@pytest.mark.slow
def test_weights_that_moved_are_found_where_they_are_named(published: Path, tmp_path: Path, run: Wavemill):
    root = tmp_path / "tokens"
    shutil.copytree(published / "tokens", root)
    moved = {name: tmp_path / name / "snapshots" / ("c0ffee" * 6 + "cafe") for name in TOKENIZERS}  # as the hub's cache
    for name, folder in moved.items():
        shutil.copytree(published / name, folder)
    old = published.rename(published.with_name("away"))
    try:
        lost = run("verify", root, "--sample", "1", status=1)
        assert f"stream mimi cannot be tokenized again: There is no folder {published}/mimi" in lost.stderr
        streams = zip(("units", "encodec", "mimi", "dac"), moved.values(), strict=True)
        flags = [argument for stream, folder in streams for argument in ("--weights", f"{stream}={folder}")]
        found = json.loads(run("verify", root, "--sample", "1", "--json", *flags).stdout)
        assert (found["num_problems"], found["tokenized_again"]) == (0, 1)
        decode = ("decode", root, "--stream", "mimi", "--limit", "1", "--to", tmp_path / "wav")
        run(*decode, "--weights", f"mimi={moved['mimi']}")
        wrong = run(*decode, "--weights", f"mimi={moved['encodec-24khz']}", status=2)
        assert "holds a model of type 'encodec'" in wrong.stderr
    finally:
        old.rename(published)


def test_centroids_from_a_file_make_the_units_that_they_say(published: Path, run: Wavemill):
    weights = published / "hubert-base"
    stream = f"imported=hubert-base:km,layer=1,weights={weights}"
    run("tokenize", published / "tokens", "--engine", "inline", "--stream", stream)
    shown = json.loads(run("inspect", published / "tokens", "--json").stdout)
    [imported] = [each for each in shown["streams"] if each["stream"] == "imported"]
    assert (imported["num_codebooks"], imported["codebook_size"]) == (1, 20)
    shutil.rmtree(published / "tokens" / "streams" / "imported")


@pytest.mark.parametrize(
    "tokenizer", [pytest.param(name, marks=() if name == "hubert-base" else pytest.mark.slow) for name in TOKENIZERS]
)
def test_check_holds_a_tokenizer_to_its_promises_on_own_recordings(
    tokenizer: str, published: Path, samples: Path, run: Wavemill
):
    command = ("tokenizers", "check", tokenizer, samples / "speech", "--weights", published / tokenizer, "--limit", "3")
    done = json.loads(run(*command, "--json").stdout)
    assert done["kept"] is True
    assert done["segments"] == 3
    names = {promise["name"] for promise in done["promises"]}
    assert {"same codes again", "same from other memory and order", "same in a batch"} <= names
    assert all(promise["compared"] >= 3 for promise in done["promises"])
    assert done["fast"]["compared"] > 100


def test_check_finds_a_tokenizer_that_breaks_its_promise(samples: Path, run: Wavemill, monkeypatch: pytest.MonkeyPatch):
    from wavemill.tokenizers.mfcc import MfccFeatures

    extract, calls = MfccFeatures.extract, iter(range(10**6))

    def drifts(self: MfccFeatures, waveform_N):
        return extract(self, waveform_N) + next(calls)

    monkeypatch.setattr(MfccFeatures, "extract", drifts)
    done = run("tokenizers", "check", "mfcc-kmeans", samples / "speech", "--limit", "3", status=1)
    assert "NOT KEPT" in done.stdout


def test_a_recipe_names_layer_weights_and_mode_and_reuses_an_imported_codebook(
    published: Path, samples: Path, run: Wavemill
):
    recipe = published / "recipe.yaml"
    recipe.write_text(
        f"root: from-recipe\ncorpus: {{sources: ['de={samples / 'speech'}/de_frieda_0*']}}\n"
        "codebooks:\n  - {tokenizer: hubert-base, layer: 1, weights: hubert-base, file: km.npy}\n"
        "streams:\n"
        "  units: {tokenizer: hubert-base, layer: 1, weights: hubert-base}\n"
        "  sound: {tokenizer: encodec-24khz, weights: encodec-24khz, num_codebooks: 2}\n"
        "tokenize: {engine: inline, local_files_only: true}\n"
    )
    steps = run("recipe", "check", recipe).stdout
    assert (
        f"stream units: hubert-base, layer 1 of {published}/hubert-base, mode exact, with codebook hubert-base" in steps
    )
    assert f"stream sound: encodec-24khz, 2 codebooks of {published}/encodec-24khz, mode exact" in steps
    assert f"codebook hubert-base: is taken from {published}/km.npy for hubert-base, layer 1 of" in steps
    done = json.loads(run("run", recipe, "--json").stdout)
    assert done["tokenize"]["segments"] == 9
    assert done["codebooks"][0]["imported_from"] == "km.npy"
    refused = run("run", recipe, "--set", "codebooks.0.layer=0", status=2)
    assert "was made with layer 1, the recipe says 0" in refused.stderr
    apart = run("run", recipe, "--set", "root=new", "--set", "streams.units.layer=0", status=2)
    assert "streams.units uses layer 0, its codebook 'hubert-base' is made for layer 1." in apart.stderr
    again = json.loads(run("run", recipe, "--json").stdout)
    assert (again["tokenize"]["shards"], again["codebooks"]) == (0, [{"codebook": "hubert-base", "fitted": False}])


def _tree(path: Path) -> dict[str, tuple[int, int]]:
    found = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): (file.stat().st_size, file.stat().st_mtime_ns) for file in found}
