"""A recipe: one file from recordings to export, every mistake in it a sentence, every run of it a resume."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from pydantic import BaseModel
from wavemill.jobs import recipe as sections
from wavemill.jobs.cli import main
from wavemill.jobs.recipe_file import default_recipe, load_recipe, recipe_text
from wavemill.pipelines import audio, policy
from wavemill.tokenizers.spec import UserError

Wavemill = Callable[..., CompletedProcess[str]]

SMALL = """
root: tokens
corpus:
  sources: [speech=recordings]
  shard_hours: 0.01
codebooks:
  - {tokenizer: mfcc-kmeans, size: 20}
  - {tokenizer: mel-rvq, size: 16, num_codebooks: 2}
tokenize:
  engine: inline
export:
  - view: plain
"""


MADE_OF_UNITS = """
streams:
  semantic: {tokenizer: mfcc-kmeans}
  runs: {tokenizer: deduplicate, of: semantic}
  joined: {tokenizer: bpe, codebook: pairs, of: runs}
units:
  - {stream: runs, name: pairs, size: 40}
"""


@pytest.fixture
def wavemill_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Wavemill]:
    """Runs the command line in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str | Path) -> CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["wavemill", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return CompletedProcess(arguments, int(stopped.value.code or 0), said.out, said.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def project(tmp_path: Path, samples: Path) -> Path:
    """A folder with a few recordings and a small recipe for them."""
    (tmp_path / "recordings").mkdir()
    for path in _speech(samples)[:6]:
        shutil.copy(path, tmp_path / "recordings")
    (tmp_path / "recipe.yaml").write_text(SMALL)
    return tmp_path


def _speech(samples: Path) -> list[Path]:
    return sorted(path for path in (samples / "speech").rglob("*") if path.suffix != ".txt")


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def _mistake(path: Path, text: str, **arguments: list[str]) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        load_recipe(str(path), **arguments)
    told = str(refused.value)
    assert "\n" not in told
    return told


def _sections() -> list[type[BaseModel]]:
    return [kind for kind in vars(sections).values() if isinstance(kind, type) and issubclass(kind, sections.Section)]


def test_the_commented_recipe_is_valid_and_says_exactly_the_defaults(tmp_path: Path):
    written, short = tmp_path / "written.yaml", tmp_path / "short.yaml"
    written.write_text(recipe_text("written.yaml"))
    short.write_text("corpus:\n  sources: [recordings]\n")
    assert load_recipe(str(written)) == load_recipe(str(short))
    assert load_recipe(str(written)).streams == default_recipe().streams


def test_the_commented_recipe_shows_every_key_with_a_comment():
    lines = recipe_text("recipe.yaml").splitlines()
    shown = {match[1] for line in lines if (match := re.match(r"[ #-]*(\w+):.*  # \S", line))}
    expected = {name for kind in _sections() for name in kind.model_fields}
    assert len(expected) > 40
    in_the_comment_on_sources = {"path", "kind", "text_column", "audio_column"}
    assert expected - shown - in_the_comment_on_sources == set()
    assert any(all(name in line for name in sections.Source.model_fields) for line in lines if "sources:" in line)


def test_what_is_off_in_the_commented_recipe_is_on_once_its_comments_are_taken_away(tmp_path: Path):
    text = re.sub(r"^( *)#  ", r"\1  ", recipe_text("recipe.yaml"), flags=re.MULTILINE)
    text = text.replace("vad: null", "vad:").replace("units: []", "units:").replace("export: []", "export:")
    head, _, body = text.partition("\nroot:")
    (tmp_path / "recipe.yaml").write_text(f"root:{body}")
    loaded = load_recipe(str(tmp_path / "recipe.yaml"))
    assert head
    assert loaded.corpus.vad == sections.Vad()
    assert loaded.units == [sections.Units(stream="semantic")]
    assert loaded.export == [sections.Export()]


@pytest.mark.parametrize(
    ("section", "kind", "filled_in_later"),
    [
        (sections.Vad, policy.VadPolicy, {"model"}),
        (sections.Filters, policy.Filters, set()),
        (sections.Transforms, policy.Transforms, set()),
        (sections.Limits, audio.Limits, set()),
    ],
)
def test_keys_and_defaults_of_a_recipe_are_those_of_the_pipeline(
    section: type[BaseModel], kind: type, filled_in_later: set[str]
):
    ours = section().model_dump()
    theirs = {name: value for name, value in dataclasses.asdict(kind()).items() if name not in filled_in_later}
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in ours.items()} == theirs


def test_a_recipe_becomes_the_policy_that_its_words_say(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "corpus:\n  sources: [a]\n  channels: split\n  vad: {threshold: 0.7}\n"
        "  filters: {languages: [de, 'no'], min_duration_s: 1}\n  transforms: {loudness_lufs: -23}\n"
    )
    assert load_recipe(str(path)).corpus.policy() == policy.CorpusPolicy(
        channels="split",
        vad=policy.VadPolicy(threshold=0.7),
        filters=policy.Filters(languages=("de", "no"), min_duration_s=1),
        transforms=policy.Transforms(loudness_lufs=-23),
    )
    path.write_text("corpus:\n  sources: [a]\n  window: 2.5min\n")
    assert load_recipe(str(path)).corpus.policy().window_s == 150


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("corpus:\n  sources: [a]\n  chanels: mix\n", "line 3: corpus.chanels is unknown; did you mean channels?"),
        ("corpus:\n  sources: [a]\n  zebra: 1\n", "line 3: corpus.zebra is unknown; there are: sources, window"),
        ("root: x\n", "corpus is missing"),
        ("", "corpus is missing"),
        ("corpus:\n  window: 3s\n", "line 1: corpus.sources is missing"),
        ("corpus:\n  sources: []\n", "line 2: corpus.sources is an empty list; expected at least 1"),
        ("corpus:\n  sources: here\n", "line 2: corpus.sources is 'here'; expected a list"),
        ("corpus:\n  sources:\n    - a\n    - {nmae: b, path: c}\n", "line 4: corpus.sources[1].nmae is unknown; did"),
        ("corpus:\n  sources:\n    - {path: a, kind: nemo}\n", "line 3: corpus.sources[0].kind: there is no kind of"),
        ("corpus:\n  sources: [a]\n  deadline: 0s\n", "line 3: corpus.deadline: '0s' is 0 s; accepted are 1 s"),
        ("corpus:\n  sources: [a]\n  channels: left\n", "is 'left'; expected 'mix', 'first' or 'split'"),
        ("corpus:\n  sources: [a]\n  window: soon\n", "line 3: corpus.window: 'soon' is no length of time"),
        ("corpus:\n  sources: [a]\n  window: [1]\n", "line 3: corpus.window: expected a length of time"),
        ("corpus:\n  sources: [a]\n  vad: {threshold: 2}\n", "line 3: corpus.vad: The VAD's threshold is 2; accepted"),
        ("corpus:\n  sources: [a]\n  vad: {threshold: .nan}\n", "corpus.vad.threshold is nan; expected a number"),
        ("corpus:\n  sources: [a]\n  window: 9s\n  vad: {}\n", "Windows and VAD both cut recordings"),
        ("corpus:\n  sources: [a]\n  filters:\n    languages: [en, no]\n", "languages[1] is false; expected text. Put"),
        ("corpus:\n  sources: [a]\n  filters:\n", "line 3: corpus.filters is empty; expected keys and values"),
        ("corpus: {sources: [a]}\ntokenize: {workers: '2'}\n", "tokenize.workers is '2'; expected a whole number"),
        ("corpus: {sources: [a]}\ntokenize: {workers: 0}\n", "line 2: tokenize.workers is 0; expected 1 or more"),
        ("corpus: {sources: [a]}\ntokenize: {any_numerics: 1}\n", "is 1; expected true or false"),
        ("corpus: {sources: [a]}\nstreams: {Big One: {tokenizer: mel-rvq}}\n", "'Big One' cannot name a stream"),
        ("corpus: {sources: [a]}\nstreams: {s: {tokeniser: x}}\n", "tokeniser is unknown; did you mean tokenizer?"),
        ("corpus: {sources: [a]}\ncodebooks:\n  - {tokenizer: a, budget: lots}\n", "'lots' is no number of bytes"),
        ("corpus: {sources: [a]}\ncodebooks:\n  - tokenizer: b\n  - tokenizer: b\n", "line 4: codebooks[1]: two"),
        ("corpus: {sources: [a]}\nexport:\n  - streams: [s, semantic]\n", "line 3: export[0].streams[0]: this recipe"),
        ("corpus: {sources: [a]}\nunits:\n  - {stream: runs}\n", "line 3: units[0].stream: this recipe has no stream"),
        (
            "corpus: {sources: [a]}\nunits: [{stream: semantic}, {stream: acoustic}]\n",
            "units[1].name: two models are called 'bpe'; name them apart.",
        ),
        ("corpus: {sources: [a]}\nexport: [{}, {}]\n", "export[1].view: two exports have the view 'plain'"),
        ("corpus:\n  sources: [a]\n\twindow: 3s\n", "line 3: a tab stands where spaces are expected"),
        ("corpus:\n\tsources: [a]\n", "line 2: a tab stands where spaces are expected"),
        ("corpus:\n  sources: [a]\n window: 3s\n", "line 3: this is not YAML"),
        ("corpus:\n  sources: [a\nroot: b\n", "line 3: this is not YAML"),
        ("corpus: {sources: [a]}\nroot: x\nroot: y\n", "line 3: root is there twice, first in line 2"),
        ("corpus: {sources: [a]}\nno: x\n", "line 2: a key must be text; put no in quotes"),
        ("- corpus\n", "holds a list; a recipe is keys and values"),
        ("corpus: {sources: [a]}\nroot: 2026-13-45\n", "Put it in quotes"),
        ("corpus: {sources: [a]}\nroot: !!python/object:os.system x\n", "line 2: this is not YAML"),
        ("corpus: &c\n  sources: [a]\n  filters: *c\n", "line 1: an alias (*) leads back to where it stands"),
        ("corpus: {sources: [a]}\nroot: \x07\n", "holds characters that YAML does not take"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence_with_file_line_and_key(text: str, expected: str, tmp_path: Path):
    told = _mistake(tmp_path / "recipe.yaml", text)
    assert str(tmp_path / "recipe.yaml") in told
    assert expected in told


def test_aliases_that_grow_without_end_are_refused_at_once(tmp_path: Path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert "over 100,000 keys" in _mistake(tmp_path / "recipe.yaml", bomb)


def test_the_first_of_several_mistakes_is_told_and_the_others_are_counted(tmp_path: Path):
    told = _mistake(tmp_path / "recipe.yaml", "tokenize: {workers: 0, device: 1}\ncorpus: {sources: [a], x: 1}\n")
    assert "line 1: tokenize.workers" in told
    assert "(2 more mistakes after this one.)" in told


def test_values_of_set_and_then_flags_stand_above_the_file(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL)
    loaded = load_recipe(
        str(path),
        sets=[
            "corpus.window=30s",
            "tokenize.workers=2",
            "codebooks.1.size=99",
            "corpus.vad={threshold: 0.6}",
            "corpus.window=null",
            "streams.one={tokenizer: mel-rvq}",
            "export=[]",
            "root=elsewhere",
        ],
        flags={"--workers": ("tokenize.workers", 7), "--engine": ("tokenize.engine", None)},
    )
    assert loaded.corpus.window is None
    assert loaded.corpus.vad == sections.Vad(threshold=0.6)
    assert loaded.codebooks[1].size == 99
    assert loaded.codebooks[0].size == 20
    assert list(loaded.streams) == ["one"]
    assert (loaded.tokenize.workers, loaded.tokenize.engine) == (7, "inline")
    assert loaded.export == []
    assert loaded.root == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("tokenize.worker=2", "--set tokenize.worker=2: tokenize.worker is unknown; did you mean workers?"),
        ("tokenize.workers=many", "--set tokenize.workers=many: tokenize.workers is 'many'; expected a whole number"),
        ("tokenize.workers", "expected KEY=VALUE"),
        ("codebooks.5.size=3", "codebooks is a list with 2 entries in this recipe, numbered from 0; '5' is none"),
        ("root.size=3", "root is 'tokens' in this recipe; it has no keys"),
        ("corpus.window=[", "the value is not YAML"),
        ("corpus={sources: [a], windw: 3s}", "--set corpus={sources: [a], windw: 3s}: corpus.windw is unknown"),
    ],
)
def test_a_mistake_in_set_names_the_flag(argument: str, expected: str, tmp_path: Path):
    assert expected in _mistake(tmp_path / "recipe.yaml", SMALL, sets=[argument])


def test_paths_count_from_the_recipes_folder_wherever_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "odd [name]"
    (folder / "here=there").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        "root: ../tokens\n"
        "corpus:\n"
        "  sources:\n"
        "    - speech=recordings\n"
        "    - here=there\n"
        "    - /data/x\n"
        "    - 's3://bucket/y'\n"
        "    - 'odd=s3://bucket/[z]/../*.wav'\n"
        "    - '**/*.flac'\n"
        "    - {path: sub/../z, name: last}\n"
        "  separate: weights.pt\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe("odd [name]/recipe.yaml")
    assert loaded.root == str(tmp_path / "tokens")
    assert loaded.corpus.separate == str(folder / "weights.pt")
    assert [source.argument() for source in loaded.corpus.sources] == [
        f"speech={folder}/recordings",
        f"{folder}/here=there",
        "/data/x",
        "s3://bucket/y",
        "odd=s3://bucket/[z]/../*.wav",
        f"{tmp_path}/odd [[]name]/**/*.flac",
        f"last={folder}/z",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "corpus.separate=s3://bucket/net.pt",
        "codebooks=[{tokenizer: mfcc-kmeans, file: 's3://key:canary@bucket/km.npy'}]",
    ],
)
def test_weights_and_centroids_are_files_of_this_machine(line: str, tmp_path: Path):
    told = _mistake(tmp_path / "recipe.yaml", SMALL, sets=[line])
    assert "expected a file on this machine" in told
    assert "canary" not in told.removeprefix(f"--set {line}")


