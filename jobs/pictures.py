"""A picture of one segment, by matplotlib: its sound, words, phones and codes over one time axis."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..pipelines.closeup import SOUND_RATE, Segment, StreamCodes
from .canvas import (
    DPI,
    INK,
    LEFT,
    LINE,
    QUIET,
    RIGHT,
    WIDTH,
    Panel,
    head,
    hues,
    outside_text,
    page,
    picture_text,
    save,
    style,
)

if TYPE_CHECKING:
    from .canvas import Axes

MAX_DRAWN_S = 30  # of a longer segment, its beginning


def draw_segment(segment: Segment, sound_N: NDArray[np.float32], path: str) -> None:
    """Waveform, mel spectrogram, words, phones and codes of a segment over one time axis in seconds."""
    row = segment.row
    shown = Fraction(len(sound_N), SOUND_RATE)
    shown_s = float(shown)
    longer = row["duration_s"] > shown_s + 0.01
    streams = [stream.until(shown) for stream in segment.streams] if longer else segment.streams
    panels = [
        Panel(1.1, lambda axes: _draw_waveform(axes, sound_N)),
        Panel(2.1, lambda axes: _draw_mel(axes, sound_N)),
    ]
    for tier in ("words", "phones"):
        labels = [label for label in row[tier] or () if label["start_sample"] < shown * row["sample_rate"]]
        if labels:
            panels.append(
                Panel(0.3, lambda axes, tier=tier, labels=labels: _draw_labels(axes, tier, labels, row["sample_rate"]))
            )
    for stream in streams:
        if stream.codes_KT is not None and not stream.spec.bits_per_second:
            panels.append(Panel(0.3, lambda axes, stream=stream: _draw_told(axes, stream)))
        elif stream.frames_TD is not None:
            panels.append(Panel(1.7, lambda axes, stream=stream: _draw_frames(axes, stream)))
        elif stream.codes_KT is not None and stream.spec.num_codebooks == 1:
            panels.append(Panel(0.3, lambda axes, stream=stream: _draw_runs(axes, stream)))
            panels.append(Panel(1.7, lambda axes, stream=stream: _draw_numbers(axes, stream)))
        elif stream.codes_KT is not None:
            height = min(4.0, max(0.8, 0.22 * stream.spec.num_codebooks))
            panels.append(Panel(height, lambda axes, stream=stream: _draw_codebooks(axes, stream)))
        else:
            panels.append(Panel(0.3, lambda axes, stream=stream: _draw_missing(axes, stream)))
    with style():
        figure, every = page(panels, top=1.0, bottom=0.55)
        ends_s = [float(stream.frame_edges_s()[-1]) for stream in streams if stream.spec.bits_per_second]
        end_s = shown_s if longer else max(shown_s, *ends_s, 0)
        for axes in every:
            axes.set_xlim(0, end_s or 1)
            axes.tick_params(labelbottom=axes is every[-1], bottom=axes is every[-1])
        every[-1].set_xlabel("seconds")
        head(figure, *_segment_head(row, shown_s if longer else None))
        for axes, panel in zip(every, panels, strict=True):
            panel.draw(axes)
        save(figure, path)


def _draw_waveform(axes: "Axes", sound_N: NDArray[np.float32]) -> None:
    """Least and greatest sample of each stretch of about a pixel."""
    stretch = max(1, len(sound_N) // 2_800)
    cut = len(sound_N) // stretch * stretch
    shaped = sound_N[:cut].reshape(-1, stretch)
    times_s = (np.arange(len(shaped)) + 0.5) * stretch / SOUND_RATE
    axes.fill_between(times_s, shaped.min(axis=1), shaped.max(axis=1), color=LINE, linewidth=0.4, edgecolor=LINE)
    peak = max(0.01, float(np.abs(sound_N).max(initial=0)))
    axes.set_ylim(-1.05 * peak, 1.05 * peak)
    axes.set_yticks([-peak, 0, peak], [f"-{peak:.2f}", "0", f"{peak:.2f}"])
    _name(axes, "waveform", "full scale 1")


def _draw_mel(axes: "Axes", sound_N: NDArray[np.float32]) -> None:
    """80 log-mel bands every 10 ms, each frame centred on its mark."""
    import torch

    from ..tokenizers.mel import MelFeatures

    mel_TM = MelFeatures().extract(torch.from_numpy(sound_N)).numpy().reshape(-1, 80) / math.log(10) * 20
    if len(mel_TM):
        top = float(mel_TM.max())
        extent = (-0.005, len(mel_TM) * 0.01 - 0.005, -0.5, 79.5)
        axes.imshow(
            mel_TM.T,
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap="magma",
            vmin=max(top - 80, -100),
            vmax=top,
            interpolation="nearest",
        )
    ticks = (250, 500, 1_000, 2_000, 4_000)
    axes.set_ylim(-0.5, 79.5)
    axes.set_yticks([_slaney(hertz) * 81 / _slaney(8_000) - 1 for hertz in ticks], [f"{hertz:,}" for hertz in ticks])
    _name(axes, "mel", "Hz, 80 dB deep")


def _slaney(hertz: float) -> float:
    """Slaney's mel scale: linear to 1 kHz, logarithmic above (Auditory Toolbox, 1998)."""
    return hertz * 3 / 200 if hertz < 1_000 else 15 + 27 * math.log(hertz / 1_000) / math.log(6.4)


