"""Places that are none of ours, in manifests of every kind, tables, tars and arguments: nothing is fetched or run."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_runs import rows_of
from hostile_teller import Teller
from hostile_tools import CANARY_RATE, World, sound, tar
from wavemill.jobs.corpus import build_corpus
from wavemill.pipelines.entries import AudioError
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.recordings import Opener, Place
from wavemill.pipelines.sources import open_source
from wavemill.storage.root import Root
from wavemill.tokenizers.spec import UserError

pytest_plugins = ["hostile_table"]
pytestmark = pytest.mark.timeout(200)

# HERE is a listener on 127.0.0.1, PORT its port, CANARY a recording outside of the source
URLS = [
    "http://HERE/a.wav",
    "HTTP://HERE/a.wav",
    "http://localhost:PORT/a.wav",
    "http://0:PORT/a.wav",
    "http://2130706433:PORT/a.wav",
    "http://0x7f000001:PORT/a.wav",
    "http://0177.0.0.1:PORT/a.wav",
    "http://[::1]:PORT/a.wav",
    "http://[::ffff:127.0.0.1]:PORT/a.wav",
    "http://user:hunter2@HERE/a.wav",
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://2852039166/latest/meta-data/",
    "http://[::ffff:169.254.169.254]/latest/",
    "http://[fd00:ec2::254]/latest/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://169.254.170.2/v2/credentials",
    "https://bucket.s3.amazonaws.com/a.wav?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2",
    "s3a://bucket/a.wav",
    "hf://datasets/x/a.wav",
    "file:///etc/passwd",
    "ftp://HERE/a.wav",
    "tcp://HERE",
    "udp://HERE",
    "rtsp://HERE/a.wav",
    "hls+http://HERE/a.m3u8",
    "unix:///var/run/docker.sock",
    "pipe:touch TOUCHED",
    "pipe:0",
]
# what FFmpeg, fsspec and shells take for more than names; here they are names of files that are not there
NAMES = [
    "concat:CANARY|CANARY",
    "subfile,,start,0,end,0,,:CANARY",
    "crypto:CANARY",
    "async:http:HERE",
    "data:audio/wav;base64,UklGRg==",
    "simplecache::http://HERE/a.wav",
    "zip://a.wav::http://HERE/a.zip",
    "//169.254.169.254/a.wav",
    "169.254.169.254/a.wav",
    "\\\\169.254.169.254\\share\\a.wav",
    "http:/HERE/a.wav",
    "$(touch TOUCHED).wav",
    "`touch TOUCHED`.wav",
]

Writer = Callable[[World, str], str | Path]


def _list(name: str, text: Callable[[str], str]) -> Writer:
    def write(world: World, place: str) -> Path:
        (world.source / name).write_text(text(place))
        return world.source / name

    return write


def _kaldi(world: World, place: str) -> Path:
    (world.source / "wav.scp").write_text(f"utt1 {place}\n")
    return world.source


def _metadata(world: World, place: str) -> Path:
    (world.source / "metadata.jsonl").write_text(json.dumps({"file_name": place}) + "\n")
    return world.source


def _lhotse(world: World, place: str) -> Path:
    recording = {"id": "r", "sampling_rate": 16_000, "num_samples": 16_000, "duration": 1.0, "channel_ids": [0]}
    recording |= {"sources": [{"type": "file", "channels": [0], "source": place}]}
    cut = {"type": "MonoCut", "id": "c", "start": 0, "duration": 1, "channel": 0, "recording": recording}
    (world.source / "cuts.jsonl.gz").write_bytes(gzip.compress(json.dumps(cut).encode()))
    return world.source / "cuts.jsonl.gz"


def _lhotse_url(world: World, place: str) -> Path:
    sources = [{"type": "url", "channels": [0], "source": place}]
    recording = {"id": "r", "sources": sources, "sampling_rate": 16_000, "num_samples": 16_000, "duration": 1.0}
    (world.source / "recordings.jsonl").write_text(json.dumps(recording) + "\n")
    return world.source / "recordings.jsonl"


def _common_voice(world: World, place: str) -> Path:
    (world.source / "clips").mkdir(exist_ok=True)
    (world.source / "validated.tsv").write_text(f"client_id\tpath\tsentence\nx\t{place}\ty\n")
    return world.source


def _ljspeech(world: World, place: str) -> Path:
    (world.source / "wavs").mkdir(exist_ok=True)
    (world.source / "metadata.csv").write_text(f"{place.replace('|', '!')}|text|text\n")
    return world.source


def _parquet(world: World, place: str) -> Path:
    pq.write_table(pa.table({"path": [place]}), world.source / "a.parquet")
    return world.source / "a.parquet"


def _audio_column(world: World, place: str) -> Path:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(
        pa.table({"audio": pa.array([{"bytes": None, "path": place}], type=kind)}), world.source / "b.parquet"
    )
    return world.source / "b.parquet"


def _arrow(world: World, place: str) -> Path:
    table = pa.table({"path": [place]})
    with pa.ipc.new_stream(world.source / "a.arrow", table.schema) as out:
        out.write_table(table)
    return world.source / "a.arrow"


KINDS: dict[str, Writer] = {
    "JSON lines": _list("list.jsonl", lambda place: json.dumps({"audio_filepath": place}) + "\n"),
    "a CSV": _list("list.csv", lambda place: f'path,text\n"{place}",x\n'),
    "a TSV": _list("list.tsv", lambda place: f"path\ttext\n{place}\tx\n"),
    "Kaldi's wav.scp": _kaldi,
    "Hugging Face's metadata.jsonl": _metadata,
    "Lhotse's cuts": _lhotse,
    "Lhotse's recordings, of the type url": _lhotse_url,
    "Common Voice's list": _common_voice,
    "LJSpeech's list": _ljspeech,
    "a column of paths (Parquet)": _parquet,
    "a column of audio (Parquet)": _audio_column,
    "a column of paths (Arrow)": _arrow,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_names_a_url_or_a_command_is_refused_and_nothing_is_fetched(
    world: World, tell: Teller, kind: str
) -> None:
    came: Counter[str] = Counter()
    for pattern in [*URLS, *NAMES]:
        place = _filled(pattern, world)
        source = KINDS[kind](world, place)
        found, sentence = _outcome(source)
        if sentence:
            assert "hunter2" not in sentence
            assert len(sentence) < 700
            came["a sentence"] += 1
            continue
        assert pattern not in URLS or kind in ("LJSpeech's list", "Common Voice's list") or "(" in kind, pattern
        assert found
        assert set(found) <= {"missing", "bad-row", "outside-source", "unreadable"}, (pattern, found)
        came.update(found)
    tell.case(
        f"{len(URLS) + len(NAMES)} URLs, commands and metadata addresses in {kind}",
        ", ".join(f"{kind} {count}" for kind, count in came.most_common()),
    )


def _filled(pattern: str, world: World) -> str:
    port = str(world.listener.port)
    filled = pattern.replace("HERE", f"127.0.0.1:{port}").replace("PORT", port)
    return filled.replace("TOUCHED", str(world.touched)).replace("CANARY", str(world.outside / "canary.wav"))


def _outcome(source: str | Path) -> tuple[list[str], str]:
    """What becomes of the recordings of a source, each opened as a build does; or the sentence that refuses it."""
    found: list[str] = []
    try:
        opened = open_source(f"x={source}", exclude="/nowhere")
    except UserError as refusal:
        return [], str(refusal)
    with Opener() as opener:
        for entry in opened.entries:
            try:
                if entry.error:
                    raise entry.error
                place = Place(source_root=opened.root, path=entry.path, member=entry.member)
                opener.open(place).__exit__()
                found.append("opened")
            except AudioError as error:
                found.append(error.kind)
    return found, ""


@pytest.mark.parametrize("form", ["{}", "x={}"])
def test_a_source_that_is_a_url_or_a_command_is_refused(world: World, tell: Teller, form: str) -> None:
    for pattern in [*URLS, *NAMES]:
        with pytest.raises(UserError) as refusal:
            open_source(form.format(_filled(pattern, world)), exclude="/nowhere")
        assert pattern not in URLS or "is a URL" in str(refusal.value)
        assert "hunter2" not in str(refusal.value)
    tell.case(f"the same {len(URLS) + len(NAMES)} as the argument {form.format('PLACE')} of corpus build", "a sentence")


def test_relative_paths_of_a_manifest_that_lead_out_are_errors(world: World, tell: Teller) -> None:
    paths = ["../outside/canary.wav", "x/../../outside/canary.wav", "good.wav"]
    (world.source / "list.jsonl").write_text("\n".join(json.dumps({"audio_filepath": path}) for path in paths))
    assert _built(world, world.source / "list.jsonl") == {"../outside/canary.wav": "outside-source", "good.wav": None}
    tell.case("relative paths of a manifest that lead out of its folder", "outside-source")


def test_a_table_found_in_a_folder_cannot_name_recordings_outside_of_it(world: World, tell: Teller) -> None:
    pq.write_table(pa.table({"path": [str(world.outside / "canary.wav")]}), world.source / "a.parquet")
    found = _built(world, world.source)
    assert found.pop(str(world.outside / "canary.wav")) == "outside-source"
    assert found == {"good.wav": None}
    tell.case("a table found in a folder that names a recording outside of it", "outside-source")


def test_names_of_a_tars_members_are_names_and_no_places(world: World, tell: Teller) -> None:
    names = [_filled(pattern, world) for pattern in [*URLS, *NAMES]]
    (world.source / "a.tar").write_bytes(tar(*((name, sound()) for name in names if not name.startswith("/"))))
    found = {place: error for place, error in _built(world, world.source / "a.tar").items() if " > " in place}
    assert len(found) == len([name for name in names if not name.startswith("/")])
    assert set(found.values()) <= {None, "unsafe-name"}
    tell.case("members of a tar named like URLs, commands and metadata addresses", "codes of the members themselves")


def test_objects_whose_names_are_places_elsewhere_are_asked_of_the_store_alone(world: World, tell: Teller) -> None:
    """A name in a store cannot make a client ask another host: fsspec takes `::` for a chain of file systems."""
    from wavemill.pipelines.remote import RemoteObject

    for name in ("a.wav::http://HERE/b.wav", "http://HERE/b.wav", "../../b.wav", "x/filecache::http://HERE/c"):
        name = _filled(name, world)
        found = RemoteObject(f"s3://bucket-of-nobody/{name}")
        assert found._path == f"bucket-of-nobody/{name}"
        assert "s3" in found._store.protocol
    tell.case("objects with names like chains of stores (::) and URLs", "the object of that name, in its own store")


def _built(world: World, source: Path | str) -> dict[str, str | None]:
    """Errors by path and member of a corpus of a source."""
    root = world.folder.parent / "root"
    build_corpus(Root(root), [f"x={source}"], CorpusPolicy(), shard_hours=1)
    rows = rows_of(root)
    assert all(row["sample_rate"] != CANARY_RATE for row in rows)
    return {row["path"] + (f" > {row['member']}" if row["member"] else ""): row["error"] for row in rows}
