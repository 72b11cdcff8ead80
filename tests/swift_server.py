"""OpenStack Swift with its S3 API in one process on loopback, for as long as another process lives.

    python swift_server.py FOLDER PID

Writes one line of JSON with its three ports once it listens. `endpoint` makes conditional creates atomic, as S3 does,
and does the faults that it is asked for; `racing` does the faults, too, but leaves creates as Swift has them, where two
may win; `plain` is Swift alone, and takes the faults under /-/NAMESPACE, which holds for buckets called NAMESPACE-*.
"""

import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import eventlet
import eventlet.debug

eventlet.monkey_patch(all=False, socket=True, select=True, thread=True, time=True)

from eventlet import wsgi  # noqa: E402
from eventlet.event import Event  # noqa: E402
from eventlet.patcher import original  # noqa: E402
from eventlet.semaphore import Semaphore  # noqa: E402
from swift.common.http_protocol import SwiftHttpProtocol  # noqa: E402

Environ = dict[str, Any]
Answer = Callable[..., Any]
App = Callable[[Environ, Answer], Iterable[bytes]]
Chunks = Iterable[bytes]

ERRORS = {
    "503": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "500": ("500 Internal Server Error", "InternalError", "We encountered an internal error. Please try again."),
    "403": ("403 Forbidden", "ExpiredToken", "The provided token has expired."),
    "409": ("409 Conflict", "ConditionalRequestConflict", "A conflicting operation occurred during the request."),
}
_WRITES = ("PUT", "POST")
_CHUNK = 1 << 16

CONFIG = """
[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
log_level = CRITICAL
log_address = {folder}/no-log
recon_cache_path = {folder}
conn_timeout = 30
node_timeout = 60
container_update_timeout = 60
[pipeline:main]
pipeline = {pipeline}
[app:{name}-server]
use = egg:swift#{name}
fallocate_reserve = 0
account_autocreate = true
allow_account_management = true
"""
PIPELINES = {
    "account": "account-server",
    "container": "container-server",
    "object": "object-server",
    "proxy": "catch_errors gatekeeper listing_formats s3api tempauth bulk slo dlo proxy-server",
}
FILTERS = {
    "s3api": "location = us-east-1\nmin_segment_size = 1\n",
    "tempauth": "user_test_tester = testing .admin\nuser_test_guest = guesting\n"
    "user_test_canary = CANARY-s3cr3t-7f3a .admin\n",
}


class Hangup(BaseException):
    """The connection is to be closed before the answer is whole; by a reset, if `reset`."""

    def __init__(self, *, reset: bool) -> None:
        self.reset = reset


class Protocol(SwiftHttpProtocol):
    """HTTP that can break off."""

    def handle(self) -> None:
        try:
            super().handle()
        except Hangup as hangup:
            if hangup.reset:
                connection = self.connection.fd
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(connection.detach())


class Cache(dict[str, Any]):
    """What Swift remembers of accounts and containers: one process needs no memcached."""

    def get(self, key: str, default: Any = None, **_: Any) -> Any:
        return super().get(key, default)

    def set(self, key: str, value: Any, **_: Any) -> None:
        self[key] = json.loads(json.dumps(value))

    def delete(self, key: str, **_: Any) -> None:
        self.pop(key, None)

    def incr(self, key: str, delta: int = 1, **_: Any) -> int:
        self[key] = int(self.get(key, 0)) + delta
        return self[key]


