"""Small datasets to break, on a disk and in an object store: the same recordings, so the same bytes."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ACOUSTIC, SEMANTIC, STREAMS
from killing import Content, committed, table_content
from object_store import Swift
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.codes import CORPUS
from wavemill.storage.root import Root

RECORDINGS = ("de_jonas_12.flac", "en_anna_11.flac", "en_grace_12.flac", "es_mateo_12.flac", "fr_camille_12.flac")
SHARD_HOURS = 0.0012  # two recordings or so
# often: so that there is a commit before and one behind each failpoint
EAGER: dict[str, Any] = {
    "wavemill.jobs.tokenize._COMMIT_EVERY_SHARDS": 1,
    "wavemill.jobs.corpus._COMMIT_EVERY_SHARDS": 1,
    "wavemill.storage.drivers.RACERS": 2,  # for whether the store is sound: that is for other tests
}


@dataclass(frozen=True, slots=True)
class Small:
    """A few recordings and a broken one: their corpus with codebooks, and what an undisturbed run makes of it."""

    sources: str
    prepared: str  # corpus and codebooks, no stream
    corpus: dict[str, bytes]
    streams: Content
    copy: Callable[[str, str], str]  # everything below a place to another
    fresh: Callable[[], str]  # a place where nothing is
    here: Callable[[str], Root]  # a place, or a copy of it on this disk: to be looked through by many small steps

    def root(self) -> Root:
        """A copy of what is prepared."""
        return Root(self.copy(self.prepared, self.fresh()))


def small_sources(samples: Path, folder: Path, recordings: Sequence[str] = RECORDINGS) -> None:
    """A folder of recordings and a broken one."""
    folder.mkdir()
    for name in recordings:
        shutil.copy(samples / "speech" / name, folder)
    shutil.copy(samples / "broken" / "cut_short.wav", folder)


def prepare(sources: str, codebooks: Path, root: str) -> None:
    """A corpus of the sources, with codebooks."""
    build_corpus(Root(root), [f"speech={sources}"], CorpusPolicy(), shard_hours=SHARD_HOURS)
    for name in (SEMANTIC.codebook_name, ACOUSTIC.codebook_name):
        relative = f"codebooks/{name}.safetensors"
        Root(root).write_bytes(relative, (codebooks / relative).read_bytes())


def undisturbed(prepared: str, copy: Callable[[str, str], str], target: str) -> tuple[dict[str, bytes], Content]:
    """The files of the corpus, and of the streams that a run makes in a copy."""
    root = Root(copy(prepared, target))
    tokenize(root, STREAMS, InlineEngine, TokenizeOptions(max_error_share=1))
    return table_content(root, CORPUS), committed(root.uri)


def small_on_disk(samples: Path, fitted_root: Path, folder: Path) -> Small:
    def copy(source: str, target: str) -> str:
        shutil.copytree(source, target)
        return target

    sources, prepared = folder / "speech", str(folder / "prepared")
    small_sources(samples, sources)
    prepare(str(sources), fitted_root, prepared)
    numbers = iter(range(10**6))
    corpus, streams = undisturbed(prepared, copy, str(folder / "undisturbed"))
    return Small(str(sources), prepared, corpus, streams, copy, lambda: str(folder / f"copy-{next(numbers)}"), Root)


def small_in_store(
    samples: Path, fitted_root: Path, folder: Path, swift: Swift, *, recordings: Sequence[str] = RECORDINGS
) -> Small:
    """To be used where `swift` is the store of this process."""

    def fetch(uri: str) -> Root:
        target = Path(tempfile.mkdtemp(dir=folder))
        for name, content in swift.content(uri).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
        return Root(target)

    bucket = f"s3://{swift.bucket()}"
    small_sources(samples, folder / "speech", recordings)
    sources, prepared = swift.upload(folder / "speech", f"{bucket}/speech"), f"{bucket}/prepared"
    prepare(sources, fitted_root, prepared)
    numbers = iter(range(10**6))
    corpus, streams = undisturbed(prepared, swift.copy, f"{bucket}/undisturbed")
    return Small(sources, prepared, corpus, streams, swift.copy, lambda: f"{bucket}/copy-{next(numbers)}", fetch)
