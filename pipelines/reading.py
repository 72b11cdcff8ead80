"""Corpus rows to waveforms: opened, decoded in a child process, resampled, separated, brought to their loudness."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..storage.root import Root
from ..storage.stores import is_remote, open_store, store_errors
from ..tokenizers.separate import Separator
from ..tokenizers.spec import RunFailed, Sound
from .audio import MIX, SEEKABLE_FORMATS, Span
from .decoder import Decoder, DecoderSettings
from .entries import AudioError
from .opened import etag_of
from .recordings import Fetched, Opener, Place, fetch_to_end
from .resample import StreamResampler, can_resample, resampled_length

SEPARATORS = "separators"
_MAX_SAMPLE = 1e10  # full scale is 1; integers written as floats reach 2^31; past this, spectra overflow

Row = dict[str, Any]
Waveforms = dict[Sound, Tensor]  # float32, `[N]` of one channel, else `[channels, N]`
Sink = tuple[int, int]  # channel, sample rate


@dataclass(frozen=True, slots=True)
class _Cut:
    """One span of a recording and the rows that are made of it: its channels, or what was separated from it."""

    span: Span
    rows: list[Row]


class Reader(AbstractContextManager["Reader"]):
    """Reads the audio of corpus rows, with a decoder process and a place in the container read last of its own.

    For one thread at a time; a context manager.
    """

    def __init__(
        self,
        root: Root,
        source_roots: dict[str, str] | None = None,
        *,
        separator: str | None = None,
        settings: DecoderSettings | None = None,
    ) -> None:
        self._source_roots = source_roots or {}
        self._decoder = Decoder(settings or DecoderSettings())
        self._opener = Opener(fetch_to_end)
        self._separator = load_separator(root, separator) if separator else None

    def read(
        self, rows: Iterable[Row], sounds: Iterable[Sound], fetched: Callable[[], Fetched] | None = None
    ) -> Generator["Waveforms | AudioError", None, None]:
        """The sounds that are asked for, or an `AudioError`, for each row, in order.

        In stereo the mix of a recording of two channels is these two; what has one channel is on both. Rows of one
        recording, being neighbours, share a pass over it. `fetched` gives what is fetched of the one
        recording that they are of, where somebody does so ahead. Raises `RunFailed` if a whole source is gone.
        """
        wanted = sorted(set(sounds))
        for _, group in groupby(rows, key=lambda row: (row["source"], row["path"], row["member"])):
            yield from self._read_recording(_cuts(group, wanted), wanted, fetched)

    def place(self, row: Row) -> Place:
        """Where a row's recording is now."""
        source_root = self._source_roots.get(row["source"]) or row["source_root"]
        version = row["version"]
        if source_root != row["source_root"] and etag_of(version) is not None:
            version = None  # the same bytes, uploaded elsewhere, may have another ETag
        return Place(
            source_root=source_root,
            path=row["path"],
            member=row["member"],
            member_offset=row["member_offset"],
            size_bytes=row["size_bytes"],
            version=version,
        )

    def close(self) -> None:
        self._decoder.close()
        self._opener.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_recording(
        self, cuts: list[_Cut], sounds: list[Sound], fetched: Callable[[], Fetched] | None
    ) -> Iterator["Waveforms | AudioError"]:
        while cuts:
            run = _ascending_run(cuts)
            cuts = cuts[len(run) :]
            done = 0
            try:
                for result in self._read_run(run, sounds, fetched):
                    yield from result
                    done += 1
            except AudioError as error:  # nothing further can be read in this pass
                row = run[0].rows[0]
                _require_source(self.place(row).source_root, error)
                if error.kind == "corrupt" and len(run) > 1 and row["format"] in SEEKABLE_FORMATS:
                    # each of the rest in a pass of its own, so that what is good does not depend on its neighbours
                    for cut in run[done:]:
                        yield from self._read_recording([cut], sounds, fetched)
                else:
                    yield from [error] * sum(len(cut.rows) for cut in run[done:])

    def _read_run(
        self, run: list[_Cut], sounds: list[Sound], fetched: Callable[[], Fetched] | None
    ) -> Iterator[list["Waveforms | AudioError"]]:
        """For each cut, in order, what its rows get. Raises `AudioError` where nothing further can be read."""
        row = run[0].rows[0]
        for rate, _ in sounds:
            if not can_resample(row["sample_rate"], rate):
                raise AudioError("unsupported", f"{row['sample_rate']:,} Hz cannot be resampled to {rate:,} Hz")
        with self._opener.open(self.place(row), fetched) as opened:
            spans = [cut.span for cut in run]
            pieces = self._decoder.decode(opened, format=row["format"], spans=spans)
            index, piece_NC = next(pieces, (len(run), None))
            for place_in_run, cut in enumerate(run):
                sinks, not_finite = self._sinks(cut, row["sample_rate"], sounds), set[int]()
                while index == place_in_run and piece_NC is not None:
                    finite_NC = np.abs(piece_NC) <= _MAX_SAMPLE  # false for NaN, too
                    not_finite |= {cut.span.channels[column] for column in np.flatnonzero(~finite_NC.all(axis=0))}
                    for (channel, _), sink in sinks.items():
                        column_N = np.ascontiguousarray(piece_NC[:, cut.span.channels.index(channel)])
                        sink.push(torch.from_numpy(column_N))
                    index, piece_NC = next(pieces, (len(run), None))
                yield self._finish(cut, sinks, sounds, not_finite)

    def _sinks(self, cut: _Cut, sample_rate: int, sounds: list[Sound]) -> dict[Sink, StreamResampler]:
        wanted: set[Sink] = set()
        for row in cut.rows:
            if row["separated"] is not None:
                wanted.add((channel_number(row["channel"]), self._require_separator().sample_rate))
                continue
            for sound in sounds:
                wanted |= {(channel, sound.sample_rate) for channel in _channels_of(row, sound)}
        return {sink: StreamResampler(cut.span.num_samples, sample_rate, sink[1]) for sink in sorted(wanted)}

    def _finish(
        self, cut: _Cut, sinks: dict[Sink, StreamResampler], sounds: list[Sound], not_finite: set[int]
    ) -> list["Waveforms | AudioError"]:
        finished = {sink: resampler.finish() for sink, resampler in sinks.items()}
        apart: dict[int, Tensor] = {}  # [sources, N] by channel
        results: list[Waveforms | AudioError] = []
        for row in cut.rows:
            channel = channel_number(row["channel"])
            if channel in not_finite:
                results.append(_NOT_FINITE)
                continue
            if row["separated"] is None:
                waveforms = {
                    sound: _in_channels([finished[each, sound.sample_rate] for each in _channels_of(row, sound)], sound)
                    for sound in sounds
                }
            else:
                separator = self._require_separator()
                if channel not in apart:
                    apart[channel] = _apart(separator, finished[channel, separator.sample_rate])
                source_N = apart[channel][row["separated"]]
                waveforms = {
                    sound: _in_channels([_resampled(source_N, separator.sample_rate, sound.sample_rate, row)], sound)
                    for sound in sounds
                }
            if row["gain_db"] is not None:
                factor = 10 ** (row["gain_db"] / 20)
                waveforms = {sound: waveform * factor for sound, waveform in waveforms.items()}
            results.append(waveforms)
        return results

    def _require_separator(self) -> Separator:
        assert self._separator is not None, "rows that were separated come with a separator"
        return self._separator


