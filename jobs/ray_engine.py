"""Workers as Ray actors: the only file that knows Ray. Ray moves shards; workers move audio."""

import atexit
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..pipelines.tokenize import ShardTask
from ..tokenizers.numerics import use_one_thread
from ..tokenizers.spec import RunFailed, UserError
from .engine import Work, WorkersLost, task_groups

_ATTEMPTS = 3  # of a shard whose worker died
_READY_S = 120.0  # for the first workers to get a place
_LOOK_S = 2.0  # between looks at whether all are alive
_PLACE_S = 60.0  # for one that takes the place of another
_SILENT_S = 45.0  # a worker that has given no sign of life for so long is replaced, a cluster given up
_LAST_S = 53  # Ray ends a process whose cluster has been gone for 60 s, with words of its own
_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # receipts only: no audio goes through it


_RUN_AGAIN = "What was committed stays; run the command again."


@cache
def _prepare_own_cluster() -> None:
    """Settings for clusters that this process starts: no usage reports, and a token that only this user can read,
    where Ray's own would be world-readable.

    Ray reads settings when it is imported and keeps the token, so this comes first and once. A token of the user's
    own is respected.
    """
    if "ray" in sys.modules:
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    folder = tempfile.mkdtemp(prefix="wavemill-ray-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = os.path.join(folder, "token")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=path)


def _require_reachable(address: str | None) -> None:
    """Raise `RunFailed` if nobody listens at `host:port`, which Ray would wait for without end."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon:
        return
    if not port.isdecimal():
        raise UserError(f"--address {address!r}: expected HOST:PORT, ray://HOST:PORT or auto; {port!r} is no port.")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise RunFailed(
            f"Nobody answers at the Ray address {address}: {error.strerror or error}. Check it, or leave it out."
        ) from error


def connect_ray(address: str | None, *, num_cpus: int | None, cleanup: contextlib.ExitStack) -> Any:
    """Ray, connected to the cluster at `address`, or to one of our own with so many cores on this machine.

    Raises `UserError` and `RunFailed` for addresses where there is none.
    """
    if address is None:
        _prepare_own_cluster()
    import ray

    _require_reachable(address)
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # Ray puts the folder it is started in on its workers' sys.path: a data folder may hold a numpy.py
        empty = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="wavemill-ray-"))
        with contextlib.chdir(empty):
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                num_cpus=None if address else num_cpus,
                object_store_memory=None if address else _OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace=f"wavemill-{secrets.token_hex(4)}",
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise RunFailed(
            f"Cannot start or reach {where}: {str(error).splitlines()[0]}. "
            "Check the address and its token (RAY_AUTH_TOKEN_PATH), or use --engine inline."
        ) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in ours.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    return ray


class RayWorker:
    """A worker that answers while it works: its methods run on two threads."""

    def __init__(self, work: Work) -> None:
        self._worker = work.worker()

    def about(self) -> Any:
        return self._worker.about()

    def run(self, tasks: Sequence[ShardTask]) -> list[Any]:
        use_one_thread()  # OpenMP's count belongs to the thread
        return self._worker.run(tasks)

    def pulse(self) -> tuple[str, int]:
        """Where this is, to be killed there should it stop answering."""
        return socket.gethostname(), os.getpid()


@dataclass(slots=True, eq=False)
class _Slot:
    """A place for one worker: its actor, the shards that it has, and its last sign of life."""

    actor: Any
    group: tuple[ShardTask, ...] = ()
    pulse: Any = None  # asked for
    place: tuple[str, int] | None = None  # host and process; None: it has given no sign of life yet
    seen_s: float = field(default_factory=time.monotonic)


class _ClusterWatch:
    """Sees that a cluster has died, from a thread of its own: calls to a dead one may never come back."""

    def __init__(self, ray: Any, *, own: bool) -> None:
        self._ray = ray
        self._node = ray._private.worker.global_worker.node if own else None
        self._answered_s = time.monotonic()
        self._stop = threading.Event()
        self._silent_ticks = 0  # seconds that this process saw go by: one that was stopped saw none
        for target in (self._ask, self._have_the_last_word):
            threading.Thread(target=target, daemon=True).start()

    def dead(self) -> str:
        """What has died, in a sentence; empty if all is well."""
        if self._node is not None:
            ended = sorted({kind for kind, _ in self._node.dead_processes() if kind in ("raylet", "gcs_server")})
            if ended:
                return f"Ray on this machine has ended: its {' and '.join(ended)} died."
        silent_s = time.monotonic() - self._answered_s
        return f"The Ray cluster has not answered for {silent_s:.0f} s." if silent_s > _SILENT_S else ""

    def close(self) -> None:
        self._stop.set()

    def _ask(self) -> None:
        while not self._stop.wait(_LOOK_S):
            with contextlib.suppress(Exception):  # whatever it is, it is no answer
                self._ray.nodes()
                self._answered_s = time.monotonic()
                self._silent_ticks = 0

    def _have_the_last_word(self) -> None:
        """End this process if its main thread hangs in a call to a cluster that has died, before Ray does it."""
        while not self._stop.wait(1.0):
            self._silent_ticks += 1
            if self._silent_ticks > _LAST_S:
                print(f"Error: {self.dead()} {_RUN_AGAIN}", file=sys.stderr, flush=True)
                os._exit(1)


class RayEngine:
    """One actor per CPU core or GPU, on the cluster at `address` or on a cluster of our own on this machine."""

    def __init__(self, *, address: str | None, num_workers: int | None) -> None:
        if address is None:
            _prepare_own_cluster()
        import ray
        import ray.exceptions

        self._ray: Any = ray
        self._address = address
        self._num_workers = num_workers
        self._cleanup = contextlib.ExitStack()
        self._slots: list[_Slot] = []
        self._watch: _ClusterWatch | None = None
        self._work: Work | None = None
        self._work_ref: Any = None
        self._actor_class: Any = None

    def start(self, work: Work, num_tasks: int) -> Any:
        ray = self._ray
        if self._address is None:  # a cluster of our own: no more workers than cores, nor than there is work for
            self._num_workers = min(self._num_workers or num_tasks, os.cpu_count() or 1, num_tasks)
        self._cleanup.enter_context(contextlib.redirect_stdout(sys.stderr))  # Ray tells of dead workers on stdout
        self._connect()
        resources = ray.cluster_resources()
        on_gpu = work.device.startswith("cuda")
        available = int(resources.get("GPU" if on_gpu else "CPU", 0))
        if available == 0:
            raise UserError(f"The Ray cluster has no {'GPU' if on_gpu else 'CPU'} to run workers on.")
        count = min(self._num_workers or available, available, num_tasks)
        self._actor_class = ray.remote(
            num_cpus=0.5 if on_gpu else 1,
            num_gpus=1 if on_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,
        )(RayWorker)
        self._work = work
        self._work_ref = ray.put(work)
        actors = [self._new_actor() for _ in range(count)]
        # a shared cluster may have fewer places free than it has cores: go on with those that got one. They have not
        # loaded anything yet, which may take long
        places = [actor.__ray_ready__.remote() for actor in actors]
        ready = self._wait(places, num_returns=count, timeout_s=_READY_S)
        if not ready:
            raise RunFailed(
                f"No worker could be started within {_READY_S:.0f} s: the Ray cluster has no free "
                f"{'GPU' if on_gpu else 'CPU core'}. Wait for other jobs, or name fewer --workers."
            )
        self._slots = [_Slot(actor) for actor, place in zip(actors, places, strict=True) if place in ready]
        for actor, place in zip(actors, places, strict=True):
            if place not in ready:
                ray.kill(actor)
        abouts = [slot.actor.about.remote() for slot in self._slots]  # all load their weights at the same time
        try:
            self._wait(abouts[:1])
            return self._get(abouts[0])
        except ray.exceptions.RayActorError as error:
            raise RunFailed(
                f"A worker could not be started: {str(error).strip().splitlines()[-1]} Every machine of the cluster "
                "needs the same wavemill installed and must see the same root."
            ) from error

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[Any]:
        assert self._work is not None, "start first"
        queue = deque(task_groups(tasks, self._work, num_workers=len(self._slots)))
        attempts: Counter[int] = Counter()
        lost: list[int] = []
        running: dict[Any, _Slot] = {}

        def feed(slot: _Slot) -> None:
            slot.group = queue.popleft() if queue else ()
            if slot.group:
                running[slot.actor.run.remote(slot.group)] = slot

        def replace(slot: _Slot, why: str) -> None:
            again = self._note_death(slot.group, attempts, why)
            queue.extend((task,) for task in again)  # each for itself: one may be what kills
            lost.extend(task.shard for task in slot.group if task not in again)
            self._slots[self._slots.index(slot)] = fresh = _Slot(self._new_actor())
            feed(fresh)

        for slot in self._slots:
            feed(slot)
        while running:
            for done in self._wait(list(running), timeout_s=_LOOK_S):
                slot = running.pop(done)
                try:
                    reports = self._get(done)
                except (self._ray.exceptions.RayActorError, self._ray.exceptions.OutOfMemoryError):
                    replace(slot, "died")
                    continue
                feed(slot)
                yield from reports
            for done, slot in [(done, slot) for done, slot in running.items() if self._is_silent(slot)]:
                del running[done]
                self._kill(slot)
                if slot.place is None:  # it never got a place: its shards are for others
                    self._slots.remove(slot)
                    queue.extend((task,) for task in slot.group)
                else:
                    replace(slot, f"gave no sign of life for {_SILENT_S:.0f} s and was killed")
            for slot in self._slots if queue else ():
                if slot not in running.values():
                    feed(slot)
            if queue and not running:
                raise WorkersLost(
                    "No worker is left, and the Ray cluster has no place for another. What was committed stays; run "
                    "the command again when it has."
                )
        if lost:
            raise WorkersLost(
                f"Workers died {_ATTEMPTS} times on shard(s) {', '.join(map(str, sorted(lost)))}; these are missing. "
                "Everything else is done. Look for a file there that kills decoders, or for too little memory; "
                "then run the command again."
            )

    def _wait(self, references: list[Any], *, num_returns: int = 1, timeout_s: float = float("inf")) -> list[Any]:
        """Those that are there when enough are, or the time is over. Raises `WorkersLost` if the cluster has died."""
        until = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, min(_LOOK_S, until - time.monotonic()))
            ready = self._ray.wait(references, num_returns=num_returns, timeout=left_s)[0]
            if len(ready) == num_returns or time.monotonic() >= until:
                return ready
            self._require_cluster()

    def _is_silent(self, slot: _Slot) -> bool:
        """Whether a worker has answered nothing for too long."""
        if slot.pulse is not None and self._ray.wait([slot.pulse], timeout=0)[0]:
            with contextlib.suppress(self._ray.exceptions.RayError):  # its death shows in its task
                slot.place, slot.seen_s = self._ray.get(slot.pulse), time.monotonic()
            slot.pulse = None
        if slot.pulse is None:
            slot.pulse = slot.actor.pulse.remote()
        return time.monotonic() - slot.seen_s > (_PLACE_S if slot.place is None else _SILENT_S)

    def _kill(self, slot: _Slot) -> None:
        """End a worker that may be stopped, so that it cannot end itself."""
        if slot.place is not None and slot.place[0] == socket.gethostname():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(slot.place[1], signal.SIGKILL)
        self._ray.kill(slot.actor)

    def _require_cluster(self) -> None:
        """Raise `WorkersLost` if the cluster does not answer any more: Ray itself would wait, or end this process."""
        assert self._watch is not None, "start first"
        dead = self._watch.dead()
        if dead:
            self._watch.close()  # there is nothing left to tell: what is done may be committed in peace
            raise WorkersLost(f"{dead} {_RUN_AGAIN}")

    def _note_death(self, group: tuple[ShardTask, ...], attempts: Counter[int], why: str) -> list[ShardTask]:
        """Count and tell that a worker died on a group; those of its shards that may be tried again."""
        attempts.update(task.shard for task in group)
        shards = f"shard{'s' * (len(group) > 1)} {', '.join(str(task.shard) for task in group)}"
        times = max(attempts[task.shard] for task in group)
        print(f"a worker {why} on {shards} (time {times} of {_ATTEMPTS})", file=sys.stderr)
        return [task for task in group if attempts[task.shard] < _ATTEMPTS]

    def close(self) -> None:
        self._slots = []
        if self._watch is not None:
            self._watch.close()
        self._ray.shutdown()
        self._cleanup.close()

    def _connect(self) -> None:
        connect_ray(self._address, num_cpus=self._num_workers, cleanup=self._cleanup)
        self._watch = _ClusterWatch(self._ray, own=self._address is None)

    def _new_actor(self) -> Any:
        return self._actor_class.remote(self._work_ref)

    def _get(self, reference: Any) -> Any:
        """The result of an actor's call; what the call raised is raised as it was."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
