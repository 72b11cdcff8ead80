"""Recordings in an object store are those on a disk: the same samples, the same errors, and never other bytes."""

import gzip
import hashlib
import io
import os
import shutil
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import SAMPLES, STREAMS
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from numpy.typing import NDArray
from object_store import Fault, Swift
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.ahead import DecodeAhead
from wavemill.pipelines.audio import Limits, Probe, Span
from wavemill.pipelines.decoder import Decoder, DecoderSettings
from wavemill.pipelines.entries import AudioError
from wavemill.pipelines.fetching import FetchAhead
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.quarantine import quarantined
from wavemill.pipelines.reading import Reader
from wavemill.pipelines.recordings import Opener, Place, fetch_to_end
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.storage.stores import StoreTrouble
from wavemill.tokenizers.spec import RunFailed, Sound

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from killing import committed, descendants

pytestmark = pytest.mark.timeout(170)
RATE = 16_000


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    ours = Decoder(DecoderSettings(deadline_s=20))
    yield ours
    ours.close()


def sound(name: str, num_samples: int, seed: int = 0) -> bytes:
    """A file of noise."""
    noise_N = (0.2 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)
    out = io.BytesIO()
    out.name = name
    with soundfile.SoundFile(out, "w", RATE, 1, subtype="FLOAT" if name.endswith("wav") else None) as file:
        for begin in range(0, num_samples, RATE):  # libsndfile's Vorbis encoder overflows its stack otherwise
            file.write(noise_N[begin : begin + RATE])
    return out.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            file.addfile(header, io.BytesIO(content))
    return out.getvalue()


def place_of(uri: str, **known: Any) -> Place:
    root, _, name = uri.rpartition("/")
    return Place(source_root=root, path=name, **known)


def probe(decoder: Decoder, place: Place) -> Probe:
    with Opener() as opener, opener.open(place) as opened:
        return decoder.probe(opened, Limits())


def read(decoder: Decoder, place: Place, found: Probe, spans: list[Span], *, to_end: bool = False) -> list[bytes]:
    """The samples of each span."""
    pieces: list[list[bytes]] = [[] for _ in spans]
    opener = Opener(fetch_to_end) if to_end else Opener()
    with opener, opener.open(place) as opened:
        for index, piece_NC in decoder.decode(opened, format=found.format, spans=spans):
            pieces[index].append(piece_NC.tobytes())
    return list(map(b"".join, pieces))


def kind_of(asked: Callable[[], object]) -> str:
    with pytest.raises(AudioError) as caught:
        asked()
    return caught.value.kind


# The same samples


