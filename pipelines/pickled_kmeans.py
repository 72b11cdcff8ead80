"""Centroids out of a pickled scikit-learn k-means, as fairseq's and textlesslib's published units come.

A pickle is a program for a machine with a stack. The one here runs what those files need and can do nothing else: a
class that a file names becomes an inert note of its name, a call a note of what was called with what. No module is
imported, nothing is called, and names beyond a short list end the reading. Only one array is then made, of the note
that stands for `cluster_centers_`. Opcodes: CPython's Lib/pickletools.py. Arrays behind the pickle of their
description: joblib's numpy_pickle.py.
"""

import struct
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..tokenizers.spec import UserError

COMPRESSED = (b"\x1f\x8b", b"\x78")  # gzip, zlib: joblib.dump(kmeans, path, compress=3)
PICKLED = b"\x80"  # of protocol 2 and above
_MAX_BYTES = 1024**3
_TOO_LARGE = f"it holds more than {_MAX_BYTES / 1024**3:.0f} GiB"
_MAX_DIMENSIONS = 8  # of an array
_KMEANS = {
    f"sklearn.cluster.{module}.{name}"
    for module in ("_kmeans", "k_means_")  # the second up to scikit-learn 0.21
    for name in ("KMeans", "MiniBatchKMeans")
}
_WRAPPERS = {f"{place}joblib.numpy_pickle.NumpyArrayWrapper" for place in ("", "sklearn.externals.")}
_CORES = ("numpy.core", "numpy._core")
_RECONSTRUCT = {f"{core}.multiarray._reconstruct" for core in _CORES}
_FROM_BUFFER = {f"{core}.numeric._frombuffer" for core in _CORES}
_RANDOM = {
    *(f"numpy.random._pickle.{name}" for name in ("__randomstate_ctor", "__bit_generator_ctor", "__generator_ctor")),
    *(f"numpy.random.{name}" for name in ("__RandomState_ctor", "_mt19937.MT19937", "_pcg64.PCG64")),
}
_ALLOWED = {
    *(_KMEANS | _WRAPPERS | _RECONSTRUCT | _FROM_BUFFER | _RANDOM),
    *(f"{core}.multiarray.scalar" for core in _CORES),
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",  # bytes in pickles of protocol 2
}
_SAVE = "Save the centroids as numbers: numpy.save('centroids.npy', kmeans.cluster_centers_.astype('float32'))."


class _Broken(Exception):
    """Why a pickle is none that can be read here."""


@dataclass(frozen=True, slots=True, eq=False)
class _Name:
    """A class or function that the file names."""

    name: str


@dataclass(slots=True, eq=False)
class _Made:
    """What the file says would come of a call, and the state it would be given; or an array's bytes."""

    name: str
    arguments: Any
    state: Any = None
    content: bytes | memoryview = b""


def read_pickled_kmeans(path: str) -> np.ndarray:
    """`cluster_centers_` `[C, D]` of a pickled KMeans or MiniBatchKMeans, also joblib's, also compressed by zlib.

    Raises `UserError` for all that names other classes, is damaged, or holds no fitted k-means. Nothing is executed.
    """
    try:
        machine = _Machine(memoryview(_content(path)))
        found = machine.run()
        if not (isinstance(found, _Made) and found.name in _KMEANS and isinstance(found.state, dict)):
            raise _Broken("it holds no k-means of scikit-learn")
        if "cluster_centers_" not in found.state:
            raise _Broken("its k-means has no cluster_centers_: it was never fitted")
        return _array(found.state["cluster_centers_"])
    except OSError as error:
        raise UserError(f"Cannot read the centroids {path}: {error.strerror or error}.") from error
    except _Broken as error:
        raise UserError(f"{path} is no pickled k-means that can be read: {error}. {_SAVE}") from error


def _content(path: str) -> bytes:
    if Path(path).stat().st_size > _MAX_BYTES:
        raise _Broken(_TOO_LARGE)
    content = Path(path).read_bytes()
    if content.startswith(COMPRESSED):
        inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        try:
            content = inflate.decompress(content, _MAX_BYTES + 1)
        except zlib.error as error:
            raise _Broken(f"its compression is damaged ({error})") from error
        if len(content) > _MAX_BYTES:
            raise _Broken(_TOO_LARGE)
        if not inflate.eof:
            raise _Broken("it is cut short")
    return content


_MARK = object()


