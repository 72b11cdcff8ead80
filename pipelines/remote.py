"""Recordings in object stores: the bytes of one version of an object, fetched by ranges, never those of two."""

import hashlib
import re
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, cast

from fsspec.asyn import sync

from ..storage.stores import StoreTrouble, open_store, store_errors
from .entries import AudioError

FIRST_BYTES = 256 << 10  # holds the headers of most recordings, and all of an utterance's
_BLOCK_BYTES = 4 << 20  # the largest
_KEPT_BLOCKS = 4
_TRIES = 3
_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class _Answer:
    """Part of an object, and what the store says of the object."""

    content: bytes
    size: int
    etag: str | None


class RemoteObject:
    """One version of an object: that of an ETag, or else the one that is there when it is first read.

    For several threads at a time.
    """

    def __init__(self, uri: str, *, etag: str | None = None) -> None:
        self._uri = uri
        self._store, self._path = open_store(uri)
        self._as_built = etag is not None
        self.etag = etag
        self.size = 0  # known when something was fetched

    def fetch(self, begin: int, end: int) -> bytes:
        """Bytes `[begin, end)`, cut at the object's end.

        Raises `AudioError`: "missing" if there is no such object, "changed" if it is another version; `StoreTrouble`.
        """
        answer = self._ask(begin, end, self.etag)
        if not _is_intact(answer):
            again = self._ask(begin, end, self.etag)
            # twice the same: then the ETag is no MD5, as that of some encrypted objects
            if again.content != answer.content and not _is_intact(again):
                raise StoreTrouble(f"{self._uri}: its bytes change on their way here. See the network, or use https.")
            answer = again
        return answer.content

    def _ask(self, begin: int, end: int, etag: str | None) -> _Answer:
        try:
            with store_errors(self._uri):
                answer = _get(self._store, self._path, begin, end, etag)
        except FileNotFoundError as error:
            raise AudioError("missing", "the file is not there") from error
        except FileExistsError:  # and it is another; or this store takes no conditions
            return self._ask(begin, end, None)
        if self.etag is not None and answer.etag != self.etag:
            when = "when the corpus was built" if self._as_built else "when reading began"
            now = f"it is {answer.etag}, of {answer.size:,} bytes"
            raise AudioError("changed", f"its ETag was {self.etag} {when}, now {now}")
        if len(answer.content) != max(0, min(end, answer.size) - begin):
            raise StoreTrouble(f"{self._uri}: the store sent {len(answer.content):,} of bytes {begin:,} to {end:,}.")
        self.etag, self.size = answer.etag, answer.size
        return answer


class ObjectRanges:
    """An object's bytes up to `end`, in blocks: small ones where reading jumps, larger ones where it goes forward.

    While one is read forward, the next is fetched. The first block and the last few are kept. For one thread at a time.
    """

    def __init__(self, remote: RemoteObject, end: int, background: Executor, *, begin: int, first: bytes) -> None:
        self._remote = remote
        self._end = end
        self._background = background
        self._first = begin, first
        self._kept: list[tuple[int, bytes]] = []  # where each begins, and its bytes
        self._reached = begin + len(first)  # by the block that was fetched last
        self._block_bytes = FIRST_BYTES
        self._ahead: tuple[int, int, Future[bytes]] | None = None  # begin and end of the block being fetched

    def read(self, begin: int, end: int) -> bytes:
        """Bytes from `begin` to `end` or to the end of a block, whichever comes first; none behind the last."""
        end = min(end, self._end)
        if begin >= end:
            return b""
        for start, block in (self._first, *self._kept):
            if start <= begin < start + len(block):
                return block[begin - start : end - start]
        start, block = self._next_block(begin)
        self._kept = [*self._kept[1 - _KEPT_BLOCKS :], (start, block)]
        return block[begin - start : end - start]

    def close(self) -> None:
        """Let go of what is held and of what is being fetched."""
        if self._ahead is not None:
            self._ahead[2].cancel()
        self._ahead, self._kept = None, []

    def _next_block(self, begin: int) -> tuple[int, bytes]:
        """A block that holds a byte, and where it begins."""
        if self._ahead is not None and self._ahead[0] <= begin < self._ahead[1]:
            start, _, fetching = self._ahead
            block, forward = fetching.result(), True
        else:
            if self._ahead is not None:
                self._ahead[2].cancel()
            forward = 0 <= begin - self._reached < FIRST_BYTES
            self._block_bytes = self._larger() if forward else FIRST_BYTES
            start, block = begin, self._remote.fetch(begin, min(begin + self._block_bytes, self._end))
        self._reached = start + len(block)
        self._ahead = None
        if forward and self._reached < self._end:
            self._block_bytes = self._larger()
            end = min(self._reached + self._block_bytes, self._end)
            self._ahead = self._reached, end, self._background.submit(self._remote.fetch, self._reached, end)
        return start, block

    def _larger(self) -> int:
        return min(2 * self._block_bytes, _BLOCK_BYTES)


def _is_intact(answer: _Answer) -> bool:
    """False where the ETag is the MD5 of all bytes, as that of plain uploads is, and all that came has another."""
    if len(answer.content) != answer.size or answer.etag is None or not _MD5.fullmatch(answer.etag):
        return True
    return hashlib.md5(answer.content, usedforsecurity=False).hexdigest() == answer.etag


def _get(store: Any, path: str, begin: int, end: int, etag: str | None) -> _Answer:
    """Bytes `[begin, end)`, cut at the object's end, under the condition of an ETag where the store takes one."""
    if "s3" in store.protocol:
        return _get_s3(store, path, begin, end, etag)
    for _ in range(_TRIES):  # these stores tell no ETag with bytes, so they are asked before and behind
        size, found = _size_and_etag(store, path)
        content = store.cat_file(path, start=begin, end=min(end, size)) if begin < size else b""
        if _size_and_etag(store, path) == (size, found):
            return _Answer(content, size, found)
    raise OSError("it is replaced again and again")


def _get_s3(store: Any, path: str, begin: int, end: int, etag: str | None) -> _Answer:
    from s3fs.core import S3_RETRYABLE_ERRORS

    bucket, key, _ = store.split_path(path)
    condition = {} if etag is None else {"IfMatch": f'"{etag}"'}
    for attempt in range(1, store.retries + 1):
        try:
            answer = store.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={begin}-{end - 1}", **condition)
        except OSError as error:
            if _refusal(error) != "InvalidRange":
                raise
            return _Answer(b"", *_size_and_etag(store, path))  # an object of no bytes, or of fewer
        try:
            content = cast(bytes, sync(store.loop, _body, answer))
        except S3_RETRYABLE_ERRORS:  # a body cut short is one of them
            if attempt == store.retries:
                raise
            continue
        etag = answer["ETag"].strip('"')
        if "ContentRange" not in answer:  # a store without ranges
            return _Answer(content[begin:end], len(content), etag)
        return _Answer(content, int(answer["ContentRange"].rpartition("/")[2]), etag)
    raise AssertionError("an attempt ends in an answer or an error")


async def _body(answer: Any) -> bytes:
    try:
        return await answer["Body"].read()
    finally:
        answer["Body"].close()


def _refusal(error: OSError) -> str:
    """What S3 calls its reason."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code", "")


def _size_and_etag(store: Any, path: str) -> tuple[int, str | None]:
    store.invalidate_cache(path)
    found = store.info(path)
    if found["type"] != "file":
        raise FileNotFoundError(path)
    etag = found.get("ETag") or found.get("etag")
    return found["size"], etag and etag.strip('"')
