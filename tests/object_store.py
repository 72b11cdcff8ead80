"""A real object store for tests: OpenStack Swift on this machine, with faults on request (see swift_server.py)."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytest

SERVER = Path(__file__).with_name("swift_server.py")
KEY, SECRET, REGION = "test:tester", "testing", "us-east-1"
GUEST_KEY, GUEST_SECRET = "test:guest", "guesting"  # who may do nothing

# 503, 500, 403, 409   answered, and nothing is done; 403 says ExpiredToken
# slow                 done after some seconds
# reset                the connection is reset, and nothing is done
# lose, lose-reset     done, and answered by a 500 or a reset
# cut, reset-body      half of the answer's body, then the connection is closed or reset
# flip                 a bit of the body on its way: of what is answered or, for PUT and POST, of what is sent
# rot                  a bit of what a PUT stores
Do = Literal["503", "500", "403", "409", "slow", "reset", "lose", "lose-reset", "cut", "reset-body", "flip", "rot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong with requests of some methods whose path and query match an expression."""

    do: Do
    methods: str = "GET HEAD PUT POST DELETE"
    match: str = ""  # searched for in /BUCKET/KEY?QUERY
    times: int = -1  # then no more; -1: for ever
    skip: int = 0  # so many that match are let through first
    share: float = 1.0  # of those that match
    seconds: float = 0.0  # how slow
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that came, and what became of it."""

    method: str
    target: str  # /BUCKET/KEY?QUERY
    range: str  # what was asked for, as in "bytes=0-99"
    condition: str  # If-None-Match or If-Match
    key: str  # who signed it; empty: nobody
    region: str  # for which region
    token: str  # of a session
    fault: str  # what went wrong, as in `Fault.do`
    status: int  # 0: the connection was closed
    bytes_in: int
    bytes_out: int  # of the body


class Swift:
    """A running store, as one test process sees it. Faults and requests are those of this process's buckets."""

    def __init__(self, ports: dict[str, int]) -> None:
        self.endpoint = f"http://127.0.0.1:{ports['endpoint']}"
        self.racing_endpoint = f"http://127.0.0.1:{ports['racing']}"  # of two conditional creates both may win
        self.plain_endpoint = f"http://127.0.0.1:{ports['plain']}"  # no faults, and no requests are noted
        self._namespace = f"wm{uuid.uuid4().hex[:10]}"
        self._numbers = count()

    def env(self, **changes: str) -> dict[str, str]:
        """What clients find in their environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            **changes,
        }

    @contextmanager
    def environment(self, **changes: str) -> Iterator[None]:
        """This store as the one that clients in this process find; nothing remembered of another."""
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in self.env(**changes).items():
                patch.setenv(name, value)
            forget_stores()
            yield
        forget_stores()

    def bucket(self) -> str:
        """A new bucket's name."""
        name = f"{self._namespace}-{next(self._numbers)}"
        self._client.create_bucket(Bucket=name)
        return name

    def set_faults(self, *faults: Fault) -> None:
        """These and no others, from now on: the first that strikes a request is done."""
        self._control("PUT", [asdict(fault) for fault in faults])

    def clear(self) -> None:
        """No faults any more, and no requests so far."""
        self._control("DELETE")

    def requests(self, method: str = "", match: str = "") -> list[Request]:
        """What was asked since `clear`, in order: of a method, with these words in path and query."""
        found = [Request(**request) for request in self._control("GET")]
        return [each for each in found if method in ("", each.method) and match in each.target]

    def put(self, uri: str, content: bytes) -> None:
        """Put an object, past all faults. So do the methods below."""
        bucket, key = _split(uri)
        self._client.put_object(Bucket=bucket, Key=key, Body=content)

    def get(self, uri: str) -> bytes:
        bucket, key = _split(uri)
        return self._client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def delete(self, uri: str) -> None:
        bucket, key = _split(uri)
        self._client.delete_object(Bucket=bucket, Key=key)

    def keys(self, uri: str) -> list[str]:
        """Names of all objects below a prefix, relative to it, sorted."""
        bucket, prefix = _split(f"{uri}/")
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(found["Key"].removeprefix(prefix) for page in pages for found in page.get("Contents", ()))

    def upload(self, folder: Path, uri: str) -> str:
        """Put all files below a folder below a prefix; the prefix."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return uri

    def content(self, uri: str) -> dict[str, bytes]:
        """All objects below a prefix, by name."""
        return {key: self.get(f"{uri}/{key}") for key in self.keys(uri)}

    def copy(self, source: str, target: str) -> str:
        """Copy all objects below a prefix to another, within the store; the other."""
        for key in self.keys(source):
            bucket, name = _split(f"{target}/{key}")
            old_bucket, old_name = _split(f"{source}/{key}")
            self._client.copy_object(Bucket=bucket, Key=name, CopySource={"Bucket": old_bucket, "Key": old_name})
        return target

    @cached_property
    def _client(self) -> Any:
        import botocore.config
        import botocore.session

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.plain_endpoint,
            region_name=REGION,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=botocore.config.Config(s3={"addressing_style": "path"}, proxies={}),
        )

    def _control(self, method: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.plain_endpoint}/-/{self._namespace}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())


def start_swift(parent: int) -> dict[str, int]:
    """Start a store that ends with the process `parent`; its ports."""
    folder = tempfile.mkdtemp(prefix="wavemill-swift-")
    # isolated: nothing beside the script is to be taken for one of Swift's modules
    server = subprocess.Popen(
        [sys.executable, "-I", str(SERVER), folder, str(parent)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=open(f"{folder}/said", "wb"),  # noqa: SIM115 - the server's from here on
        start_new_session=True,
    )
    assert server.stdout is not None
    said = server.stdout.readline()
    assert said, f"Swift did not start: {Path(folder, 'said').read_text()[-2000:]}"
    return json.loads(said)


def require_swift() -> None:
    """Skip the test where no store can be started."""
    if sys.platform != "linux" or find_spec("swift") is None or find_spec("pyeclib") is None:
        pytest.skip("needs OpenStack Swift, which is for Linux: pip install swift pyeclib")


def forget_stores() -> None:
    """Have the next who opens a store read the environment anew."""
    import fsspec
    from wavemill.storage import stores

    for kind in ("s3", "s3a"):
        if kind in fsspec.available_protocols():
            fsspec.get_filesystem_class(kind).clear_instance_cache()
    stores._session.cache_clear()
    stores._s3_client.cache_clear()


def _split(uri: str) -> tuple[str, str]:
    """A bucket's name and what comes behind it."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
