"""Exported tars: the same bytes every time, read back by webdataset as they were written."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from conftest import STREAMS
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.export import export_webdataset
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.codes import open_corpus, open_stream, read_codes, stream_spec
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, stream_schema
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import UserError

Copy = Callable[[Path], Path]


def export(root: Path, *names: str, view: str = "plain") -> dict[str, Any]:
    place = Root(root)
    streams = {name: open_stream(place, name) for name in names or [stream.name for stream in STREAMS]}
    return export_webdataset(place, open_corpus(place), streams, view=view)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(folder: Path) -> Iterator[tarfile.TarInfo]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            yield from tar


def corpus_rows(root: Path) -> list[dict[str, Any]]:
    place = Root(root)
    corpus = open_corpus(place)
    return [
        row
        for shard in corpus.files
        for row in read_parquet(place, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
    ]


@pytest.fixture(scope="module")
def exported(finished_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished root with the view "plain"."""
    root = tmp_path_factory.mktemp("exported") / "root"
    shutil.copytree(finished_root, root)
    export(root)
    return root


def test_exporting_twice_gives_the_same_bytes(exported: Path, finished_root: Path, copy_root: Copy) -> None:
    first = files_of(exported / "webdataset" / "plain")
    other = copy_root(finished_root)
    for _ in range(2):
        export(other)
        assert files_of(other / "webdataset" / "plain") == first
    for view, names in (("again", ("semantic", "acoustic")), ("turned", ("acoustic", "semantic"))):
        export(other, *names, view=view)
        assert files_of(other / "webdataset" / view) == first


def test_webdataset_reads_every_code_back(exported: Path) -> None:
    place = Root(exported)
    stored: dict[str, dict[str, np.ndarray]] = {}
    for stream in STREAMS:
        snapshot = open_stream(place, stream.name)
        for shard in snapshot.files:
            codes = read_codes(place, snapshot, shard)
            for row, segment in enumerate(codes.ids):
                if (codes_KT := codes.codes(row)) is not None:
                    stored.setdefault(segment, {})[f"{stream.name}.npy"] = codes_KT
    rows = {row["id"]: row for row in corpus_rows(exported)}
    urls = sorted(str(path) for path in (exported / "webdataset" / "plain").glob("*.tar"))
    count = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        count += 1
        row, expected = rows[sample["__key__"]], stored.pop(sample["__key__"])
        assert {name for name in sample if not name.startswith("__")} == {"semantic.npy", "acoustic.npy", "json"}
        for name, codes_KT in expected.items():
            assert np.array_equal(sample[name], codes_KT)
            assert sample[name].dtype == codes_KT.dtype == np.int16
        columns = ("id", "path", "duration_s", "sample_rate", "text", "speaker", "language")
        assert sample["json"] == {name: row[name] for name in columns}
    assert count == 108
    assert stored == {}


def test_samples_come_in_the_order_of_the_corpus_and_their_keys_hold_no_dot(exported: Path) -> None:
    names = [member.name for member in members(exported / "webdataset" / "plain")]
    keys = list(dict.fromkeys(name.partition(".")[0] for name in names))
    broken = {row["id"] for row in corpus_rows(exported) if row["source"] == "broken"}
    assert keys == [row["id"] for row in corpus_rows(exported) if row["id"] not in broken]
    assert sorted(names) == sorted(f"{key}.{end}" for key in keys for end in ("semantic.npy", "acoustic.npy", "json"))


def test_members_know_nothing_of_this_machine(exported: Path) -> None:
    for member in members(exported / "webdataset" / "plain"):
        assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
        assert (member.uname, member.gname) == ("wavemill", "wavemill")
        assert member.isreg()
        assert member.mode == 0o444
        assert member.pax_headers == {}
    for name, content in files_of(exported / "webdataset" / "plain").items():
        assert str(exported).encode() not in content, name


def test_rows_with_an_error_are_left_out_and_counted(exported: Path) -> None:
    index = json.loads((exported / "webdataset" / "plain" / "index.json").read_bytes())
    rows = corpus_rows(exported)
    assert (index["samples"], index["left_out"]) == (108, 4)
    assert index["samples"] + index["left_out"] == len(rows)
    keys = {member.name.partition(".")[0] for member in members(exported / "webdataset" / "plain")}
    assert {row["source"] for row in rows if row["id"] not in keys} == {"broken"}


