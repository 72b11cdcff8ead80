"""`wavemill generate`: recordings continued by small runs of each kind, and what it says to runs that do not fit."""

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from layout_roots import make_layout_root
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.generate import GenerateOptions, generate
from wavemill.jobs.lm.drawing import Drawer, Sampling
from wavemill.jobs.lm.generate import WAYS, Asked, Trained, way_of
from wavemill.jobs.lm.model import ModelConfig
from wavemill.jobs.lm.objectives import Objective
from wavemill.jobs.lm.prompts import Prompt, read_prompt, spoken
from wavemill.jobs.lm.registry import objective_of
from wavemill.jobs.lm.sameness import entropy_bits, longest_repeat
from wavemill.jobs.lm.settings import Record, Split, TrainSettings
from wavemill.jobs.lm.train import Means
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.jobs.train_lm import train_lm
from wavemill.pipelines.layouts.registry import parse_layout
from wavemill.pipelines.streams import StreamConfig
from wavemill.storage.codes import open_corpus, open_stream, read_codes, stream_spec
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.spec import FrameRule, UserError
from wavemill.tokenizers.tokenizer import Output, TokenizerConfig, Tokens

CLI = Callable[..., subprocess.CompletedProcess[str]]
MadeOnce = Callable[[str, Callable[[Path], None]], Path]
STAGES = ("semantic", "coarse", "fine")
LAYOUTS = {
    "semantic": "semantic:stream=semantic,ends=true",
    "coarse": "coarse:semantic=semantic,acoustic=acoustic,codebooks=2",
    "fine": "fine:acoustic=acoustic,coarse=2,codebooks=3",
    "stages": "stages:semantic=semantic,acoustic=acoustic,coarse=1,codebooks=3",
    "flatten": "flatten:stream=acoustic,codebooks=2",
    "delay": "delay:stream=acoustic,codebooks=3,ends=true",
    "parallel": "parallel:stream=acoustic",
    "vall-e": "vall-e:text=text,acoustic=acoustic",
    "vall-e-nar": "vall-e-nar:text=text,acoustic=acoustic,codebooks=3",
    "soundstorm": "soundstorm:semantic=semantic,acoustic=acoustic,codebooks=3",
    "continuous": "continuous:stream=mels",
    "units": "flatten:stream=semantic",
}
MakeRun = Callable[..., str]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Trains a small model for a step or two, each once."""
    folder = tmp_path_factory.mktemp("runs")

    def run(root: Path, name: str, *, called: str = "small", **changes: Any) -> str:
        path = folder / f"{root.parent.name}-{called}-{name}"
        settings = TrainSettings(
            root=str(root),
            **{
                "layout": LAYOUTS[name],
                "model": ModelConfig(dim=16, num_layers=1, num_heads=2),
                "steps": 1,
                "batch_size": 4,
                "length": 512,
                "warmup": 0,
                "held_out_batches": 2,
                **changes,
            },
        )
        if not path.exists():
            train_lm(settings, str(path), Means())
        return str(path)

    return run


@pytest.fixture
def prompt(samples: Path) -> str:
    return str(samples / "speech" / "en_grace_12.flac")


def sound(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0]


def test_three_stages_go_on_from_a_recording_for_as_long_as_they_are_told_to(
    finished_root: Path, make_run: MakeRun, prompt: str, tmp_path: Path, in_process: CLI
):
    models = [argument for name in STAGES for argument in ("--model", make_run(finished_root, name))]
    asked = (prompt, *models, "--prompt-seconds", "0.61", "--seconds", "0.8", "--json")
    done = in_process("generate", *asked, "--to", str(tmp_path / "a.wav"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(sound(tmp_path / "a.wav")) == report["samples"] == round(1.41 * 16_000)
    assert report["prompt_s"] == pytest.approx(0.61, abs=1e-4)
    assert report["made_s"] == pytest.approx(0.8, abs=1e-4)
    assert report["frames"] == -(-round(1.41 * 16_000) // 320) - -(-round(0.61 * 16_000) // 320)
    assert [(each["stream"], each["codebook"]) for each in report["codebooks"]] == [
        ("semantic", 0),
        *(("acoustic", book) for book in range(3)),
    ]
    for each in report["codebooks"]:
        assert 0 < each["bits"] <= np.log2(each["frames"])
        assert 0 < each["held_out_bits"] <= np.log2(each["frames"])
        assert each["held_out_bits"] < each["held_out_bits_of_all"]
        assert 0 <= each["repeat"] <= each["frames"] // 2
    again = in_process("generate", *asked[:-1], "--to", str(tmp_path / "b.wav"))
    assert (tmp_path / "b.wav").read_bytes() == (tmp_path / "a.wav").read_bytes()
    assert again.stderr.splitlines()[-1] == f"Wrote {tmp_path / 'b.wav'}: 0.61 s of the prompt, then 0.80 s."
    assert [line.split()[0] for line in again.stdout.splitlines()[1:5]] == [
        *("semantic.0", "acoustic.0", "acoustic.1", "acoustic.2")
    ]


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_three_stages_that_have_learnt_go_on_from_an_unseen_recording_as_recordings_do(
    finished_root: Path, make_run: MakeRun, tmp_path: Path
):
    learning = {
        "model": ModelConfig(dim=96, num_layers=2, num_heads=4, dropout=0.1),
        "batch_size": 8,
        "warmup": 20,
        "evaluate_every": 50,
        "held_out_batches": 32,
        "called": "learnt",
    }
    fast, slow = {"steps": 150, "learning_rate": 3e-3}, {"steps": 200, "learning_rate": 1e-3}
    kinds = {"semantic": fast, "coarse": fast, "fine": slow | {"layout": f"{LAYOUTS['fine']},piece=50"}}
    runs = [make_run(finished_root, name, **learning, **kind) for name, kind in kinds.items()]
    for run in runs:
        report = json.loads((Path(run) / "report.json").read_text())
        assert report["best_held_out_loss"] < report["baseline_loss"]
    options = GenerateOptions(seconds=4.0, prompt_seconds=1.5)
    report = generate(unseen_recording(finished_root, runs), str(tmp_path / "out.wav"), runs, options)
    assert report["frames"] == 200
    for each in report["codebooks"]:
        assert 0.5 * each["held_out_bits"] < each["bits"] < 1.5 * each["held_out_bits"], each
        assert each["repeat"] < each["frames"] // 3, each  # a loop's is half of all
    made = sound(tmp_path / "out.wav")[round(1.5 * 16_000) :]
    assert np.sqrt(np.mean(made**2)) > 0.005


def unseen_recording(root: Path, runs: list[str]) -> str:
    """The longest recording of which no run has learnt any part."""
    corpus = open_corpus(Root(root))
    last = {json.loads((Path(run) / "run.json").read_text())["split"]["last"] for run in runs}
    rows = [
        row
        for shard in corpus.files
        for row in read_parquet(Root(root), corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
        if row["id"] <= min(last) and row["error"] is None
    ]
    row = max(rows, key=lambda row: row["duration_s"])
    return str(Path(row["source_root"]) / row["path"])


@pytest.fixture(scope="module")
def every_root(made_once: MadeOnce, samples: Path, fitted_root: Path) -> Path:
    """A dataset with text and frames of numbers that know the way back to sound."""

    def make(path: Path) -> None:
        root = make_layout_root(path, samples, fitted_root / "codebooks")
        mels = TokenizerConfig(tokenizer="mel-rvq", output=Output.FEATURES)
        tokenize(Root(root), [StreamConfig(name="mels", tokenizer=mels)], InlineEngine, TokenizeOptions())

    return made_once("generating", make) / "root"


@pytest.mark.slow
@pytest.mark.parametrize("names", [way.layouts for way in WAYS], ids=" ".join)
def test_every_way_gives_the_same_sound_of_the_length_asked_for(
    names: tuple[str, ...], every_root: Path, make_run: MakeRun, prompt: str, tmp_path: Path
):
    runs = [make_run(every_root, name, length=600, held_out_batches=32) for name in names]
    options = GenerateOptions(seconds=0.7, prompt_seconds=0.5, sampling=Sampling(temperature=0.9, top_k=50))
    num_samples = 19_200
    if "vall-e" in names:
        options = dataclasses.replace(options, text="two things", prompt_text="the fox")
    if names == ("soundstorm",):
        options = dataclasses.replace(options, seconds=None)
        info = soundfile.info(prompt)
        num_samples = -(-info.frames * 16_000 // info.samplerate)
    reports = [generate(prompt, str(tmp_path / f"{number}.wav"), runs, options) for number in range(2)]
    assert (tmp_path / "0.wav").read_bytes() == (tmp_path / "1.wav").read_bytes()
    assert len(sound(tmp_path / "0.wav")) == reports[0]["samples"]
    if not reports[0]["ended"]:
        assert reports[0]["samples"] == num_samples
    assert reports[0]["codebooks"] == reports[1]["codebooks"]
    assert (reports[0]["codebooks"] == []) is (names == ("continuous",))


def test_a_prompt_has_the_very_tokens_that_the_dataset_has_of_it(finished_root: Path, samples: Path):
    root = Root(finished_root)
    rows = {}
    for name in ("semantic", "acoustic"):
        snapshot = open_stream(root, name)
        codes = read_codes(root, snapshot, 0)
        rows[name] = dict(zip(codes.ids, map(codes.codes, range(len(codes.ids))), strict=True)), snapshot.version
    corpus = open_corpus(root)
    row = read_parquet(root, corpus.path(0), schema=CORPUS_SCHEMA).to_pylist()[0]
    versions = {name: version for name, (_, version) in rows.items()}
    read = read_prompt(str(Path(row["source_root"]) / row["path"]), root, versions)
    for name, (codes, _) in rows.items():
        np.testing.assert_array_equal(read.tokens[name].codes_KT.numpy(), codes[row["id"]])
        spec = stream_spec(open_stream(root, name))
        assert read.frames_of(read.num_samples, spec) == read.tokens[name].num_frames


def test_what_is_said_in_a_prompt_stands_beside_it_or_is_told(samples: Path, tmp_path: Path):
    recording = samples / "speech" / "en_anna_12.wav"
    written = recording.with_suffix(".txt").read_text().strip()
    assert spoken(str(recording), None, " and more ") == f"{written} and more"
    assert spoken(str(recording), "told", "and more") == "told and more"
    shutil.copy(recording, tmp_path / "bare.wav")
    with pytest.raises(UserError, match=r"there is no bare\.txt beside it\. Say it with --prompt-text\."):
        spoken(str(tmp_path / "bare.wav"), None, "and more")


def test_prompts_that_cannot_be_gone_on_from_are_said(
    finished_root: Path, make_run: MakeRun, prompt: str, tmp_path: Path
):
    run, out = make_run(finished_root, "delay"), str(tmp_path / "out.wav")
    (tmp_path / "noise.wav").write_bytes(b"this is no recording at all" * 40)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    for path, says in (
        ("nowhere.wav", "There is no recording '.*nowhere.wav' to go on from"),
        ("noise.wav", r"noise.wav cannot be read: not-audio \("),
        ("none.wav", r"none.wav cannot be read: no-samples \("),
    ):
        with pytest.raises(UserError, match=says):
            generate(str(tmp_path / path), out, [run], GenerateOptions())
    runs = [make_run(finished_root, name) for name in STAGES]
    with pytest.raises(UserError, match=r"too short: its 0.010 s have no frame of stream 'semantic'. Give a longer"):
        generate(prompt, out, runs, GenerateOptions(prompt_seconds=0.01))
    assert not Path(out).exists()


def test_runs_of_another_dataset_or_of_streams_that_were_made_anew_are_refused(
    finished_root: Path, make_run: MakeRun, copy_root: Callable[[Path], Path], prompt: str, tmp_path: Path
):
    out = str(tmp_path / "out.wav")
    moved, runs = copy_root(finished_root), [make_run(finished_root, name) for name in STAGES]
    shutil.copytree(runs[2], tmp_path / "other")
    told = json.loads((tmp_path / "other" / "run.json").read_text())
    told["settings"]["root"] = str(moved)
    (tmp_path / "other" / "run.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"The runs were trained on several datasets: .*--root where it is"):
        generate(prompt, out, [*runs[:2], str(tmp_path / "other")], GenerateOptions())
    kept = (moved / "codebooks" / "mel-rvq.safetensors").read_bytes()
    codebook = Codebook.from_bytes(kept, name="mel-rvq")
    centroids_QCD = codebook.centroids_QCD.clone()
    centroids_QCD[0, 0] += 1
    other = Codebook(centroids_QCD, codebook.header).to_bytes()
    (moved / "codebooks" / "mel-rvq.safetensors").write_bytes(other)
    with pytest.raises(UserError, match=r'Stream "acoustic" in .* was written with .* \(codebook differs'):
        generate(prompt, out, runs, GenerateOptions(root=str(moved)))
    log = moved / "streams" / "acoustic" / "_delta_log" / f"{0:020d}.json"
    before = open_stream(Root(moved), "acoustic").table_id
    log.write_text(log.read_text().replace(before, "0" * 8 + before[8:]))
    with pytest.raises(UserError, match=r"are others than those that .* was trained on: they were made anew since"):
        generate(prompt, out, [str(tmp_path / "other"), *runs[:2]], GenerateOptions(root=str(moved)))
    assert not Path(out).exists()


def test_a_stream_without_a_decoder_is_refused(finished_root: Path, make_run: MakeRun, prompt: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"Stream 'semantic' \(mfcc-kmeans\) has no way back to sound"):
        generate(prompt, str(tmp_path / "out.wav"), [make_run(finished_root, "units")], GenerateOptions())


def test_text_is_asked_for_where_it_is_needed_and_only_there(
    finished_root: Path, make_run: MakeRun, prompt: str, tmp_path: Path
):
    with pytest.raises(UserError, match="Runs of delay take no text: leave out --text"):
        generate(
            prompt, str(tmp_path / "a.wav"), [make_run(finished_root, "delay")], GenerateOptions(text="two things")
        )


@pytest.mark.slow
def test_what_a_way_cannot_be_asked_for_is_said(finished_root: Path, make_run: MakeRun, prompt: str, tmp_path: Path):
    def says(runs: list[str], **options: Any) -> str:
        with pytest.raises(UserError) as told:
            generate(prompt, str(tmp_path / "out.wav"), runs, GenerateOptions(**options))
        assert not (tmp_path / "out.wav").exists()
        return str(told.value)

    storm = [make_run(finished_root, "soundstorm")]
    assert "give a recording another sound, and no end: leave out --seconds" in says(storm, seconds=1.0)
    assert "100 s of it are to stay as they are: nothing is left to make" in says(storm, prompt_seconds=100.0)
    texts = {"vall-e": "vall-e:text=semantic,acoustic=acoustic"}
    texts["vall-e-nar"] = "vall-e-nar:text=semantic,acoustic=acoustic,codebooks=2"
    spoken_runs = [make_run(finished_root, name, layout=layout, called="heard") for name, layout in texts.items()]
    assert "say what they are told to: give --text." in says(spoken_runs)
    asked = {"text": "two things", "prompt_seconds": 0.5}
    assert "say what is said in it with --prompt-text." in says(spoken_runs, **asked)
    assert "(mfcc-kmeans) is heard, not written" in says(spoken_runs, **asked, prompt_text="the fox")


def test_a_stream_without_a_clock_cannot_be_continued_by_seconds(finished_root: Path):
    run = trained("flatten:stream=acoustic", finished_root)
    read = Prompt(path="a.wav", num_samples=16_000, sample_rate=16_000, tokens={}, tokenizers={})
    assert read.samples_after(0.5) == 24_000
    spec = run.record.specs["acoustic"]
    assert read.frames_of(24_000, spec) == 75
    merged = dataclasses.replace(spec, frame_rule=FrameRule.FREE)
    run = dataclasses.replace(run, record=dataclasses.replace(run.record, specs={"acoustic": merged}))
    read = dataclasses.replace(read, tokens={"acoustic": Tokens(codes_KT=torch.zeros(8, 5, dtype=torch.int64))})
    drawer = Drawer(sampling=Sampling(), generator=torch.Generator())
    with pytest.raises(UserError, match="of the flatten run has no clock: nobody knows how long its units last"):
        way_of([run]).go({"flatten": run}, read, Asked(num_samples=24_000, given_samples=16_000), drawer)


def trained(layout: str, root: Path, objective: str | None = None) -> Trained:
    """A run as far as one needs it to know what it goes with."""
    parsed = parse_layout(layout)
    specs = {name: stream_spec(open_stream(Root(root), name)) for name in ("semantic", "acoustic")}
    plan = parsed.plan({name: specs[name] for name in parsed.streams})
    record = Record(
        settings=TrainSettings(root=str(root), layout=layout),
        objective=objective or objective_of(parsed, plan),
        split=Split(column="id", spans=[("", "0")]),
        versions={},
        specs=specs,
    )
    return Trained(folder="RUN", record=record, layout=parsed, plan=plan, objective=Objective())


@pytest.mark.parametrize(
    ("layouts", "says"),
    [
        (
            ["semantic:stream=semantic"],
            r"Runs of semantic lack a run of coarse \+ fine or soundstorm: name it with another --model\.",
        ),
        (
            ["fine:acoustic=acoustic", "semantic:stream=semantic"],
            r"Runs of fine \+ semantic lack a run of coarse: name",
        ),
        (["masked:stream=semantic"], r"Runs of masked cannot go on from a recording together; what can: semantic \+ "),
        (["delay:stream=acoustic"] * 2, r"Runs of delay \+ delay cannot go on from a recording together"),
        (
            ["semantic:stream=acoustic", "soundstorm:semantic=semantic,acoustic=acoustic"],
            "of different semantic streams: semantic has 'acoustic', soundstorm has 'semantic'. Name runs",
        ),
        (
            [
                "semantic:stream=semantic",
                "coarse:semantic=semantic,acoustic=acoustic,codebooks=2",
                "fine:acoustic=acoustic,coarse=3",
            ],
            r"The coarse run makes 2 codebook\(s\), the fine run takes 3. Name runs of the same number.",
        ),
    ],
)
def test_runs_that_do_not_go_together_are_told_what_is_missing(layouts: list[str], says: str, finished_root: Path):
    with pytest.raises(UserError, match=says):
        way_of([trained(layout, finished_root) for layout in layouts])


def test_a_run_that_has_learnt_something_else_than_its_layout_is_for_is_refused(finished_root: Path):
    layout = "soundstorm:semantic=semantic,acoustic=acoustic"
    assert way_of([trained(layout, finished_root)]).keeps_length
    with pytest.raises(UserError, match=r"was trained with objective parallel; .* it takes soundstorm"):
        way_of([trained(layout, finished_root, objective="parallel")])


def test_entropy_and_repeats_tell_a_loop_from_what_does_not_repeat():
    rng = np.random.default_rng(0)
    random = rng.integers(50, size=200)
    assert longest_repeat(random) < 5
    assert longest_repeat(np.tile(random[:10], 20)) == 100
    assert longest_repeat(np.zeros(7, dtype=np.int64)) == 3
    assert longest_repeat(np.array([1, 2, 3, 4, 1, 2, 3, 5])) == 3
    assert longest_repeat(np.array([1, 2, 1])) == 1
    assert longest_repeat(np.zeros(0, dtype=np.int64)) == 0
    assert entropy_bits(np.arange(8)) == 3
    assert entropy_bits(np.zeros(8, dtype=np.int64)) == 0
    assert entropy_bits(np.zeros(0, dtype=np.int64)) == 0
