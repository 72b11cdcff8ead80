"""Parquet as wavemill writes and reads it: checked to the last bit, by the byte ranges of what is asked for.

A file's name holds a hash of its footer, and its footer the hashes of its column chunks: so a reader of some columns
can tell that they, and what says where they are, are what was written. Page checksums are there for other readers; they
cover neither headers nor the footer.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..tokenizers.spec import RunFailed
from .root import Root
from .schema import ADDED_COLUMNS

DICTIONARY_LIMIT = 4_096  # codebooks up to this size are bit-packed as dictionary indices
_ROW_GROUP_ROWS = 65_536
_NEVER_ALIKE = ("id", "frames", "text")
_HASHES = b"wavemill.hashes"  # of the footer's metadata: one hash for each column of each row group
_HASH_DIGITS = 16
_MAGIC = b"PAR1"
_TAIL_BYTES = 16_384  # read at first: most footers are smaller


class CorruptFile(RunFailed):
    """Bytes at rest are not the bytes that were written."""


def parquet_bytes(table: pa.Table, *, codebook_size: int = 0) -> bytes:
    """One shard's file, the table's metadata in its footer. Equal tables give equal bytes.

    Code columns of up to `DICTIONARY_LIMIT` values are dictionary pages (Parquet bit-packs the indices: 10 bits a
    code for 1,024 centroids), larger ones BYTE_STREAM_SPLIT; all under zstd-1 with a checksum per page.
    """
    codes = [f"{name}.list.element" for name in table.column_names if name.startswith("codes_")]
    others = [name for name in table.column_names if not name.startswith("codes_") and name not in _NEVER_ALIKE]
    split = codebook_size > DICTIONARY_LIMIT
    num_groups = max(1, -(-table.num_rows // _ROW_GROUP_ROWS))
    unknown = b"?" * (_HASH_DIGITS * table.num_columns * num_groups)
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=others if split else others + codes,  # pyright: ignore[reportArgumentType]
        column_encoding=dict.fromkeys(codes, "BYTE_STREAM_SPLIT") if split else None,
        write_statistics=others,  # pyright: ignore[reportArgumentType]  # of codes and ids nobody has a use for them
        write_batch_size=65_536,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
        writer.add_key_value_metadata({**(table.schema.metadata or {}), _HASHES: unknown})
    return _with_hashes(sink.getvalue(), unknown)


def shard_file_name(shard: int, content: bytes) -> str:
    """A name that says the shard and, by hash, the content: writing it twice is writing it once."""
    return f"shard-{shard:06d}-{_hash(content[-_footer_bytes(content[-8:]) :])}.parquet"


def read_parquet(root: Root, relative: str, *, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read a file of a table, all of its bytes checked. Raises `CorruptFile`, naming the file."""

    def read() -> pa.Table:
        with _told(root, relative):
            content = root.read_bytes(relative)
            if content[:4] != _MAGIC:
                raise pa.ArrowInvalid("it does not begin as a Parquet file")
        shard = ParquetShard(root, relative, len(content), schema=schema, content=content)
        return shard.read(columns if columns is not None else schema.names)

    return _twice(root, read)


