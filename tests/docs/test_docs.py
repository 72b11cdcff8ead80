"""The docs say what is so: their commands run on the samples, their tables equal the code, their links lead on."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperCommand, TyperGroup
from wavemill.jobs.cli import main
from wavemill.jobs.console import app
from wavemill.jobs.recipe import Recipe
from wavemill.pipelines.layouts.registry import LAYOUTS, parse_layout
from wavemill.tokenizers.registry import REGISTRY

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "infra" / "docs"
DOCS = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", *sorted(FOLDER.glob("*.md"))]
_SAMPLES = ("en_anna_*", "de_jonas_01.*")

# a block behind `<!-- run -->`, fenced or indented, and every block of Python
_BLOCK = re.compile(
    r"<!-- run -->\n+(?:```sh\n(?P<fenced>.*?)```|(?P<indented>(?:    [^\n]*\n|\n)+))|```python\n(?P<python>.*?)```",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def workplace(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some of the samples, as `speech`, `broken` and `recordings`."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("speech", "recordings"):
        (place / name).mkdir()
        for pattern in _SAMPLES:
            for file in (samples / "speech").glob(pattern):
                shutil.copy(file, place / name)
    shutil.copytree(samples / "broken", place / "broken")
    return place


@pytest.fixture(scope="module")
def read_readme(workplace: Path) -> Path:
    """The workplace after the README's commands, which make the dataset `tokens`."""
    _run_document(REPO / "README.md", workplace)
    return workplace


@pytest.fixture(scope="module")
def labelled(read_readme: Path) -> Path:
    """The workplace with the dataset `labelled` of inputs.md, tokenized, and a file of phones."""
    _run_document(FOLDER / "inputs.md", read_readme)
    shutil.copytree(read_readme / "tokens" / "codebooks", read_readme / "labelled" / "codebooks")
    _run_line("wavemill tokenize labelled --engine inline", read_readme)
    (read_readme / "phones.csv").write_text(
        "file,start_s,end_s,phone\nen_anna_12.wav,0,1.2,AH0\nen_anna_12.wav,1.2,2,B\n"
    )
    return read_readme


def test_what_the_readme_and_the_inputs_page_say_can_be_done(labelled: Path):
    built = {folder.name for folder in (labelled / "r").iterdir()}
    assert {"folder", "glob", "file", "jsonl", "csv", "kaldi", "lhotse", "webdataset", "parquet"} <= built
    assert (labelled / "tokens" / "streams" / "acoustic").is_dir()


