"""Hostile tars and tables in a folder: what each is, and what must become of it."""

import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from hostile_files import file
from hostile_tools import Offer, World, pickled, sound, special, tar

GOOD = ("good.wav", sound())


def _parquet(table: pa.Table, **options: object) -> bytes:
    content = io.BytesIO()
    pq.write_table(table, content, **options)
    return content.getvalue()


def _audio_struct(values: list[dict[str, object]]) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"audio": pa.array(values, type=kind)})


def _leading_out(world: World) -> bytes:
    canary = str(world.outside / "canary.wav")
    return tar(
        ("../../outside/canary.wav", sound()),
        ("/tmp/absolute.wav", sound()),
        ("a/../../up.wav", sound()),
        special("link.wav", tarfile.SYMTYPE, link=canary),
        special("hard.wav", tarfile.LNKTYPE, link=canary),
        special("hard-up.wav", tarfile.LNKTYPE, link="../outside/canary.wav"),
        special("fifo.wav", tarfile.FIFOTYPE),
        special("device.wav", tarfile.CHRTYPE),
        special("block.wav", tarfile.BLKTYPE),
        special("folder", tarfile.SYMTYPE, link=str(world.outside)),
        ("folder/canary.wav", sound()),
        GOOD,
    )


LEADING_OUT = {
    **dict.fromkeys(
        [
            "a.tar > ../../outside/canary.wav",
            "a.tar > /tmp/absolute.wav",
            "a.tar > a/../../up.wav",
            *(f"a.tar > {name}.wav" for name in ("link", "hard", "hard-up", "fifo", "device", "block")),
            "a.tar > folder",
        ],
        "unsafe-name",
    ),
    "a.tar > folder/canary.wav": None,
    "a.tar > good.wav": None,
}


def _sparse_member() -> bytes:
    header = tarfile.TarInfo("a.wav")
    header.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,10"}
    header.pax_headers |= {"GNU.sparse.name": "a.wav", "GNU.sparse.size": str(1 << 50)}
    return tar(header, GOOD)