class ParquetShard:
    """One file of a table, read by ranges: the footer first, then the chunks of the columns that are asked for.

    Each is compared with its hash. Raises `CorruptFile`, naming the file.
    """

    def __init__(
        self, root: Root, relative: str, size_bytes: int, *, schema: pa.Schema, content: bytes | None = None
    ) -> None:
        self._root = root
        self._relative = relative
        self._size = size_bytes
        self._schema = schema
        self._content = content

    def read(self, columns: Sequence[str]) -> pa.Table:
        """These columns, in the types of the schema; null, where the file is older than a column."""

        def read() -> pa.Table:
            with _told(self._root, self._relative):
                there = [name for name in columns if name not in ADDED_COLUMNS or name in self._metadata.schema.names]
                file = pq.ParquetFile(
                    pa.BufferReader(self._checked(there)), metadata=self._metadata, page_checksum_verification=True
                )
                # on one thread: with PyTorch loaded, pyarrow's own threads may abort the process at its exit
                return file.read(columns=there, use_threads=False)

        table = read() if self._content is not None else _twice(self._root, read)
        for place, name in enumerate(columns):
            if name in ADDED_COLUMNS and name not in table.column_names:
                table = table.add_column(place, name, pa.nulls(table.num_rows, self._schema.field(name).type))
        return table.cast(pa.schema([self._schema.field(name) for name in columns]))

    def key_values(self) -> dict[bytes, bytes]:
        """What the footer says beside the columns; no more of the file is read."""
        with _told(self._root, self._relative):
            return dict(self._metadata.metadata or {})

    def _checked(self, columns: Sequence[str]) -> pa.Buffer:
        """The file with these columns in it, compared with their hashes; all of it, where its content is at hand."""
        groups = range(self._metadata.num_row_groups)
        whole = self._content is not None
        chunks = list(self._chunks.values()) if whole else [self._chunks[key] for key in product(groups, columns)]
        sparse = None if whole else np.zeros(self._size, dtype=np.uint8)  # pages not written to take no memory
        ranges = [(begin, end) for begin, end, _ in chunks]
        for (begin, end, expected), chunk in zip(chunks, self._read(ranges), strict=True):
            if _hash(chunk) != expected:
                raise pa.ArrowInvalid(f"bytes {begin:,} to {end:,} are not those that were written")
            if sparse is not None:
                sparse[begin:end] = np.frombuffer(chunk, dtype=np.uint8)
        return pa.py_buffer(self._content if sparse is None else sparse)

    @cached_property
    def _footer(self) -> bytes:
        if self._size < 12:
            raise pa.ArrowInvalid(f"it has {self._size} bytes, too few for a Parquet file")
        [tail] = self._read([(max(0, self._size - _TAIL_BYTES), self._size)])
        needed = _footer_bytes(tail[-8:])
        if needed > self._size:
            raise pa.ArrowInvalid("its last bytes are not those of a Parquet file")
        if needed > len(tail):
            [tail] = self._read([(self._size - needed, self._size)])
        footer = tail[-needed:]
        if _hash(footer) not in self._relative:
            raise pa.ArrowInvalid("its content is not what its name, which holds the content's hash, says")
        return footer

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        return pq.read_metadata(pa.BufferReader(_MAGIC + self._footer))

    @cached_property
    def _chunks(self) -> dict[tuple[int, str], tuple[int, int, str]]:
        """Begin, end and hash of each column of each row group."""
        hashes = (self._metadata.metadata or {}).get(_HASHES, b"").decode()
        ranges = _chunk_ranges(self._metadata)
        if len(hashes) != _HASH_DIGITS * len(ranges):
            raise pa.ArrowInvalid("its footer holds no hashes of its columns: wavemill did not write it")
        return {
            key: (begin, end, hashes[index * _HASH_DIGITS : (index + 1) * _HASH_DIGITS])
            for index, (key, (begin, end)) in enumerate(ranges.items())
        }

    def _read(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        if self._content is not None:
            return [self._content[begin:end] for begin, end in ranges]
        return self._root.read_ranges(self._relative, ranges)


def _twice(root: Root, read: Callable[[], pa.Table]) -> pa.Table:
    """Read, in a store once more where bytes are not those that were written: they may have changed on their way."""
    if not root.is_local:
        with suppress(CorruptFile):
            return read()
    return read()


def _with_hashes(content: bytes, unknown: bytes) -> bytes:
    """The file with the hashes of its chunks where its footer holds question marks."""
    ranges = _chunk_ranges(pq.read_metadata(pa.BufferReader(content)))
    hashes = "".join(_hash(content[begin:end]) for begin, end in ranges.values()).encode()
    begin = len(content) - _footer_bytes(content[-8:])
    head, found, tail = content[begin:].partition(unknown)
    assert found, "the footer lacks its place for hashes"
    assert len(hashes) == len(unknown)
    return content[:begin] + head + hashes + tail


def _chunk_ranges(metadata: pq.FileMetaData) -> dict[tuple[int, str], tuple[int, int]]:
    """Begin and end of each column's bytes in each row group, that of nested columns from their first leaf on."""
    ranges: dict[tuple[int, str], tuple[int, int]] = {}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            leaf = metadata.row_group(group).column(index)
            begin = leaf.data_page_offset
            if leaf.dictionary_page_offset:
                begin = min(begin, leaf.dictionary_page_offset)
            key = group, leaf.path_in_schema.partition(".")[0]
            first = ranges.get(key, (begin, 0))[0]
            ranges[key] = first, begin + leaf.total_compressed_size
    return ranges


def _footer_bytes(last_eight: bytes) -> int:
    """Length of a file's footer with its length and magic, which are the file's last eight bytes."""
    if len(last_eight) < 8 or last_eight[4:] != _MAGIC:
        raise pa.ArrowInvalid("its last bytes are not those of a Parquet file")
    return int.from_bytes(last_eight[:4], "little") + 8


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_HASH_DIGITS]


class _told:
    """Turns what pyarrow and the file system say of a file into a `CorruptFile` that names it."""

    def __init__(self, root: Root, relative: str) -> None:
        self._place = root.join(relative)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        advice = "Run `wavemill repair`, or restore it from a backup."
        if isinstance(error, FileNotFoundError):
            raise CorruptFile(f"{self._place} is named by its table but is not there. {advice}") from error
        if isinstance(error, (OSError, EOFError, ValueError, pa.ArrowException)):  # ValueError: of extension types
            told = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CorruptFile(f"{self._place} is damaged: {told}. {advice}") from error
