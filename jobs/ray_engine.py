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
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..pipelines.tokenize import ShardReport, ShardTask, Work, Worker, WorkerAbout
from ..tokenizers.spec import RunFailed, UserError
from .engine import task_groups

_ATTEMPTS = 3  # of a shard whose worker died
_READY_S = 120.0
_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # receipts only: no audio goes through it


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


@dataclass(slots=True)
class _Slot:
    """A place for one worker: its actor and the shards that it has."""

    actor: Any
    group: tuple[ShardTask, ...] = ()


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
        self._work: Work | None = None
        self._work_ref: Any = None
        self._actor_class: Any = None

    def start(self, work: Work, num_tasks: int) -> WorkerAbout:
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
            num_cpus=0.5 if on_gpu else 1, num_gpus=1 if on_gpu else 0, max_restarts=0, max_task_retries=0
        )(Worker)
        self._work = work
        self._work_ref = ray.put(work)
        actors = [self._new_actor() for _ in range(count)]
        # a shared cluster may have fewer places free than it has cores: go on with those that got one. They have not
        # loaded anything yet, which may take long
        places = [actor.__ray_ready__.remote() for actor in actors]
        ready, _ = ray.wait(places, num_returns=count, timeout=_READY_S)
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
            return self._get(abouts[0])
        except ray.exceptions.RayActorError as error:
            raise RunFailed(
                f"A worker could not be started: {str(error).strip().splitlines()[-1]} Every machine of the cluster "
                "needs the same wavemill installed and must see the same root."
            ) from error

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[ShardReport]:
        assert self._work is not None, "start first"
        queue = deque(task_groups(tasks, self._work, num_workers=len(self._slots)))
        attempts: Counter[int] = Counter()
        lost: list[int] = []
        running: dict[Any, _Slot] = {}

        def feed(slot: _Slot) -> None:
            slot.group = queue.popleft() if queue else ()
            if slot.group:
                running[slot.actor.tokenize.remote(slot.group)] = slot

        for slot in self._slots:
            feed(slot)
        while running:
            for done in self._ray.wait(list(running), num_returns=1)[0]:
                slot = running.pop(done)
                try:
                    reports = self._get(done)
                except (self._ray.exceptions.RayActorError, self._ray.exceptions.OutOfMemoryError):
                    again = self._note_death(slot.group, attempts)
                    queue.extend((task,) for task in again)  # each for itself: one may be what kills
                    lost += [task.shard for task in slot.group if task not in again]
                    slot.actor = self._new_actor()
                    feed(slot)
                    continue
                feed(slot)
                yield from reports
        if lost:
            raise RunFailed(
                f"Workers died {_ATTEMPTS} times on shard(s) {', '.join(map(str, sorted(lost)))}; these are missing. "
                "Everything else is done. Look for a file there that kills decoders, or for too little memory; "
                "then run the command again."
            )

    def _note_death(self, group: tuple[ShardTask, ...], attempts: Counter[int]) -> list[ShardTask]:
        """Count and tell that a worker died on a group; those of its shards that may be tried again."""
        attempts.update(task.shard for task in group)
        shards = f"shard{'s' * (len(group) > 1)} {', '.join(str(task.shard) for task in group)}"
        times = max(attempts[task.shard] for task in group)
        print(f"a worker died on {shards} (time {times} of {_ATTEMPTS})", file=sys.stderr)
        return [task for task in group if attempts[task.shard] < _ATTEMPTS]

    def close(self) -> None:
        self._slots = []
        self._ray.shutdown()
        self._cleanup.close()

    def _connect(self) -> None:
        ray = self._ray
        _require_reachable(self._address)
        ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            # Ray puts the folder it is started in on its workers' sys.path: a data folder may hold a numpy.py
            empty = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="wavemill-ray-"))
            with contextlib.chdir(empty):
                ray.init(
                    address=self._address or "local",
                    include_dashboard=None if self._address else False,
                    num_cpus=None if self._address else self._num_workers,
                    object_store_memory=None if self._address else _OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    namespace=f"wavemill-{secrets.token_hex(4)}",
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"the Ray cluster at {self._address}" if self._address else "Ray on this machine"
            raise RunFailed(
                f"Cannot start or reach {where}: {str(error).splitlines()[0]}. "
                "Check the address and its token (RAY_AUTH_TOKEN_PATH), or use --engine inline."
            ) from error
        if threading.current_thread() is threading.main_thread():
            for number, handler in ours.items():  # Ray puts its own in their place
                signal.signal(number, handler)

    def _new_actor(self) -> Any:
        return self._actor_class.remote(self._work_ref)

    def _get(self, reference: Any) -> Any:
        """The result of an actor's call; what the call raised is raised as it was."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
