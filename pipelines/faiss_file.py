"""Flat FAISS indexes, read and written by their bytes: FAISS itself trusts what a file says of sizes.

`IxF2` (L2) and `IxFI` (inner product): faiss/impl/index_write.cpp, little-endian.
"""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..tokenizers.spec import UserError

FLAT = {b"IxF2": 1, b"IxFI": 0}  # by METRIC_L2 and METRIC_INNER_PRODUCT
FAISS = b"Ix"  # all indexes that are no binary ones begin so, but IVF, HNSW and wrappers
_OTHERS = (b"Iw", b"IH", b"IB", b"Ip", b"IN")
_HEADER = struct.Struct("<4siqqq?iQ")  # kind, D, C, two unused, is it trained, metric, how many numbers follow
_UNUSED = 1 << 20


def is_faiss(begin: bytes) -> bool:
    return begin.startswith((FAISS, *_OTHERS))


def read_flat_index(path: str) -> NDArray[np.float32]:
    """Centroids `[C, D]` of an `IndexFlatL2` or `IndexFlatIP`. Raises `UserError` for all others."""
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        begin = file.read(_HEADER.size)
    kind = begin[:4]
    if kind not in FLAT:
        named = "".join(chr(byte) if 32 < byte < 127 else "?" for byte in kind)
        raise UserError(
            f"{path} is a FAISS index of kind {named}, which does not hold centroids as they are; expected IndexFlatL2 "
            "or IndexFlatIP. Of an IVF index, save the quantizer: faiss.write_index(index.quantizer, path)."
        )
    try:
        _, dim, num, _, _, _, metric, count = _HEADER.unpack(begin)
    except struct.error:
        dim, num, metric, count = 0, 0, -1, 0
    if min(dim, num) < 1 or metric != FLAT[kind] or count != dim * num or size != _HEADER.size + 4 * count:
        raise UserError(f"{path} is damaged: its header and its {size:,} bytes do not agree. Write it again.")
    return np.memmap(path, dtype="<f4", mode="r", offset=_HEADER.size, shape=(num, dim))


def flat_index_bytes(centroids_CD: NDArray[np.float32], *, inner_product: bool = False) -> bytes:
    """The file of an `IndexFlatL2` (or `IndexFlatIP`) that holds these centroids, as `faiss.write_index` writes it."""
    kind = b"IxFI" if inner_product else b"IxF2"
    num, dim = centroids_CD.shape
    header = _HEADER.pack(kind, dim, num, _UNUSED, _UNUSED, True, FLAT[kind], dim * num)
    return header + np.ascontiguousarray(centroids_CD, dtype="<f4").tobytes()
