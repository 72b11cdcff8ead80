"""The doctor tells what this machine really has, finds what is made to fail, and leaves nothing behind."""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from wavemill.jobs import doctor
from wavemill.jobs.doctor_root import Check, _winners, check_replace, check_root
from wavemill.storage.root import Root

Wavemill = Callable[..., CompletedProcess[str]]


def one(checks: list[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def package(folder: Path, name: str, version: str) -> None:
    """What pip leaves behind of an installed package."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_machine_can_hold_a_dataset_and_nothing_is_left_behind(tmp_path: Path):
    (tmp_path / "root").mkdir()
    checks = doctor.diagnose(str(tmp_path / "root"))
    assert [check for check in checks if check.status == "fail"] == []
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert one(checks, "python").found.startswith(".".join(map(str, sys.version_info[:3])))
    assert one(checks, "soundfile").found.count("libsndfile") == 1
    assert "amrnb" in one(checks, "decoders").found
    assert one(checks, "root's commits").status == "ok"
    assert list((tmp_path / "root").iterdir()) == []


def test_a_root_that_is_not_there_yet_is_tried_above_and_not_made(tmp_path: Path):
    checks = check_root(str(tmp_path / "not" / "yet"))
    assert {check.status for check in checks} == {"ok"}
    assert "not there yet" in one(checks, "root").found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_json_is_a_list_of_checks_and_a_failure_is_the_exit_status(wavemill: Wavemill, tmp_path: Path):
    well = wavemill("doctor", tmp_path, "--json")
    assert well.returncode == 0, well.stdout
    checks = json.loads(well.stdout)
    assert len(checks) > 20
    for check in checks:
        assert set(check) == {"name", "status", "found", "advice"}
        assert check["status"] in ("ok", "warn", "fail")
        assert check["found"]
        assert check["advice"] or check["status"] == "ok"
    (tmp_path / "file").write_text("no folder")
    ill = wavemill("doctor", tmp_path / "file")
    assert ill.returncode == 1
    assert "is a file" in ill.stdout.replace("\n", " ")
    assert "1 fail" in ill.stdout
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.slow
def test_ray_is_started_and_stopped_when_asked_to(wavemill: Wavemill):
    done = wavemill("doctor", "--ray", "--json")
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert "a worker was up after" in checks["ray engine"]["found"]
    assert not any(name.startswith("root") for name in checks)


@pytest.mark.parametrize(
    ("root", "status", "expected"),
    [
        ("/proc/wavemill", "fail", "cannot be written"),
        ("/dev/null", "fail", "is a file"),
        ("/dev/null/below", "fail", "/dev/null is a file"),
        ("nosuch://bucket/x", "fail", "nosuch://bucket/x"),
    ],
)
def test_a_root_that_cannot_be_used_or_judged_is_told(root: str, status: str, expected: str):
    check = check_root(root)[0]
    assert check.status == status
    assert expected in check.found
    assert check.advice


def test_a_file_system_that_lets_several_win_would_be_noticed(tmp_path: Path):
    assert _winners(lambda racer, target: None, tmp_path / "x") == 8
    assert _winners(lambda racer, target: target.touch(exist_ok=False), tmp_path / "y") == 1


def test_a_file_system_whose_replaced_files_are_seen_half_written_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert check_replace(tmp_path).status == "ok"

    def write_in_two_steps(root: Root, relative: str, content: bytes) -> None:
        with Path(root.join(relative)).open("wb", buffering=0) as file:
            file.write(content[:100])
            time.sleep(0.002)
            file.write(content[100:])

    monkeypatch.setattr(Root, "write_bytes", write_in_two_steps)
    check = check_replace(tmp_path)
    assert check.status == "fail"
    assert "torn" in check.found


@pytest.mark.parametrize(("limit", "status"), [(200, "fail"), (512, "warn"), (4096, "ok")])
def test_a_low_limit_on_open_files_is_told(limit: int, status: str):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 4096:
        pytest.skip("the hard limit is lower")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        check = doctor.check_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert check.status == status
    assert f"{limit:,}" in check.found


def test_faiss_that_is_missing_broken_or_there_twice_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert doctor.check_faiss().status == "ok"
    monkeypatch.setitem(sys.modules, "faiss", None)
    package(tmp_path, "faiss-toy-a", "1.0")
    package(tmp_path, "faiss-toy-b", "2.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    missing = doctor.check_faiss(["faiss-toy-c"])
    assert (missing.status, missing.found) == ("warn", "missing")
    assert "pip install 'wavemill[cpu]'" in missing.advice
    broken = doctor.check_faiss(["faiss-toy-a"])
    assert (broken.status, broken.found) == ("fail", "faiss-toy-a 1.0 is installed but cannot be imported")
    twice = doctor.check_faiss(["faiss-toy-a", "faiss-toy-b"])
    assert twice.status == "fail"
    assert "pip uninstall -y faiss-toy-a faiss-toy-b" in twice.advice


def test_libraries_that_are_missing_or_too_old_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package(tmp_path, "toy-old", "1.9")
    package(tmp_path, "toy-new", "1.10.0+local")
    monkeypatch.syspath_prepend(str(tmp_path))
    checks = doctor.check_libraries(
        ["toy-old>=1.10", "toy-new[all]>=1.10", "toy-none>=3", "toy-any", 'toy-extra>=1; extra == "more"']
    )
    assert {check.name: check.status for check in checks} == {
        "wavemill": "ok",
        "toy-old": "fail",
        "toy-new": "ok",
        "toy-none": "fail",
        "toy-any": "fail",
    }
    assert "1.10 or newer" in one(checks, "toy-old").advice
    assert "toy-none>=3" in one(checks, "toy-none").advice


def test_an_extra_is_told_with_how_to_get_it_and_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package(tmp_path, "toy-here", "1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    checks = doctor.check_extras(
        ["numpy>=1", 'toy-here>=1; extra == "a"', 'toy-gone>=1; extra == "b"', 'faiss-cpu>=1; extra == "cpu"']
    )
    assert [(check.name, check.status) for check in checks] == [("extra a", "ok"), ("extra b", "ok")]
    assert checks[0].found == "toy-here 1.0"
    assert "pip install 'wavemill[b]'" in checks[1].found


def test_memory_is_the_containers_where_that_is_less(tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable: 60000000 kB\n")
    outside = doctor.check_memory(meminfo=tmp_path / "meminfo", cgroup=tmp_path)
    assert (outside.status, outside.found) == ("ok", "65.5 GB, 61.4 GB free")
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    inside = doctor.check_memory(meminfo=tmp_path / "meminfo", cgroup=tmp_path)
    assert (inside.status, inside.found) == ("warn", "4.0 GB, the container's limit, 1.0 GB free")


def test_cores_are_those_that_the_container_may_use(tmp_path: Path):
    (tmp_path / "cpu.max").write_text("max 100000\n")
    free = doctor.check_cores(cgroup=tmp_path)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    held = doctor.check_cores(cgroup=tmp_path)
    assert "of which 0.5" not in free.found
    assert held.status == "warn"
    assert "of which 0.5 may be used" in held.found
    assert "--workers 1" in held.advice


def test_a_gpu_that_pytorch_does_not_see_is_told(tmp_path: Path):
    (tmp_path / "version").write_text("NVRM version")
    checks = {check.name: check for check in doctor.check_devices(driver=tmp_path / "version")}
    assert checks["cpu"].found
    assert "gpu 0" in checks or checks["gpu"].status == "warn"


def test_a_wrong_clock_a_lost_temporary_folder_and_no_shared_memory_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert doctor.check_clock(0.0).status == "fail"
    assert doctor.check_clock().status == "ok"
    assert doctor.check_shared_memory(folder=str(tmp_path / "none")).status == "warn"
    assert doctor.check_temporary_folder().status == "ok"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert doctor.check_temporary_folder().status == "fail"


def test_the_table_shows_advice_and_no_control_characters(capsys: pytest.CaptureFixture[str]):
    doctor.show_checks([Check("root", "fail", "a\x1b[31mb", "Do this."), Check("x", "ok", "[bold]fine")])
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown
    assert "Do this." in shown
    assert "[bold]fine" in shown
    assert shown.endswith("1 ok, 0 warn, 1 fail\n")
