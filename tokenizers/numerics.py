"""The numerics class: what, beside the fingerprint, can change the last bit of a feature."""

import os
import platform
from pathlib import Path

import av
import soundfile
import torch


def use_one_thread() -> None:
    """Give this process one intra-op thread: features differ by 3e-6 between one and two (DESIGN.md)."""
    torch.set_num_threads(1)


def use_exact_math() -> None:
    """Let a GPU compute float32 in float32, and each shape by the same algorithm every time.

    Before anything runs on it: cuBLAS, and cuDNN's LSTM with it, reads its setting when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def numerics_class(device: str) -> dict[str, str]:
    """Name what decides rounding on this machine. Codes are bit-exact within one class."""
    kind = torch.device(device)
    versions = {
        "torch": torch.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
        "ffmpeg": ".".join(str(part) for part in av.library_versions["libavcodec"]),
        "threads": str(torch.get_num_threads()),
    }
    if kind.type == "cuda":
        return {
            "device": torch.cuda.get_device_name(kind),
            "instructions": "sm_{}{}".format(*torch.cuda.get_device_capability(kind)),
            "cuda": str(torch.version.cuda),
            **versions,
        }
    return {"device": _cpu_model(), "instructions": torch.backends.cpu.get_cpu_capability(), **versions}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