def _draw_labels(axes: "Axes", tier: str, labels: list[dict[str, Any]], sample_rate: int) -> None:
    """Labelled spans, with the label where it fits."""
    spans = [(label["start_sample"] / sample_rate, label["num_samples"] / sample_rate) for label in labels]
    axes.broken_barh(spans, (0, 1), facecolors=["#eceff1", "#d7dfe3"], linewidth=0)  # in turn
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    _write_inside(
        axes, [(start, start + width, label["label"]) for (start, width), label in zip(spans, labels, strict=True)]
    )
    _name(axes, tier)


def _draw_runs(axes: "Axes", stream: StreamCodes) -> None:
    """Codes of a single codebook as coloured runs, with their numbers where they fit."""
    codes_T, edges_s = _codes_and_edges(stream)
    starts = np.flatnonzero(np.diff(codes_T, prepend=-1))
    ends = np.append(starts[1:], len(codes_T))[: len(starts)]
    spans = [(edges_s[start], edges_s[end] - edges_s[start]) for start, end in zip(starts, ends, strict=True)]
    colours = hues(codes_T[starts])
    axes.broken_barh(spans, (0, 1), facecolors=[tuple(colour) for colour in colours], linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    _write_inside(
        axes, [(begin, begin + width, str(codes_T[start])) for (begin, width), start in zip(spans, starts, strict=True)]
    )
    _name(axes, stream.name)


def _draw_numbers(axes: "Axes", stream: StreamCodes) -> None:
    """The same codes by their number: each frame a mark at the height of its code, in the colour of its run."""
    codes_T, edges_s = _codes_and_edges(stream)
    axes.hlines(
        codes_T, edges_s[:-1], edges_s[1:], colors=[tuple(colour) for colour in hues(codes_T) * 0.8], linewidth=3
    )
    if len(codes_T) <= 750:
        axes.vlines(edges_s[1:-1], codes_T[:-1], codes_T[1:], colors="#cfd8dc", linewidth=0.6, zorder=0)
    size = stream.spec.codebook_size
    axes.set_ylim(-0.03 * size, 1.03 * size)
    axes.set_yticks([0, size // 2, size - 1], [f"{code:,}" for code in (0, size // 2, size - 1)])
    _name(axes, "code number", f"{picture_text(stream.spec.tokenizer, 26)},\n{_per_second(stream)}")


def _draw_codebooks(axes: "Axes", stream: StreamCodes) -> None:
    """Codes `[K, T]` as K rows, codebook 0 on top, coloured by their number."""
    assert stream.codes_KT is not None
    num_codebooks, num_frames = stream.codes_KT.shape
    size = stream.spec.codebook_size
    if num_frames:
        extent = (0.0, float(stream.frame_edges_s()[-1]), num_codebooks - 0.5, -0.5)
        axes.imshow(
            stream.codes_KT,
            aspect="auto",
            extent=extent,
            cmap="viridis",
            vmin=0,
            vmax=size - 1,
            interpolation="nearest",
        )
    axes.set_ylim(num_codebooks - 0.5, -0.5)
    step = -(-num_codebooks // 16)
    axes.set_yticks(range(0, num_codebooks, step), [str(book) for book in range(0, num_codebooks, step)])
    axes.hlines(
        np.arange(1, num_codebooks) - 0.5, 0, 1, transform=axes.get_yaxis_transform(), colors="white", linewidth=0.8
    )
    _name(
        axes,
        stream.name,
        f"{picture_text(stream.spec.tokenizer, 26)},\n{_per_second(stream)},\ndark 0, bright {size - 1:,}",
    )


def _draw_frames(axes: "Axes", stream: StreamCodes) -> None:
    """Numbers `[T, D]`, each dimension by its own deviations from its mean."""
    assert stream.frames_TD is not None
    frames_TD = stream.frames_TD.astype(np.float32)
    if len(frames_TD):
        deviations_TD = (frames_TD - frames_TD.mean(axis=0)) / (frames_TD.std(axis=0) + 1e-6)
        extent = (0.0, float(stream.frame_edges_s()[-1]), frames_TD.shape[1] - 0.5, -0.5)
        axes.imshow(
            deviations_TD.T, aspect="auto", extent=extent, cmap="RdBu", vmin=-3, vmax=3, interpolation="nearest"
        )
    _name(axes, stream.name, f"{stream.spec.dim} numbers")


def _draw_told(axes: "Axes", stream: StreamCodes) -> None:
    """What has no clock, in words."""
    assert stream.codes_KT is not None
    axes.set_yticks([])
    what = f"{stream.spec.dim} numbers each" if stream.spec.dim else f"of {stream.spec.codebook_size:,}"
    text = axes.text(0.005, 0.5, "", transform=axes.transAxes, va="center", fontsize=9, color=QUIET)
    outside_text(text, stream.text or f"{stream.codes_KT.shape[1]:,} tokens, {what}", 180)
    _name(axes, stream.name)


def _draw_missing(axes: "Axes", stream: StreamCodes) -> None:
    axes.set_yticks([])
    text = axes.text(0.005, 0.5, "", transform=axes.transAxes, va="center", fontsize=9, color=QUIET)
    outside_text(text, f"no codes: {stream.missing}", 180)
    _name(axes, stream.name)


def _segment_head(row: dict[str, Any], shown_s: float | None) -> tuple[str, str, str]:
    name = f"{row['path']}/{row['member']}" if row["member"] else row["path"]
    part = f" (the first {shown_s:g} s)" if shown_s is not None else ""
    start = f"from {row['start_sample'] / row['sample_rate']:.3f} s" if row["start_sample"] else ""
    known = [
        f"speaker {row['speaker']}" if row["speaker"] else "",
        row["language"] or "",
        f"{row['duration_s']:.3f} s{part}",
        start,
        f"{row['sample_rate']:,} Hz",
        f"channel {row['channel']}" if row["channel"] != "mix" else "",
        row["id"],
    ]
    return name, " · ".join(part for part in known if part), row["text"] or ""


def _codes_and_edges(stream: StreamCodes) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    assert stream.codes_KT is not None
    return stream.codes_KT[0].astype(np.int64), np.array([float(edge) for edge in stream.frame_edges_s()])


def _per_second(stream: StreamCodes) -> str:
    return f"{float(stream.spec.frame_rate):g} a second"


def _name(axes: "Axes", name: str, more: str = "") -> None:
    """What a panel shows, left of it."""
    place = -1.4 / (WIDTH - LEFT - RIGHT)
    box = axes.get_position().height * axes.figure.get_figheight()  # pyright: ignore[reportAttributeAccessIssue]
    top = 1.0 if more else 0.5
    axes.text(
        place,
        top,
        picture_text(name, 16),
        transform=axes.transAxes,
        va="top" if more else "center",
        fontsize=9,
        weight="bold",
        parse_math=False,
    )
    if more:
        axes.text(place, 1 - 0.17 / box, more, transform=axes.transAxes, va="top", fontsize=6.5, color=QUIET)


def _write_inside(axes: "Axes", spans: list[tuple[float, float, str]]) -> None:
    """Labels in the middle of their spans, small ones smaller, those that do not fit left out."""
    figure = axes.get_figure()
    begin, end = axes.get_xlim()
    inches = axes.get_position().width * WIDTH / (end - begin)
    renderer = figure.canvas.get_renderer()  # pyright: ignore
    for start, stop, label in spans:
        start, stop = max(start, begin), min(stop, end)
        room = (stop - start) * inches * DPI - 2
        if room < 4:
            continue
        text = axes.text((start + stop) / 2, 0.5, "", ha="center", va="center", fontsize=8, color=INK, clip_on=True)
        outside_text(text, label, 40)
        for size in (8, 6.5, 5.5):
            text.set_fontsize(size)
            if text.get_window_extent(renderer).width <= room:
                break
        else:
            text.remove()
