"""Parquet as wavemill writes and reads it: page checksums always, dictionary pages for small codebooks."""

import hashlib
import io

import pyarrow as pa
import pyarrow.parquet as pq

from ..tokenizers.spec import RunFailed
from .root import Root

DICTIONARY_LIMIT = 4_096  # codebooks up to this size are bit-packed as dictionary indices
_ROW_GROUP_ROWS = 65_536


class CorruptFile(RunFailed):
    """Bytes at rest are not the bytes that were written."""


def parquet_bytes(table: pa.Table, *, codebook_size: int = 0) -> bytes:
    """One shard's file, the table's metadata in its footer. Equal tables give equal bytes.

    Code columns of up to `DICTIONARY_LIMIT` values are dictionary pages (Parquet bit-packs the indices: 10 bits a
    code for 1,024 centroids), larger ones BYTE_STREAM_SPLIT; all under zstd-1 with a checksum per page.
    """
    codes = [f"{name}.list.element" for name in table.column_names if name.startswith("codes_")]
    others = [name for name in table.column_names if not name.startswith("codes_")]
    split = codebook_size > DICTIONARY_LIMIT
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=others if split else others + codes,  # pyright: ignore[reportArgumentType]
        column_encoding=dict.fromkeys(codes, "BYTE_STREAM_SPLIT") if split else None,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
        writer.add_key_value_metadata(table.schema.metadata or {})
    return sink.getvalue()


def shard_file_name(shard: int, content: bytes) -> str:
    """A name that says the shard and, by hash, the content: writing it twice is writing it once."""
    return f"shard-{shard:06d}-{_content_hash(content)}.parquet"


def _content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def read_parquet(root: Root, relative: str, *, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read a file of a table, checking its hash against its name and every page against its checksum.

    The hash also covers what page checksums leave out: headers and the footer. Raises `CorruptFile`, naming the file.
    """
    names = columns if columns is not None else schema.names
    try:
        content = root.read_bytes(relative)
        if _content_hash(content) not in relative:
            raise pa.ArrowInvalid("its content is not what its name, which holds the content's hash, says")
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        # on one thread: with PyTorch loaded, pyarrow's own threads may abort the process at its exit
        table = file.read(columns=names, use_threads=False)
    except FileNotFoundError as error:
        raise CorruptFile(
            f"{root.join(relative)} is named by its table but is not there. "
            "Restore it from a backup, or make the stream again under another name."
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise CorruptFile(
            f"{root.join(relative)} is damaged: {str(error).splitlines()[0][:200]}. "
            "Restore it from a backup, or make the stream again under another name."
        ) from error
    return table.cast(pa.schema([schema.field(name) for name in names]))