class _Machine:
    """The stack machine of a pickle, with notes in the place of objects."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What is left on the stack at the end. Raises `_Broken`."""
        try:
            while True:
                opcode = self._take(1)[0]
                if opcode == 0x2E:  # STOP
                    return self._stack.pop()
                step = _STEPS.get(opcode)
                if step is None:
                    raise _Broken(f"byte {self._at - 1:,} is {opcode:#04x}, which no k-means needs")
                step(self)
        except (IndexError, KeyError, TypeError, ValueError, struct.error, AttributeError) as error:
            raise _Broken(f"it is damaged at byte {self._at:,}") from error

    def _take(self, size: int) -> memoryview:
        piece = self._content[self._at : self._at + size]
        if len(piece) != size:
            raise _Broken("it is cut short")
        self._at += size
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def counted(self, form: str) -> memoryview:
        return self._take(self.number(form))

    def text(self, form: str) -> str:
        return str(self.counted(form), "utf-8", "surrogatepass")

    def line(self) -> str:
        end = bytes(self._content[self._at : self._at + 512]).index(b"\n")
        return str(self._take(end + 1)[:-1], "utf-8")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise _Broken(f"it is damaged at byte {self._at:,}")
        return value

    def marked(self) -> list[Any]:
        """All above the last mark."""
        values = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def remember(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def remember_next(self) -> None:
        self.remember(len(self._memo))

    def recall(self, place: int) -> None:
        self.push(self._memo[place])

    def append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(values)

    def put(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, (str, int, float, bytes)):  # whose hashes are ours
                raise TypeError
            target[key] = value

    def name(self, module: Any, name: Any) -> None:
        whole = f"{module}.{name}"
        if whole not in _ALLOWED:
            shown = "".join(each if each.isprintable() else "?" for each in whole[:100])
            raise _Broken(f"it names {shown}, which is no part of a k-means and could run code if it were opened")
        self.push(_Name(whole))

    def call(self) -> None:
        arguments, called = self.pop(), self.pop()
        if not isinstance(called, _Name) or not isinstance(arguments, tuple):
            raise TypeError
        if called.name == "_codecs.encode":
            text, encoding = arguments
            if encoding != "latin1" or not isinstance(text, str):
                raise TypeError
            self.push(text.encode("latin-1"))
        else:
            self.push(_Made(called.name, arguments))

    def build(self) -> None:
        state, made = self.pop(), self._stack[-1]
        if not isinstance(made, _Made):
            raise TypeError
        made.state = state
        if made.name in _WRAPPERS:  # joblib: the array's bytes stand right behind
            if state.get("numpy_array_alignment_bytes") is not None:
                self._take(self._take(1)[0])
            made.content = self._take(_size(_dtype(state["dtype"]), state["shape"]))


def _array(made: Any) -> np.ndarray:
    """The array that a note describes, copied. Raises `_Broken` if it describes none of plain numbers."""
    try:
        if made.name in _WRAPPERS:
            dtype, shape, fortran = _dtype(made.state["dtype"]), made.state["shape"], made.state["order"] == "F"
            content = made.content
        elif made.name in _RECONSTRUCT:
            _, shape, dtype, fortran, content = made.state
            dtype = _dtype(dtype)
        elif made.name in _FROM_BUFFER:
            content, dtype, shape, order = made.arguments
            dtype, fortran = _dtype(dtype), order == "F"
        else:
            raise TypeError
        if len(content) != _size(dtype, shape):
            raise ValueError
        return np.frombuffer(content, dtype=dtype).reshape(shape, order="F" if fortran else "C").copy()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _Broken("its cluster_centers_ are no array of numbers") from error


def _dtype(made: Any) -> np.dtype:
    """A type of floating-point numbers. Raises `_Broken` for others."""
    if not (isinstance(made, _Made) and made.name == "numpy.dtype"):
        raise TypeError
    kind, order = made.arguments[0], made.state[1]
    if kind not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u4", "u8", "b1") or order not in (
        "<",
        ">",
        "|",
        "=",
    ):
        raise _Broken(f"it holds an array of {str(kind)[:20]!r}, not of numbers")
    return np.dtype(kind).newbyteorder(order)


def _size(dtype: np.dtype, shape: Any) -> int:
    """Bytes of an array. Raises `TypeError` for a shape that is none."""
    if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
        raise TypeError
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise TypeError
    return prod(shape) * dtype.itemsize


def _make(machine: _Machine, values: list[Any]) -> None:
    machine.push(tuple(values))


def _last(machine: _Machine, count: int) -> list[Any]:
    return [machine.pop() for _ in range(count)][::-1]


_STEPS: dict[int, Any] = {
    0x80: lambda m: m.number("B"),  # PROTO
    0x95: lambda m: m.number("Q"),  # FRAME
    ord("("): lambda m: m.push(_MARK),
    ord("0"): lambda m: m.pop(),
    ord("1"): lambda m: m.marked(),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("i")),
    ord("K"): lambda m: m.push(m.number("B")),
    ord("M"): lambda m: m.push(m.number("H")),
    0x8A: lambda m: m.push(int.from_bytes(m.counted("B"), "little", signed=True)),  # LONG1
    ord("G"): lambda m: m.push(struct.unpack(">d", m._take(8))[0]),
    ord("X"): lambda m: m.push(m.text("I")),
    0x8C: lambda m: m.push(m.text("B")),
    0x8D: lambda m: m.push(m.text("Q")),
    ord("T"): lambda m: m.push(bytes(m.counted("I"))),
    ord("U"): lambda m: m.push(bytes(m.counted("B"))),
    ord("B"): lambda m: m.push(m.counted("I")),
    ord("C"): lambda m: m.push(m.counted("B")),
    0x8E: lambda m: m.push(m.counted("Q")),  # BINBYTES8
    0x96: lambda m: m.push(m.counted("Q")),  # BYTEARRAY8
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: _make(m, m.marked()),
    0x85: lambda m: _make(m, _last(m, 1)),
    0x86: lambda m: _make(m, _last(m, 2)),
    0x87: lambda m: _make(m, _last(m, 3)),
    ord("a"): lambda m: m.append(_last(m, 1)),
    ord("e"): lambda m: m.append(m.marked()),
    ord("s"): lambda m: m.put(_last(m, 2)),
    ord("u"): lambda m: m.put(m.marked()),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(*_last(m, 2)),  # STACK_GLOBAL
    ord("R"): lambda m: m.call(),
    0x81: lambda m: m.call(),  # NEWOBJ
    ord("b"): lambda m: m.build(),
    ord("q"): lambda m: m.remember(m.number("B")),
    ord("r"): lambda m: m.remember(m.number("I")),
    ord("h"): lambda m: m.recall(m.number("B")),
    ord("j"): lambda m: m.recall(m.number("I")),
    0x94: lambda m: m.remember_next(),  # MEMOIZE
}
