"""What this machine has and lacks for wavemill, one `Check` each. What is tried out is cleaned up."""

import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..tokenizers.spec import RunFailed, UserError
from .checks import Check, Status
from .doctor_root import check_root

_GB = 10**9
_LEAST_PYTHON = (3, 11)
_LEAST_TIME = 1_750_000_000  # June 2025: before this wavemill was written, a clock is wrong
_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# what recordings come in; the first group is what wavemill promises to read
_SOUNDFILE_FORMATS = ("WAV", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "NIST")
_SOUNDFILE_CODECS = ("VORBIS", "OPUS", "MPEG_LAYER_III")
_FFMPEG_CODECS = ("mp3", "aac", "opus", "vorbis", "flac", "alac")
_MORE_FFMPEG_CODECS = (
    *("mp2", "ac3", "eac3", "wmav1", "wmav2", "wmapro", "wmalossless", "wmavoice", "amrnb", "amrwb"),
    *("ape", "wavpack", "speex", "tta", "tak", "gsm", "gsm_ms", "shorten", "dca", "truehd", "mlp", "mpc7", "mpc8"),
    *("cook", "qcelp", "atrac3", "dsd_lsbf", "qoa", "ilbc"),
)
_FAISS_BUILDS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")


def diagnose(root: str | None = None, *, start_ray: bool = False) -> list[Check]:
    """All checks, in the order in which they are shown. `root` adds those of a dataset's place."""
    checks = [check_python(), *check_libraries(), check_decoders(), check_faiss(), *check_extras()]
    checks += [*check_devices(), check_cores(), check_memory(), check_shared_memory(), check_open_files()]
    checks += [check_clock(), check_temporary_folder(), check_ray(start=start_ray)]
    return checks + (check_root(root) if root is not None else [])


def check_python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _LEAST_PYTHON:
        return Check("python", "fail", found, f"Install Python {'.'.join(map(str, _LEAST_PYTHON))} or newer.")
    return Check("python", "ok", f"{found} at {sys.executable}")


def check_libraries(requirements: Sequence[str] | None = None) -> list[Check]:
    """wavemill itself, then each library it always needs, with the least version that its package asks for."""
    own = _version("wavemill")
    if own is None:
        return [Check("wavemill", "fail", "not installed as a package", "Run pip install . in its repository.")]
    checks = [Check("wavemill", "ok", own)]
    for line in requirements if requirements is not None else metadata.requires("wavemill") or []:
        requirement, _, marker = line.partition(";")
        parsed = re.match(r"([\w.-]+)(?:\[[^]]*\])?(?:.*>=\s*([\d.]+))?", requirement.strip())
        if parsed is None or "extra" in marker:
            continue
        name, least = parsed[1], parsed[2] or "0"
        found = _version(name)
        if found is None:
            checks.append(Check(name, "fail", "missing", f"Run pip install '{requirement.strip()}'."))
        elif _numbers(found) < _numbers(least):
            advice = f"wavemill needs {least} or newer: pip install -U '{requirement.strip()}'."
            checks.append(Check(name, "fail", found, advice))
        else:
            checks.append(Check(name, "ok", found + _built_with(name)))
    return checks


def check_decoders() -> Check:
    """What libsndfile and FFmpeg can really open and decode here, whatever their version says."""
    from ..pipelines.sniff import FORMATS

    try:
        import av
        import soundfile
        from av.codec.codec import UnknownCodecError
    except (ImportError, OSError) as error:
        return Check("decoders", "fail", f"they do not load: {error}", "Install soundfile and av again.")

    def lacks(codec: str) -> bool:
        try:
            av.Codec(codec, "r")
        except UnknownCodecError:
            return True
        return False

    missing = [f"{name} (libsndfile)" for name in _SOUNDFILE_FORMATS if name not in soundfile.available_formats()]
    missing += [f"{name} (libsndfile)" for name in _SOUNDFILE_CODECS if name not in soundfile.available_subtypes()]
    containers = {name for names in av.formats_available for name in names.split(",")}
    wanted = {name: format for name, format in FORMATS.items() if format.backend == "pyav"}
    missing += [f"{name} (FFmpeg)" for name, format in wanted.items() if format.demuxer not in containers]
    missing += [f"{name} (FFmpeg)" for name, format in wanted.items() if format.decoder and lacks(format.decoder)]
    missing += [f"{name} (FFmpeg)" for name in _FFMPEG_CODECS if lacks(name)]
    rare = [name for name in _MORE_FFMPEG_CODECS if lacks(name)]
    have = len(_SOUNDFILE_FORMATS) + len(_FFMPEG_CODECS) + len(_MORE_FFMPEG_CODECS) - len(rare)
    if missing:
        advice = "Recordings in these become errors. Install the wheels of soundfile and av from PyPI, which have them."
        return Check("decoders", "fail", f"missing: {', '.join(missing + rare)}", advice)
    if rare:
        return Check("decoders", "warn", f"missing: {', '.join(rare)}", "Recordings in these become errors.")
    names = [name.lower() for name in _SOUNDFILE_FORMATS] + [*_FFMPEG_CODECS, *_MORE_FFMPEG_CODECS]
    return Check("decoders", "ok", f"all {have}: {', '.join(dict.fromkeys(names))}")


