"""Single bits flipped in stored files: none is read silently, `verify` names the shard, `repair` makes it again."""

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from killing import committed, finish
from tally import tally
from wavemill.pipelines.verify import verify
from wavemill.storage.codes import CORPUS, open_corpus, open_stream, read_codes, stream_folder
from wavemill.storage.parquet import CorruptFile, read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.storage.table import Snapshot
from zygote import zygote

FLIPS, FEW_FLIPS = 600, 60
VERIFY_EVERY = 20
REPAIRS, FLIPS_TO_REPAIR = 3, 4


def flip(path: Path, generator: random.Random) -> bytes:
    """Flip one bit of a file; what was in it."""
    content = path.read_bytes()
    place = generator.randrange(len(content))
    changed = bytearray(content)
    changed[place] ^= 1 << generator.randrange(8)
    path.write_bytes(changed)
    return content


def seeded() -> random.Random:
    seed = int(os.environ.get("WAVEMILL_FLIP_SEED", time.time_ns() % 10**6))
    print(f"\nseed {seed} (WAVEMILL_FLIP_SEED={seed} repeats it)")
    return random.Random(seed)


def tables(root: Root) -> dict[str, Snapshot]:
    """Snapshots by what they are called in findings."""
    streams = {f"stream {name}": open_stream(root, name) for name in ("semantic", "acoustic")}
    return {CORPUS: open_corpus(root), **streams}


def is_refused(root: Root, snapshot: Snapshot, shard: int) -> bool:
    """Whether our reader will not read a shard, and names its file."""
    try:
        if snapshot.folder == CORPUS:
            read_parquet(root, snapshot.path(shard), schema=CORPUS_SCHEMA)
        else:
            read_codes(root, snapshot, shard)
    except CorruptFile as error:
        return snapshot.path(shard) in str(error)
    return False


@pytest.mark.parametrize("flips", [FEW_FLIPS, pytest.param(FLIPS, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_read_silently_and_verify_names_the_shard(
    flips: int, finished_root: Path, copy_root: Callable[[Path], Path]
) -> None:
    root, generator = Root(copy_root(finished_root)), seeded()
    found = tables(root)
    places = [(name, shard) for name, snapshot in found.items() for shard in snapshot.files]
    silent = 0
    for number in range(flips):
        name, shard = generator.choice(places)
        path = Path(root.join(found[name].path(shard)))
        content = flip(path, generator)
        silent += not is_refused(root, found[name], shard)
        if name != CORPUS:
            require_read_rightly_or_refused(root, found[name], shard, path, content)
        if number % VERIFY_EVERY == 0:
            problems = verify(root, found[CORPUS], sample=0, seed=0, source_roots={}).problems
            assert any(problem.startswith(f"{name}, shard {shard}:") for problem in problems), problems
        path.write_bytes(content)
    tally("flips", flips=flips, silent=silent)
    assert silent == 0


def require_read_rightly_or_refused(root: Root, snapshot: Snapshot, shard: int, path: Path, content: bytes) -> None:
    """Of some columns: a flipped bit elsewhere does no harm, one in them is seen."""
    try:
        some = read_codes(root, snapshot, shard, num_codebooks=1)
    except CorruptFile:
        return
    changed = path.read_bytes()
    path.write_bytes(content)
    whole = read_codes(root, snapshot, shard)
    path.write_bytes(changed)
    assert (some.ids, some.num_frames, some.errors) == (whole.ids, whole.num_frames, whole.errors)
    for ours, theirs in zip(some.books[0], whole.books[0], strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.slow
def test_repair_makes_shards_with_flipped_bits_again_byte_for_byte(
    finished_root: Path, copy_root: Callable[[Path], Path]
) -> None:
    root, generator = Root(copy_root(finished_root)), seeded()
    for _ in range(REPAIRS):
        names = [(name, file) for name, files in committed(finished_root).items() for file in files]
        damaged = generator.sample(names, FLIPS_TO_REPAIR)
        for name, file in damaged:
            flip(Path(root.join(stream_folder(name)), file), generator)
        assert committed(root.uri) != committed(finished_root)
        status, told, said = finish(zygote().start("repair", root.uri, "--engine", "inline", "--json"))
        assert status == 0, said
        assert (told["damaged"], told["restored"], told["replaced"]) == (FLIPS_TO_REPAIR, FLIPS_TO_REPAIR, 0)
        assert committed(root.uri) == committed(finished_root)
        assert verify(root, open_corpus(root), sample=5, seed=0, source_roots={}).problems == []
        tally("flips", repaired=FLIPS_TO_REPAIR)
