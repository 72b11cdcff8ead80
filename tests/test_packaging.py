"""The wheel holds all that is ours, and every module imports from it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("jobs", "pipelines", "storage", "tokenizers")


def test_the_wheel_holds_every_module_and_the_samples_and_imports(tmp_path: Path):
    source = tmp_path / "source"
    for folder in FOLDERS:
        shutil.copytree(REPO / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", source]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "Package would be ignored" not in built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        names = set(archive.namelist())
    expected = [
        path.relative_to(source).as_posix()
        for folder in FOLDERS
        for path in (source / folder).rglob("*")
        if path.is_file()
    ]
    assert sum(name.endswith(".py") for name in expected) > 20
    assert {f"wavemill/{name}" for name in expected} == {name for name in names if name.startswith("wavemill/")}
    assert (
        "wavemill = wavemill.jobs.cli:main" in (installed / next(n for n in names if "entry_points" in n)).read_text()
    )
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    print(importlib.import_module(name).__file__)"
    module_names = [f"wavemill.{name[:-3].replace('/', '.')}" for name in expected if name.endswith(".py")]
    done = subprocess.run(
        [sys.executable, "-c", code, *module_names],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(installed)) for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == len(module_names)
