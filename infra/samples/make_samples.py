"""Writes jobs/samples: five minutes of espeak-ng speech in many formats, four broken files and a manifest.

Run `python infra/samples/make_samples.py`; it needs espeak-ng on the path. On one machine, the same versions
of espeak-ng, PyAV, libsndfile and torchaudio give the same bytes: no file holds a time or a random number.

Axes: C channels, N samples.
"""

import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import av
import numpy as np
import soundfile
import torch
import torchaudio
from av.codec.context import Flags

REPO = Path(__file__).resolve().parents[2]
SAMPLES = REPO / "jobs" / "samples"
SENTENCES = Path(__file__).with_name("sentences.json")
BITEXACT = {"fflags": "+bitexact"}
AMPLITUDE = 60  # of espeak-ng's 0 to 200; its default of 100 clips some vowels


@dataclass(frozen=True, slots=True)
class Format:
    """How one clip is stored; `bit_rate` 0 leaves it to the codec."""

    extension: str
    codec: str
    sample_rate: int
    bit_rate: int = 0
    num_channels: int = 1


MP3_22K = Format("mp3", "libmp3lame", 22_050, 48_000)
MP3_44K = Format("mp3", "libmp3lame", 44_100, 56_000)
FLAC_16K = Format("flac", "flac", 16_000)
FLAC_22K = Format("flac", "flac", 22_050)
VORBIS_22K = Format("ogg", "vorbis", 22_050)
AAC_44K = Format("m4a", "aac", 44_100, 48_000)
OPUS_48K = Format("opus", "libopus", 48_000, 32_000)
WEBM_48K = Format("webm", "libopus", 48_000, 32_000)
WAV_8K = Format("wav", "pcm_s16le", 8_000)
WAV_16K = Format("wav", "pcm_s16le", 16_000)
WAV_STEREO = Format("wav", "pcm_s16le", 44_100, num_channels=2)