@pytest.mark.parametrize(
    "name",
    [
        *("dataset.md", "training.md", "layouts.md"),
        *(
            pytest.param(f"{name}.md", marks=pytest.mark.slow)
            for name in ("recipes", "errors", "tokens", "tokenizers", "lm", "generate")
        ),
    ],
)
def test_what_the_docs_say_can_be_done(name: str, labelled: Path):
    assert _run_document(FOLDER / name, labelled) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_on_ray_train_runs(finished_root: Path, tmp_path: Path):
    [code] = re.findall(r"<!-- run on Ray -->\n```py\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    assert '"/data/tokens"' in code
    (tmp_path / "train.py").write_text(code.replace("/data/tokens", str(finished_root)))
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rank 0: loss" in done.stdout
    assert "rank 1: loss" in done.stdout


def test_tables_that_mirror_the_code_equal_it():
    filled = runpy.run_path(str(FOLDER / "make_tables.py"))["filled"]
    tables = 0
    for document in FOLDER.glob("*.md"):
        text = document.read_text()
        tables += text.count("<!-- table: ")
        assert filled(text) == text, f"{document} is out of date: python infra/docs/make_tables.py"
    assert tables == 7


def test_every_command_and_every_option_of_corpus_build_is_in_the_docs():
    every = "\n".join(document.read_text() for document in DOCS)
    commands = dict(_commands(typer.main.get_command(app), "wavemill"))
    assert len(commands) > 12
    assert [name for name in commands if name not in every] == []
    inputs = (FOLDER / "inputs.md").read_text()
    options = {option for parameter in commands["wavemill corpus build"].params for option in parameter.opts}
    assert sorted(option for option in options if option.startswith("--") and option not in inputs) == ["--json"]


def test_every_section_of_a_recipe_is_in_the_docs():
    text = (FOLDER / "recipes.md").read_text()
    for name in Recipe.model_fields:
        assert re.search(rf"^{name}:", text, re.MULTILINE), name


def test_links_between_the_docs_lead_somewhere():
    links = 0
    for document in DOCS:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if "://" in target:
                continue
            path, _, heading = target.partition("#")
            there = document.parent / path if path else document
            assert there.exists(), f"{document.name}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in headings}, target
            links += 1
    assert links > 10


def test_the_segment_in_the_readme_is_one_of_the_demo_and_can_be_drawn(finished_root: Path, tmp_path: Path):
    line = re.search(r"`(wavemill inspect demo --segment \w+ --png) segment.png`", (REPO / "README.md").read_text())
    assert line is not None
    assert line[1] in (REPO / "Makefile").read_text()
    (tmp_path / "demo").symlink_to(finished_root)  # of the same recordings, under the same names
    _run_line(f"{line[1]} segment.png", tmp_path)
    assert (tmp_path / "segment.png").read_bytes().startswith(b"\x89PNG")


def test_every_tokenizer_that_the_docs_recommend_to_a_system_is_registered():
    section = (FOLDER / "tokenizers.md").read_text().partition("## Which system reads what")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")][2:]
    named = {name for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row)}
    assert len(rows) > 12
    assert named - set(REGISTRY) == set()


def test_every_layout_has_its_section_with_its_command_its_python_and_its_picture():
    text = (FOLDER / "layouts.md").read_text()
    for name, entry in LAYOUTS.items():
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert f"wavemill layout show {entry.example} tokens\n" in section, name
        assert entry.paper in section, name
        picture = re.search(r"!\[.*\]\((layouts/.*\.png)\)", section)
        assert picture is not None, name
        assert picture[1] == f"layouts/{name}.png"
        [python] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        said: dict[str, Any] = {}
        exec(python, said)
        assert said["layout"] == parse_layout(entry.example), name


def test_pictures_in_the_docs_are_small():
    pictures = sorted(FOLDER.rglob("*.png"))
    assert pictures
    assert all(picture.stat().st_size < 200_000 for picture in pictures)


def _commands(command: TyperGroup, path: str) -> Iterator[tuple[str, TyperCommand]]:
    for name, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from _commands(inner, f"{path} {name}")
        else:
            yield f"{path} {name}", inner


def _run_document(document: Path, place: Path) -> int:
    """Run the marked blocks of a document, in order; how many lines and snippets there were."""
    done = 0
    for block in _BLOCK.finditer(document.read_text()):
        if block["python"] is not None:
            _run_python(block["python"], place)
            done += 1
            continue
        lines = (block["fenced"] or block["indented"]).splitlines()
        for line in (line.strip() for line in lines if line.strip()):
            _run_line(line, place)
            done += 1
    return done


def _run_line(line: str, place: Path) -> None:
    """One line of shell: wavemill in this process, on no Ray; anything else by bash."""
    if line.startswith("source "):
        return
    if not line.startswith("wavemill "):
        subprocess.run(["bash", "-euc", line], cwd=place, check=True)
        return
    arguments = shlex.split(line, comments=True)[1:]
    if arguments[0] in ("run", "tokenize") and "--engine" not in arguments:
        arguments += ["--engine", "inline"]
    before, argv = Path.cwd(), sys.argv
    os.chdir(place)
    sys.argv = ["wavemill", *arguments]
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code, line
    finally:
        os.chdir(before)
        sys.argv = argv


def _run_python(code: str, place: Path) -> None:
    before = Path.cwd()
    os.chdir(place)
    try:
        exec(compile(code, "snippet", "exec"), {})
    finally:
        os.chdir(before)
