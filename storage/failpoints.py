"""Named places where a test can make a process die, fail or stand still. Off, they cost one comparison.

`WAVEMILL_FAILPOINTS="shard-written=kill"`: several are separated by commas; actions are `kill` (SIGKILL to this
process), `stop` (SIGSTOP: until somebody sends SIGCONT), `segfault`, `eat:MEBIBYTES` (of memory), `raise` and
`sleep:SECONDS`; `@3` after an action waits for the third hit. With `WAVEMILL_FAILPOINTS_ONCE` naming a folder, each
failpoint fires once in all processes together.
"""

import os
import signal
import time
from pathlib import Path

_SPEC = dict(entry.split("=", 1) for entry in os.environ.get("WAVEMILL_FAILPOINTS", "").split(",") if "=" in entry)
_ONCE = os.environ.get("WAVEMILL_FAILPOINTS_ONCE", "")
_hits: dict[str, int] = {}


class FailpointError(Exception):
    """What `raise` raises."""


def failpoint(name: str) -> None:
    """Do what the environment asks for at this place; usually nothing."""
    if not _SPEC or name not in _SPEC:
        return
    action, _, wanted_hit = _SPEC[name].partition("@")
    _hits[name] = _hits.get(name, 0) + 1
    if wanted_hit and _hits[name] != int(wanted_hit):
        return
    if _ONCE and not _first(Path(_ONCE) / name):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif action.startswith("eat:"):
        _ = bytearray(b"\1") * (int(action.removeprefix("eat:")) << 20)
    elif action.startswith("sleep:"):
        time.sleep(float(action.removeprefix("sleep:")))
    else:
        raise FailpointError(name)


def _first(flag: Path) -> bool:
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
