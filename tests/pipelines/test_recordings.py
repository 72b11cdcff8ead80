"""Opening recordings where they lie: files, members of tars, rows of tables; in any order, and never other bytes."""

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from audio_at import read_rows
from conftest import SAMPLES
from wavemill.pipelines.audio import Limits, Span, decode, probe
from wavemill.pipelines.decoder import Decoder, DecoderSettings
from wavemill.pipelines.entries import AudioError, Entry
from wavemill.pipelines.opened import OpenRecording
from wavemill.pipelines.recordings import Opener, Place
from wavemill.pipelines.sources import open_source

pytestmark = pytest.mark.timeout(100)
NAMES = [f"{number:02d}.wav" for number in range(40)]
CONTENT = {name: Random(name).randbytes(3_000 + 777 * int(name[:2])) for name in NAMES}


def content_of(opened: OpenRecording) -> bytes:
    with opened:
        assert isinstance(opened.content, int)
        return os.pread(opened.content, opened.size, opened.offset)


def tar(path: Path, members: dict[str, bytes], *, gz: bool = False) -> Path:
    with tarfile.open(path, "w:gz" if gz else "w") as out:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            out.addfile(header, io.BytesIO(content))
    return path


def places(path: Path) -> list[Place]:
    """Where the recordings of a container are, as its source says."""
    return [place_of(path.parent, entry) for entry in open_source(str(path), exclude="/nowhere").entries]


def place_of(root: Path, entry: Entry) -> Place:
    assert entry.error is None, entry.error
    return Place(
        source_root=str(root),
        path=entry.path,
        member=entry.member,
        member_offset=entry.member_offset,
        size_bytes=entry.size_bytes,
    )


def kind_of(opener: Opener, place: Place) -> str:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AudioError) as caught:
        opener.open(place)
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the container may be open, recordings are not
    return caught.value.kind


def arrow_stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as out:
        out.write_table(table, max_chunksize=7)


