"""For tests: the audio of a file by its path, and of rows without a dataset, through the real decoder process."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from wavemill.pipelines.audio import Limits, Probe, Span
from wavemill.pipelines.decoder import Decoder, DecoderSettings
from wavemill.pipelines.entries import AudioError
from wavemill.pipelines.reading import Reader
from wavemill.pipelines.recordings import Opener, Place
from wavemill.storage.root import Root
from wavemill.tokenizers.spec import Sound

_NO_ROOT = Root("/nonexistent")
_DECODER = Decoder(DecoderSettings())  # started when first used, gone when the tests are
_READER = Reader(_NO_ROOT)
PLAIN = {"source": "x", "member": "", "member_offset": None, "version": None, "channel": "mix"}
PLAIN |= {"separated": None, "gain_db": None}


def probe_at(path: str | Path, limits: Limits | None = None) -> Probe:
    """What a file's header says. Raises `AudioError`."""
    place = Place(source_root=str(Path(path).parent), path=Path(path).name)
    with Opener().open(place) as opened:
        return _DECODER.probe(opened, limits or Limits())


def read_at(
    path: str | Path, spans: Sequence[Span], sample_rates: Iterable[int]
) -> list[dict[int, Tensor] | AudioError]:
    """Waveforms or an error for each span of a file that can be probed."""
    header = probe_at(path)
    rows = [
        {
            "source_root": str(Path(path).parent),
            "path": Path(path).name,
            "format": header.format,
            "size_bytes": header.size_bytes,
            "sample_rate": header.sample_rate,
            "start_sample": span.start_sample,
            "num_samples": span.num_samples,
        }
        for span in spans
    ]
    return read_rows(rows, sample_rates)


def whole_at(path: str | Path, sample_rate: int) -> Any:
    """A whole file's waveform."""
    (found,) = read_at(path, [Span(0, probe_at(path).num_samples)], [sample_rate])
    assert isinstance(found, dict), found
    return found[sample_rate]


def read_rows(rows: Iterable[dict[str, Any]], sample_rates: Iterable[int]) -> list[dict[int, Tensor] | AudioError]:
    """Mono by sample rate or an error for each row; what rows leave out is as in a plain file."""
    results = _READER.read([PLAIN | row for row in rows], map(Sound, sample_rates))
    return [
        result if isinstance(result, AudioError) else {sound.sample_rate: mono_N for sound, mono_N in result.items()}
        for result in results
    ]