def check_faiss(names: Sequence[str] = _FAISS_BUILDS) -> Check:
    """Which build of FAISS is here, by the names of its packages; only `codebook fit --backend faiss` needs one."""
    from ..tokenizers.fit import faiss_version

    builds = {name: found for name in names if (found := _version(name)) is not None}
    named = ", ".join(f"{name} {found}" for name, found in builds.items())
    if len(builds) > 1:
        advice = f"They are one Python module: pip uninstall -y {' '.join(builds)}, then install one of them."
        return Check("faiss", "fail", f"{named}, both installed", advice)
    try:
        version = faiss_version()
    except UserError as error:
        if not builds:
            return Check("faiss", "warn", "missing", str(error))
        return Check("faiss", "fail", f"{named} is installed but cannot be imported", f"Install it again. {error}")
    return Check("faiss", "ok", named or f"{version}, not from PyPI")


def check_extras(requirements: Sequence[str] | None = None) -> list[Check]:
    """Each optional part of wavemill: whether its libraries are here. FAISS has a check of its own."""
    needed: dict[str, list[str]] = {}
    for line in requirements if requirements is not None else metadata.requires("wavemill") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        name = re.match(r"[\w.-]+", requirement.strip())
        if extra is not None and name is not None and name[0] not in _FAISS_BUILDS:
            needed.setdefault(extra[1], []).append(name[0])
    checks = []
    for extra, names in needed.items():
        found = {name: _version(name) for name in names}
        if None in found.values():
            lacking = ", ".join(name for name, version in found.items() if version is None)
            told = f"not installed ({lacking}); pip install 'wavemill[{extra}]' adds it"
        else:
            told = ", ".join(f"{name} {version}" for name, version in found.items())
        checks.append(Check(f"extra {extra}", "ok", told))
    return checks


def check_devices(*, driver: Path = _PROC / "driver/nvidia/version") -> list[Check]:
    """The CPU's instruction set, and the GPUs that PyTorch sees."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Check("devices", "fail", f"PyTorch does not load: {error}", "Install torch again.")]
    capability = torch.backends.cpu.get_cpu_capability()
    flags = _text(_PROC / "cpuinfo")
    amx = ", AMX" if " amx_tile" in flags else ""
    checks = [Check("cpu", "ok", f"{_cpu_name(flags)}, {capability}{amx}")]
    if capability == "DEFAULT" and " avx2" not in flags and "vendor_id" in flags:
        checks = [Check("cpu", "warn", f"{_cpu_name(flags)}, without AVX2", "Encoding is several times slower here.")]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            told = f"{about.name}, {about.total_memory / _GB:.0f} GB, sm_{about.major}{about.minor}"
            checks.append(Check(f"gpu {number}", "ok", told))
    elif driver.exists():
        advice = "Install a torch whose CUDA fits the driver, or see that CUDA_VISIBLE_DEVICES names a GPU."
        checks.append(Check("gpu", "warn", "an NVIDIA driver is here, but PyTorch sees no GPU", advice))
    else:
        checks.append(Check("gpu", "ok", "none; --device cpu is the default"))
    return checks


def check_cores(*, cgroup: Path = _CGROUP) -> Check:
    """CPU cores, and how many of them this process may use."""
    total = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total)
    for folder in _cgroups(cgroup):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.strip().isdecimal():
            usable = min(usable, int(quota) / int(period))
    if usable < total:
        advice = f"Ray would start {total} workers: give --workers {max(1, int(usable))}."
        return Check("cores", "warn", f"{total}, of which {usable:g} may be used", advice)
    return Check("cores", "ok", str(total))


def check_memory(*, meminfo: Path = _PROC / "meminfo", cgroup: Path = _CGROUP) -> Check:
    """Memory of the machine, or of the container where that has less."""
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(meminfo), re.MULTILINE))
    if "MemTotal" not in kilobytes:
        return Check("memory", "ok", "not known on this system")
    total, free = int(kilobytes["MemTotal"]) * 1024, int(kilobytes.get("MemAvailable", 0)) * 1024
    limited = ""
    pairs = [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")]
    for folder in (*_cgroups(cgroup), cgroup / "memory"):
        for most, used in pairs:
            limit, usage = _text(folder / most).strip(), _text(folder / used).strip()
            if limit.isdecimal() and int(limit) < total:
                total, limited = int(limit), ", the container's limit"
                free = min(free, total - int(usage) if usage.isdecimal() else total)
    told = f"{total / _GB:.1f} GB{limited}, {free / _GB:.1f} GB free"
    if free < 2 * _GB:
        return Check(
            "memory",
            "warn",
            told,
            "Each worker decodes up to 0.5 GB ahead, beside its libraries: give fewer --workers.",
        )
    return Check("memory", "ok", told)


def check_shared_memory(*, folder: str = "/dev/shm") -> Check:
    """Where Ray keeps its objects; containers often have 64 MB."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return Check("shared memory", "warn", f"no {folder}", "Ray keeps its objects on disk instead, which is slower.")
    told = f"{free / _GB:.2f} GB free in {folder}"
    if free < 0.2 * _GB:
        return Check("shared memory", "warn", told, "Give the container more: docker run --shm-size=1g.")
    return Check("shared memory", "ok", told)


