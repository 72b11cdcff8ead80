"""One entry of a source to segments: what its recording is, which spans of it are taken, the rows they become."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..storage.schema import segment_id
from ..tokenizers.separate import MAX_SECONDS as MAX_SEPARATED_S
from .analysis import Found, duration_reason, find_segments, metadata_reason
from .audio import Limits, Probe, Span
from .decoder import Decoder, DecoderSettings
from .entries import AudioError, Entry, Label, Source
from .opened import OpenRecording, is_other_version
from .policy import CorpusPolicy
from .reading import channel_number
from .recordings import Fetched, Opener, Place
from .source_paths import plain_path

MAX_SEGMENT_S = 12 * 3600
PAUSES = frozenset({"", "sil", "<sil>", "sp", "<eps>", "silence"})  # words that aligners write for none
_REMEMBERED = 256  # probes, for manifests with many entries of one recording

Row = dict[str, Any]
_Bytes = tuple[int, str | None]  # size and version


@dataclass(slots=True)
class KnownRecording:
    """What a corpus holds of a recording."""

    size_bytes: int | None
    version: str | None
    probe: Probe | None
    spans: list[tuple[int, int]] = field(default_factory=list)  # start and end samples of its segments

    def is_same(self, size_bytes: int | None, version: str | None) -> bool:
        """Whether bytes of this size and version are those that the corpus has, as far as that can be told."""
        return self.size_bytes == size_bytes and not is_other_version(self.version, version)


@dataclass(slots=True, kw_only=True)
class Finding:
    """What was found behind an entry."""

    size_bytes: int | None = None
    version: str | None = None
    probe: Probe | AudioError | None = None  # None: nothing to make rows of
    segments: dict[str, list[Found]] | None = None  # by channel; None: the recording was not listened to
    left_out: Counter[str] = field(default_factory=Counter)
    known_segments: int = 0  # of the corpus, which make looking again needless


class Prober(AbstractContextManager["Prober"]):
    """Finds out what recordings are, and listens to them where the policy asks for it. For one thread at a time."""

    def __init__(self, policy: CorpusPolicy, limits: Limits, settings: DecoderSettings) -> None:
        self._policy = policy
        self._limits = limits
        self._decoder = Decoder(settings)
        self._opener = Opener()
        self._probes: OrderedDict[tuple[str, str], tuple[_Bytes, Probe | AudioError]] = OrderedDict()

    def find(
        self,
        source_root: str,
        entry: Entry,
        known: KnownRecording | None,
        fetched: Callable[[], Fetched] | None = None,
    ) -> Finding:
        """What an entry's recording is; `known` is what the corpus has of it, `fetched` gives its first bytes."""
        reason = metadata_reason(entry.language, entry.speaker, self._policy)
        if reason:
            return Finding(left_out=Counter([reason]))
        finding = Finding(size_bytes=entry.size_bytes)
        try:
            if entry.error is not None:
                raise entry.error
            self._find(entry_place(source_root, entry), entry, known, fetched, finding)
        except AudioError as error:
            finding.probe = error
        return finding

    def close(self) -> None:
        self._decoder.close()
        self._opener.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _find(
        self,
        place: Place,
        entry: Entry,
        known: KnownRecording | None,
        fetched: Callable[[], Fetched] | None,
        finding: Finding,
    ) -> None:
        _require_name(entry)
        with self._opener.open(place, fetched) as opened:
            finding.size_bytes, finding.version = opened.size, opened.version
            key = (entry.path, entry.member)
            same = known if known is not None and known.is_same(opened.size, opened.version) else None
            if same is not None and same.probe is not None:
                probe = same.probe
            elif key in self._probes and self._probes[key][0] == (opened.size, opened.version):
                probe = self._probes[key][1]
            else:
                probe = self._probe(opened, key)
            finding.probe = probe
            if isinstance(probe, AudioError) or not self._policy.needs_analysis:
                return
            start, end = entry_range(entry, probe)
            if same is not None:
                inside = sum(start <= first and last <= end for first, last in same.spans)
                if inside:
                    finding.known_segments, finding.probe = inside, None
                    return
            finding.segments = {}
            for channel in entry_channels(entry, probe, self._policy):
                span = Span(start, end - start, (channel_number(channel),))
                with closing(self._decoder.decode(opened, format=probe.format, spans=[span])) as pieces:
                    found, left_out = find_segments(
                        (_finite(piece_NC[:, 0]) for _, piece_NC in pieces),
                        sample_rate=probe.sample_rate,
                        start_sample=start,
                        num_samples=end - start,
                        policy=self._policy,
                    )
                finding.segments[channel] = found
                finding.left_out.update(left_out)

    def _probe(self, opened: OpenRecording, key: tuple[str, str]) -> Probe | AudioError:
        try:
            probe: Probe | AudioError = self._decoder.probe(opened, self._limits)
        except AudioError as error:
            probe = error
        self._probes[key] = ((opened.size, opened.version), probe)
        if len(self._probes) > _REMEMBERED:
            self._probes.popitem(last=False)
        return probe