def arrow_file(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(path, table.schema) as out:
        out.write_table(table, max_chunksize=7)


WRITERS: dict[str, tuple[str, Callable[[Path, pa.Table], None]]] = {
    "Parquet": ("a.parquet", lambda path, table: pq.write_table(table, path, row_group_size=9)),
    "Parquet in one row group": ("a.parquet", lambda path, table: pq.write_table(table, path)),
    "an Arrow stream": ("a.arrow", arrow_stream),
    "an Arrow file": ("a.arrow", arrow_file),
}
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def struct_table() -> pa.Table:
    values = [{"bytes": CONTENT[name], "path": name} for name in NAMES]
    return pa.table({"text": NAMES, "audio": pa.array(values, type=AUDIO)})


# Files and plain tars


def test_a_file_is_opened_whole_and_a_member_of_a_plain_tar_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(CONTENT["07.wav"])
    with Opener() as opener:
        assert content_of(opener.open(Place(source_root=str(tmp_path), path="a.wav"))) == CONTENT["07.wav"]
        found = places(tar(tmp_path / "a.tar", CONTENT))
        assert all(not place.in_order_only for place in found)
        for place in Random(0).sample(found, len(found)):
            assert content_of(opener.open(place)) == CONTENT[place.member]


def test_what_is_not_what_the_corpus_was_built_of_is_told(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", CONTENT)
    last, place = places(path)[-1], places(path)[20]
    with Opener() as opener:
        tar(path, {**CONTENT, "20.wav": b"shorter"})
        assert kind_of(opener, place) == "changed"
        tar(path, {name: content for name, content in CONTENT.items() if name != "05.wav"})
        assert kind_of(opener, place) == "changed"
        content = bytearray(tar(path, CONTENT).read_bytes())
        assert place.member_offset is not None
        content[place.member_offset - 400] ^= 1  # in the header, whose checksum is then wrong
        path.write_bytes(content)
        assert kind_of(opener, place) == "changed"
        path.write_bytes(content[: place.member_offset + 10])
        assert kind_of(opener, place) == "changed"
        assert kind_of(opener, last) == "changed"
        path.unlink()
        assert kind_of(opener, place) == "missing"
        path.mkdir()
        assert kind_of(opener, place) == "not-a-file"


@pytest.mark.parametrize("grown", [1, -1, 1_000])
def test_a_file_of_another_size_is_changed(tmp_path: Path, grown: int) -> None:
    (tmp_path / "a.wav").write_bytes(bytes(5_000 + grown))
    with Opener() as opener:
        assert kind_of(opener, Place(source_root=str(tmp_path), path="a.wav", size_bytes=5_000)) == "changed"


@pytest.mark.parametrize("size", [0, 1, 5_000, 98_303, 98_304, 98_305, 3_000_000])
def test_other_bytes_of_the_same_size_are_changed_wherever_a_recording_lies(tmp_path: Path, size: int) -> None:
    content, other = Random(size).randbytes(size), Random(-size - 1).randbytes(size)

    def written(content: bytes) -> list[Place]:
        (tmp_path / "a.wav").write_bytes(content)
        tar(tmp_path / "b.tar", {"b.wav": content})
        tar(tmp_path / "c.tgz", {"c.wav": content}, gz=True)
        pq.write_table(pa.table({"audio": [content]}), tmp_path / "d.parquet")
        known = {"source_root": str(tmp_path), "size_bytes": size}
        return [
            Place(path="a.wav", **known),
            Place(path="b.tar", member="b.wav", member_offset=512, **known),
            Place(path="c.tgz", member="c.wav", **known),
            Place(path="d.parquet", member="audio/0", **known),
        ]

    with Opener() as opener:
        places = written(content)
        versions = []
        for place in places:
            with opener.open(place) as opened:
                versions.append(opened.version)
        assert len(set(versions)) == 1  # the same bytes, wherever they lie
        built = [replace(place, version=version) for place, version in zip(places, versions, strict=True)]
    with Opener() as opener:
        written(content)
        os.utime(tmp_path / "a.wav", (1, 1))
        for place in built:
            assert content_of(opener.open(place)) == content
    with Opener() as opener:
        written(other)
        for place in built:
            if size:
                assert kind_of(opener, place) == "changed"
            with opener.open(replace(place, version='etag:"9a0364b9e99bb480dd25e1f0284c8555"')) as opened:
                assert opened.size == size  # an object's name says nothing of a file


def test_any_stretch_of_bytes_that_differs_is_noticed(tmp_path: Path) -> None:
    """A sample is of blocks all over a recording: what was cut in anew or silenced differs in one of them."""
    size = 5_000_000
    content = Random(0).randbytes(size)
    (tmp_path / "a.wav").write_bytes(content)
    with Opener() as opener:
        with opener.open(Place(source_root=str(tmp_path), path="a.wav")) as opened:
            place = Place(source_root=str(tmp_path), path="a.wav", size_bytes=size, version=opened.version)
        for begin in [0, size - 400_000, *(Random(1).randrange(size - 400_000) for _ in range(20))]:
            (tmp_path / "a.wav").write_bytes(content[:begin] + bytes(400_000) + content[begin + 400_000 :])
            assert kind_of(opener, place) == "changed"


# Compressed tars


@pytest.mark.parametrize("order", ["as they lie", "backwards", "shuffled", "each twice"])
@pytest.mark.parametrize("members", [1, 3])
def test_members_of_a_gzipped_tar_are_read_in_any_order(tmp_path: Path, order: str, members: int) -> None:
    path = tar(tmp_path / "a.tar", CONTENT)
    plain = path.read_bytes()
    pieces = [plain[len(plain) * n // members : len(plain) * (n + 1) // members] for n in range(members)]
    (tmp_path / "a.tar.gz").write_bytes(b"".join(map(gzip.compress, pieces)))  # as gzip, or as pigz and cat write it
    found = places(tmp_path / "a.tar.gz")
    assert all(place.in_order_only for place in found)
    wanted = {
        "as they lie": found,
        "backwards": found[::-1],
        "shuffled": Random(1).sample(found, len(found)),
        "each twice": [place for place in found for _ in range(2)],
    }[order]
    with Opener() as opener:
        assert [content_of(opener.open(place)) for place in wanted] == [CONTENT[place.member] for place in wanted]


def test_members_in_order_are_read_in_one_pass(tmp_path: Path) -> None:
    """The compressed file is read once, whatever number of members is asked for."""
    path = tar(tmp_path / "a.tgz", {name: CONTENT[name] * 10 for name in NAMES}, gz=True)
    found = places(path)
    with Opener() as opener:
        before = _bytes_read()
        for place in found:
            content_of(opener.open(place))
        sizes = [place.size_bytes or 0 for place in found]
        read = _bytes_read() - before - sum(sizes) - sum(min(size, 96 << 10) for size in sizes)  # a sample of each
    assert read < 2 * path.stat().st_size


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def test_a_gzipped_tar_that_changed_or_tore_is_told(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar.gz", CONTENT, gz=True)
    place, whole = places(path)[30], path.read_bytes()
    with Opener() as opener:
        tar(path, {**CONTENT, "30.wav": b"other"}, gz=True)
        assert kind_of(opener, place) == "changed"
        tar(path, {name: content for name, content in CONTENT.items() if name != "30.wav"}, gz=True)
        assert kind_of(opener, place) == "missing"
    with Opener() as opener:
        path.write_bytes(whole[: len(whole) // 3])
        assert kind_of(opener, place) in ("unreadable", "missing")
        path.write_bytes(whole[:50_000] + bytes(100) + whole[50_100:])
        assert kind_of(opener, place) in ("unreadable", "missing")
        path.write_bytes(b"no tar")
        assert kind_of(opener, place) == "unreadable"
        path.write_bytes(whole)
        assert content_of(opener.open(place)) == CONTENT["30.wav"]


# Tables


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("order", ["as they lie", "backwards", "shuffled"])
def test_rows_of_tables_are_read_in_any_order(tmp_path: Path, writer: str, order: str) -> None:
    name, write = WRITERS[writer]
    write(tmp_path / name, struct_table())
    found = places(tmp_path / name)
    assert [place.member for place in found] == [f"audio/{row}" for row in range(40)]
    wanted = {"as they lie": found, "backwards": found[::-1], "shuffled": Random(2).sample(found, 40)}[order]
    with Opener() as opener:
        for place in wanted:
            assert content_of(opener.open(place)) == CONTENT[NAMES[int(place.member.partition("/")[2])]]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("writer", WRITERS)
def test_plain_columns_of_bytes_are_read_and_cells_without_bytes_are_told(
    tmp_path: Path, writer: str, kind: pa.DataType
) -> None:
    name, write = WRITERS[writer]
    cells = [CONTENT["00.wav"], None, b"", CONTENT["03.wav"]] * 6
    write(tmp_path / name, pa.table({"id": list(range(24)), "a/b c": pa.array(cells, type=kind)}))
    with Opener() as opener:
        for row in Random(3).sample(range(24), 24):
            place = Place(source_root=str(tmp_path), path=name, member=f"a/b c/{row}")
            if cells[row] is None:
                assert kind_of(opener, place) == "empty"
            else:
                assert content_of(opener.open(place)) == cells[row]
        assert kind_of(opener, Place(source_root=str(tmp_path), path=name, member="a/b c/24")) == "missing"
        assert kind_of(opener, Place(source_root=str(tmp_path), path=name, member="other/0")) == "missing"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_struct_that_is_null_has_no_audio(tmp_path: Path, writer: str) -> None:
    """Also where bytes lie below the null, which Arrow allows."""
    name, write = WRITERS[writer]
    values = [{"bytes": CONTENT["00.wav"], "path": None}, None, {"bytes": None, "path": "x"}]
    write(tmp_path / name, pa.table({"audio": pa.array(values, type=AUDIO)}))
    with Opener() as opener:
        assert (
            content_of(opener.open(Place(source_root=str(tmp_path), path=name, member="audio/0"))) == CONTENT["00.wav"]
        )
        for row in (1, 2):
            assert kind_of(opener, Place(source_root=str(tmp_path), path=name, member=f"audio/{row}")) == "empty"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_table_that_changed_or_tore_is_told(tmp_path: Path, writer: str) -> None:
    name, write = WRITERS[writer]
    write(tmp_path / name, struct_table())
    whole = (tmp_path / name).read_bytes()
    place = Place(source_root=str(tmp_path), path=name, member="audio/33", size_bytes=len(CONTENT["33.wav"]))
    with Opener() as opener:
        write(tmp_path / name, struct_table().slice(1))
        assert kind_of(opener, place) == "changed"
    with Opener() as opener:
        write(tmp_path / name, struct_table().slice(20))
        assert kind_of(opener, place) == "missing"
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert kind_of(opener, place) in ("unreadable", "missing")
        (tmp_path / name).write_bytes(b"")
        assert kind_of(opener, place) == "unreadable"
        (tmp_path / name).write_bytes(whole)
        assert content_of(opener.open(place)) == CONTENT["33.wav"]


def test_a_table_under_another_suffix_is_read_as_it_was_listed(tmp_path: Path) -> None:
    pq.write_table(struct_table(), tmp_path / "a.pq")
    entries = list(open_source(str(tmp_path / "a.pq"), exclude="/nowhere", kind="parquet").entries)
    with Opener() as opener:
        assert content_of(opener.open(place_of(tmp_path, entries[5]))) == CONTENT["05.wav"]


def test_one_opener_goes_from_container_to_container(tmp_path: Path) -> None:
    pq.write_table(struct_table(), tmp_path / "a.parquet")
    tar(tmp_path / "b.tar.gz", CONTENT, gz=True)
    one, other = places(tmp_path / "a.parquet"), places(tmp_path / "b.tar.gz")
    before = len(os.listdir("/proc/self/fd"))
    with Opener() as opener:
        for number in (3, 9, 4, 30):
            assert content_of(opener.open(one[number])) == CONTENT[NAMES[number]]
            assert content_of(opener.open(other[number])) == CONTENT[NAMES[number]]
    assert len(os.listdir("/proc/self/fd")) == before


def test_windows_of_tars_decode_to_the_samples_of_the_files_for_all_formats(tmp_path: Path) -> None:
    one_of_each = {path.suffix: path for path in sorted((SAMPLES / "speech").iterdir()) if path.suffix != ".txt"}
    assert len(one_of_each) >= 7
    tar(tmp_path / "a.tar", {path.name: path.read_bytes() for path in one_of_each.values()})
    tar(tmp_path / "b.tar.gz", {path.name: path.read_bytes() for path in one_of_each.values()}, gz=True)
    audio = pa.array([{"bytes": path.read_bytes(), "path": None} for path in one_of_each.values()], type=AUDIO)
    pq.write_table(pa.table({"audio": audio}), tmp_path / "c.parquet")
    found = {name: places(tmp_path / name) for name in ("a.tar", "b.tar.gz", "c.parquet")}
    for number, path in enumerate(one_of_each.values()):
        with path.open("rb") as file:
            header = probe(file, path.stat().st_size, Limits())
            spans = [Span(0, header.num_samples)]
            pieces = decode(file, header.size_bytes, format=header.format, spans=spans)
            whole_N = np.concatenate([piece_NC[:, 0] for _, piece_NC in pieces])
        for places_found in found.values():
            place = places_found[number]
            row = {
                "source_root": place.source_root,
                "path": place.path,
                "member": place.member,
                "member_offset": place.member_offset,
                "format": header.format,
                "size_bytes": path.stat().st_size,
                "sample_rate": header.sample_rate,
                "start_sample": 0,
                "num_samples": header.num_samples,
            }
            [waveforms] = read_rows([row], [header.sample_rate])
            assert isinstance(waveforms, dict), waveforms
            assert np.array_equal(waveforms[header.sample_rate].numpy(), whole_N), place


# While it is being read


def test_a_file_that_grows_shrinks_or_is_replaced_while_it_is_read_gives_its_samples_or_an_error(
    tmp_path: Path,
) -> None:
    samples = (0.2 * np.random.default_rng(1).standard_normal(8_000_000)).astype(np.float32)
    path = tmp_path / "a.wav"
    decoder = Decoder(DecoderSettings())

    def append() -> None:
        with path.open("ab") as out:
            out.write(bytes(1_000_000))

    def replace() -> None:
        soundfile.write(tmp_path / "other.wav", -samples, 16_000, subtype="FLOAT")
        os.replace(tmp_path / "other.wav", path)

    for change, error in (
        (append, None),
        (replace, None),
        (path.unlink, None),
        (lambda: os.truncate(path, 60), "truncated"),
    ):
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
        found, kind = [], None
        with Opener().open(Place(source_root=str(tmp_path), path=path.name)) as opened:
            try:
                for _, piece_NC in decoder.decode(opened, format="wav", spans=[Span(0, len(samples))]):
                    if not found:
                        change()
                    found.append(piece_NC[:, 0])
            except AudioError as failure:
                kind = failure.kind
        got = np.concatenate(found)
        assert kind in (error, error and "length-mismatch")
        assert np.array_equal(got, samples[: len(got)])
        assert (len(got) == len(samples)) == (error is None)
    decoder.close()
