"""How many nulls a Parquet file's footer counts, read by hand: pyarrow's own accessor ends the process on some damage.

(`RowGroupMetaData.column` lets a C++ exception through: "ColumnMetaData type does not match ColumnDescriptor".)
Format: https://parquet.apache.org/docs/file-format/metadata/ in Thrift's compact protocol.
"""

import io
import struct
from typing import Any, BinaryIO

_MAGIC = b"PAR1"
_MAX_FOOTER = 64 << 20  # bytes
_MAX_DEPTH = 16
_STRUCT, _LIST, _SET, _MAP, _BINARY, _DOUBLE = 12, 9, 10, 11, 8, 7
_TRUE, _FALSE, _BYTE = 1, 2, 3
# field numbers of parquet.thrift
_ROW_GROUPS, _COLUMNS, _META_DATA, _PATH, _STATISTICS, _NULL_COUNT = 4, 1, 3, 3, 12, 3


def null_counts(file: BinaryIO, column: str) -> list[int | None]:
    """By row group, how many values of a leaf column (`audio.bytes`) are null; None where the footer does not say.

    Empty for a footer that cannot be made out.
    """
    try:
        file.seek(-8, io.SEEK_END)
        size = int.from_bytes(file.read(4), "little")
        if file.read(4) != _MAGIC or size > _MAX_FOOTER:
            return []
        file.seek(-8 - size, io.SEEK_END)
        groups = _struct(io.BytesIO(file.read(size)), 0)[_ROW_GROUPS]
        return [_null_count(group[_COLUMNS], column) for group in groups]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OSError, struct.error):
        return []


def _null_count(chunks: list[dict[int, Any]], column: str) -> int | None:
    for chunk in chunks:
        found = chunk[_META_DATA]
        if b".".join(found[_PATH]) == column.encode():
            count = found.get(_STATISTICS, {}).get(_NULL_COUNT)
            return count if isinstance(count, int) else None
    return None


def _struct(data: io.BytesIO, depth: int) -> dict[int, Any]:
    fields: dict[int, Any] = {}
    number = 0
    while header := data.read(1)[0]:
        delta, kind = header >> 4, header & 15
        number = number + delta if delta else _zigzag(data)
        fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else _value(data, kind, depth + 1)
    return fields


def _value(data: io.BytesIO, kind: int, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if kind == _STRUCT:
        return _struct(data, depth)
    if kind in (_LIST, _SET):
        header = data.read(1)[0]
        count = header >> 4 if header >> 4 != 15 else _varint(data)
        return [_value(data, header & 15, depth + 1) for _ in range(count)]
    if kind == _BINARY:
        return _bytes(data, _varint(data))
    if kind == _DOUBLE:
        return struct.unpack("<d", _bytes(data, 8))[0]
    if kind in (_TRUE, _FALSE, _BYTE):  # inside lists, booleans are bytes
        return data.read(1)[0]
    if kind == _MAP or kind > _STRUCT or kind == 0:
        raise ValueError(f"no footer has a value of the kind {kind}")
    return _zigzag(data)


def _bytes(data: io.BytesIO, size: int) -> bytes:
    found = data.read(size)
    if len(found) != size:
        raise ValueError("the footer ends early")
    return found


def _varint(data: io.BytesIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = data.read(1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ValueError("a number has over ten bytes")


def _zigzag(data: io.BytesIO) -> int:
    value = _varint(data)
    return value >> 1 ^ -(value & 1)