class Rules:
    """The faults that are asked for, and the requests that came, by namespace."""

    def __init__(self) -> None:
        self._faults: dict[str, list[dict[str, Any]]] = {}
        self.requests: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.rotting: set[str] = set()  # objects whose next body is to be stored with a flipped bit

    def pick(self, namespace: str, method: str, target: str) -> dict[str, Any]:
        """The first fault that strikes this request; empty if there is none."""
        for fault in self._faults.get(namespace, ()):
            if fault["times"] == 0 or method not in fault["methods"].split() or not re.search(fault["match"], target):
                continue
            if fault["random"].random() >= fault["share"]:
                continue
            if fault["skip"] > 0:
                fault["skip"] -= 1
                continue
            fault["times"] -= 1  # those that began below 0 never end
            return fault
        return {}

    def __call__(self, env: Environ, answer: Answer) -> list[bytes]:
        """Sets faults (PUT), forgets them and the requests (DELETE), tells the requests (GET)."""
        namespace = env["PATH_INFO"].removeprefix("/-/")
        told: Any = None
        if env["REQUEST_METHOD"] == "PUT":
            asked = json.loads(env["wsgi.input"].read())
            self._faults[namespace] = [{**fault, "random": random.Random(fault["seed"])} for fault in asked]
        elif env["REQUEST_METHOD"] == "DELETE":
            self._faults.pop(namespace, None)
            self.requests.pop(namespace, None)
        else:
            told = self.requests[namespace]
        answer("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(told).encode()]


class Front:
    """What stands before Swift's proxy: the lock, the faults, the list of requests."""

    def __init__(self, app: App, rules: Rules, *, atomic: bool) -> None:
        self._app = app
        self._rules = rules
        self._atomic = atomic
        self._locks: dict[str, Semaphore] = defaultdict(lambda: Semaphore(1))

    def __call__(self, env: Environ, answer: Answer) -> Iterator[bytes]:
        path = _path(env)
        target = f"{path}?{env.get('QUERY_STRING', '')}"
        namespace = path.split("/")[1].rpartition("-")[0]
        fault = self._rules.pick(namespace, env["REQUEST_METHOD"], target)
        signed = re.search(r"Credential=([^/]+)/[^/]+/([^/]+)/", env.get("HTTP_AUTHORIZATION", ""))
        seen = {
            "method": env["REQUEST_METHOD"],
            "target": unquote(target),
            "range": env.get("HTTP_RANGE", ""),
            "condition": env.get("HTTP_IF_NONE_MATCH") or env.get("HTTP_IF_MATCH") or "",
            "key": unquote(signed[1]) if signed else "",
            "region": signed[2] if signed else "",
            "token": env.get("HTTP_X_AMZ_SECURITY_TOKEN", ""),
            "fault": fault.get("do", ""),
            "status": 0,
            "bytes_in": int(env.get("CONTENT_LENGTH") or 0),
            "bytes_out": 0,
        }
        self._rules.requests[namespace].append(seen)

        def noted(status: str, headers: list[tuple[str, str]]) -> None:
            seen["status"] = int(status.split()[0])
            answer(status, headers)

        for chunk in self._answer(env, noted, fault, path):
            seen["bytes_out"] += len(chunk)
            yield chunk

    def _answer(self, env: Environ, answer: Answer, fault: dict[str, Any], path: str) -> Iterator[bytes]:
        do, writes = fault.get("do", ""), env["REQUEST_METHOD"] in _WRITES
        if do in ERRORS:
            while env["wsgi.input"].read(_CHUNK):
                pass
            yield _refuse(do, env, answer)
            return
        if do == "reset":
            raise Hangup(reset=True)
        if do == "slow":
            eventlet.sleep(fault["seconds"])
        elif do == "flip" and writes:
            env["wsgi.input"] = Flipped(env["wsgi.input"])
        elif do == "rot":
            self._rules.rotting.add(path)
        creates = writes and env.get("HTTP_IF_NONE_MATCH") == "*"
        with self._locks[path] if creates and self._atomic else nullcontext():
            status, headers, chunks = _ask(self._app, env)
            if creates or do.startswith("lose"):
                chunks = [b"".join(chunks)]
        if do == "lose":
            yield _refuse("500", env, answer)
            return
        if do == "lose-reset":
            raise Hangup(reset=True)
        answer(status, headers)
        size = int(next((value for name, value in headers if name.lower() == "content-length"), 0))
        if do in ("cut", "reset-body"):
            yield from _first(chunks, size // 2)
            raise Hangup(reset=do == "reset-body")
        yield from _flipped(chunks, fault["random"].randrange(size)) if do == "flip" and size and not writes else chunks


class Rotting:
    """Swift's object server on a disk that stores a flipped bit where it is asked to."""

    def __init__(self, app: App, rules: Rules) -> None:
        self._app = app
        self._rules = rules

    def __call__(self, env: Environ, answer: Answer) -> Iterable[bytes]:
        path = "/" + _path(env).split("/", 4)[-1]  # behind device, partition and account
        if env["REQUEST_METHOD"] == "PUT" and path in self._rules.rotting:
            self._rules.rotting.discard(path)
            env["wsgi.input"] = Flipped(env["wsgi.input"])
        return self._app(env, answer)


class Flipped:
    """A body that is read with a bit of its first chunk flipped."""

    def __init__(self, body: Any) -> None:
        self._body = body
        self._done = False

    def read(self, *arguments: Any) -> bytes:
        return self._flip(self._body.read(*arguments))

    def readline(self, *arguments: Any) -> bytes:
        return self._flip(self._body.readline(*arguments))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)

    def _flip(self, chunk: bytes) -> bytes:
        if self._done or not chunk:
            return chunk
        self._done = True
        return b"".join(_flipped([chunk], len(chunk) // 2))


def _path(env: Environ) -> str:
    return env["PATH_INFO"].encode("latin-1").decode(errors="replace")


def _refuse(error: str, env: Environ, answer: Answer) -> bytes:
    status, code, message = ERRORS[error]
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return b"" if env["REQUEST_METHOD"] == "HEAD" else body


def _ask(app: App, env: Environ) -> tuple[str, list[tuple[str, str]], Chunks]:
    """Status, headers and body of what Swift answers."""
    said: list[Any] = []

    def answer(status: str, headers: list[tuple[str, str]], _: Any = None) -> Callable[[bytes], None]:
        said[:] = [status, headers]
        return lambda data: None

    body = app(env, answer)
    chunks = iter(body)
    first = next(chunks, b"")
    return said[0], said[1], _rest(first, chunks, body)


def _rest(first: bytes, chunks: Iterator[bytes], body: Any) -> Iterator[bytes]:
    try:
        yield first
        yield from chunks
    finally:
        if hasattr(body, "close"):
            body.close()


def _first(chunks: Chunks, size: int) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk[:size]
        size -= len(chunk)
        if size <= 0:
            return


def _flipped(chunks: Chunks, place: int) -> Iterator[bytes]:
    """The chunks with one bit of the byte at `place` flipped."""
    for chunk in chunks:
        if 0 <= place < len(chunk):
            chunk = chunk[:place] + bytes([chunk[place] ^ 1 << place % 8]) + chunk[place + 1 :]
        place -= len(chunk)
        yield chunk


def _load(folder: Path, ports: dict[str, int]) -> dict[str, App]:
    """Swift's four servers by name, on the ports of those that are asked over HTTP."""
    from swift.common import utils
    from swift.common.ring import RingBuilder
    from swift.common.storage_policy import reload_storage_policies
    from swift.common.wsgi import loadapp

    (folder / "devices" / "d1").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n[storage-policy:0]\nname = one\n")
    utils.set_swift_dir(str(folder))
    reload_storage_policies()
    for name, port in ports.items():
        ring = RingBuilder(4, 1, 1)
        device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d1", "weight": 1.0}
        ring.add_dev(device)
        ring.rebalance()
        ring.get_ring().save(str(folder / f"{name}.ring.gz"))
    apps = {}
    for name, pipeline in PIPELINES.items():
        config = CONFIG.format(folder=folder, name=name, pipeline=pipeline)
        for each in pipeline.split()[:-1]:
            config += f"[filter:{each}]\nuse = egg:swift#{each}\n{FILTERS.get(each, '')}"
        (folder / f"{name}.conf").write_text(config)
        apps[name] = loadapp(str(folder / f"{name}.conf"))
    return apps


def main(folder: Path, parent: int) -> None:
    _end_with(parent, folder)
    os.fsync = os.fdatasync = lambda fd: None  # nothing here is to outlive the machine
    os.environ["TZ"] = "UTC+0"
    time.tzset()
    eventlet.debug.hub_exceptions(False)
    names = ("account", "container", "object", "endpoint", "racing", "plain")
    listeners = {name: eventlet.listen(("127.0.0.1", 0), backlog=1024) for name in names}
    ports = {name: listener.getsockname()[1] for name, listener in listeners.items()}
    apps = _load(folder, {name: ports[name] for name in names[:3]})
    swift, cache, rules = apps.pop("proxy"), Cache(), Rules()

    def proxy(env: Environ, answer: Answer) -> Iterable[bytes]:
        env["swift.cache"] = cache
        return swift(env, answer)

    def plain(env: Environ, answer: Answer) -> Iterable[bytes]:
        return (rules if env["PATH_INFO"].startswith("/-/") else proxy)(env, answer)

    apps["object"] = Rotting(apps["object"], rules)
    apps |= {"endpoint": Front(proxy, rules, atomic=True), "racing": Front(proxy, rules, atomic=False), "plain": plain}
    log = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    for name, app in apps.items():
        eventlet.spawn(
            wsgi.server,
            listeners[name],
            app,
            log=log,
            protocol=Protocol,
            minimum_chunk_size=1,  # half an answer is to be sent, too
            socket_timeout=600,
            capitalize_response_headers=False,
            url_length_limit=1 << 16,
        )
    print(json.dumps({name: ports[name] for name in names[3:]}), flush=True)
    Event().wait()


def _end_with(parent: int, folder: Path) -> None:
    """Have this process end, and its folder go, when another ends, however it does."""
    watched = os.pidfd_open(parent)
    selecting: Any = original("select")
    threading: Any = original("threading")
    polling = selecting.poll()
    polling.register(watched, select.POLLIN)

    def wait() -> None:
        polling.poll()
        shutil.rmtree(folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