def _zeros(*heads: tuple[str, bytes], size: int) -> bytes:
    """A gzipped tar whose members begin with so many bytes and go on with zeros, up to `size`."""
    content = io.BytesIO()
    piece = gzip.compress(bytes(1 << 20))
    for name, head in heads:
        header = tarfile.TarInfo(name)
        header.size = size
        content.write(gzip.compress(header.tobuf() + head + bytes((1 << 20) - len(head))))
        content.write(piece * (size // (1 << 20) - 1))
    content.write(gzip.compress(tar(GOOD)))
    return content.getvalue()


def _runnable(world: World) -> bytes:
    return tar(
        ("good.pkl", pickled(world.touched)),
        ("good.pickle", pickled(world.touched)),
        (
            "good.npy",
            b"\x93NUMPY\x01\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + pickled(world.touched),
        ),
        ("good.pyd", pickled(world.touched)),
        ("good.pth", pickled(world.touched)),
        ("good.cls", b"0"),
        GOOD,
    )


def _commands(world: World) -> bytes:
    return tar(
        (f"pipe:touch {world.touched.name}; cat x.wav", sound()),
        (world.listener.url, sound()),
        ("__pycache__/../../x.wav", sound()),
        ("gopen.wav", world.listener.url.encode()),
    )


def _extension(world: World) -> bytes:
    """Arrow extension metadata that old pyarrows unpickled (CVE-2023-47248)."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled(world.touched),
    }
    field = pa.field("audio", pa.binary(), metadata=metadata)
    return _parquet(
        pa.table([pa.array([sound()])], schema=pa.schema([field], metadata={b"pandas": pickled(world.touched)}))
    )


def _arrow(world: World) -> bytes:
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled(world.touched),
    }
    content = io.BytesIO()
    schema = pa.schema([pa.field("audio", pa.binary(), metadata=metadata)])
    with pa.ipc.new_stream(content, schema) as out:
        out.write_table(pa.table([pa.array([sound()])], schema=schema))
    return content.getvalue()


def _compressed_arrow(claim: int) -> bytes:
    """An Arrow stream whose compressed bytes claim to become `claim` bytes."""
    content = io.BytesIO()
    schema = pa.schema([pa.field("audio", pa.binary())])
    zeros = bytes(100_003)
    with pa.ipc.new_stream(content, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as out:
        out.write_table(pa.table([pa.array([zeros])], schema=schema))
    written = content.getvalue()
    mark = (len(zeros)).to_bytes(8, "little", signed=True) + b"\x28\xb5\x2f\xfd"
    assert mark in written
    return written.replace(mark, claim.to_bytes(8, "little", signed=True) + mark[8:])


def _urls(world: World) -> bytes:
    return _audio_struct(
        [
            {"bytes": None, "path": world.listener.url},
            {"bytes": None, "path": "http://169.254.169.254/latest/meta-data/iam"},
            {"bytes": None, "path": "pipe:touch touched"},
            {"bytes": None, "path": "hf://datasets/x/a.wav"},
            {"bytes": None, "path": "../../outside/canary.wav"},
            {"bytes": sound(), "path": world.listener.url},
            {"bytes": sound(), "path": "../../outside/canary.wav"},
        ]
    )


def zeros_in_gzip(size: int) -> bytes:
    """A gzipped tar of two recordings of so many bytes, mostly zeros, and a good one."""
    return _zeros(("zeros.wav", b""), ("wave.wav", sound()), size=size)


def many_members(count: int) -> bytes:
    """A tar of so many members that are no audio, and a recording behind them."""
    return tarfile.TarInfo("x.bin").tobuf(tarfile.USTAR_FORMAT) * count + tar(GOOD)


CONTAINERS = [
    Offer(
        "members of a tar with names, links and devices that lead out are errors, and nothing is extracted",
        file("a.tar", _leading_out),
        LEADING_OUT,
    ),
    Offer(
        "a sparse member that claims a petabyte is an error",
        file("a.tar", _sparse_member()),
        {"a.tar > a.wav": "unsupported", "a.tar > good.wav": None},
    ),
    Offer(
        "a gzipped tar with 128 MiB of zeros as recordings is listed and read in bounded memory",
        file("a.tar.gz", zeros_in_gzip(1 << 26)),
        {"a.tar.gz > zeros.wav": "not-audio", "a.tar.gz > wave.wav": None, "a.tar.gz > good.wav": None},
    ),
    Offer(
        "a tar of 10,000 members that are no audio is listed",
        file("a.tar", many_members(10_000)),
        {"a.tar > good.wav": None},
    ),
    Offer(
        "pickles and object arrays in a WebDataset are never loaded",
        file("a.tar", _runnable),
        {"a.tar > good.wav": None},
    ),
    Offer(
        "members named like commands and URLs are members",
        file("a.tar", _commands),
        {
            "a.tar > pipe:touch touched; cat x.wav": None,
            "a.tar > __pycache__/../../x.wav": "unsafe-name",
            "a.tar > gopen.wav": "not-audio",
            "a.tar > URL": None,
        },
    ),
    Offer(
        "Arrow metadata that holds a pickle is not unpickled (Parquet)",
        file("a.parquet", _extension),
        {"a.parquet > audio/0": None},
    ),
    Offer(
        "Arrow metadata that holds a pickle is not unpickled (Arrow)",
        file("a.arrow", _arrow),
        {"a.arrow > audio/0": None},
    ),
    Offer(
        "rows of a table that name URLs, commands and files outside are errors; bytes beside them are read",
        file("a.parquet", lambda world: _parquet(_urls(world))),
        {
            **dict.fromkeys([f"a.parquet > audio/{row}" for row in range(4)], "bad-row"),
            "../../outside/canary.wav": "outside-source",
            "a.parquet > audio/5": None,
            "a.parquet > audio/6": None,
        },
    ),
    Offer(
        "an Arrow file whose bytes claim to be a petabyte is an error",
        file("a.arrow", _compressed_arrow(1 << 50)),
        {"a.arrow": "corrupt"},
    ),
    Offer(
        "an Arrow file whose bytes claim a negative size is an error",
        file("a.arrow", _compressed_arrow(-5)),
        {"a.arrow": "corrupt"},
    ),
    Offer(
        "a Parquet cell of 128 MiB of zeros is no audio",
        file(
            "a.parquet",
            lambda world: _parquet(
                pa.table({"audio": [bytes(1 << 27)]}), compression="zstd", use_dictionary=False, write_statistics=False
            ),
        ),
        {"a.parquet > audio/0": "not-audio"},
    ),
    Offer(
        "a table whose Hugging Face features are of any shape is read",
        file(
            "a.parquet",
            lambda world: _parquet(
                pa.table({"audio": [sound()]}).replace_schema_metadata(
                    {"huggingface": json.dumps({"info": {"features": {"audio": ["__import__"], "x": None}}})}
                )
            ),
        ),
        {"a.parquet > audio/0": None},
    ),
]