def entry_place(source_root: str, entry: Entry) -> Place:
    """Where an entry's recording is."""
    return Place(
        source_root=source_root,
        path=entry.path,
        member=entry.member,
        member_offset=entry.member_offset,
        size_bytes=entry.size_bytes,
    )


def segment_rows(
    source: Source, entry: Entry, finding: Finding, policy: CorpusPolicy, *, num_separated: int = 0
) -> Iterator[Row]:
    """The rows of an entry, without a shard yet; what is left out is counted in `finding.left_out`."""
    probe = finding.probe
    if probe is None:
        return
    row: Row = {
        "source": source.name,
        "source_root": source.root,
        "path": plain_path(entry.path),
        "member": entry.member,
        "member_offset": entry.member_offset,
        "size_bytes": finding.size_bytes,
        "version": finding.version,
        "text": entry.text,
        "speaker": entry.speaker,
        "language": entry.language,
        "pair": entry.pair,
    }
    if isinstance(probe, AudioError):
        channel = policy.channels if entry.channel is None else str(entry.channel)
        # the offset keeps two parts of one unreadable recording apart
        yield _finish({**row, "channel": channel}, round(entry.offset_s * 1000), 0, error=probe)
        return
    row |= {
        "format": probe.format,
        "sample_rate": probe.sample_rate,
        "num_channels": probe.num_channels,
        "recording_samples": probe.num_samples,
    }
    try:
        start, end = entry_range(entry, probe)
        channels = entry_channels(entry, probe, policy)
    except AudioError as error:
        channel = policy.channels if entry.channel is None else str(entry.channel)
        start, asked = (round((seconds or 0) * probe.sample_rate) for seconds in (entry.offset_s, entry.duration_s))
        yield _finish({**row, "channel": channel}, start, asked, error=error)
        return
    if finding.segments is None:
        spans = _windows(start, end, probe, policy, finding.left_out)
        segments = dict.fromkeys(channels, spans)
    else:
        segments = finding.segments
    whole = (start, end)
    # the channels of one span are neighbours, so that one pass over the recording serves them all
    every = sorted(
        (found.start_sample, found.num_samples, channels.index(channel), found.gain_db)
        for channel, parts in segments.items()
        for found in parts
    )
    if len(every) > 1:
        row["pair"] = None  # which of them goes with which of the other recording is not known
    for first, num_samples, number, gain_db in every:
        segment = {**row, "channel": channels[number], "gain_db": gain_db}
        segment |= _labelled(entry, probe.sample_rate, first, num_samples, whole)
        error = None
        if num_samples > MAX_SEGMENT_S * probe.sample_rate:
            error = AudioError("too-long", f"over {MAX_SEGMENT_S // 3600} hours in one segment; build with --window")
        parent = _finish(segment, first, num_samples, error=error)
        yield parent
        if error is None:
            yield from _children(parent, num_separated)


def _children(parent: Row, num_separated: int) -> Iterator[Row]:
    """A segment's separated sources: its span, but nobody knows yet who says what in which."""
    seconds = parent["num_samples"] / parent["sample_rate"]
    error = None
    if seconds > MAX_SEPARATED_S:
        message = f"{seconds:.0f} s; sources are separated in up to {MAX_SEPARATED_S} s at a time: build with --window"
        error = AudioError("too-long", message)
    unknown = dict.fromkeys(("text", "speaker", "pair", "words", "phones"))
    for separated in range(num_separated):
        child = {**parent, **unknown, "parent": parent["id"], "separated": separated}
        yield _finish(child, parent["start_sample"], parent["num_samples"], error=error)