def test_the_index_says_what_each_tar_holds(exported: Path) -> None:
    folder = exported / "webdataset" / "plain"
    index = json.loads((folder / "index.json").read_bytes())
    assert [tar["name"] for tar in index["tars"]] == sorted(path.name for path in folder.glob("*.tar"))
    assert len(index["tars"]) == len(open_corpus(Root(exported)).files)
    for tar in index["tars"]:
        content = (folder / tar["name"]).read_bytes()
        assert tar["sha256"] == hashlib.sha256(content).hexdigest()
        with tarfile.open(fileobj=io.BytesIO(content)) as file:
            assert tar["samples"] == len({name.partition(".")[0] for name in file.getnames()})
    assert index["samples"] == sum(tar["samples"] for tar in index["tars"])
    place = Root(exported)
    assert index["versions"] == {
        "corpus": open_corpus(place).version,
        **{stream.name: open_stream(place, stream.name).version for stream in STREAMS},
    }
    for stream in STREAMS:
        metadata = open_stream(place, stream.name).metadata
        assert index["streams"][stream.name] == {"spec": metadata["spec"], "fingerprint": metadata["fingerprint"]}


def test_one_stream_can_be_exported_alone(finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)
    index = export(root, "semantic", view="semantic-only")
    assert list(index["streams"]) == ["semantic"]
    ends = {member.name.partition(".")[2] for member in members(root / "webdataset" / "semantic-only")}
    assert ends == {"semantic.npy", "json"}
    with pytest.raises(UserError, match="was exported from versions"):
        export(root, "semantic", "acoustic", view="semantic-only")


def test_a_view_of_other_versions_is_refused_and_left_as_it_is(exported: Path, samples: Path, copy_root: Copy) -> None:
    root = copy_root(exported)
    before = files_of(root / "webdataset" / "plain")
    old = {stream.name: open_stream(Root(root), stream.name) for stream in STREAMS}
    old_corpus = open_corpus(Root(root))
    build_corpus(Root(root), [f"more={samples / 'speech' / 'en_anna_11.flac'}"], CorpusPolicy(), shard_hours=1)
    tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions())
    with pytest.raises(UserError, match="was exported from versions"):
        export(root)
    assert files_of(root / "webdataset" / "plain") == before
    newer = export(root, view="newer")
    assert newer["samples"] == 109
    export_webdataset(Root(root), old_corpus, old, view="pinned")  # a pinned snapshot still gives what it gave
    assert files_of(root / "webdataset" / "pinned") == before


def test_a_stream_that_lacks_a_shard_is_refused_before_anything_is_written(
    finished_root: Path, samples: Path, copy_root: Copy
) -> None:
    root = copy_root(finished_root)
    build_corpus(Root(root), [f"more={samples / 'speech' / 'en_anna_11.flac'}"], CorpusPolicy(), shard_hours=1)
    with pytest.raises(UserError, match=r"lacks 1 shard"):
        export(root)
    assert not (root / "webdataset").exists()


def test_a_stream_whose_rows_are_not_the_corpuss_is_refused(finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)
    place = Root(root)
    old = open_stream(place, "semantic")
    schema = stream_schema(stream_spec(old))
    tables = {shard: read_parquet(place, old.path(shard), schema=schema) for shard in old.files}
    shutil.rmtree(root / "streams" / "semantic")
    create_table(place, "streams/semantic", schema=schema, metadata=dict(old.metadata))
    writer = TableWriter(place, "streams/semantic")
    tables[1] = tables[1].take(list(reversed(range(tables[1].num_rows))))
    writer.commit(write_shard(place, "streams/semantic", shard, table) for shard, table in tables.items())
    with pytest.raises(UserError, match="shard 1"):
        export(root)
    assert not (root / "webdataset" / "plain" / "index.json").exists()


def test_text_of_any_language_and_segments_without_frames_survive(
    fitted_root: Path, samples: Path, tmp_path: Path
) -> None:
    """A tenth of a window: no semantic frame, one acoustic frame, and a text with everything in it."""
    text = 'Grüße, "日本語" 🎵 \\ \n\t\x00 end'
    line = {"audio_filepath": f"{samples}/speech/en_anna_11.flac", "duration": 0.01, "text": text, "speaker": "a.b/c"}
    (tmp_path / "list.jsonl").write_text(json.dumps(line))
    root = tmp_path / "root"
    build_corpus(Root(root), [str(tmp_path / "list.jsonl")], CorpusPolicy(), shard_hours=1)
    shutil.copytree(fitted_root / "codebooks", root / "codebooks")
    tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions())
    assert export(root)["samples"] == 1
    [url] = map(str, (root / "webdataset" / "plain").glob("*.tar"))
    [sample] = webdataset.WebDataset([url], shardshuffle=False).decode()
    assert sample["semantic.npy"].shape == (1, 0)
    assert sample["acoustic.npy"].shape == (8, 1)
    assert (sample["json"]["text"], sample["json"]["speaker"]) == (text, "a.b/c")
