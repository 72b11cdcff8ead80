"""The examples of trainers.md run: those of libraries that are not installed here, where they are."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "infra" / "docs" / "trainers.md"
_BLOCK = re.compile(r"(?:<!-- run with (?P<library>\w+)[^>]*-->\n)?```(?P<kind>python|py)\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = [(found["library"], found["kind"], found["code"]) for found in _BLOCK.finditer(PAGE.read_text())]


@pytest.fixture
def place(finished_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where `tokens` is the samples' dataset, in which we are."""
    (tmp_path / "tokens").symlink_to(finished_root)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*codes: str) -> None:
    names: dict[str, object] = {}
    for code in codes:
        exec(compile(code, str(PAGE), "exec"), names)


def needs(library: str) -> str:
    """The block that needs a library; the test is skipped without it."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    [code] = [code for needed, _, code in BLOCKS if needed == library]
    return code


def test_every_block_is_run():
    assert [kind for library, kind, _ in BLOCKS if library is None] == ["python"] * 3
    assert [library for library, kind, _ in BLOCKS if kind == "py"] == ["accelerate", "lightning"]


@pytest.mark.parametrize("number", range(3))
def test_what_needs_no_other_library_runs(number: int, place: Path):
    run([code for library, _, code in BLOCKS if library is None][number])


@pytest.mark.slow
def test_the_hugging_face_trainer_trains_and_goes_on(place: Path):
    code = needs("accelerate")
    [before] = [code for library, _, code in BLOCKS if library is None and "LlamaForCausalLM" in code]
    run(before, code)
    states = [json.loads((place / f"hf-run/checkpoint-{step}/loader.json").read_text()) for step in (2, 4)]
    assert states[0]["slot"] != states[1]["slot"]


@pytest.mark.slow
def test_lightning_trains_and_goes_on(place: Path):
    run(needs("lightning"))
    assert os.path.exists("lightning-run/last.ckpt")