def entry_range(entry: Entry, probe: Probe) -> tuple[int, int]:
    """First sample and end of what an entry names. Raises `AudioError` if the recording is shorter."""
    start = round(entry.offset_s * probe.sample_rate)
    end = probe.num_samples
    if entry.duration_s is not None:
        end = start + round(entry.duration_s * probe.sample_rate)
        if start < probe.num_samples < end <= probe.num_samples + probe.sample_rate // 10:
            end = probe.num_samples  # manifests round: a tenth of a second past the end is the end
    if end > probe.num_samples or start >= end:
        raise AudioError(
            "out-of-range",
            f"the manifest asks for samples {start:,} to {end:,}, the recording has {probe.num_samples:,} "
            f"at {probe.sample_rate:,} Hz",
        )
    return start, end


def entry_channels(entry: Entry, probe: Probe, policy: CorpusPolicy) -> list[str]:
    """The channels that segments are made of. Raises `AudioError` if the recording has fewer."""
    if entry.channel is not None:
        if not 0 <= entry.channel < probe.num_channels:
            raise AudioError(
                "out-of-range",
                f"the manifest asks for channel {entry.channel} (from 0), the recording has {probe.num_channels}",
            )
        return [str(entry.channel)]
    if policy.channels == "split":
        return [str(channel) for channel in range(probe.num_channels)]
    return ["0" if policy.channels == "first" else "mix"]


def _windows(start: int, end: int, probe: Probe, policy: CorpusPolicy, left_out: Counter[str]) -> list[Found]:
    window = round(policy.window_s * probe.sample_rate) if policy.window_s else end - start
    spans = []
    for first in range(start, end, window):
        num_samples = min(window, end - first)
        reason = duration_reason(num_samples / probe.sample_rate, policy)
        if reason:
            left_out[reason] += 1
        else:
            spans.append(Found(first, num_samples, None))
    return spans


def _labelled(entry: Entry, sample_rate: int, first: int, num_samples: int, whole: tuple[int, int]) -> Row:
    """A segment's words, phones and text; in a part of an entry, the text is what its words say, or not known."""
    words = _labels(entry.words, sample_rate, first, num_samples)
    text = entry.text
    if (first, first + num_samples) != whole:
        text = None
        if entry.words is not None:
            centre = [((word.start_s + word.end_s) / 2 * sample_rate, word.label) for word in entry.words]
            inside = (label for place, label in centre if first <= place < first + num_samples)
            text = " ".join(label for label in inside if label.lower() not in PAUSES)
    return {"words": words, "phones": _labels(entry.phones, sample_rate, first, num_samples), "text": text}


def _labels(
    labels: tuple[Label, ...] | None, sample_rate: int, first: int, num_samples: int
) -> list[dict[str, Any]] | None:
    """Labels that reach into a segment, cut to it, counted in samples from its first."""
    if labels is None:
        return None
    inside = []
    for label in labels:
        start = max(0, round(label.start_s * sample_rate) - first)
        end = min(num_samples, round(label.end_s * sample_rate) - first)
        if start < end:
            inside.append({"start_sample": start, "num_samples": end - start, "label": label.label})
    return inside


def _finite(piece_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples that figures can be made of; the ones that are not finite become an error when they are tokenized."""
    return np.nan_to_num(piece_N, nan=0.0, posinf=0.0, neginf=0.0)


def _require_name(entry: Entry) -> None:
    try:
        entry.path.encode()
    except UnicodeEncodeError as error:
        raise AudioError("bad-name", "the file's name is not valid UTF-8; rename it") from error


def _finish(row: Row, start_sample: int, num_samples: int, *, error: AudioError | None) -> Row:
    rate = row.get("sample_rate")
    separated = row.get("separated")
    return {
        **row,
        "id": segment_id(
            row["source"],
            row["path"],
            member=row["member"],
            channel=row["channel"] if separated is None else f"{row['channel']}/separated-{separated}",
            start_sample=start_sample,
            num_samples=num_samples,
        ),
        "start_sample": start_sample,
        "num_samples": num_samples,
        "duration_s": num_samples / rate if rate and error is None else 0.0,
        "error": error.kind if error else None,
        "error_message": error.message if error else None,
    }
