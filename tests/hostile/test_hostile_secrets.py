"""Keys, tokens and signatures: after every run and every failure, none is in what was printed, stored or logged."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from hostile_runs import family, run
from hostile_teller import Teller
from hostile_tools import World
from hostile_watch import Audit, connections_out
from object_store import Fault, Swift

pytest_plugins = ["hostile_table"]
pytestmark = pytest.mark.timeout(900)

Wavemill = Callable[..., CompletedProcess[str]]

PASSWORD = "hunter2-7f3a"  # in URLs
SECRETS = {
    "AWS_ACCESS_KEY_ID": "test:canary",
    "AWS_SECRET_ACCESS_KEY": "CANARY-s3cr3t-7f3a",
    "AWS_SESSION_TOKEN": "CANARY-t0ken-7f3a",
    "HF_TOKEN": "hf_CANARY7f3a",
    "WAVEMILL_TOKEN": "CANARY-ours-7f3a",
}
# how a command may be given the store's keys wrong, and what the store then answers
TROUBLES: dict[str, tuple[dict[str, str], tuple[Fault, ...]]] = {
    "a wrong secret": ({"AWS_SECRET_ACCESS_KEY": "CANARY-wr0ng-7f3a"}, ()),
    "an unknown key": ({"AWS_ACCESS_KEY_ID": "AKIACANARY7F3A"}, ()),
    "a token that has expired": ({}, (Fault(do="403"),)),
    "a store that refuses to write": ({}, (Fault(do="403", methods="PUT POST DELETE"),)),
}
SLOW_TROUBLES: dict[str, tuple[dict[str, str], tuple[Fault, ...]]] = {
    "503 for ever": ({}, (Fault(do="503"),)),
    "connections that are reset": ({}, (Fault(do="reset"),)),
    "bodies that are cut": ({}, (Fault(do="cut", methods="GET"),)),
    "nobody who listens": ({"AWS_ENDPOINT_URL": f"http://user:{PASSWORD}@127.0.0.1:9"}, ()),
    "an endpoint with a password": ({"AWS_ENDPOINT_URL": f"http://user:{PASSWORD}@ENDPOINT"}, ()),
}


def _needles() -> list[bytes]:
    """Each secret as it is and as formats and logs may write it."""
    found = []
    for secret in {*SECRETS.values(), PASSWORD, "CANARY-wr0ng-7f3a", "AKIACANARY7F3A"}:
        plain = secret.encode()
        found += [plain, quote(secret, safe="").encode(), quote(quote(secret, safe=""), safe="").encode()]
        found += [plain.hex().encode(), plain.hex(" ").encode(), base64.b64encode(plain).rstrip(b"=")]
    return found


_NEEDLE = re.compile(b"|".join(map(re.escape, _needles())), re.IGNORECASE)


class Search:
    """Looks for secrets, counts what it finds and how much it looked at."""

    def __init__(self, tell: Teller) -> None:
        self._tell = tell
        self.bytes = 0

    def __call__(self, where: str, content: bytes | str) -> None:
        content = content.encode() if isinstance(content, str) else content
        hits = _NEEDLE.findall(content)
        self.bytes += len(content)
        self._tell.figure("searched", len(content))
        self._tell.figure("secrets", len(hits))
        assert not hits, f"{where} holds {set(hits)}"

    def objects(self, content: dict[str, bytes]) -> None:
        """Objects of a store by name: as they are, and the rows and metadata of tables among them."""
        for name, each in content.items():
            self(name, each)
            if name.endswith(".parquet"):
                table = pq.read_table(io.BytesIO(each))
                self(f"the rows of {name}", f"{table.schema.metadata} {table.to_pylist()}")

    def files(self, *folders: Path) -> None:
        """All regular files below folders."""
        for path in (path for folder in folders for path in folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                self(str(path), path.read_bytes())


@pytest.fixture
def search(tell: Teller) -> Search:
    return Search(tell)


@pytest.fixture
def as_canary(on_swift: Swift, monkeypatch: pytest.MonkeyPatch) -> Iterator[Swift]:
    """The store, asked by somebody whose keys are secrets to look for."""
    for name in ("HF_TOKEN", "WAVEMILL_TOKEN"):
        monkeypatch.setenv(name, SECRETS[name])
    with on_swift.environment(**{name: secret for name, secret in SECRETS.items() if name.startswith("AWS_")}):
        yield on_swift


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[World]:
    """A world in which commands run in processes of their own."""
    world = World.make(tmp_path / "world")
    yield world
    world.listener.close()


def _uploaded(store: Swift, samples: Path) -> str:
    """A source of five recordings, one of them no audio."""
    source = f"s3://{store.bucket()}/recordings"
    for path in sorted((samples / "speech").glob("en_anna_0[1-4].*")):
        store.put(f"{source}/{path.name}", path.read_bytes())
    store.put(f"{source}/broken.wav", b"<html>")
    return source


COMMANDS = [
    "corpus build x={source} --to {root} --json",
    "codebook fit {root} mfcc-kmeans --size 20 --json",
    "tokenize {root} --engine inline --stream semantic=mfcc-kmeans --max-error-share 1",
    "corpus show {root}",
    "inspect {root} --json",
    "quarantine {root} --json",
    "pin {root} base",
    "export {root} --view plain",
    "verify {root}",
    "vacuum {root} --dry-run",
]


@pytest.mark.slow
def test_a_dataset_in_a_store_holds_no_secret_and_neither_does_what_its_commands_print(
    as_canary: Swift, samples: Path, in_process: Wavemill, search: Search, tell: Teller
) -> None:
    source = _uploaded(as_canary, samples)
    root = source.replace("/recordings", "/dataset")
    for command in COMMANDS:
        done = in_process("--debug", *command.format(source=source, root=root).split())
        assert done.returncode == 0, (command, done.stderr)
        search(command, done.stdout + done.stderr)
    assert len(as_canary.keys(root)) > 10
    search.objects(as_canary.content(root))
    signed = {request.key for request in as_canary.requests()}
    assert SECRETS["AWS_ACCESS_KEY_ID"] in signed
    tell.case(
        f"keys, a session token, HF_TOKEN in the environment of {len(COMMANDS)} commands on a store",
        f"done, no secret in {search.bytes:,} bytes of output, tables, logs, codebooks, exports",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "trouble", [next(iter(TROUBLES)), *(pytest.param(each, marks=pytest.mark.slow) for each in list(TROUBLES)[1:])]
)
def test_a_store_that_refuses_makes_no_command_tell_a_secret(
    as_canary: Swift, samples: Path, in_process: Wavemill, search: Search, tell: Teller, trouble: str
) -> None:
    source = _uploaded(as_canary, samples)
    root = source.replace("/recordings", "/dataset")
    for command in COMMANDS[:3]:
        in_process(*command.format(source=source, root=root).split())
    environment, faults = TROUBLES[trouble]
    as_canary.set_faults(*faults)
    with as_canary.environment(**_aws({**SECRETS, **environment})):
        said = _fail(in_process, search, source=source, root=root, but=("vacuum",) if faults else ())
    search.objects(as_canary.content(root))
    tell.case(f"{trouble}, in {len(COMMANDS)} commands", said)


def _aws(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("AWS_")}


def _fail(command_line: Wavemill, search: Search, *, source: str, root: str, but: Iterable[str] = ()) -> str:
    """Run commands that cannot do their work and search what they say; the last that was said."""
    told = ""
    for command in COMMANDS:
        done = command_line("--debug", *command.format(source=source, root=root).split())
        search(command, done.stdout + done.stderr)
        assert "Traceback" not in done.stderr, (command, done.stderr)
        if done.returncode:
            told = done.stderr.strip().splitlines()[-1]
            assert done.returncode in (1, 2), (command, done.stderr)
            assert len(told) < 700, told
            assert "<" not in told.replace(f"{root}", ""), told  # a store's own words, not its XML
    assert told
    return told.removeprefix("Error: ")


URLS = [
    f"s3://AKIACANARY7F3A:{PASSWORD}@bucket/x",
    f"s3://bucket/x.wav?X-Amz-Credential=AKIACANARY7F3A%2F2026&X-Amz-Signature={PASSWORD}",
    f"s3://bucket/x.wav?AWSAccessKeyId=AKIAEXAMPLE&Expires=1&Signature={PASSWORD}",
    f"https://bucket.s3.amazonaws.com/x.wav?X-Amz-Security-Token={PASSWORD}&X-Amz-Signature={PASSWORD}",
    f"https://user:{PASSWORD}@example.org/x.wav",
    f"az://container@account.blob.core.windows.net/x.wav?sv=2026&sig={PASSWORD}",
]
USES = {
    "a source": "corpus build {url} --to {folder}/root",
    "a named source": "corpus build x={url} --to {folder}/root",
    "a line of a manifest": "corpus build {folder}/list.jsonl --to {folder}/root",
    "a source in a recipe": "run {folder}/recipe.yaml",
    "the root of a build": "corpus build {folder} --to {url}",
    "the root of a run": "tokenize {url}",
    "the root of a look": "inspect {url} --json",
    "the place of decoded sound": "decode {finished} --limit 1 --to {url}",
    "weights": "tokenize {finished} --stream x=hubert-base,weights={url}",
    "where a source is now": "tokenize {finished} --source speech={url}",
}


@pytest.mark.parametrize("use", USES)
def test_a_url_that_comes_with_keys_is_refused_and_not_repeated(
    on_swift: Swift,
    in_process: Wavemill,
    search: Search,
    tell: Teller,
    finished_root: Path,
    tmp_path: Path,
    use: str,
) -> None:
    said = set()
    for url in URLS:
        (tmp_path / "list.jsonl").write_text(json.dumps({"audio_filepath": url}))
        (tmp_path / "recipe.yaml").write_text(json.dumps({"root": "root", "corpus": {"sources": [{"path": url}]}}))
        words = [word.format(url=url, folder=tmp_path, finished=finished_root) for word in USES[use].split()]
        done = in_process("--debug", *words)
        assert done.returncode in (1, 2), (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        search(f"{use} {url}", done.stdout + done.stderr)
        said.add(done.stderr.strip().splitlines()[-1])
    if (tmp_path / "root").exists():
        search.files(tmp_path / "root")
    tell.case(f"{len(URLS)} URLs with keys, signatures, passwords as {use}", max(said).removeprefix("Error: "))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", SLOW_TROUBLES)
def test_a_store_that_fails_makes_no_command_tell_a_secret(
    desk: World, as_canary: Swift, samples: Path, search: Search, tell: Teller, trouble: str
) -> None:
    """In processes of their own, so that what libraries print past Python is searched, too."""
    source = _uploaded(as_canary, samples)
    root = source.replace("/recordings", "/dataset")
    for command in COMMANDS[:3]:
        assert run(desk, *command.format(source=source, root=root).split()).status == 0
    environment, faults = SLOW_TROUBLES[trouble]
    as_canary.set_faults(*faults)
    host = as_canary.endpoint.removeprefix("http://")
    changed = {name: value.replace("ENDPOINT", host) for name, value in environment.items()}
    told, audit = "", Audit(desk.folder.parent / "audit")
    for command in [COMMANDS[0], *COMMANDS[2:5], "doctor {root}"]:
        done = run(desk, "--debug", *command.format(source=source, root=root).split(), env=audit.env | changed)
        search(command, done.out + done.err)
        tell.figure("peak_bytes", done.peak_bytes)
        assert "Traceback" not in done.err, done.err
        assert done.status in (0, 1, 2)
        if done.status and done.err.strip():
            told = done.err.strip().splitlines()[-1]
    assert told
    connections = connections_out(audit.events(), "127.0.0.1")
    audit.close()
    tell.figure("connections", desk.listener.hits + len(connections))
    assert (desk.listener.hits, connections) == (0, set())
    search.files(desk.folder)
    assert not list(desk.folder.rglob("core*"))
    tell.case(f"{trouble}, in 5 commands", told.removeprefix("Error: "))


# Ray


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its sessions; its sockets have long names below it."""
    with tempfile.TemporaryDirectory(prefix="wm", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_rays_session_folder_holds_no_secret_whatever_became_of_the_run(
    desk: World, as_canary: Swift, samples: Path, ray_folder: Path, search: Search, tell: Teller
) -> None:
    source = _uploaded(as_canary, samples)
    root = source.replace("/recordings", "/dataset")
    env = {"RAY_TMPDIR": str(ray_folder)}
    tokenize = ("--debug", "tokenize", root, "--stream", "semantic=mfcc-kmeans", "--workers", "2")
    tokenize = (*tokenize, "--max-error-share", "1")
    for command in COMMANDS[:2]:
        assert run(desk, *command.format(source=source, root=root).split()).status == 0
    troubles = {
        "workers that may not write": (Fault(do="403", methods="PUT", match=r"/shard-"), 1),
        "workers that may not read": (Fault(do="403", methods="GET", match=r"/recordings/"), 1),
        "a run that is done": (Fault(do="503", times=0), 0),
    }
    for trouble, (fault, status) in troubles.items():
        as_canary.set_faults(fault)
        done = run(desk, *tokenize, env=env)
        assert done.status == status, (trouble, done.err)
        search(trouble, done.out + done.err)
    sessions = [path for path in (ray_folder / "ray").glob("session_2*") if path.is_dir()]
    assert len(sessions) == len(troubles)
    assert all(len(list((session / "logs").iterdir())) > 5 for session in sessions)
    search.files(ray_folder, desk.folder)
    search.objects(as_canary.content(root))
    tell.case(
        f"a store with keys in the environment of {len(troubles)} runs on Ray, two of them failing",
        f"no secret in {search.bytes:,} bytes of its session folders, of output and tables",
    )


@pytest.mark.slow
def test_a_driver_without_the_token_cannot_use_our_ray(
    desk: World, finished_root: Path, copy_root: Callable[[Path], Path], ray_folder: Path, tell: Teller
) -> None:
    root = copy_root(finished_root)
    env = {**desk.env, "RAY_TMPDIR": str(ray_folder), "WAVEMILL_FAILPOINTS": "shard-before-write=sleep:300"}
    command = [sys.executable, "-P", "-m", "wavemill.jobs.cli", "tokenize", str(root), "--workers", "1"]
    command += ["--stream", "again=mfcc-kmeans"]
    driver = subprocess.Popen(command, env=env, cwd=desk.folder / "desk", stderr=subprocess.DEVNULL)
    try:
        address, token = _ray_of(driver)
        assert os.stat(token).st_mode & 0o777 == 0o600
        assert os.stat(os.path.dirname(token)).st_mode & 0o777 == 0o700
        assert not (desk.folder / "home" / ".ray" / "auth_token").exists()
        secret = Path(token).read_text()
        for path in (path for path in ray_folder.rglob("*") if path.is_file() and not path.is_symlink()):
            assert secret.encode() not in path.read_bytes(), path
        for form, given in {
            "no token": {},
            "another token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        }.items():
            told = _intrude(address, desk, given)
            assert not desk.touched.exists()
            tell.case(f"a driver with {form} at our Ray", told)
        with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
        _intrude(address, desk, with_token)
        assert desk.touched.exists(), "nobody could have touched it, so nothing was shown"
        desk.touched.unlink()
    finally:
        driver.terminate()
        driver.wait(60)
    assert not os.path.exists(token)


def _ray_of(driver: "subprocess.Popen[bytes]") -> tuple[str, str]:
    """The address of the cluster that a process has started, and its token's file, once a worker works."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for pid in family(driver.pid):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                env = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            address = re.search(r"--gcs-address=([\d.]+:\d+)", command)
            token = next((line.partition("=")[2] for line in env if line.startswith("RAY_AUTH_TOKEN_PATH=")), "")
            if address and token:
                return address[1], token
        time.sleep(0.2)
    raise AssertionError("Ray did not start")


def _intrude(address: str, world: World, given: dict[str, str]) -> str:
    """Have somebody else's driver run code in a cluster; the last line that it says."""
    code = f"""
import os, ray
ray.init(address={address!r}, log_to_driver=False, _node_ip_address={address.rpartition(":")[0]!r})
touch = ray.remote(num_cpus=0)(lambda: open({str(world.touched)!r}, "w").close())
ray.get(touch.remote(), timeout=60)
"""
    env = {name: value for name, value in world.env.items() if not name.startswith("RAY_")} | given
    asked = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        asked, env=env, cwd=world.folder / "tmp", capture_output=True, text=True, timeout=150, check=False
    )
    return (done.stderr.strip().splitlines() or ["done"])[-1]