def check_open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        status: Status = "fail" if soft < 256 else "warn"
        highest = "" if hard == resource.RLIM_INFINITY else f" (up to {hard:,} without root)"
        return Check("open files", status, f"{soft:,} at most", f"Ray needs more: ulimit -n 65536{highest}.")
    return Check("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} at most")


def check_clock(now: float | None = None) -> Check:
    """Whether the clock can be right: object stores refuse requests that are 15 minutes off."""
    now = time.time() if now is None else now
    told = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < _LEAST_TIME:
        return Check("clock", "fail", told, "That is in the past. Set the clock (NTP): object stores check it.")
    return Check("clock", "ok", told)


def check_temporary_folder() -> Check:
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"wavemill")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        advice = "Set TMPDIR to a folder that may be written to."
        return Check("temporary folder", "fail", f"cannot be written: {error.strerror or error}", advice)
    if free < _GB:
        return Check("temporary folder", "warn", f"{folder}, {free / _GB:.1f} GB free", "Ray logs there: free some.")
    return Check("temporary folder", "ok", f"{folder}, {free / _GB:.0f} GB free")


def check_ray(*, start: bool = False) -> Check:
    """Whether Ray can be imported; with `start`, whether a worker comes up on this machine."""
    from ..pipelines.policy import CorpusPolicy
    from ..pipelines.tokenize import Work
    from ..storage.table import Snapshot
    from .ray_engine import RayEngine

    advice = "Install it again: pip install -U 'ray[default]'. Without it, there is --engine inline."
    try:
        engine = RayEngine(address=None, num_workers=1)
    except ImportError as error:
        return Check("ray engine", "fail", f"it does not load: {error}", advice)
    if not start:
        return Check("ray engine", "ok", f"{_version('ray')} loads; --ray starts one to see")
    nothing = Snapshot(tempfile.gettempdir(), "", -1, "", {"policy": CorpusPolicy().to_json()}, {})
    work = Work(
        root_uri=nothing.root_uri,
        corpus=nothing,
        streams=(),
        device="cpu",
        source_roots={},
        decode_threads=1,
        decode_ahead_bytes=1 << 20,
    )
    started = time.monotonic()
    try:
        engine.start(work, 1)
    except (RunFailed, UserError) as error:
        return Check("ray engine", "fail", "no worker can be started", str(error))
    finally:
        engine.close()
    return Check("ray engine", "ok", f"{_version('ray')}, a worker was up after {time.monotonic() - started:.1f} s")


def show_checks(checks: Iterable[Check]) -> None:
    """Print checks as a table for people, and how many are not well."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 1))
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    counts = dict.fromkeys(styles, 0)
    for check in checks:
        counts[check.status] += 1
        told = Text(_printable(check.found))
        if check.advice:
            told.append(f"\n{_printable(check.advice)}", style="italic")
        table.add_row(Text(check.status, style=styles[check.status]), Text(check.name, style="bold"), told)
    Console().print(table)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))


def _version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 11, 0) of 2.11.0+cu130."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def _built_with(name: str) -> str:
    """The C libraries inside a package, where they decide what wavemill can do."""
    try:
        if name == "soundfile":
            import soundfile

            return f" (libsndfile {soundfile.__libsndfile_version__})"
        if name == "av":
            import av

            return f" (FFmpeg's libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))})"
        if name == "torch":
            import torch

            return f" (CUDA {torch.version.cuda})" if torch.version.cuda else " (no CUDA)"
    except (ImportError, OSError) as error:
        return f", which does not load: {error}"
    return ""


def _cgroups(top: Path) -> list[Path]:
    """The folders of this process's control group (version 2) and of those above it."""
    inside = next((line[3:] for line in _text(_PROC / "self/cgroup").splitlines() if line.startswith("0::")), "/")
    folder = top / inside.strip("/")
    return [folder, *(above for above in folder.parents if above.is_relative_to(top))]


def _cpu_name(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1] if found else "a CPU without a name"


def _text(path: Path) -> str:
    """A system file's content; empty where the system has no such file."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _printable(text: Any) -> str:
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))
