"""Every kind of source, all the way to rows: the same recordings, the same samples, whatever they lie in."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import lhotse
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from wavemill.jobs.corpus import build_corpus
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.sources import SOURCE_KINDS, kind_of
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA

NAMES = ("7-1-0000", "7-1-0001", "8-2-0000")
TEXTS = ("one", "two", "three")


def sound(index: int) -> bytes:
    buffer = io.BytesIO()
    noise = 0.1 * np.random.default_rng(index).standard_normal(3_200 + 160 * index)
    soundfile.write(buffer, noise, 16_000, format="FLAC")
    return buffer.getvalue()


def write_folder(place: Path) -> Path:
    for index, (name, text) in enumerate(zip(NAMES, TEXTS, strict=True)):
        (place / f"{name}.flac").write_bytes(sound(index))
        (place / f"{name}.txt").write_text(text)
    return place


def write_librispeech(place: Path) -> Path:
    for index, name in enumerate(NAMES):
        (place / f"{name}.flac").write_bytes(sound(index))
    (place / "all.trans.txt").write_text("".join(f"{name} {text}\n" for name, text in zip(NAMES, TEXTS, strict=True)))
    return place


def write_manifest(place: Path, name: str, lines: list[str]) -> Path:
    write_librispeech(place)
    (place / name).write_text("\n".join(lines) + "\n")
    return place / name


def write_jsonl(place: Path) -> Path:
    rows = [{"audio_filepath": f"{name}.flac", "text": text} for name, text in zip(NAMES, TEXTS, strict=True)]
    return write_manifest(place, "list.jsonl", [json.dumps(row) for row in rows])


def write_csv(place: Path) -> Path:
    rows = [f"{name}.flac,{text}" for name, text in zip(NAMES, TEXTS, strict=True)]
    return write_manifest(place, "list.csv", ["path,text", *rows])


def write_kaldi(place: Path) -> Path:
    write_manifest(place, "wav.scp", [f"{name} {name}.flac" for name in NAMES])
    return write_manifest(place, "text", [f"{name} {text}" for name, text in zip(NAMES, TEXTS, strict=True)]).parent


def write_lhotse(place: Path) -> Path:
    write_librispeech(place)
    cuts = []
    for name, text in zip(NAMES, TEXTS, strict=True):
        recording = lhotse.Recording.from_file(place / f"{name}.flac")
        segment = lhotse.SupervisionSegment(name, recording.id, 0, recording.duration, text=text)
        cuts.append(lhotse.MonoCut(name, 0, recording.duration, 0, [segment], recording=recording))
    lhotse.CutSet.from_cuts(cuts).to_file(place / "cuts.jsonl.gz")
    return place


def write_common_voice(place: Path) -> Path:
    (place / "clips").mkdir()
    for index, name in enumerate(NAMES):  # what counts is the content, not the name
        (place / "clips" / f"{name}.mp3").write_bytes(sound(index))
    rows = [f"s\t{name}.mp3\t{text}" for name, text in zip(NAMES, TEXTS, strict=True)]
    (place / "validated.tsv").write_text("\n".join(["client_id\tpath\tsentence", *rows]))
    return place


def write_ljspeech(place: Path) -> Path:
    (place / "wavs").mkdir()
    write_librispeech(place / "wavs")
    (place / "metadata.csv").write_text("".join(f"{n}|raw|{t}\n" for n, t in zip(NAMES, TEXTS, strict=True)))
    return place


def write_tar(place: Path, mode: str, name: str) -> Path:
    with tarfile.open(place / name, mode) as tar:
        for index, (key, text) in enumerate(zip(NAMES, TEXTS, strict=True)):
            for suffix, content in (("flac", sound(index)), ("txt", text.encode())):
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return place / name


def table() -> pa.Table:
    audio = [{"bytes": sound(index), "path": f"{name}.flac"} for index, name in enumerate(NAMES)]
    return pa.table({"audio": audio, "text": TEXTS})


def write_parquet(place: Path) -> Path:
    pq.write_table(table(), place / "a.parquet", row_group_size=2)
    return place / "a.parquet"


def write_arrow(place: Path) -> Path:
    with pa.ipc.new_stream(str(place / "a.arrow"), table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    return place / "a.arrow"


def write_feather(place: Path) -> Path:
    with pa.ipc.new_file(str(place / "a.arrow"), table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    return place / "a.arrow"


KINDS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "folder": ("folder", write_folder),
    "librispeech": ("folder", write_librispeech),
    "jsonl": ("jsonl", write_jsonl),
    "csv": ("csv", write_csv),
    "kaldi": ("kaldi", write_kaldi),
    "lhotse": ("lhotse", write_lhotse),
    "common-voice": ("common-voice", write_common_voice),
    "ljspeech": ("ljspeech", write_ljspeech),
    "tar": ("webdataset", lambda place: write_tar(place, "w", "a.tar")),
    "gzipped tar": ("webdataset", lambda place: write_tar(place, "w:gz", "a.tar.gz")),
    "parquet": ("parquet", write_parquet),
    "arrow stream": ("parquet", write_arrow),
    "arrow file": ("parquet", write_feather),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_source_becomes_rows_with_its_texts(name: str, tmp_path: Path) -> None:
    kind, write = KINDS[name]
    (tmp_path / "source").mkdir()
    place = write(tmp_path / "source")
    assert kind_of(str(place)) == kind
    assert kind in SOURCE_KINDS
    root = Root(tmp_path / "root")
    build_corpus(root, [str(place)], CorpusPolicy(), shard_hours=1)
    corpus = open_corpus(root)
    rows = [
        row
        for shard in corpus.files
        for row in read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
    ]
    assert [(row["error"], row["error_message"]) for row in rows] == [(None, None)] * 3
    assert [(row["num_samples"], row["text"], row["format"]) for row in rows] == [
        (3_200 + 160 * index, text, "flac") for index, text in enumerate(TEXTS)
    ]
    again = build_corpus(root, [str(place)], CorpusPolicy(), shard_hours=1)
    assert (again.counts.new, again.counts.known) == (0, 3)