# A speaker's first eleven clips go round this list; the twelfth, a short one, has `Speaker.last_format`.
ROUND = (
    MP3_22K, FLAC_16K, OPUS_48K, VORBIS_22K, MP3_44K, AAC_44K,
    WEBM_48K, MP3_22K, VORBIS_22K, OPUS_48K, AAC_44K,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Speaker:
    """A voice of espeak-ng (language+variant) with its pitch (0 to 99) and speed (words a minute)."""

    name: str
    voice: str
    pitch: int
    speed: int
    last_format: Format

    @property
    def language(self) -> str:
        """The two letters before the first name: "en" in "en_anna"."""
        return self.name.partition("_")[0]


class Row(TypedDict):
    """One line of the manifest, as NeMo names its columns; `duration` in seconds."""

    audio_filepath: str
    duration: float
    text: str
    speaker: str
    language: str


SPEAKERS = (
    Speaker("de_frieda", "de+f2", 55, 168, WAV_16K),
    Speaker("de_jonas", "de+m7", 20, 173, FLAC_22K),
    Speaker("en_anna", "en-us+f3", 60, 174, WAV_16K),
    Speaker("en_brian", "en-gb+m3", 38, 182, WAV_8K),
    Speaker("en_callum", "en-gb-scotland+m5", 48, 167, WAV_STEREO),
    Speaker("en_grace", "en-gb-x-rp+f5", 36, 177, FLAC_22K),
    Speaker("es_lucia", "es+f1", 65, 175, WAV_16K),
    Speaker("es_mateo", "es+m1", 62, 169, FLAC_22K),
    Speaker("fr_camille", "fr+f4", 50, 155, FLAC_22K),
)


def find_espeak() -> str:
    """The path of espeak-ng; exits with one sentence where it is missing."""
    path = shutil.which("espeak-ng")
    return path or sys.exit("espeak-ng was not found on the path: install it (apt-get install espeak-ng).")


def espeak_version(espeak: str) -> str:
    """The version alone, such as "1.51"."""
    printed = subprocess.run([espeak, "--version"], check=True, capture_output=True, text=True).stdout
    return printed.partition("text-to-speech:")[2].split()[0]


def synthesise(espeak: str, speaker: Speaker, text: str) -> tuple[np.ndarray, int]:
    """Speech `[N]` as float64 in [-1, 1], and its sample rate."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        voice = ["-v", speaker.voice, f"-p{speaker.pitch}", f"-s{speaker.speed}", f"-a{AMPLITUDE}"]
        subprocess.run([espeak, *voice, "-b1", "-w", wav, "--stdin"], input=text.encode(), check=True)
        return soundfile.read(wav)


def convert(speech_N: np.ndarray, sample_rate: int, target: Format) -> np.ndarray:
    """The speech as int16 `[C, N]` at the target's rate; a second channel is softer and 0.5 ms later."""
    speech = torch.from_numpy(speech_N)
    wave_N = torchaudio.functional.resample(speech, sample_rate, target.sample_rate).numpy()
    channels = [wave_N]
    if target.num_channels == 2:
        delay = target.sample_rate // 2000
        channels.append(0.6 * np.concatenate([np.zeros(delay), wave_N[:-delay]]))
    return np.clip(np.rint(np.stack(channels) * 32767), -32768, 32767).astype(np.int16)


def write_audio(path: Path, samples_CN: np.ndarray, target: Format) -> None:
    """Encodes int16 (or float32, for pcm_f32le) samples with FFmpeg."""
    interleaved = np.ascontiguousarray(samples_CN.T).reshape(1, -1)
    layout = "stereo" if target.num_channels == 2 else "mono"
    sample_format = "flt" if samples_CN.dtype == np.float32 else "s16"
    frame = av.AudioFrame.from_ndarray(interleaved, format=sample_format, layout=layout)
    frame.sample_rate = target.sample_rate
    with av.open(path, "w", options=BITEXACT) as container:
        stream = container.add_stream(target.codec, rate=target.sample_rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        stream.codec_context.flags |= Flags.bitexact
        if target.bit_rate:
            stream.bit_rate = target.bit_rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_vorbis(path: Path, samples_CN: np.ndarray, target: Format) -> None:
    """Encodes with libsndfile, as PyAV has no libvorbis.

    libsndfile draws the Ogg serial number at random, so the packets are copied to an Ogg that PyAV numbers.
    """
    buffer = io.BytesIO()
    soundfile.write(buffer, samples_CN.T, target.sample_rate, format="OGG", subtype="VORBIS")
    buffer.seek(0)
    with av.open(buffer, "r") as source, av.open(path, "w", options=BITEXACT) as container:
        stream = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)


def write_speech(espeak: str, root: Path) -> Iterator[Row]:
    """Writes speech/<speaker>_<nn> with its .txt, and gives the manifest row of each clip."""
    sentences = json.loads(SENTENCES.read_text(encoding="utf-8"))
    folder = root / "speech"
    folder.mkdir()
    for index, speaker in enumerate(SPEAKERS):
        for number, text in enumerate(sentences[speaker.name]):
            is_last = number == len(sentences[speaker.name]) - 1
            target = speaker.last_format if is_last else ROUND[(number + index) % len(ROUND)]
            samples_CN = convert(*synthesise(espeak, speaker, text), target)
            path = folder / f"{speaker.name}_{number + 1:02d}.{target.extension}"
            (write_vorbis if target.codec == "vorbis" else write_audio)(path, samples_CN, target)
            path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
            yield {
                "audio_filepath": path.relative_to(root).as_posix(),
                "duration": round(samples_CN.shape[1] / target.sample_rate, 3),
                "text": text,
                "speaker": speaker.name,
                "language": speaker.language,
            }


def write_broken(espeak: str, root: Path) -> None:
    """Writes the four files of broken/, each with another fault that crawled audio has."""
    folder = root / "broken"
    folder.mkdir()
    (folder / "empty.mp3").touch()
    (folder / "error_page.mp3").write_text(
        "<!DOCTYPE html>\n<html>\n<head><title>404 Not Found</title></head>\n"
        "<body><h1>Not Found</h1><p>The requested recording is not on this server.</p></body>\n</html>\n"
    )
    speech = synthesise(espeak, SPEAKERS[0], "Diese Aufnahme bricht mitten im Satz ab.")
    cut_short = folder / "cut_short.wav"
    write_audio(cut_short, convert(*speech, WAV_16K), WAV_16K)
    cut_short.write_bytes(cut_short.read_bytes()[: cut_short.stat().st_size // 2])

    tone_N = 0.3 * np.sin(2 * np.pi * 440 * np.arange(8_000) / 16_000)
    tone_N[2_000:6_000] = np.nan
    not_numbers = folder / "not_numbers.wav"
    write_audio(not_numbers, tone_N[None].astype(np.float32), Format("wav", "pcm_f32le", 16_000))


def write_readme(root: Path, rows: list[Row], version: str) -> None:
    """Says in eight lines what the folder is, where it came from, and how large it is (itself left out)."""
    seconds = sum(row["duration"] for row in rows)
    size_bytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    languages = sorted({row["language"] for row in rows})
    lines = [
        "# Samples: five minutes of speech to try a job on",
        "",
        f"- Made by `infra/samples/make_samples.py` with espeak-ng {version}; remake with",
        "  `python infra/samples/make_samples.py` (needs espeak-ng).",
        f"- {len(rows)} clips, {len(SPEAKERS)} speakers, {len(languages)} languages ({', '.join(languages)}),"
        f" {seconds:.0f} s, {size_bytes / 1e6:.1f} MB: WAV, FLAC, MP3, Ogg Vorbis, M4A, Opus, WebM.",
        "- `speech/`: each clip with its transcript beside it; `manifest.jsonl`: a row a clip (NeMo style).",
        "- `broken/`, not in the manifest: four bad files (empty, an HTML page, cut short, NaN samples).",
        "- Licence: Apache-2.0, like the project (synthesised by espeak-ng from our own sentences).",
    ]
    (root / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Builds the folder aside and puts it in place of the old one once it is whole."""
    espeak = find_espeak()
    SAMPLES.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SAMPLES.parent) as aside:
        root = Path(aside) / SAMPLES.name
        root.mkdir()
        rows = sorted(write_speech(espeak, root), key=lambda row: row["audio_filepath"])
        write_broken(espeak, root)
        manifest = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (root / "manifest.jsonl").write_text(manifest, encoding="utf-8")
        write_readme(root, rows, espeak_version(espeak))
        if SAMPLES.exists():
            shutil.rmtree(SAMPLES)
        root.rename(SAMPLES)
    print(f"{len(rows)} clips, {sum(row['duration'] for row in rows):.1f} s in {SAMPLES}")


if __name__ == "__main__":
    main()
