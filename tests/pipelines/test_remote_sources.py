"""Sources that lie in an object store: every kind of them gives what the same tree gives on a disk."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from object_store import Fault, Swift, forget_stores
from test_source_kinds import KINDS, NAMES, TEXTS, write_arrow, write_librispeech
from wavemill.jobs.arguments import parse_moved
from wavemill.jobs.corpus import build_corpus
from wavemill.pipelines.entries import AudioError, Entry
from wavemill.pipelines.files import Replaced, open_regular
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.source_paths import full_path
from wavemill.pipelines.sources import kind_of, open_source
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.storage.stores import StoreTrouble
from wavemill.tokenizers.spec import UserError

NOWHERE = "/nowhere/at/all"


def sound(seconds: float = 0.1, format: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(int(seconds * 16_000), 0.1), 16_000, format=format)
    return buffer.getvalue()


def told(argument: str | Path, **asked: Any) -> tuple[list[Any], dict[str, int]]:
    """Entries, their errors by what they say, and what was skipped."""
    source = open_source(str(argument), **{"exclude": NOWHERE, **asked})
    entries = [
        (replace(entry, error=None), entry.error and (entry.error.kind, str(entry.error))) for entry in source.entries
    ]
    return entries, dict(source.skipped)


def listed(argument: str | Path, **asked: Any) -> list[Entry]:
    return list(open_source(str(argument), **{"exclude": NOWHERE, **asked}).entries)


def paths(argument: str | Path, **asked: Any) -> list[str]:
    return [entry.path for entry in listed(argument, **asked)]


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def bucket(on_swift: Swift) -> str:
    """A new bucket's URI."""
    return f"s3://{on_swift.bucket()}"


@pytest.fixture
def put(on_swift: Swift, bucket: str) -> Callable[..., str]:
    """Puts objects, recordings where no content is given, below `s` in a bucket; the URI of `s`."""

    def put(*recordings: str, **contents: str | bytes) -> str:
        for name in recordings:
            on_swift.put(f"{bucket}/s/{name}", sound())
        for name, content in contents.items():
            on_swift.put(f"{bucket}/s/{name}", content if isinstance(content, bytes) else content.encode())
        return f"{bucket}/s"

    return put


# As on a disk


