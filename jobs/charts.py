"""Pictures of figures, by matplotlib: the use of codes in a dataset, units against phones."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..pipelines.phones import PhoneCounts
from .canvas import LEFT, LINE, QUIET, WIDTH, head, new_figure, picture_text, save, shade, style, write_nothing

if TYPE_CHECKING:
    from .canvas import Axes

_TICKS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1_800, 3_600, 7_200, 21_600, 43_200)
_LEGEND = 16  # codebooks listed


def draw_use(
    described: dict[str, Any],
    usage: dict[str, NDArray[np.int64]],
    durations: tuple[NDArray[np.int64], NDArray[np.float64]],
    path: str,
) -> None:
    """How long segments are, what errors they have, and how often each code of each codebook is used."""
    streams = described["streams"]
    rows = 1 + -(-len(streams) // 2)
    height = 0.85 + 3.7 * rows
    with style():
        figure = new_figure(height)
        corpus = described["corpus"]
        head(
            figure,
            f"{corpus['root']}",
            f"{corpus['segments']:,} segments, {corpus['hours']:.2f} h, corpus version {corpus['version']}",
        )
        slots = [
            figure.add_axes((left / WIDTH, (height - 0.85 - 3.7 * row - 3.1) / height, 6.3 / WIDTH, 2.75 / height))
            for row in range(rows)
            for left in (1.0, 9.0)
        ]
        _draw_durations(slots[0], *durations)
        _draw_errors(slots[1], corpus, streams)
        for axes, stream in zip(slots[2:], streams, strict=False):
            _draw_rank_frequency(axes, stream, usage[stream["stream"]])
        for axes in slots[2 + len(streams) :]:
            axes.remove()
        save(figure, path)


def draw_phones(facts: dict[str, Any], counts: PhoneCounts, path: str) -> None:
    """P(phone | unit), units sorted by their most likely phone, phones by their frames (as in HuBERT's figure)."""
    order = [counts.phones.index(phone["phone"]) for phone in facts["phones"]]
    used = np.flatnonzero(counts.joint_PC.sum(axis=0))
    share_PU = counts.joint_PC[order][:, used] / counts.joint_PC[:, used].sum(axis=0)
    best_U = share_PU.argmax(axis=0)
    sorted_U = np.lexsort((-share_PU.max(axis=0), best_U))
    size = min(24.0, max(2.5, 0.17 * len(order)))
    with style():
        figure = new_figure(size + 1.75)
        height = size + 1.75
        axes = figure.add_axes((LEFT / WIDTH, 0.75 / height, 13.3 / WIDTH, size / height))
        image = axes.imshow(share_PU[:, sorted_U], aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        names = [picture_text(phone["phone"], 14) for phone in facts["phones"]]
        axes.set_yticks(range(len(order)), names, fontsize=8 if size < 24 else 5, parse_math=False)
        axes.set_ylabel("phones, by frames")
        axes.set_xlabel("units, by their most likely phone")
        axes.set_xticks([])
        if len(used) <= 150:
            axes.set_xticks(range(len(used)), [str(used[unit]) for unit in sorted_U], rotation=90, fontsize=6)
        bar = figure.colorbar(image, cax=figure.add_axes((15.05 / WIDTH, 0.75 / height, 0.15 / WIDTH, size / height)))
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        bar.set_label("P(phone | unit)")
        chance = facts["shuffled"]
        head(
            figure,
            f"{facts['stream']}, codebook {facts['codebook']}: phones and units",
            f"{facts['frames']:,} frames, {len(order):,} phones, "
            f"{facts['used_units']:,} of {facts['codebook_size']:,} units",
            f"PNMI {_figure_of(facts['pnmi'])} ({_figure_of(chance['pnmi'])} with shuffled phones), "
            f"phone purity {facts['phone_purity']:.3f} ({chance['phone_purity']:.3f}), "
            f"cluster purity {facts['cluster_purity']:.3f} ({chance['cluster_purity']:.3f})",
        )
        save(figure, path)


def _draw_durations(axes: "Axes", counts_B: NDArray[np.int64], edges_s: NDArray[np.float64]) -> None:
    axes.set_title("How long segments are", loc="left", fontsize=11)
    filled = np.flatnonzero(counts_B)
    if not len(filled):
        write_nothing(axes, "no segments without an error")
        return
    first, last = max(0, filled[0] - 2), min(len(counts_B), filled[-1] + 3)
    axes.bar(
        edges_s[first:last],
        counts_B[first:last],
        np.diff(edges_s)[first:last],
        align="edge",
        color=LINE,
        edgecolor="white",
        linewidth=0.6,
    )
    axes.set_xscale("log")
    axes.set_xlim(edges_s[first], edges_s[last])
    ticks = [tick for tick in _TICKS_S if edges_s[first] <= tick <= edges_s[last]]
    axes.set_xticks(ticks, [_time(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel("segments")


def _draw_errors(axes: "Axes", corpus: dict[str, Any], streams: list[dict[str, Any]]) -> None:
    """Errors by class, in the corpus and in each stream."""
    axes.set_title("Errors by class", loc="left", fontsize=11)
    places = {"corpus": corpus["errors_by_class"]} | {stream["stream"]: stream["errors_by_class"] for stream in streams}
    totals = {
        kind: max(counts.get(kind, 0) for counts in places.values()) for counts in places.values() for kind in counts
    }
    kinds = sorted(totals, key=lambda kind: (-totals[kind], kind))[:8]
    if not kinds:
        write_nothing(axes, "none")
        return
    thickness = 0.8 / len(places)
    for place, (name, counts) in enumerate(places.items()):
        heights = np.arange(len(kinds)) - 0.4 + (place + 0.5) * thickness
        values = [counts.get(kind, 0) for kind in kinds]
        bars = axes.barh(
            heights, values, thickness * 0.9, color=shade(place - 1, len(streams)) if place else LINE, label=name
        )
        axes.bar_label(bars, [f"{value:,}" for value in values], fontsize=7, padding=2, color=QUIET)
    axes.set_ylim(max(len(kinds), 3) - 0.4, -0.6)  # bars are not the thicker for being few
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlim(0, 1.12 * max(totals.values()))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("segments")
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _draw_rank_frequency(axes: "Axes", stream: dict[str, Any], usage_KC: NDArray[np.int64]) -> None:
    """Share of each code, most used first, one line per codebook; dashed, the share if all were used alike."""
    size, books = stream["codebook_size"], stream["codebooks"]
    axes.set_title(
        f"{stream['stream']}: {stream['tokenizer']}, {len(books)} × {size:,}", loc="left", fontsize=11, parse_math=False
    )
    axes.set_title(_use_words(stream), loc="right", fontsize=8, color=QUIET)
    if not usage_KC.any():
        write_nothing(axes, "no codes yet")
        return
    listed = {round(place * (len(books) - 1) / (_LEGEND - 1)) for place in range(_LEGEND)}
    for book, usage_C in enumerate(usage_KC):
        shares = np.sort(usage_C[usage_C > 0])[::-1] / usage_C.sum()
        used = 100 * books[book]["used_codes"] / size
        label = f"{book:>2}: {books[book]['entropy_bits']:.2f} bits, {used:.0f} % used" if book in listed else None
        axes.plot(np.arange(1, len(shares) + 1), shares, color=shade(book, len(books)), linewidth=1.3, label=label)
    axes.axhline(1 / size, color=QUIET, linewidth=0.8, linestyle=(0, (4, 4)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, size)
    least, most = (math.log10(limit) for limit in axes.get_ylim())
    axes.set_ylim(10 ** math.floor(least), 10 ** math.ceil(most))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("rank of the code (dashed: if all were used alike)")
    axes.set_ylabel("share of frames")
    if len(books) > 1:
        axes.legend(fontsize=7, frameon=False, loc="lower left", title="codebook", title_fontsize=7, alignment="left")


def _use_words(stream: dict[str, Any]) -> str:
    entropies = [book["entropy_bits"] for book in stream["codebooks"]]
    used = [100 * book["used_codes"] / stream["codebook_size"] for book in stream["codebooks"]]
    bits = math.log2(stream["codebook_size"])
    return f"entropy {_span(entropies, '.2f')} of {bits:.2f} bits, {_span(used, '.0f')} % used"


def _span(values: list[float], form: str) -> str:
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least} to {most}"


def _time(seconds: float) -> str:
    for unit, length in (("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:g} {unit}"
    return f"{seconds:g} s"


def _figure_of(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