def open_reader(root: Root, corpus_metadata: dict[str, Any], source_roots: dict[str, str] | None = None) -> Reader:
    """A reader for the rows of a corpus, with the separator that its policy names."""
    return Reader(root, source_roots, separator=corpus_metadata["policy"]["separate"])


def load_separator(root: Root, sha256: str) -> Separator:
    """The separator whose weights the corpus was built with. Raises `RunFailed` if the root has lost them."""
    relative = f"{SEPARATORS}/{sha256}.safetensors"
    try:
        return Separator.from_bytes(root.read_bytes(relative), name=relative)
    except FileNotFoundError as error:
        raise RunFailed(
            f"{root.join(relative)}, with which the corpus was separated, is not there. Restore it from a backup, or "
            "build the corpus again in another root."
        ) from error


def _require_source(source_root: str, error: AudioError) -> None:
    """Raise `RunFailed` where a recording cannot be read because its whole source is gone."""
    if not is_remote(source_root):
        there = os.path.isdir(source_root)
    elif error.kind == "missing":
        store, path = open_store(source_root)
        with store_errors(source_root):
            there = store.exists(path)
    else:
        return
    if not there:
        raise RunFailed(
            f"The source folder {source_root} is not there (any more), so its recordings cannot be read. "
            "Mount it, or say where it is now with --source NAME=FOLDER; then run the command again."
        ) from error


def channel_number(channel: str) -> int:
    """A row's `channel` as decoders take it."""
    return MIX if channel == "mix" else int(channel)


def _channels_of(row: Row, sound: Sound) -> tuple[int, ...]:
    """The channels of the recording that a row's sound is made of."""
    if sound.channels == 2 and row["channel"] == "mix" and row["separated"] is None and row["num_channels"] == 2:
        return (0, 1)
    return (channel_number(row["channel"]),)


def _in_channels(parts: list[Tensor], sound: Sound) -> Tensor:
    """`[N]`, or `[channels, N]`, where a single part `[N]` is all channels."""
    return parts[0] if sound.channels == 1 else torch.stack(parts * (sound.channels // len(parts)))


_NOT_FINITE = AudioError("non-finite", f"there are samples that are NaN, infinite or beyond {_MAX_SAMPLE:.0e}")


def _apart(separator: Separator, mixture_N: Tensor) -> Tensor:
    """Separated sources `[sources, N]`: Conv-TasNet does not know scale, so they get the mixture's peak together."""
    sources_SN = separator.separate(mixture_N)
    peak = sources_SN.abs().max()
    return sources_SN * (mixture_N.abs().max() / peak) if peak > 0 else sources_SN


def _resampled(waveform_N: Tensor, sample_rate: int, rate: int, row: Row) -> Tensor:
    resampler = StreamResampler(waveform_N.shape[0], sample_rate, rate)
    resampler.push(waveform_N)
    # rounded up twice, it may be a sample longer than the rows' own rule says
    return resampler.finish()[: resampled_length(row["num_samples"], row["sample_rate"], rate)]


def _cuts(rows: Iterable[Row], sounds: list[Sound]) -> list[_Cut]:
    """Neighbours of one span together: its channels and separated sources come from one pass.

    A row's own channel, also the mix of others that are asked for, says whether its samples are finite.
    """
    cuts = []
    for (start, num_samples), group in groupby(rows, key=lambda row: (row["start_sample"], row["num_samples"])):
        members = list(group)
        channels = {channel_number(row["channel"]) for row in members}
        channels |= {channel for row in members for sound in sounds for channel in _channels_of(row, sound)}
        cuts.append(_Cut(Span(start, num_samples, tuple(sorted(channels))), members))
    return cuts


def _ascending_run(cuts: list[_Cut]) -> list[_Cut]:
    """The leading cuts that one pass can serve: each begins where the last one ended or later."""
    end = 0
    for count, cut in enumerate(cuts):
        if cut.span.start_sample < end:
            return cuts[:count]
        end = cut.span.start_sample + cut.span.num_samples
    return cuts