def test_init_writes_a_recipe_and_writes_over_nothing_unless_told_to(wavemill_here: Wavemill, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    assert wavemill_here("recipe", "init", path).returncode == 0
    assert path.read_text() == recipe_text("mine.yaml")
    path.write_text("precious")
    refused = wavemill_here("recipe", "init", path)
    assert refused.returncode == 2
    assert "is there already" in refused.stderr
    assert path.read_text() == "precious"
    assert wavemill_here("recipe", "init", path, "--force").returncode == 0
    assert path.read_text() == recipe_text("mine.yaml")


def test_a_run_makes_the_dataset_and_the_same_run_again_changes_no_byte(wavemill_here: Wavemill, project: Path):
    first = wavemill_here("run", project / "recipe.yaml", "--json")
    assert first.returncode == 0, first.stderr
    assert first.stderr.splitlines()[-1] == f"The dataset is in {project / 'tokens'}"
    summary = json.loads(first.stdout)
    assert summary["corpus"]["new"] == summary["tokenize"]["segments"] == summary["export"][0]["samples"] == 6
    assert [each["fitted"] for each in summary["codebooks"]] == [True, True]
    shown = json.loads(wavemill_here("inspect", project / "tokens", "--json").stdout)
    assert {stream["stream"]: stream["segments"] for stream in shown["streams"]} == {"semantic": 6, "acoustic": 6}
    assert json.loads(wavemill_here("verify", project / "tokens", "--json").stdout)["num_problems"] == 0
    before = _tree(project)
    again = wavemill_here("run", project / "recipe.yaml", "--json")
    assert again.returncode == 0, again.stderr
    assert "exported already" in again.stderr
    summary = json.loads(again.stdout)
    assert (summary["corpus"]["new"], summary["tokenize"]["shards"]) == (0, 0)
    assert not any(each["fitted"] for each in summary["codebooks"])
    assert _tree(project) == before


def test_a_run_after_more_recordings_does_only_these_and_leaves_an_old_view_as_it_was(
    wavemill_here: Wavemill, project: Path, samples: Path
):
    assert wavemill_here("run", project / "recipe.yaml").returncode == 0
    view = _tree(project / "tokens" / "webdataset")
    books = _tree(project / "tokens" / "codebooks")
    for path in _speech(samples)[6:8]:
        shutil.copy(path, project / "recordings")
    refused = wavemill_here("run", project / "recipe.yaml")
    assert refused.returncode == 2
    assert "was exported from versions corpus" in refused.stderr
    assert "give export[0].view another name" in refused.stderr
    assert _tree(project / "tokens" / "webdataset") == view
    grown = wavemill_here("run", project / "recipe.yaml", "--set", "export.0.view=second", "--json")
    assert grown.returncode == 0, grown.stderr
    summary = json.loads(grown.stdout)
    assert (summary["corpus"]["known"], summary["corpus"]["new"]) == (8, 0)  # the refused run had done the rest
    assert summary["export"][0]["samples"] == 8
    assert _tree(project / "tokens" / "codebooks") == books


@pytest.mark.slow
def test_a_view_that_lost_a_tar_is_written_again_with_the_same_bytes(wavemill_here: Wavemill, project: Path):
    assert wavemill_here("run", project / "recipe.yaml").returncode == 0
    tar = next((project / "tokens" / "webdataset" / "plain").glob("*.tar"))
    content = tar.read_bytes()
    tar.unlink()
    done = wavemill_here("run", project / "recipe.yaml", "--json")
    assert json.loads(done.stdout)["export"][0]["written"] is True
    assert tar.read_bytes() == content


def test_a_run_that_stopped_at_too_many_errors_goes_on_when_told_to(
    wavemill_here: Wavemill, project: Path, samples: Path
):
    shutil.copytree(samples / "broken", project / "broken")
    (project / "recipe.yaml").write_text(SMALL.replace("[speech=recordings]", "[speech=recordings, broken]"))
    stopped = wavemill_here("run", project / "recipe.yaml")
    assert stopped.returncode == 1
    assert "over the limit of 5.0%" in stopped.stderr
    done = wavemill_here("run", project / "recipe.yaml", "--set", "tokenize.max_error_share=1", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["corpus"]["new"] == 0
    assert summary["export"][0]["samples"] == 6
    assert summary["export"][0]["left_out"] == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("tokenizer: mel-rvq", "tokenizer: mel-rqv"), "There is no tokenizer 'mel-rqv'"),
        (("  - {tokenizer: mfcc-kmeans, size: 20}\n", ""), "streams.semantic needs the codebook 'mfcc-kmeans'"),
        (("tokenize:\n", "streams: {s: {tokenizer: mel-rvq, codebook: mfcc-kmeans}}\ntokenize:\n"), "is one for 'mfcc"),
        (("=recordings", "=recordigns"), "corpus.sources[0]: there is no file or folder"),
        (("  shard_hours", "  separate: none.pt\n  shard_hours"), "corpus.separate: there is no file"),
        (("engine: inline", "device: tpu"), "'tpu' is unknown"),
    ],
)
def test_what_would_stop_a_run_later_is_told_before_anything_is_written(
    change: tuple[str, str], expected: str, wavemill_here: Wavemill, project: Path
):
    (project / "recipe.yaml").write_text(SMALL.replace(*change))
    for command in (["run"], ["recipe", "check"]):
        refused = wavemill_here(*command, project / "recipe.yaml")
        assert refused.returncode == 2
        assert refused.stdout == ""
        assert expected in refused.stderr
    assert not (project / "tokens").exists()


