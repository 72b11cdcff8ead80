"""The house stands: arrows between the folders, one file per heavy library, no cycles, no `__init__.py`."""

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FOLDERS = {
    "jobs": {"jobs", "pipelines", "storage", "tokenizers"},
    "pipelines": {"pipelines", "storage", "tokenizers"},
    "storage": {"storage", "tokenizers.spec"},
    "tokenizers": {"tokenizers"},
}
HEAVY = {
    "ray": {"jobs/ray_engine.py", "jobs/lm/ray_train.py"},  # Ray itself; Ray Train
    "faiss": {"tokenizers/fit.py"},
    "deltalake": {"storage/table.py"},
    "webdataset": {"pipelines/export.py"},
    "transformers": {"tokenizers/hub.py"},
    "tokenizers": {"tokenizers/unit_bpe.py"},
    "huggingface_hub": {"tokenizers/hub.py"},
    "silero_vad": {"pipelines/vad.py"},
    "ai_edge_litert": {"tokenizers/lyra.py"},
    "matplotlib": {"jobs/canvas.py"},
    "triton": {"tokenizers/quantize_kernels.py"},
}


def modules() -> dict[str, Path]:
    """By dotted name below the package: `storage.table`, `pipelines.layouts.flat`."""
    files = [path for folder in FOLDERS for path in sorted((REPO / folder).rglob("*.py"))]
    return {".".join(path.relative_to(REPO).with_suffix("").parts): path for path in files}


@functools.cache
def imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules of ours and top-level names of other packages that a file imports anywhere."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(REPO).parts[: -node.level]
            names = [alias.name for alias in node.names] if node.module is None else [node.module]
            ours |= {".".join([*above, name]) for name in names}
    return ours, others


def test_each_folder_imports_only_what_lies_below_it():
    assert len(modules()) > 20
    for name, path in modules().items():
        allowed = FOLDERS[name.partition(".")[0]]
        for used in imports(path)[0]:
            assert used in modules(), f"{name} imports {used}, which is not a module"
            assert used in allowed or used.partition(".")[0] in allowed, f"{name} may not import {used}"


def test_the_leaf_that_says_what_a_stream_is_imports_nothing_of_ours():
    assert imports(REPO / "tokenizers" / "spec.py")[0] == set()


def test_there_are_no_import_cycles():
    graph = {name: imports(path)[0] for name, path in modules().items()}
    assert list(TopologicalSorter(graph).static_order())


def test_each_heavy_library_sits_behind_one_file():
    for name, path in modules().items():
        for library, files in HEAVY.items():
            used = library in imports(path)[1]
            assert not used or str(path.relative_to(REPO)) in files, f"{name} imports {library}"


def test_no_folder_is_a_regular_package():
    for folder in FOLDERS:
        assert not list((REPO / folder).rglob("__init__.py"))


def test_imports_of_our_own_are_relative():
    for name, path in modules().items():
        assert "wavemill" not in imports(path)[1], f"{name} imports wavemill by its full name"


def test_help_imports_no_heavy_library():
    code = (
        "import sys; from typer.testing import CliRunner; from wavemill.jobs.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "print([name for name in ('torch', 'numpy', 'pyarrow', 'ray', 'faiss', 'deltalake') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_looking_at_a_dataset_imports_no_torch_and_no_ray():
    code = (
        "import sys, wavemill.storage.codes, wavemill.pipelines.inspection, wavemill.pipelines.quarantine, "
        "wavemill.jobs.show; print([name for name in ('torch', 'ray', 'faiss', 'av') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