def write_metadata(place: Path) -> Path:
    write_librispeech(place)
    rows = [{"file_name": f"{name}.flac", "text": text} for name, text in zip(NAMES, TEXTS, strict=True)]
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def write_saved(place: Path) -> Path:
    write_arrow(place)
    (place / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    return place


FOLDERS = {"metadata.jsonl": ("csv", write_metadata), "saved": ("parquet", write_saved)}


@pytest.mark.parametrize("name", [*KINDS, *FOLDERS])
def test_every_kind_of_source_gives_the_entries_that_it_gives_on_a_disk(
    name: str, tmp_path: Path, on_swift: Swift
) -> None:
    kind, write = {**KINDS, **FOLDERS}[name]
    (tmp_path / "source").mkdir()
    place = write(tmp_path / "source")
    top = on_swift.upload(tmp_path, f"s3://{on_swift.bucket()}/a b")
    if name == "lhotse":  # names files from the root on
        cuts = gzip.decompress((place / "cuts.jsonl.gz").read_bytes())
        on_swift.put(f"{top}/source/cuts.jsonl.gz", gzip.compress(cuts.replace(str(tmp_path).encode(), top.encode())))
    uri = f"{top}/{place.relative_to(tmp_path)}"
    assert kind_of(uri) == kind
    local, remote = (open_source(argument, exclude=NOWHERE) for argument in (str(place), uri))
    assert (remote.name, remote.root) == (local.name, local.root.replace(str(tmp_path), top))
    assert list(remote.entries) == list(local.entries)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with some of everything."""
    place = tmp_path / "mixed"
    contents: dict[str, bytes] = {
        "a.wav": sound(0.2),
        "a.txt": b"one",
        "a.json": b'{"speaker": "anna", "language": "en"}',
        "deep/er/b.flac": sound(0.3, "FLAC"),
        "deep/er/b.TextGrid": b'"ooTextFile" "TextGrid" 0 1 <exists> 1 "IntervalTier" "words" 0 1 1 0 0.2 "two"',
        "deep/84-1-0000.wav": sound(0.1),
        "deep/84-1.trans.txt": b"84-1-0000 THREE\n",
        "deep/notes.md": b"no audio",
        "no suffix": sound(0.15),
        "shards/0.tar": tar_of({"x/c.wav": sound(0.25), "x/c.txt": b"four", "../up.wav": sound()}),
        "shards/1.tgz": gzip.compress(tar_of({"d.wav": sound(0.35), "d.txt": b"five"})),
        "torn.tar": tar_of({"e.wav": sound(2.0)})[:20_000],
        "words.ctm": b"a 1 0.0 0.1 one\n",
        "bad.mp3": b"<html>",
    }
    for name, content in contents.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    pq.write_table(pa.table({"audio": [sound(0.12), None], "text": ["six", "seven"]}), place / "t.parquet")
    (place / ".hidden.wav").write_bytes(sound())
    return place


def rows_of(root: Root) -> list[dict[str, Any]]:
    corpus = open_corpus(root)
    tables = [read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA) for shard in corpus.files]
    return [row for table in tables for row in table.to_pylist()]


def test_a_corpus_built_from_a_store_into_a_store_has_the_rows_of_one_built_on_a_disk(
    mixed: Path, tmp_path: Path, on_swift: Swift, bucket: str
) -> None:
    uri = on_swift.upload(mixed, f"{bucket}/data/mixed")
    roots = Root(tmp_path / "root"), Root(f"{bucket}/data/mixed/tokens")  # below its own source
    built = [
        build_corpus(root, [str(source)], CorpusPolicy(), shard_hours=1)
        for root, source in zip(roots, (mixed, uri), strict=True)
    ]
    local, remote = (rows_of(root) for root in roots)
    places = {"source_root", "version"}
    assert [{**row, **dict.fromkeys(places)} for row in remote] == [{**row, **dict.fromkeys(places)} for row in local]
    assert {row["source_root"] for row in remote} == {uri}
    assert len(local) == 11
    assert built[1].skipped == built[0].skipped
    again = build_corpus(roots[1], [uri], CorpusPolicy(), shard_hours=1)
    assert (again.counts.new, again.counts.known) == (0, len(local))


@pytest.mark.slow
def test_a_glob_takes_what_it_takes_on_a_disk(mixed: Path, on_swift: Swift, bucket: str) -> None:
    uri = on_swift.upload(mixed, f"{bucket}/x/mixed")
    for pattern in ("*.wav", "**/*.wav", "**", "*", "**/er/*", "deep/**/b.*", "??????/[01].t*", "[!d]*"):
        local, remote = (open_source(f"{place}/{pattern}", exclude=NOWHERE) for place in (mixed, uri))
        assert (remote.name, remote.root) == (local.name, local.root.replace(str(mixed), uri))
        assert told(f"{uri}/{pattern}") == told(f"{mixed}/{pattern}")


def test_a_single_object_is_a_source_with_what_lies_beside_it(put: Callable[..., str]) -> None:
    uri = put("a.wav", **{"a.txt": "one", "b.txt": "two"})
    source = open_source(f"{uri}/a.wav", exclude=NOWHERE)
    assert (source.name, source.root, list(source.entries)) == ("s", uri, [Entry(path="a.wav", text="one")])


@pytest.mark.slow
def test_a_source_in_a_store_is_called_like_its_last_part(on_swift: Swift, bucket: str) -> None:
    on_swift.put(f"{bucket}/a/speech/x.wav", sound())
    place = bucket.removeprefix("s3://")
    for argument, name, root in (
        (f"{bucket}/a/speech", "speech", f"{bucket}/a/speech"),
        (f"{bucket}/a/speech/", "speech", f"{bucket}/a/speech"),
        (f"S3://{place}/a/speech", "speech", f"{bucket}/a/speech"),
        (bucket, place, bucket),
        (f"{bucket}/", place, bucket),
        (f"mine={bucket}/a", "mine", f"{bucket}/a"),
        (f"mine={bucket}/a/*/*.wav", "mine", f"{bucket}/a"),
    ):
        source = open_source(argument, exclude=NOWHERE)
        assert (source.name, source.root) == (name, root)
        assert [f"{root}/{entry.path}" for entry in source.entries] == [f"{bucket}/a/speech/x.wav"]


def test_stores_whose_listings_are_fsspecs_give_the_same_entries(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory(MemoryFileSystem):
        protocol = "gs"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
            return f"/{path.removeprefix('gs://').strip('/')}".rstrip("/")

    monkeypatch.setitem(_registry, "gs", Memory)
    store = Memory()
    for path in sorted(path for path in mixed.rglob("*") if path.is_file()):
        store.pipe_file(f"/bucket/mixed/{path.relative_to(mixed)}", path.read_bytes())
    for pattern in ("", "/**/*.wav", "/deep/*.wav", "/a.wav"):
        assert told(f"gs://bucket/mixed{pattern}") == told(f"{mixed}{pattern}")
    with pytest.raises(UserError, match="There is no file or folder 'gs://bucket/nothing'"):
        listed("gs://bucket/nothing")


# Names


def test_names_with_any_character_are_kept_as_they_are_and_can_be_opened(put: Callable[..., str]) -> None:
    names = [
        *("a b.wav", "a#b.wav", "a?b=c.wav", "a+b.wav", "a%20b.wav", "a%2Fb.wav", "a&b.wav", "a=b.wav", "~.wav"),
        *("a\nb.wav", "a\tb.wav", "\x1b[31mred.wav", "Grüße/日本.wav", "🎵.wav", "[x]*?.wav", '"q".wav', "b\\s.wav"),
        "d/" * 480 + "e.wav",
        *("a::file:///etc/passwd.wav", "x//y.wav", "x///y.wav", "a.wav/b.wav", "a.wav", "...wav/c.wav"),
    ]
    uri = put(*names)
    assert sorted(paths(uri)) == sorted(set(names) - {"...wav/c.wav"})  # hidden
    assert sorted(paths(f"{uri}/**/*.wav")) == sorted(set(names) - {"...wav/c.wav"})
    for path in paths(uri):
        with open_regular(f"{uri}/{path}") as file:
            assert file.read() == sound()


def test_names_that_lead_out_or_cannot_be_asked_for_are_entries_with_an_error(put: Callable[..., str]) -> None:
    leading_out = {"/a.wav", "//etc/b.wav", "s3://elsewhere/h.wav", "http://127.0.0.1/i.wav"}
    strays = {"x/../c.wav", "../d.wav", "./e.wav", "x/./f", "g.wav?versionId=1"}
    uri = put("good.wav", *leading_out, *strays)
    found = {entry.path: entry.error and entry.error.kind for entry in listed(uri)}
    assert found == {"good.wav": None} | dict.fromkeys(strays | {f"./{name}" for name in leading_out}, "unsafe-name")
    for path in found:
        with nullcontext() if path == "good.wav" else pytest.raises(AudioError, match="leads out of its source"):
            full_path(uri, path)
    globbed = {entry.path: entry.error and entry.error.kind for entry in listed(f"{uri}/**/*.wav")}
    assert globbed == {path: error for path, error in found.items() if path.endswith(".wav")}


@pytest.mark.slow
def test_hidden_names_and_markers_of_folders_are_passed_over(put: Callable[..., str]) -> None:
    uri = put("a.wav", ".b.wav", ".c/d.wav", "e/.f/g.wav", **{"e/": b"", "h/": b"", "": b""})
    source = open_source(uri, exclude=NOWHERE)
    assert [entry.path for entry in source.entries] == ["a.wav"]
    assert not source.skipped


@pytest.mark.slow
def test_the_datasets_own_root_is_passed_over_wherever_it_lies_in_a_source(put: Callable[..., str]) -> None:
    uri = put("a.wav", "tokens/b.wav", "tokens-2/c.wav", "d/tokens/e.wav")
    for root in (f"{uri}/tokens", f"{uri}/tokens/", uri.replace("s3://", "S3://") + "/tokens"):
        assert paths(uri, exclude=root) == ["a.wav", "d/tokens/e.wav", "tokens-2/c.wav"]
        assert paths(f"{uri}/**/*.wav", exclude=root) == ["a.wav", "d/tokens/e.wav", "tokens-2/c.wav"]
    assert paths(f"{uri}/d", exclude=uri) == ["tokens/e.wav"]
    with pytest.raises(UserError, match="both the source and the root"):
        open_source(uri, exclude=uri)


# What is asked of the store


@pytest.mark.slow
def test_a_folder_is_listed_by_pages_and_recordings_are_not_looked_at(
    on_swift: Swift, put: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, names = put(), [f"{number % 3}/{number:02}.wav" for number in range(24)]
    numbers = []
    for some in (names[:8], names[8:]):
        put(*some)
        on_swift.clear()
        paths(uri)
        numbers.append(len(on_swift.requests()))
    assert numbers[0] == numbers[1]
    monkeypatch.setitem(fsspec.config.conf, "s3", {"s3_additional_kwargs": {"MaxKeys": 10}})
    forget_stores()
    assert sorted(paths(uri)) == sorted(names)
    assert len(on_swift.requests(match="continuation-token=")) == 2


@pytest.mark.slow
def test_of_a_side_file_one_request_is_made(on_swift: Swift, put: Callable[..., str]) -> None:
    names = [f"{number:02}" for number in range(20)]
    uri = put(*(f"{name}.wav" for name in names), **{f"{name}.txt": name for name in names})
    on_swift.clear()
    assert [entry.text for entry in listed(uri)] == names
    assert len(on_swift.requests(match=".txt?")) == 20


def test_a_tar_is_listed_without_its_audio(on_swift: Swift, put: Callable[..., str]) -> None:
    members = {f"{number:02}.{suffix}": b"" for number in range(30) for suffix in ("txt", "wav")}
    members |= {name: sound(10.0) if name.endswith("wav") else name.encode() for name in members}
    content = tar_of(members)
    uri = put(**{"a.tar": content})
    on_swift.clear()
    entries = listed(f"{uri}/a.tar")
    assert [(entry.member, entry.text) for entry in entries] == [
        (f"{number:02}.wav", f"{number:02}.txt") for number in range(30)
    ]
    assert all(content[entry.member_offset :].startswith(b"RIFF") for entry in entries if entry.member_offset)
    asked = on_swift.requests("GET", match="a.tar?")
    assert len(asked) <= 40
    assert sum(request.bytes_out for request in asked) < len(content) / 20


def test_of_a_table_only_the_columns_that_are_needed_are_read(on_swift: Swift, put: Callable[..., str]) -> None:
    rows = 40
    random = np.random.default_rng(0)
    table = pa.table({"audio": [sound() + random.bytes(50_000)] * rows, "text": [f"{row}" for row in range(rows)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=8, use_dictionary=False)
    uri = put(**{"a.parquet": buffer.getvalue()})
    on_swift.clear()
    assert [entry.text for entry in listed(f"{uri}/a.parquet")] == [f"{row}" for row in range(rows)]
    assert sum(request.bytes_out for request in on_swift.requests()) < len(buffer.getvalue()) / 5


# Manifests


def jsonl(*names: str) -> str:
    return "".join(json.dumps({"audio_filepath": name}) + "\n" for name in names)


@pytest.mark.slow
def test_a_manifest_may_name_objects_wherever_it_lies(put: Callable[..., str], tmp_path: Path) -> None:
    names = [f"{put()}/m/a.wav", "s3://elsewhere/x/b c.wav", "S3://elsewhere/d.wav"]
    uri = put(**{"m/list.jsonl": jsonl("./x/../e.wav", *names)})
    assert paths(f"{uri}/m/list.jsonl") == ["e.wav", "a.wav", "s3://elsewhere/x/b c.wav", "s3://elsewhere/d.wav"]
    (tmp_path / "list.jsonl").write_text(jsonl("e.wav", *names))
    expected = ["e.wav", names[0], *paths(f"{uri}/m/list.jsonl")[2:]]
    assert paths(tmp_path / "list.jsonl") == expected
    (tmp_path / "wav.scp").write_text("".join(f"{number} {name}\n" for number, name in enumerate(names)))
    assert paths(tmp_path) == expected[1:]
    pq.write_table(pa.table({"path": names}), tmp_path / "list.parquet")
    assert paths(tmp_path / "list.parquet") == expected[1:]


@pytest.mark.parametrize("kind", ["url", "file"])
def test_lhotses_audio_may_lie_in_a_store(kind: str, tmp_path: Path) -> None:
    source = {"type": kind, "channels": [0], "source": "s3://elsewhere/a.wav"}
    recording = {"id": "r", "sources": [source], "sampling_rate": 16_000, "num_samples": 16_000, "duration": 1.0}
    (tmp_path / "recordings.jsonl").write_text(json.dumps(recording) + "\n")
    assert paths(tmp_path / "recordings.jsonl") == ["s3://elsewhere/a.wav"]


LEADING_OUT = {
    "/etc/passwd": "'/etc/passwd' is a path of one machine",
    "file:///etc/passwd": "a URL or a command",
    "https://example.org/a.wav": "a URL or a command",
    "pipe:touch x": "a URL or a command",
    "s3://": "names no bucket",
    "s3://bucket": "names no object",
    "s3://bucket/a/../../b.wav": "names no object",
}


@pytest.mark.slow
def test_a_manifest_in_a_store_names_nothing_of_this_machine(put: Callable[..., str]) -> None:
    for number, (name, words) in enumerate(LEADING_OUT.items()):
        uri = put(**{f"{number}.jsonl": jsonl("a.wav", name)})
        with pytest.raises(UserError, match=r"line 2: .*") as caught:
            listed(f"{uri}/{number}.jsonl")
        assert words in str(caught.value)
    for manifest, content in (("list.csv", "path\n/etc/passwd\n"), ("k/wav.scp", "1 /etc/passwd\n")):
        uri = put(**{manifest: content})
        with pytest.raises(UserError, match=r"line \d: '/etc/passwd' is a path of one machine"):
            listed(f"{uri}/{manifest}")
    table = io.BytesIO()
    pq.write_table(pa.table({"path": ["a.wav", *LEADING_OUT]}), table)
    uri = put(**{"list.parquet": table.getvalue()})
    errors = [entry.error and entry.error.kind for entry in listed(f"{uri}/list.parquet")]
    assert errors == [None] + ["bad-row"] * len(LEADING_OUT)


def test_a_table_that_merely_lies_in_a_source_names_nothing_outside_of_it(put: Callable[..., str]) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"path": [f"{put()}/a.wav", "s3://elsewhere/b.wav", "/etc/passwd"]}), table)
    uri = put("a.wav", **{"t.parquet": table.getvalue()})
    found = [(entry.path, entry.error and entry.error.kind) for entry in listed(uri)]
    assert found == [
        ("a.wav", None),
        ("a.wav", None),
        ("s3://elsewhere/b.wav", "outside-source"),
        ("t.parquet", "bad-row"),
    ]


def test_paths_of_a_manifest_that_lead_out_of_its_place_are_error_rows(
    put: Callable[..., str], on_swift: Swift, tmp_path: Path
) -> None:
    uri = put("a.wav", "secret.wav", **{"m/list.jsonl": jsonl("../secret.wav", "x/../../secret.wav", "gone.wav", "")})
    build_corpus(Root(tmp_path / "root"), [f"{uri}/m/list.jsonl"], CorpusPolicy(), shard_hours=1)
    found = {row["path"]: row["error"] for row in rows_of(Root(tmp_path / "root"))}
    assert found == {"../secret.wav": "outside-source", "gone.wav": "missing", ".": "outside-source"}
    assert not on_swift.requests(match="secret.wav?")[2:]  # but for putting it


# Trouble


def test_what_is_not_there_is_told_in_one_sentence(bucket: str, on_swift: Swift) -> None:
    on_swift.put(f"{bucket}/a/x.wav", sound())
    for argument, words in {
        f"{bucket}/b": "There is no file or folder",
        f"{bucket}/a/x": "There is no file or folder",
        f"{bucket}/a/x.wav/y": "There is no file or folder",
        f"{bucket}/list.jsonl": "There is no file or folder",
        f"{bucket}/b/*.wav": "matches no file",
        f"{bucket}-no/a": f"There is no bucket '{bucket}-no'",
        f"{bucket}-no/**/*.wav": "there is no such bucket",
        "s3://": "names no bucket",
        "s3:///a": "names no bucket",
        "s3://buck*/a": "names no bucket",
        "s3://[x/a.wav": "names no bucket",
    }.items():
        with pytest.raises(UserError) as caught:
            listed(argument)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_command_line_tells_a_mistake_from_a_store_that_fails(
    put: Callable[..., str], bucket: str, on_swift: Swift, in_process: Callable[..., Any], tmp_path: Path
) -> None:
    uri = put("a.wav")
    mistaken = in_process("corpus", "build", f"{bucket}-no/s", "--to", tmp_path / "root")
    assert (mistaken.returncode, mistaken.stderr.count("\n")) == (2, 1)
    on_swift.set_faults(Fault(do="403"))
    failed = in_process("corpus", "build", uri, "--to", tmp_path / "root")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert not (tmp_path / "root").exists()


@pytest.mark.slow
def test_wrong_credentials_are_a_stores_trouble_and_no_secret_is_told(on_swift: Swift, put: Callable[..., str]) -> None:
    uri = put("a.wav")
    for argument in (uri, f"{uri}/*.wav", f"{uri}/a.wav"):
        with on_swift.environment(AWS_SECRET_ACCESS_KEY="canary-4711"), pytest.raises(StoreTrouble) as caught:
            listed(argument)
        assert "credentials" in str(caught.value)
        assert "canary" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("match", "skip"), [("list-type=2", 7), ("a.txt", 0), ("t.tar", 1), ("p.parquet", 1), ("g.tgz", 1), ("unknown", 0)]
)
def test_a_store_that_refuses_in_the_middle_stops_the_listing(
    match: str, skip: int, on_swift: Swift, put: Callable[..., str]
) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"audio": [sound()], "text": ["x"]}), table)
    tar = tar_of({"x.wav": sound(5.0), "y.wav": sound(5.0)})
    contents = {"t.tar": tar, "p.parquet": table.getvalue(), "g.tgz": gzip.compress(tar), "unknown": b"?"}
    uri = put("a.wav", "z.wav", **{"a.txt": "a", **contents})
    on_swift.set_faults(Fault(do="403", match=match, skip=skip))
    with pytest.raises(StoreTrouble):
        listed(uri)
    on_swift.set_faults()
    assert len(listed(uri)) == 7


@pytest.mark.slow
def test_a_store_that_fails_for_a_moment_changes_nothing(mixed: Path, on_swift: Swift, bucket: str) -> None:
    uri = on_swift.upload(mixed, f"{bucket}/mixed")
    for do in ("503", "reset", "cut", "reset-body"):
        on_swift.clear()
        on_swift.set_faults(Fault(do=do, methods="GET HEAD", share=0.1, seed=3))
        assert told(uri) == told(mixed)
        assert [request for request in on_swift.requests() if request.fault]


@pytest.mark.parametrize("name", ["list.jsonl", "a.tar", "a.tar.gz"])
def test_what_is_replaced_or_deleted_while_it_is_read_is_never_read_as_one(
    name: str, on_swift: Swift, put: Callable[..., str]
) -> None:
    lines = jsonl(*(f"{number:090}.wav" for number in range(3_000))).encode()
    noise = np.random.default_rng(0).bytes(300_000)
    tar = tar_of({f"{number}.wav": sound() + noise for number in range(4)})
    content = {"list.jsonl": lines, "a.tar": tar, "a.tar.gz": gzip.compress(tar)}[name]
    for change in (lambda uri: on_swift.put(uri, content[:-1] + b" "), on_swift.delete):
        uri = f"{put(**{name: content})}/{name}"
        entries = iter(open_source(uri, exclude=NOWHERE).entries)
        next(entries)
        change(uri)
        with pytest.raises(Replaced, match="was replaced or deleted while it was read"):
            list(entries)


@pytest.mark.slow
def test_an_object_that_is_gone_when_it_is_to_be_read_is_missing(
    on_swift: Swift, put: Callable[..., str], tmp_path: Path
) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"audio": [sound()]}), table)
    uri = put("b.wav", **{"a.wav": sound(), "t.tar": tar_of({"x.wav": sound()}), "u.parquet": table.getvalue()})
    source = open_source(uri, exclude=NOWHERE)
    for name in ("t.tar", "u.parquet"):
        on_swift.delete(f"{uri}/{name}")
    found = {entry.path: entry.error and entry.error.kind for entry in source.entries}
    assert found == {"a.wav": None, "b.wav": None, "t.tar": "missing", "u.parquet": "missing"}


# Sources that have moved


def test_a_source_may_have_moved_into_a_store(put: Callable[..., str], bucket: str, tmp_path: Path) -> None:
    uri = put("a/b.wav")
    assert parse_moved([f"x={uri}/a/", f"y={bucket}", f"z={tmp_path}"]) == {
        "x": f"{uri}/a",
        "y": bucket,
        "z": str(tmp_path),
    }
    for argument in (f"x={uri}/c", f"x={uri}/a/b.wav", "x=", "x", f"x={tmp_path}/no", "x=https://example.org/a"):
        with pytest.raises(UserError, match="expected NAME=FOLDER with a folder that exists"):
            parse_moved([argument])
