"""Hostile files in a folder: what each is, and what must become of it."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hostile_tools import (
    FTYP,
    NOISE,
    RATE,
    Offer,
    World,
    alias,
    box,
    full_box,
    id3,
    matroska,
    mp4,
    silent_flac,
    sound,
    wav_header,
)

Content = Callable[[World], bytes]
SELF = full_box(b"url ", flags=1)  # in a dref: the samples are in this very file
PCM = (NOISE[:8_000] * 32767).astype("<i2").tobytes()


def file(name: str, content: Content | bytes) -> Callable[[Path, World], None]:
    def make(folder: Path, world: World) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content(world))

    return make


def files(*pairs: tuple[str, Content | bytes]) -> Callable[[Path, World], None]:
    def make(folder: Path, world: World) -> None:
        for name, content in pairs:
            file(name, content)(folder, world)

    return make


def one(sentence: str, name: str, content: Content | bytes, error: str | None) -> Offer:
    return Offer(sentence, file(name, content), {name: error})


def url(text: str) -> Content:
    """A text that names the listener."""
    return lambda world: text.replace("URL", world.listener.url).encode()


def local(text: str) -> Content:
    """A text that names a recording outside the source."""
    return lambda world: text.replace("FILE", str(world.outside / "canary.wav")).encode()


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"

NETWORK = [
    one("an HLS playlist named .wav is no audio and fetches nothing", "a.wav", url(HLS.format("URL")), "not-audio"),
    one(
        "an HLS playlist behind an ID3 tag, named .mp3, is no audio and fetches nothing",
        "a.mp3",
        lambda world: id3((b"TIT2", b"\0x")) + url(HLS.format("URL"))(world),
        "not-audio",
    ),
    Offer("an .m3u playlist is passed over", file("a.m3u", url("#EXTM3U\nURL\n")), {}),
    one(
        "an HLS playlist whose key is a URL is no audio",
        "a.aac",
        url('#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="URL"\n#EXTINF:1,\na.ts\n'),
        "not-audio",
    ),
    one(
        "a DASH manifest named .m4a is no audio",
        "a.m4a",
        url('<?xml version="1.0"?><MPD><Period><AdaptationSet><BaseURL>URL</BaseURL></AdaptationSet></Period></MPD>'),
        "not-audio",
    ),
    one("an ffconcat script named .wav is no audio", "a.wav", url("ffconcat version 1.0\nfile 'URL'\n"), "not-audio"),
    one(
        "an SDP session named .opus is no audio",
        "a.opus",
        url("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\na=control:URL\nm=audio 9 RTP/AVP 0\n"),
        "not-audio",
    ),
    one(
        "a .pls playlist named .ogg is no audio",
        "a.ogg",
        url("[playlist]\nFile1=URL\nNumberOfEntries=1\n"),
        "not-audio",
    ),
    one("an ASX list named .wma is no audio", "a.wma", url("[Reference]\nRef1=URL\n"), "not-audio"),
    one(
        "an IMF composition named .mxf.wav is no audio",
        "a.mxf.wav",
        url("<?xml version='1.0'?><CompositionPlaylist><Id>URL</Id></CompositionPlaylist>"),
        "not-audio",
    ),
    one(
        "an MP4 whose samples are said to lie at a URL is read for its own bytes, and fetches nothing",
        "a.mp4",
        lambda world: mp4(reference=full_box(b"url ", world.listener.url.encode() + b"\0"), data=PCM),
        None,
    ),
    one(
        "a QuickTime reference movie that leads to a URL has no samples",
        "a.mov.m4a",
        lambda world: (
            FTYP
            + box(
                b"moov",
                box(
                    b"rmra",
                    box(
                        b"rmda", full_box(b"rdrf", b"url ", struct.pack(">I", 99), world.listener.url.encode() + b"\0")
                    ),
                ),
            )
        ),
        "no-samples",
    ),
    one(
        "a Matroska file with linked segments, an attached playlist and URLs as tags is read for its own sound",
        "a.mka",
        lambda world: matroska(world.listener.url),
        None,
    ),
    one(
        "an MP3 tag with a picture at a URL is passed over, the sound behind it read",
        "a.mp3",
        lambda world: (
            id3(
                (b"APIC", b"\0-->\0\3\0" + world.listener.url.encode()),
                (b"WXXX", b"\0\0" + world.listener.url.encode()),
            )
            + sound("MP3")
        ),
        None,
    ),
]


def _link(name: str, target: Callable[[World], str | Path]) -> Callable[[Path, World], None]:
    def make(folder: Path, world: World) -> None:
        (folder / name).symlink_to(target(world))

    return make


def _side_link(folder: Path, world: World) -> None:
    (folder / "a.wav").write_bytes(sound())
    (folder / "a.txt").symlink_to(world.outside / "canary.txt")
    (folder / "a.json").symlink_to(world.outside / "canary.txt")


def _folder_loop(folder: Path, world: World) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "up").symlink_to(folder)


CANARIES = [
    Offer(
        "a link to a recording outside is refused",
        _link("a.wav", lambda w: w.outside / "canary.wav"),
        {"a.wav": "outside-source"},
    ),
    Offer(
        "a link with .. to a recording outside is refused",
        _link("a.wav", lambda w: "../../outside/canary.wav"),
        {"a.wav": "outside-source"},
    ),
    Offer("a link to a folder outside is not entered", _link("more", lambda w: w.outside), {}),
    Offer("a link to a tar outside is not opened", _link("a.tar", lambda w: w.outside / "canary.tar"), {}),
    Offer("folders that hold links to themselves end", _folder_loop, {}),
    Offer("a link to /dev/zero is not read", _link("a.wav", lambda w: "/dev/zero"), {"a.wav": "outside-source"}),
    Offer(
        "a link to /proc/self/environ is not read",
        _link("a.wav", lambda w: "/proc/self/environ"),
        {"a.wav": "outside-source"},
    ),
    Offer("a transcript that is a link to a secret outside is not read", _side_link, {"a.wav": None}),
    one("a playlist that names a file outside is no audio", "a.wav", local(HLS.format("FILE")), "not-audio"),
    one(
        "an ffconcat script that names a file outside is no audio",
        "a.wav",
        local("ffconcat version 1.0\nfile 'FILE'\n"),
        "not-audio",
    ),
    one("a text with a concat: protocol is no audio", "a.wav", local("concat:FILE|FILE"), "not-audio"),
    one(
        "an MP4 whose samples are said to lie in a file outside is read for its own bytes, and opens nothing",
        "a.mp4",
        lambda world: mp4(
            reference=full_box(b"url ", b"file://" + bytes(world.outside / "canary.wav") + b"\0"), data=PCM
        ),
        None,
    ),
    one(
        "a QuickTime file whose alias leads to a file outside has no samples, and opens nothing",
        "a.m4a",
        lambda world: mp4(reference=alias(str(world.outside / "canary.wav")), data=PCM),
        "no-samples",
    ),
]


def _sparse(name: str, content: bytes, size: int) -> Callable[[Path, World], None]:
    def make(folder: Path, world: World) -> None:
        (folder / name).write_bytes(content)
        os.truncate(folder / name, size)

    return make


def _tagged(folder: Path, world: World) -> None:
    with (folder / "a.flac").open("wb") as out:
        out.write(b"ID3\x04\0\0\x7f\x7f\x7f\x7f")
        out.seek(10 + (1 << 28) - 1)
        out.write(sound("FLAC"))


def _promised(content: bytes, num_samples: int) -> bytes:
    """A FLAC with another total in its STREAMINFO."""
    packed = int.from_bytes(content[18:26], "big") >> 36 << 36 | num_samples
    return content[:18] + packed.to_bytes(8, "big") + content[26:]


def _large_text(folder: Path, world: World) -> None:
    (folder / "a.wav").write_bytes(sound())
    (folder / "a.txt").write_bytes(b"x")
    os.truncate(folder / "a.txt", 1 << 36)
    (folder / "a.json").write_bytes(b"[" * 1_000_000)


SILENT = np.zeros(RATE * 60, dtype=np.int16)
NESTED = b"".join(struct.pack(">I", 8 * (20_000 - n)) + b"moov" for n in range(20_000))
BOMBS = [
    one(
        "a FLAC that promises 2^36 - 1 samples is too large", "a.flac", _promised(sound("FLAC"), 2**36 - 1), "too-large"
    ),
    one(
        "a FLAC that promises one sample too many is an error",
        "a.flac",
        _promised(sound("FLAC"), RATE + 1),
        "truncated",
    ),
    one("a FLAC whose bytes become 29,000 bytes each is too large", "a.flac", silent_flac(), "too-large"),
    one("a minute of silence as FLAC is fine", "a.flac", sound("FLAC", "PCM_16", SILENT), None),
    one("a WAV of 65,535 channels is an error", "a.wav", wav_header(num_channels=65_535) + bytes(32_000), "corrupt"),
    one("a WAV of 2^31 - 1 Hz is an error", "a.wav", wav_header(rate=2**31 - 1) + bytes(32_000), "unsupported"),
    one(
        "a WAV that promises 1 GiB and has 32 kB is truncated",
        "a.wav",
        wav_header(data_bytes=1 << 30) + bytes(32_000),
        "truncated",
    ),
    Offer(
        "a sparse WAV of 1 TB is too large",
        _sparse("a.wav", wav_header(data_bytes=1 << 40), 1 << 40),
        {"a.wav": "too-large"},
    ),
    Offer(
        "a sparse file of 60 GB of no audio is no audio",
        _sparse("a.wav", b"no audio", 60 * 10**9),
        {"a.wav": "not-audio"},
    ),
    Offer("a FLAC behind an ID3 tag of 256 MB is read", _tagged, {"a.flac": None}),
    one(
        "a thousand ID3 tags one behind the other are no audio",
        "a.mp3",
        id3((b"TIT2", b"\0x")) * 1_000 + sound("MP3"),
        "not-audio",
    ),
    one("an Ogg of 10,000 links is read", "a.opus", sound("OGG", "OPUS", NOISE[:160]) * 10_000, None),
    one(
        "an Ogg of a million empty pages is an error", "a.ogg", (b"OggS\0\0" + bytes(20) + b"\0") * 1_000_000, "corrupt"
    ),
    one(
        "an MP4 whose tables claim 2^32 entries is an error",
        "a.mp4",
        mp4(
            reference=SELF,
            data=PCM,
            table={
                b"stts": struct.pack(">III", 2**32 - 1, 1, 1),
                b"stsz": struct.pack(">II", 0, 2**32 - 1),
                b"stco": struct.pack(">II", 2**32 - 1, 28),
            },
        ),
        "corrupt",
    ),
    one(
        "an MP4 whose one run of samples claims 2^32 - 1 of them is an error",
        "a.mp4",
        mp4(
            reference=SELF,
            data=PCM,
            table={
                b"stts": struct.pack(">III", 1, 2**32 - 1, 1),
                b"stsz": struct.pack(">II", 2, 2**32 - 1),
                b"stsc": struct.pack(">IIII", 1, 1, 2**32 - 1, 1),
            },
        ),
        "length-mismatch",
    ),
    one("an MP4 of 20,000 boxes one inside the other is an error", "a.mp4", FTYP + NESTED, "corrupt"),
    one(
        "a Matroska element that claims 2^56 bytes is an error",
        "a.mka",
        bytes.fromhex("1A45DFA3") + b"\x01" + b"\xff" * 7,
        "corrupt",
    ),
    one(
        "an AIFF chunk that claims 4 GiB is an error",
        "a.aiff",
        b"FORM\xff\xff\xff\xffAIFFCOMM\xff\xff\xff\xff" + bytes(100),
        "corrupt",
    ),
    one(
        "a CAF chunk of a negative size is an error", "a.caf", b"caff\0\1\0\0desc" + b"\xff" * 8 + bytes(100), "corrupt"
    ),
    Offer("a transcript of 64 GB and JSON a million levels deep are passed over", _large_text, {"a.wav": None}),
]


FILES = [*NETWORK, *CANARIES, *BOMBS]