def test_a_codebook_that_is_there_is_kept_but_not_passed_off_as_another(wavemill_here: Wavemill, project: Path):
    assert wavemill_here("run", project / "recipe.yaml").returncode == 0
    before = _tree(project / "tokens")
    refused = wavemill_here("run", project / "recipe.yaml", "--set", "codebooks.1.size=32")
    assert refused.returncode == 2
    assert "was made with size 16, the recipe says 32" in refused.stderr
    assert _tree(project / "tokens") == before
    (project / "recipe.yaml").write_text(SMALL.replace(", size: 16, num_codebooks: 2", ""))
    assert wavemill_here("run", project / "recipe.yaml").returncode == 0
    assert _tree(project / "tokens") == before


def test_units_are_fitted_between_the_streams_that_they_are_made_of_and_those_that_need_them(
    wavemill_here: Wavemill, project: Path
):
    recipe = project / "recipe.yaml"
    recipe.write_text(SMALL + MADE_OF_UNITS)
    steps = wavemill_here("recipe", "check", recipe).stdout
    assert "units pairs: fitted on runs, 40 tokens" in steps
    done = wavemill_here("run", recipe, "--json")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("[")]
    steps = [line.partition(":")[0] for line in told[2:]]
    assert steps == ["[3/6] tokenize", "[4/6] units", "[5/6] tokenize", "[6/6] export"]
    assert told[4] == "[5/6] tokenize: joined=bpe"
    [story] = json.loads(done.stdout)["units"]
    assert (story["model"], story["size_asked_for"]) == ("pairs", 40)
    assert json.loads(wavemill_here("verify", project / "tokens", "--json").stdout)["num_problems"] == 0
    before = _tree(project)
    again = wavemill_here("run", recipe, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["units"] == []
    assert _tree(project) == before
    refused = wavemill_here("run", recipe, "--set", "units.0.size=50")
    assert refused.returncode == 2
    assert "'pairs' in" in refused.stderr
    assert "was fitted with size_asked_for 40, the recipe says 50" in refused.stderr


def test_units_that_are_fitted_on_what_needs_them_are_refused(wavemill_here: Wavemill, project: Path):
    (project / "recipe.yaml").write_text(SMALL + MADE_OF_UNITS.replace("stream: runs", "stream: joined"))
    refused = wavemill_here("run", project / "recipe.yaml")
    assert "Error: units: the model 'pairs' is fitted on stream 'joined', which needs it." in refused.stderr
    assert not (project / "tokens").exists()


def test_check_says_what_a_run_would_do_and_writes_nothing(wavemill_here: Wavemill, project: Path):
    before = _tree(project)
    told = wavemill_here("recipe", "check", project / "recipe.yaml")
    assert told.returncode == 0, told.stderr
    for expected in ("a new folder", "speech=", "codebook mel-rvq: is fitted", "stream semantic", "view plain"):
        assert expected in told.stdout
    assert _tree(project) == before
    assert wavemill_here("run", project / "recipe.yaml").returncode == 0
    told = wavemill_here("recipe", "check", project / "recipe.yaml", "--json")
    steps = "\n".join(json.loads(told.stdout)["steps"])
    assert "6 segments at corpus version" in steps
    assert "mel-rvq: there already, 2 x 16, kept" in steps
    assert "plain of semantic, acoustic was exported from versions corpus" in steps


@pytest.mark.slow
def test_flags_stand_above_the_recipe_and_the_recipe_above_the_environment(
    wavemill_here: Wavemill, wavemill: Wavemill, project: Path, samples: Path
):
    recipe, root = project / "recipe.yaml", project / "other"
    assert wavemill_here("run", recipe, "--to", root).returncode == 0
    assert not (project / "tokens").exists()
    shutil.copy(_speech(samples)[6], project / "recordings")

    def asked_for(*arguments: str) -> str:
        environment = {"RAY_ADDRESS": "127.0.0.1:2"}
        done = wavemill("run", recipe, "--to", root, "--engine", "ray", *arguments, env=environment)
        assert done.returncode == 1
        return re.findall(r"Nobody answers at the Ray address ([\d.:]+):", done.stderr)[0]

    assert asked_for() == "127.0.0.1:2"
    recipe.write_text(SMALL.replace("engine: inline", "address: 127.0.0.1:1"))
    assert asked_for() == "127.0.0.1:1"
    assert asked_for("--address", "127.0.0.1:3") == "127.0.0.1:3"


def test_help_of_the_commands_reads_no_yaml_and_no_pydantic(wavemill: Wavemill):
    for command in (["run"], ["recipe", "init"], ["recipe", "check"], ["doctor"]):
        assert "Usage" in wavemill(*command, "--help").stdout
    code = (
        "import sys, wavemill.jobs.cli; print([name for name in ('yaml', 'pydantic', 'torch') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
