"""Centroids from elsewhere: pickles of scikit-learn in every form they come in, FAISS indexes, and files that lie."""

import builtins
import gzip
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wavemill.pipelines.centroids import read_centroids
from wavemill.pipelines.faiss_file import flat_index_bytes, read_flat_index
from wavemill.pipelines.pickled_kmeans import read_pickled_kmeans
from wavemill.tokenizers.registry import describe_features
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.tokenizer import TokenizerConfig

DIM = 39


def fitted(kind: str = "MiniBatchKMeans", dtype: type = np.float32, random_state: Any = 0) -> Any:
    cluster = pytest.importorskip("sklearn.cluster")
    frames_ND = np.random.default_rng(0).standard_normal((60, DIM)).astype(dtype)
    return getattr(cluster, kind)(n_clusters=5, random_state=random_state, n_init=1, max_iter=3).fit(frames_ND)


@pytest.mark.parametrize("kind", ["KMeans", "MiniBatchKMeans"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("state", ["seed", "generator"])
def test_a_k_means_of_scikit_learn_gives_its_centroids_in_whatever_form_it_was_written(
    kind: str, dtype: type, state: str, tmp_path: Path
) -> None:
    joblib = pytest.importorskip("joblib")
    kmeans = fitted(kind, dtype, 0 if state == "seed" else np.random.RandomState(1))
    forms: list[Callable[[Path], object]] = [
        *(
            lambda path, protocol=protocol: path.write_bytes(pickle.dumps(kmeans, protocol=protocol))
            for protocol in (2, 3, 4, 5)
        ),
        *(lambda path, protocol=protocol: joblib.dump(kmeans, path, protocol=protocol) for protocol in (2, 4, None)),
        *(lambda path, how=how: joblib.dump(kmeans, path, compress=how) for how in (3, ("zlib", 9), ("gzip", 1))),
    ]
    for number, write in enumerate(forms):
        write(tmp_path / "km.bin")
        found_CD = read_pickled_kmeans(str(tmp_path / "km.bin"))
        assert found_CD.dtype == dtype, number
        assert np.array_equal(found_CD, kmeans.cluster_centers_), number


def test_a_pickled_k_means_becomes_centroids_that_fit_the_features(tmp_path: Path) -> None:
    kmeans = fitted(dtype=np.float64)
    path = tmp_path / "km.pkl"
    path.write_bytes(pickle.dumps(kmeans))
    centroids_QCD, _ = read_centroids(str(path), describe_features(TokenizerConfig(tokenizer="mfcc-kmeans")))
    assert np.array_equal(centroids_QCD.numpy(), kmeans.cluster_centers_.astype(np.float32)[None])


class Calls:
    """Its pickle calls a function when it is opened."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _with(value: Any) -> bytes:
    """A k-means with something in the place of its centroids."""
    kmeans = fitted()
    kmeans.cluster_centers_ = value
    return pickle.dumps(kmeans, protocol=4)


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {flag}",), "posix.system"),
        (builtins.eval, ("open('{flag}', 'w')",), "builtins.eval"),
        (os.mkdir, ("{flag}",), "posix.mkdir"),
        (getattr, ("", "join"), "builtins.getattr"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_would_run_something_is_refused_by_its_name_and_runs_nothing(
    function: Any, arguments: tuple[Any, ...], named: str, nested: bool, protocol: int, tmp_path: Path
) -> None:
    flag, path = tmp_path / "flag", tmp_path / "km.pkl"
    hostile: Any = Calls(function, *(each.format(flag=flag) for each in arguments))
    if nested:
        kmeans = fitted()
        kmeans.deep = [{"a": (1, [hostile])}]
        hostile = kmeans
    path.write_bytes(pickle.dumps(hostile, protocol=protocol))
    named = named if protocol > 2 else named.replace("builtins", "__builtin__")
    with pytest.raises(UserError) as caught:
        read_pickled_kmeans(str(path))
    assert f"it names {named}, which is no part of a k-means" in str(caught.value)
    assert str(caught.value).endswith(".")
    assert not flag.exists()


def _global(name: str) -> bytes:
    module, _, function = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + function.encode() + b"\n"


KMEANS = b"\x80\x04" + _global("sklearn.cluster._kmeans.KMeans") + b")\x81"
FLOATS = _global("numpy.dtype") + b"\x8c\x02f8\x85R(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
CENTERS = b"}\x8c\x10cluster_centers_"


@pytest.mark.parametrize(
    "content",
    [
        b"\x80",
        b"\x80\x04",
        b"\x80\x04.",
        b"\x80\x04N.",
        b"\x80\x04" + b"(" * 100_000 + b".",
        b"\x80\x04]" + b"\x94h\x00a" * 10_000 + b".",  # a list that holds itself
        b"\x80\x04)" + b"\x94h\x00\x86" * 3 + b".",
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a memo of two thousand million places
        b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b"x.",
        b"\x80\x04X\xff\xff\xff\xffx.",
        b"\x80\x04\x8a\xff" + b"\x01" * 40,
        b"\x80\x04P0\n.",
        b"\x80\x04\x82\x01.",
        KMEANS + b".",
        KMEANS + b"}b.",
        KMEANS + CENTERS + b"Nsb.",
        KMEANS + CENTERS + FLOATS + b"sb.",
        KMEANS
        + CENTERS
        + _global("joblib.numpy_pickle.NumpyArrayWrapper")
        + b")\x81}(\x8c\x05dtype"
        + FLOATS
        + b"\x8c\x05shapeJ\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86ub"
        + b"\0" * 64,
        KMEANS
        + CENTERS
        + _global("joblib.numpy_pickle.NumpyArrayWrapper")
        + b")\x81}(\x8c\x05dtype"
        + FLOATS
        + b"\x8c\x05shape("
        + b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f" * 5_000
        + b"tub",
        zlib.compress(b"\x80\x04N.")[:-5],
        zlib.compress(bytes(1 << 20) * 20),
        gzip.compress(b"\x80\x04N.", mtime=0)[:12],
        b"\x78\x9c not compressed",
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_pickle_that_is_damaged_lies_or_is_a_bomb_is_told_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "km.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_pickled_kmeans(str(path))
    assert str(caught.value).startswith(f"{path} is no pickled k-means that can be read: ")
    assert "\n" not in str(caught.value)


def test_a_k_means_cut_short_anywhere_or_with_a_flipped_byte_never_raises_anything_else(tmp_path: Path) -> None:
    path, whole = tmp_path / "km.pkl", pickle.dumps(fitted(), protocol=4)
    random = np.random.default_rng(0)
    for end in random.integers(0, len(whole), 200):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError):
            read_pickled_kmeans(str(path))
    for place in random.integers(0, len(whole), 400):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(changed)
        try:
            assert read_pickled_kmeans(str(path)).dtype.kind in "fiub"
        except UserError as error:
            assert str(error).endswith(".")  # noqa: PT017


@pytest.mark.parametrize("value", ["no array", np.array(["a", "b"]), np.array([None, 1], dtype=object)])
def test_centroids_that_are_no_numbers_are_told(value: Any, tmp_path: Path) -> None:
    (tmp_path / "km.pkl").write_bytes(_with(value))
    with pytest.raises(UserError, match=r"no pickled k-means that can be read"):
        read_pickled_kmeans(str(tmp_path / "km.pkl"))


@pytest.mark.parametrize("inner_product", [False, True])
def test_a_flat_index_is_what_faiss_writes_and_reads(inner_product: bool, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    centroids_CD = np.random.default_rng(0).standard_normal((7, DIM)).astype(np.float32)
    index = faiss.IndexFlatIP(DIM) if inner_product else faiss.IndexFlatL2(DIM)
    index.add(centroids_CD)
    faiss.write_index(index, str(tmp_path / "theirs.index"))
    assert (tmp_path / "theirs.index").read_bytes() == flat_index_bytes(centroids_CD, inner_product=inner_product)
    assert np.array_equal(read_flat_index(str(tmp_path / "theirs.index")), centroids_CD)


def test_an_index_of_another_kind_is_named(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    path = str(tmp_path / "pq.index")
    index = faiss.IndexPQ(8, 2, 2)
    index.train(np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32))
    faiss.write_index(index, path)
    with pytest.raises(UserError, match=r"FAISS index of kind IxPq, which does not hold centroids as they are"):
        read_centroids(path, describe_features(TokenizerConfig(tokenizer="mfcc-kmeans")))


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: whole[:20],
        lambda whole: whole[:4] + struct.pack("<iq", 1 << 30, 1 << 60) + whole[16:],
        lambda whole: whole[:4] + struct.pack("<iq", -DIM, -7) + whole[16:],
        lambda whole: whole[:37] + struct.pack("<Q", 1 << 63) + whole[45:],
    ],
)
def test_an_index_whose_header_lies_is_refused(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    path.write_bytes(change(flat_index_bytes(np.ones((7, DIM), np.float32))))
    with pytest.raises(UserError, match=r"is damaged: its header and its [\d,]+ bytes do not agree\."):
        read_flat_index(str(path))
