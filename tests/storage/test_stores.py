"""Stores are set up where their own tools are set up, once for both libraries; what fails is told in a sentence."""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fsspec.config import conf
from object_store import GUEST_KEY, GUEST_SECRET, KEY, REGION, SECRET, Do, Fault, Request, Swift, forget_stores
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.storage.stores import open_store, redacted, table_options
from wavemill.storage.table import create_table, read_snapshot
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import RunFailed, UserError

CANARY = "cAnAry7secret9and5token"
CREDENTIALS = f"aws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"


@pytest.fixture
def clean(on_swift: Swift, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment that says nothing of S3; `forget_stores` after setting it up."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    forget_stores()
    yield monkeypatch
    monkeypatch.undo()
    forget_stores()


def by_environment(swift: Swift, patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name, value in swift.env().items():
        patch.setenv(name, value)


def by_a_session(swift: Swift, patch: pytest.MonkeyPatch, folder: Path) -> None:
    by_environment(swift, patch, folder)
    patch.delenv("AWS_REGION")
    patch.setenv("AWS_SESSION_TOKEN", CANARY)


def by_the_endpoint_of_s3_alone(swift: Swift, patch: pytest.MonkeyPatch, folder: Path) -> None:
    by_environment(swift, patch, folder)
    patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    patch.setenv("AWS_ENDPOINT_URL_S3", swift.endpoint)


def by_a_profile(swift: Swift, patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "config").write_text(
        f"[default]\nregion = eu-west-9\n"
        f"[profile here]\nregion = {REGION}\nendpoint_url = {swift.endpoint}\n{CREDENTIALS}"
    )
    patch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    patch.setenv("AWS_PROFILE", "here")


def by_a_profile_with_services(swift: Swift, patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "config").write_text(
        f"[profile here]\nregion = {REGION}\nservices = near\ns3 =\n  addressing_style = path\n"
        f"[services near]\ns3 =\n  endpoint_url = {swift.endpoint}\n"
    )
    (folder / "credentials").write_text(f"[here]\n{CREDENTIALS}")
    patch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    patch.setenv("AWS_PROFILE", "here")


def by_a_process(swift: Swift, patch: pytest.MonkeyPatch, folder: Path) -> None:
    said = f'{{"Version": 1, "AccessKeyId": "{KEY}", "SecretAccessKey": "{SECRET}"}}'
    (folder / "said.json").write_text(said)
    (folder / "config").write_text(
        f"[default]\nregion = {REGION}\nendpoint_url = {swift.endpoint}\n"
        f"credential_process = cat {folder / 'said.json'}\n"
    )
    patch.setenv("AWS_CONFIG_FILE", str(folder / "config"))


def by_fsspec(swift: Swift, patch: pytest.MonkeyPatch, folder: Path) -> None:
    found = {"key": KEY, "secret": SECRET, "endpoint_url": swift.endpoint, "client_kwargs": {"region_name": REGION}}
    patch.setitem(conf, "s3", found)


@pytest.mark.parametrize(
    "set_up",
    [
        by_environment,
        by_a_session,
        by_the_endpoint_of_s3_alone,
        by_a_profile,
        pytest.param(by_a_profile_with_services, marks=pytest.mark.slow),
        pytest.param(by_a_process, marks=pytest.mark.slow),
        pytest.param(by_fsspec, marks=pytest.mark.slow),
    ],
)
def test_both_libraries_find_the_store_where_botocore_would(
    set_up: Callable[[Swift, pytest.MonkeyPatch, Path], None],
    on_swift: Swift,
    clean: pytest.MonkeyPatch,
    tmp_path: Path,
):
    uri = f"s3://{on_swift.bucket()}/some/where"
    set_up(on_swift, clean, tmp_path)
    forget_stores()
    root = Root(uri)
    root.write_bytes("x", b"content")
    assert root.read_bytes("x") == b"content"
    by_fsspec_itself = on_swift.requests()
    create_table(root, "corpus", schema=CORPUS_SCHEMA, metadata={})
    TableWriter(root, "corpus")
    by_deltalake = on_swift.requests()[len(by_fsspec_itself) :]
    assert whom(by_fsspec_itself) == whom(by_deltalake) == {(KEY, REGION, CANARY if set_up is by_a_session else "")}


def test_both_libraries_ask_anonymously_where_that_is_set(on_swift: Swift, clean: pytest.MonkeyPatch):
    root_uri = f"s3://{on_swift.bucket()}/some/where"
    clean.setenv("AWS_ENDPOINT_URL", on_swift.endpoint)
    clean.setitem(conf, "s3", {"anon": True})
    forget_stores()
    for act in (lambda root: root.read_bytes("x"), lambda root: read_snapshot(root, "corpus")):
        on_swift.clear()
        with pytest.raises((RunFailed, UserError, FileNotFoundError)):  # Swift knows no anonymous S3
            act(Root(root_uri))
        assert whom(on_swift.requests()) == {("", "", "")}


def test_the_style_of_addresses_and_the_region_are_the_same_for_both(clean: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "config").write_text(
        f"[default]\nregion = eu-west-9\ns3 =\n  addressing_style = virtual\n{CREDENTIALS}"
    )
    clean.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    clean.setenv("AWS_ENDPOINT_URL", "https://store.example")
    forget_stores()
    options = table_options("s3://bucket/x")
    assert options["aws_virtual_hosted_style_request"] == "true"
    assert options["aws_region"] == "eu-west-9"
    assert "aws_allow_http" not in options
    clean.delenv("AWS_ENDPOINT_URL")
    forget_stores()
    assert "aws_endpoint_url" not in table_options("s3://bucket/x")  # Amazon's own, which deltalake knows


def test_secrets_are_in_no_message_of_ours():
    for url in (
        f"https://host/bucket/key?X-Amz-Credential={CANARY}&X-Amz-Signature={CANARY}",
        f"https://host/x?sv=2024&sig={CANARY}&se=1",
        f"https://user:{CANARY}@host/x",
        f"s3://bucket/x?token={CANARY}",
    ):
        assert CANARY not in redacted(f"Cannot open {url}: no.")
        with pytest.raises(UserError) as caught:
            open_store(url.replace("s3:", "http:"))
        assert CANARY not in str(caught.value)


MISTAKES = {
    "a profile that is not there": {"AWS_PROFILE": "nosuch"},
    "no credentials": {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
    "an unknown key": {"AWS_ACCESS_KEY_ID": f"test:{CANARY}"},
    "another's secret": {"AWS_SECRET_ACCESS_KEY": CANARY},
    "a guest, who may do nothing": {"AWS_ACCESS_KEY_ID": GUEST_KEY, "AWS_SECRET_ACCESS_KEY": GUEST_SECRET},
    "no bucket": {},
}
ACTS: dict[str, Callable[[Root], object]] = {
    "list": lambda root: root.list("streams"),
    "exists": lambda root: root.exists("codebooks/x"),
    "read": lambda root: root.read_bytes("pins/x"),
    "ranges": lambda root: root.read_ranges("corpus/x", [(0, 10)]),
    "write": lambda root: root.write_bytes("pins/x", b"x"),
    "require": lambda root: root.require_writable(),
    "snapshot": lambda root: read_snapshot(root, "corpus"),
    "create": lambda root: create_table(root, "streams/x", schema=CORPUS_SCHEMA, metadata={}),
    "fence": lambda root: TableWriter(root, "corpus"),
}
WITHOUT_BUCKET = {"list", "exists", "read", "ranges", "write"}  # as where there is no such folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_settings_is_one_sentence_at_once(
    mistake: str, on_swift: Swift, finished_root: Path, monkeypatch: pytest.MonkeyPatch
):
    uri = f"s3://{on_swift.bucket()}/some/where"
    on_swift.upload(finished_root / "corpus", f"{uri}/corpus")
    if mistake == "no bucket":
        uri = "s3://no-such-bucket/some/where"
    for name, value in MISTAKES[mistake].items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    forget_stores()
    for act, do in ACTS.items():
        if mistake == "no bucket" and act in WITHOUT_BUCKET:
            continue
        started = time.monotonic()
        with pytest.raises((RunFailed, UserError)) as caught:
            do(Root(uri))
        require_sentence(caught.value, act)
        assert time.monotonic() - started < 10, act


def test_without_credentials_no_metadata_service_is_asked(on_swift: Swift, clean: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as service:
        clean.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{service.getsockname()[1]}")  # deltalake's name for it
        clean.setenv("AWS_ENDPOINT_URL", on_swift.endpoint)
        forget_stores()
        service.settimeout(5)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(service.accept)
            with pytest.raises(UserError, match="credentials"):
                read_snapshot(Root(f"s3://{on_swift.bucket()}/x"), "corpus")
            with pytest.raises(TimeoutError):
                asked.result()


@pytest.mark.slow
def test_where_nobody_listens_each_act_ends_within_a_minute(on_swift: Swift, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    forget_stores()
    require_trouble_within(60, Root("s3://bucket/some/where"))


@pytest.mark.slow
@pytest.mark.parametrize("do", ["503", "500", "reset", "409", "lose", "lose-reset", "cut", "reset-body"])
def test_a_store_that_fails_for_ever_ends_each_act_within_a_minute(do: Do, on_swift: Swift, finished_root: Path):
    uri = f"s3://{on_swift.bucket()}/some/where"
    on_swift.upload(finished_root / "corpus", f"{uri}/corpus")
    on_swift.put(f"{uri}/corpus/x", bytes(100))
    on_swift.put(f"{uri}/pins/x", bytes(100))
    on_swift.set_faults(Fault(do=do))
    require_trouble_within(60, Root(uri))


def whom(requests: Sequence[Request]) -> set[tuple[str, str, str]]:
    """Keys, regions and tokens with which requests were signed."""
    assert requests
    return {(request.key, request.region, request.token) for request in requests}


def require_trouble_within(limit_s: float, root: Root) -> None:
    """See that each act, all at once, ends in a `RunFailed`, in one sentence, in time."""

    def measure(act: str) -> float:
        started = time.monotonic()
        with pytest.raises(RunFailed) as caught:
            ACTS[act](root)
        require_sentence(caught.value, act)
        return time.monotonic() - started

    with ThreadPoolExecutor(len(ACTS)) as pool:
        took = dict(zip(ACTS, pool.map(measure, ACTS), strict=True))
    print(", ".join(f"{act} {seconds:.0f} s" for act, seconds in took.items()))
    assert max(took.values()) < limit_s, took


def require_sentence(error: BaseException, act: str) -> None:
    told = str(error)
    assert told.endswith("."), (act, told)
    assert len(told) < 600, (act, told)
    assert not re.search(r"[\n\x1b<>↳]|169\.254", told), (act, told)
    assert CANARY not in told, (act, told)


def closed_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]