def test_samples_of_all_formats_are_those_on_a_disk_by_range_and_whole(on_swift: Swift, decoder: Decoder) -> None:
    folder, uri = SAMPLES / "speech", f"s3://{on_swift.bucket()}/speech"
    one_of_each = {path.suffix: path for path in sorted(folder.iterdir()) if path.suffix != ".txt"}
    assert len(one_of_each) >= 7
    for path in one_of_each.values():
        on_swift.put(f"{uri}/{path.name}", path.read_bytes())
        here, there = place_of(str(path)), place_of(f"{uri}/{path.name}")
        found = probe(decoder, here)
        assert probe(decoder, there) == found
        spans = [Span(0, found.num_samples // 3), Span(found.num_samples // 2, found.num_samples // 3, (0,))]
        expected = read(decoder, here, found, spans)
        assert read(decoder, there, found, spans) == expected
        on_swift.clear()
        known = place_of(f"{uri}/{path.name}", size_bytes=found.size_bytes)
        assert read(decoder, known, found, spans, to_end=True) == expected
        assert [request.method for request in on_swift.requests()] == ["GET"]


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff"])
def test_windows_of_long_recordings_are_read_by_ranges(
    on_swift: Swift, decoder: Decoder, tmp_path: Path, name: str
) -> None:
    content, uri = sound(name, 1_500_000), f"s3://{on_swift.bucket()}/{name}"
    (tmp_path / name).write_bytes(content)
    on_swift.put(uri, content)
    here, there = place_of(str(tmp_path / name)), place_of(uri)
    found = probe(decoder, here)
    assert probe(decoder, there) == found
    for spans in ([Span(0, 1_500_000)], [Span(7, 99), Span(700_000, 300_000)], [Span(1_400_000, 100_000)]):
        assert read(decoder, there, found, spans) == read(decoder, here, found, spans)
    on_swift.clear()
    read(decoder, there, found, [Span(0, 1_500_000)])
    asked = on_swift.requests()
    assert sum(request.bytes_out for request in asked) < len(content) + (1 << 20)
    assert all(request.condition for request in asked[1:])  # all of one version


@pytest.mark.slow
def test_a_recording_of_hundred_megabytes_is_probed_by_its_header_and_read_in_little_memory(
    on_swift: Swift, decoder: Decoder
) -> None:
    content = sound("a.wav", RATE)
    size = 100_000_000
    header = bytearray(content[: content.index(b"data") + 8])
    header[-4:] = size.to_bytes(4, "little")
    header[4:8] = (size + len(header) - 8).to_bytes(4, "little")
    uri = f"s3://{on_swift.bucket()}/a.wav"
    on_swift.put(uri, bytes(header) + bytes(size))
    on_swift.clear()
    assert probe(decoder, place_of(uri)).num_samples == size // 4
    assert sum(request.bytes_out for request in on_swift.requests()) < 1_000_000
    tracemalloc.start()
    try:
        with Opener() as opener, opener.open(place_of(uri)) as opened:
            pieces = decoder.decode(opened, format="wav", spans=[Span(0, size // 4)])
            assert sum(len(piece_NC) for _, piece_NC in pieces) == size // 4
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


MEMBERS = {
    f"{number:02d}.{kind}": sound(f"a.{kind}", 30_000 + 9_000 * number, number)
    for number, kind in enumerate(["wav", "flac", "wav", "ogg", "wav", "mp3"])
}


def arrow(options: Callable[..., Any]) -> bytes:
    out = io.BytesIO()
    table = audio_table()
    with options(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(audio_table(), out, row_group_size=4)
    return out.getvalue()


def audio_table() -> pa.Table:
    values = [{"bytes": content, "path": name} for name, content in MEMBERS.items()]
    audio = pa.array(values, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table({"audio": audio})


CONTAINERS = {
    "a.tar": lambda: tar(MEMBERS),
    "a.tar.gz": lambda: gzip.compress(tar(MEMBERS)),
    "a.parquet": parquet,
    "a.arrow": lambda: arrow(pa.ipc.new_stream),
    "b.arrow": lambda: arrow(pa.ipc.new_file),
}


def members_of(name: str, content: bytes) -> list[dict[str, Any]]:
    """What places the members of a container, in its order."""
    sizes = list(map(len, MEMBERS.values()))
    if name == "a.tar":
        with tarfile.open(fileobj=io.BytesIO(content)) as file:
            return [{"member": m.name, "member_offset": m.offset_data, "size_bytes": m.size} for m in file.getmembers()]
    names = list(MEMBERS) if name == "a.tar.gz" else [f"audio/{row}" for row in range(len(MEMBERS))]
    return [{"member": member, "size_bytes": size} for member, size in zip(names, sizes, strict=True)]


@pytest.mark.parametrize("name", CONTAINERS)
def test_members_of_containers_are_read_in_any_order(on_swift: Swift, decoder: Decoder, name: str) -> None:
    content, uri = CONTAINERS[name](), f"s3://{on_swift.bucket()}/{name}"
    on_swift.put(uri, content)
    known = members_of(name, content)
    for order in (range(6), Random(0).sample(range(6), 6)):
        with Opener(fetch_to_end) as opener:
            for number in order:
                with opener.open(place_of(uri, **known[number])) as opened:
                    assert isinstance(opened.content, int)
                    found = os.pread(opened.content, opened.size, opened.offset)
                    assert found == list(MEMBERS.values())[number]
    on_swift.clear()
    with Opener() as opener, opener.open(place_of(uri, **known[4])) as opened:
        assert decoder.probe(opened, Limits()).num_samples == 30_000 + 9_000 * 4
    if name == "a.tar":  # no more than the one member is fetched
        assert sum(request.bytes_out for request in on_swift.requests()) <= len(MEMBERS["04.wav"]) + 512


# Never other bytes


@pytest.mark.slow
@pytest.mark.parametrize("to_end", [False, True])
def test_what_is_not_what_the_corpus_was_built_of_is_told(on_swift: Swift, decoder: Decoder, to_end: bool) -> None:
    content, uri = sound("a.wav", 100_000), f"s3://{on_swift.bucket()}/a.wav"
    on_swift.put(uri, content)
    with Opener() as opener, opener.open(place_of(uri)) as opened:
        known = {"size_bytes": opened.size, "version": opened.version}
    assert known["version"].startswith("etag:")

    def again(**changes: Any) -> Callable[[], object]:
        found = Probe(format="wav", size_bytes=0, sample_rate=RATE, num_channels=1, num_samples=100_000)
        place = place_of(uri, **(known | changes))
        return lambda: read(decoder, place, found, [Span(0, 100_000)], to_end=to_end)

    assert again()()
    on_swift.put(uri, content)  # the same bytes once more
    assert again()()
    on_swift.put(uri, sound("a.wav", 100_000, seed=1))
    assert kind_of(again()) == "changed"
    assert again(version=None)()  # a source that has moved: an upload of its own
    for other in (content[:-4], content + b"more", b""):
        on_swift.put(uri, other)
        assert kind_of(again()) == "changed"
        assert kind_of(again(version=None)) == "changed"
    on_swift.delete(uri)
    assert kind_of(again()) == "missing"


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_recording_that_goes_while_it_is_read_gives_its_samples_or_an_error(
    on_swift: Swift, decoder: Decoder, change: str
) -> None:
    content, uri = sound("a.wav", 5_000_000), f"s3://{on_swift.bucket()}/a.wav"
    samples_N = soundfile.read(io.BytesIO(content), dtype="float32")[0]
    on_swift.put(uri, content)
    found: list[NDArray[np.float32]] = []

    def read_on() -> None:
        with Opener() as opener, opener.open(place_of(uri)) as opened:
            for _, piece_NC in decoder.decode(opened, format="wav", spans=[Span(0, 5_000_000)]):
                if not found:
                    on_swift.put(uri, sound("a.wav", 5_000_000, seed=1)) if change == "replaced" else on_swift.delete(
                        uri
                    )
                found.append(piece_NC[:, 0])

    assert kind_of(read_on) == {"replaced": "changed", "deleted": "missing"}[change]
    got_N = np.concatenate(found)
    assert 0 < len(got_N) < 5_000_000
    assert np.array_equal(got_N, samples_N[: len(got_N)])


@pytest.mark.slow
def test_a_container_that_is_replaced_while_it_is_read_gives_no_others_bytes(on_swift: Swift) -> None:
    size = 3_000_000  # together more than is fetched ahead
    members = {f"{number}.wav": Random(number).randbytes(size) for number in range(8)}
    uri = f"s3://{on_swift.bucket()}/a.tar.gz"
    on_swift.put(uri, gzip.compress(tar(members), 0))
    kinds = []
    with Opener() as opener:
        for number, (name, content) in enumerate(members.items()):
            if number == 3:  # the same sizes
                others = {name: Random(name).randbytes(size) if name == "5.wav" else members[name] for name in members}
                on_swift.put(uri, gzip.compress(tar(others), 0))
            try:
                with opener.open(place_of(uri, member=name, size_bytes=size, version=version_of(content))) as opened:
                    assert isinstance(opened.content, int)
                    assert os.pread(opened.content, size, 0) == content
                kinds.append("")
            except AudioError as error:
                kinds.append(error.kind)
    assert kinds[:3] == [""] * 3
    assert kinds.count("changed") in (1, 2)  # the one that was replaced, and the one it was noticed in
    assert kinds[5] == "changed"
    assert kinds[-1] == ""


def version_of(content: bytes) -> str:
    from wavemill.pipelines.opened import sample_version

    fd = os.memfd_create("test")
    os.write(fd, content)
    try:
        return sample_version(fd, 0, len(content))
    finally:
        os.close(fd)


# Trouble


@pytest.mark.slow
def test_a_store_that_stumbles_gives_the_same_samples(on_swift: Swift, decoder: Decoder) -> None:
    content, uri = sound("a.wav", 1_000_000), f"s3://{on_swift.bucket()}/a.wav"
    on_swift.put(uri, content)
    found = probe(decoder, place_of(uri))
    expected = read(decoder, place_of(uri), found, [Span(0, 1_000_000)])
    known = place_of(uri, size_bytes=len(content))
    for to_end, fault in (
        (True, Fault(do="503", times=2)),
        (False, Fault(do="500", times=1, skip=2)),
        (False, Fault(do="reset", times=1, skip=1)),
        (True, Fault(do="cut", times=2)),
        (False, Fault(do="cut", share=0.5, times=2, seed=1)),
        (False, Fault(do="reset-body", times=2)),
    ):
        on_swift.clear()
        on_swift.set_faults(fault)
        assert read(decoder, known, found, [Span(0, 1_000_000)], to_end=to_end) == expected
        assert sum(bool(request.fault) for request in on_swift.requests()) == fault.times


def test_a_bit_that_flips_on_the_way_is_noticed_where_the_whole_is_fetched(on_swift: Swift) -> None:
    content, uri = sound("a.wav", 100_000), f"s3://{on_swift.bucket()}/a.wav"
    on_swift.put(uri, content)
    on_swift.set_faults(Fault(do="flip", methods="GET", times=1))
    assert fetch_to_end(place_of(uri, size_bytes=len(content))).content == content
    assert len(on_swift.requests("GET")) == 2


FOR_GOOD = ["403", "cut", pytest.param("503", marks=pytest.mark.slow), pytest.param("reset", marks=pytest.mark.slow)]


@pytest.mark.parametrize("do", FOR_GOOD)
def test_a_store_that_fails_for_good_is_no_fault_of_the_recording(on_swift: Swift, decoder: Decoder, do: Any) -> None:
    content, uri = sound("a.wav", 1_000_000), f"s3://{on_swift.bucket()}/a.wav"
    on_swift.put(uri, content)
    found = probe(decoder, place_of(uri))
    on_swift.set_faults(Fault(do=do, methods="GET HEAD", skip=1))
    with pytest.raises(StoreTrouble, match=r"s3://.*a\.wav"):  # the child was asked by then
        read(decoder, place_of(uri), found, [Span(0, 1_000_000)])
    with pytest.raises(StoreTrouble, match=r"s3://.*a\.wav"):
        probe(decoder, place_of(uri))
    on_swift.clear()
    assert len(read(decoder, place_of(uri), found, [Span(0, 1_000_000)])[0]) == 4_000_000


@pytest.mark.slow
def test_a_slow_store_is_no_decoder_that_hangs(on_swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
    content, bucket = sound("a.wav", 200_000), on_swift.bucket()
    for name in ("a.wav", "hang.wav"):
        on_swift.put(f"s3://{bucket}/{name}", content)
    monkeypatch.setenv("WAVEMILL_FAILPOINTS", "decoder-hang.wav=sleep:1000")
    hasty = Decoder(DecoderSettings(deadline_s=1.5))
    try:
        found = probe(hasty, place_of(f"s3://{bucket}/a.wav"))
        on_swift.set_faults(Fault(do="slow", methods="GET", seconds=1))
        started = time.monotonic()
        assert len(read(hasty, place_of(f"s3://{bucket}/a.wav"), found, [Span(0, 200_000)])[0]) == 800_000
        assert time.monotonic() - started > 2
        on_swift.clear()
        assert kind_of(lambda: probe(hasty, place_of(f"s3://{bucket}/hang.wav"))) == "decoder-hang"
    finally:
        hasty.close()


def test_the_child_that_decodes_knows_no_store_and_no_credentials(on_swift: Swift, decoder: Decoder) -> None:
    uri = f"s3://{on_swift.bucket()}/a.wav"
    on_swift.put(uri, sound("a.wav", 1_000_000))
    before = descendants(os.getpid())
    ours = Decoder(DecoderSettings())
    try:
        found = probe(ours, place_of(uri))
        with Opener() as opener, opener.open(place_of(uri)) as opened:
            pieces = ours.decode(opened, format=found.format, spans=[Span(0, 1_000_000)])
            next(pieces)
            [child] = descendants(os.getpid()) - before
            environment = Path(f"/proc/{child}/environ").read_text()
            files = [os.readlink(file) for file in Path(f"/proc/{child}/fd").iterdir()]
            pieces.close()
    finally:
        ours.close()
    assert "AWS" not in environment
    assert on_swift.endpoint not in environment
    assert sum(file.startswith("socket:") for file in files) == 1  # to its parent
    assert all(file == "/dev/null" or file.startswith("socket:") for file in files)


# Whole runs


def prepared(fitted_root: Path, path: Path, source: str) -> Root:
    """A root with codebooks and the corpus of a folder or prefix."""
    shutil.copytree(fitted_root / "codebooks", path / "codebooks")
    build_corpus(Root(path), [f"x={source}"], CorpusPolicy(), shard_hours=1)
    return Root(path)


def rows_of(root: Root) -> list[dict[str, Any]]:
    corpus = open_corpus(root)
    tables = [read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA) for shard in corpus.files]
    return [row for table in tables for row in table.to_pylist()]


def errors_of(root: Root) -> dict[str, str]:
    return {row["path"]: row["error"] for row in quarantined(root, open_corpus(root))}


RECORDINGS = {
    f"{number}.{kind}": sound(f"a.{kind}", 9_000 + 7_000 * number, number)
    for number, kind in enumerate(["wav", "flac", "wav", "ogg", "wav", "mp3"])
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "store"])
def test_what_was_replaced_or_deleted_under_a_job_is_told_and_the_rest_has_its_codes(
    on_swift: Swift, fitted_root: Path, tmp_path: Path, where: str
) -> None:
    source = f"s3://{on_swift.bucket()}/speech" if where == "store" else str(tmp_path / "speech")
    put(on_swift, source, RECORDINGS)
    root = prepared(fitted_root, tmp_path / "root", source)
    shutil.copytree(tmp_path / "root", tmp_path / "undisturbed")
    tokenize(Root(tmp_path / "undisturbed"), STREAMS, InlineEngine, TokenizeOptions())
    others = {"0.wav": sound("a.wav", 9_000, seed=9), "4.wav": RECORDINGS["4.wav"] + b"more"}
    assert len(others["0.wav"]) == len(RECORDINGS["0.wav"])
    put(on_swift, source, others | {"1.flac": RECORDINGS["1.flac"]})  # this one as it was
    put(on_swift, source, {"2.wav": None})
    tokenize(root, STREAMS, InlineEngine, TokenizeOptions(max_error_share=1))
    assert errors_of(root) == {"0.wav": "changed", "2.wav": "missing", "4.wav": "changed"}
    put(on_swift, source, RECORDINGS)
    shutil.rmtree(tmp_path / "root" / "streams")
    tokenize(root, STREAMS, InlineEngine, TokenizeOptions())
    assert committed(tmp_path / "root") == committed(tmp_path / "undisturbed")


def put(swift: Swift, source: str, files: Mapping[str, bytes | None]) -> None:
    """Write files, or delete them, on a disk or in the store."""
    for name, content in files.items():
        if not source.startswith("s3://"):
            Path(source).mkdir(exist_ok=True)
            Path(source, name).write_bytes(content) if content is not None else Path(source, name).unlink()
        elif content is None:
            swift.delete(f"{source}/{name}")
        else:
            swift.put(f"{source}/{name}", content)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_build_that_meets_other_bytes_of_the_same_size_says_replaced(
    on_swift: Swift, tmp_path: Path, where: str
) -> None:
    source = f"s3://{on_swift.bucket()}/speech" if where == "store" else str(tmp_path / "speech")
    put(on_swift, source, RECORDINGS)

    def counted() -> tuple[int, int, int]:
        counts = build_corpus(Root(tmp_path / "root"), [f"x={source}"], CorpusPolicy(), shard_hours=1).counts
        return counts.new, counts.known, counts.replaced

    assert counted() == (6, 0, 0)
    put(on_swift, source, RECORDINGS)
    on_swift.clear()
    assert counted() == (0, 6, 0)
    assert sum(request.bytes_out for request in on_swift.requests("GET", "speech/")) < 6 * 4096
    put(on_swift, source, {"0.wav": sound("a.wav", 9_000, seed=9)})
    assert counted() == (0, 5, 1)


@pytest.mark.slow
def test_a_source_that_moved_between_disk_and_store_gives_the_same_codes(
    on_swift: Swift, fitted_root: Path, tmp_path: Path
) -> None:
    here, there, again = str(tmp_path / "a"), f"s3://{on_swift.bucket()}/b", f"s3://{on_swift.bucket()}/c"
    for source in (here, there, again):
        put(on_swift, source, RECORDINGS)
    codes = []
    for number, (built, moved) in enumerate([(here, here), (here, there), (there, here), (there, again)]):
        root = prepared(fitted_root, tmp_path / f"root-{number}", built)
        tokenize(root, STREAMS, InlineEngine, TokenizeOptions(source_roots={"x": moved}))
        codes.append(committed(tmp_path / f"root-{number}"))
    assert codes[1:] == codes[:1] * 3
    put(on_swift, there, {"0.wav": sound("a.wav", 9_000, seed=9)})  # a sample is compared wherever the bytes are held
    shutil.rmtree(tmp_path / "root-1" / "streams")
    tokenize(
        Root(tmp_path / "root-1"), STREAMS, InlineEngine, TokenizeOptions(source_roots={"x": there}, max_error_share=1)
    )
    assert errors_of(Root(tmp_path / "root-1")) == {"0.wav": "changed"}


@pytest.mark.slow
def test_a_store_that_fails_stops_the_run_and_the_next_one_completes(
    on_swift: Swift, fitted_root: Path, tmp_path: Path
) -> None:
    source = f"s3://{on_swift.bucket()}/speech"
    put(on_swift, source, RECORDINGS)
    root = prepared(fitted_root, tmp_path / "root", source)
    shutil.copytree(tmp_path / "root", tmp_path / "undisturbed")
    tokenize(Root(tmp_path / "undisturbed"), STREAMS, InlineEngine, TokenizeOptions())
    on_swift.set_faults(Fault(do="403", match="3.ogg"))
    with pytest.raises(StoreTrouble, match=r"3\.ogg"):
        tokenize(root, STREAMS, InlineEngine, TokenizeOptions(max_error_share=1))
    on_swift.set_faults(Fault(do="503", methods="GET", share=0.3, seed=2))
    tokenize(root, STREAMS, InlineEngine, TokenizeOptions())
    assert committed(tmp_path / "root") == committed(tmp_path / "undisturbed")
    for name in RECORDINGS:
        on_swift.delete(f"{source}/{name}")
    shutil.rmtree(tmp_path / "root" / "streams")
    with pytest.raises(RunFailed, match="not there"):
        tokenize(root, STREAMS, InlineEngine, TokenizeOptions(max_error_share=1))


# Fetched ahead


def small_places(swift: Swift, count: int, size_bytes: int) -> dict[int, Place]:
    uri = f"s3://{swift.bucket()}"
    for number in range(count):
        swift.put(f"{uri}/{number:02d}", Random(number).randbytes(size_bytes))
    return {number: place_of(f"{uri}/{number:02d}", size_bytes=size_bytes) for number in range(count)}


def names_asked(swift: Swift, places: dict[int, Place]) -> set[str]:
    bucket = places[0].source_root.removeprefix("s3:/")
    return {request.target.rpartition("/")[2].partition("?")[0] for request in swift.requests("GET", bucket + "/")}


def test_what_is_fetched_ahead_and_not_yet_done_with_stays_under_its_budget(on_swift: Swift) -> None:
    places = small_places(on_swift, 20, 100_000)
    fetching = FetchAhead(places, budget_bytes=350_000)
    try:
        for number in range(17):
            for held in range(number, number + 3):  # all that may be fetched by now
                found = fetching.fetch(held)
                assert found is not None
                assert found().content == Random(held).randbytes(100_000)
            assert names_asked(on_swift, places) == {f"{done:02d}" for done in range(number + 3)}
            fetching.release(number)
        assert fetching.fetch(20) is None
    finally:
        fetching.close()
    on_swift.clear()
    fetching = FetchAhead(places, budget_bytes=50_000)  # for none: each is fetched when somebody waits for it
    try:
        for number in (5, 6):
            found = fetching.fetch(number)
            assert found is not None
            assert found().content == Random(number).randbytes(100_000)
        assert names_asked(on_swift, places) == {"05", "06"}
    finally:
        fetching.close()


def test_one_request_is_made_for_each_small_recording_and_none_is_left_behind(on_swift: Swift) -> None:
    uri = f"s3://{on_swift.bucket()}"
    rows: list[dict[str, Any]] = []
    for number in range(12):
        content = sound("a.wav", 8_000, number)
        on_swift.put(f"{uri}/{number:02d}.wav", content)
        row = {"source": "x", "source_root": uri, "path": f"{number:02d}.wav", "member": "", "member_offset": None}
        row |= {"size_bytes": len(content), "version": None, "format": "wav", "sample_rate": RATE, "error": None}
        row |= {"channel": "mix", "separated": None, "gain_db": None, "num_samples": 4_000}
        rows += [row | {"start_sample": start} for start in (0, 2_000, 4_000)]  # they overlap: three passes
    readers = [Reader(Root("/nonexistent")) for _ in range(2)]
    on_swift.clear()
    try:
        found = dict(DecodeAhead(rows, {Sound(RATE)}, readers, 1 << 20, fetch_ahead_bytes=100_000))
        assert sorted(found) == list(range(36))
        assert [request.method for request in on_swift.requests()] == ["GET"] * 12
        assert all(isinstance(found[index], dict) for index in found)
        left_early = iter(DecodeAhead(rows, {Sound(RATE)}, readers, 1, fetch_ahead_bytes=100_000))
        next(left_early)
        left_early.close()  # pyright: ignore[reportAttributeAccessIssue]
        assert len(list(DecodeAhead(rows, {Sound(RATE)}, readers, 1 << 20))) == 36
    finally:
        for reader in readers:
            reader.close()


# Other stores


class OtherStore(MemoryFileSystem):
    """A store of another kind: its ETags are told of objects, but not with their bytes."""

    protocol = "gs"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in the class above
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found = super().info(path, **options)
        if found["type"] == "file":
            found["etag"] = hashlib.sha1(self.store[self._strip_protocol(path)].getvalue()).hexdigest()
        return found


def test_a_store_that_tells_no_etag_with_its_bytes_is_asked_for_it(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_registry, "gs", OtherStore)
    store, content = OtherStore(), sound("a.wav", 1_000_000)
    store.pipe_file("/bucket/a.wav", content)
    found = probe(decoder, place_of("gs://bucket/a.wav"))
    with Opener() as opener, opener.open(place_of("gs://bucket/a.wav")) as opened:
        known = place_of("gs://bucket/a.wav", size_bytes=len(content), version=opened.version)
    samples = soundfile.read(io.BytesIO(content), dtype="float32")[0].tobytes()
    for to_end in (False, True):
        assert read(decoder, known, found, [Span(0, 1_000_000)], to_end=to_end) == [samples]
    with Opener() as opener, opener.open(known) as opened:
        store.pipe_file("/bucket/a.wav", sound("a.wav", 1_000_000, seed=1))
        assert kind_of(lambda: list(decoder.decode(opened, format="wav", spans=[Span(0, 1_000_000)]))) == "changed"
    for to_end in (False, True):
        assert kind_of(lambda: read(decoder, known, found, [Span(0, 9)], to_end=to_end)) == "changed"  # noqa: B023
    store.rm_file("/bucket/a.wav")
    assert kind_of(lambda: read(decoder, known, found, [Span(0, 9)])) == "missing"
