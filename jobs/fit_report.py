"""How a codebook was fitted, in figures and as a picture: from its header, which is the whole record.

Axes: K codebooks, C centroids.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..pipelines.streams import read_codebook
from ..storage.root import Root
from ..tokenizers.spec import UserError
from .canvas import LINE, QUIET, WIDTH, head, new_figure, save, shade, style, write_nothing

if TYPE_CHECKING:
    from .canvas import Axes

_LEFT_OUT = ("cluster_sizes", "curves", "distances")  # of figures: lists as long as there are centroids and rounds


def error_of(header: dict[str, Any]) -> float:
    """The mean squared error that all codebooks together leave: that of the last stage of each group."""
    errors = header["mean_square_error"]
    stages = len(errors) // header.get("groups", 1)
    return sum(errors[stages - 1 :: stages])


def describe_fit(root: Root, name: str) -> dict[str, Any]:
    """The header of a codebook with figures of its use. Raises `UserError` for one that was not fitted here."""
    header = read_codebook(root, name).header
    if "curves" not in header:
        came = (
            f"was brought from {header['imported_from']}" if "imported_from" in header else "is from an older wavemill"
        )
        raise UserError(f"Codebook {name} {came}: there is no record of its fit. Fit one with `wavemill codebook fit`.")
    books = [
        {"codebook": book, "rounds": len(curve), "mean_square_error": error, **use_of(sizes)}
        for book, (curve, error, sizes) in enumerate(
            zip(header["curves"], header["mean_square_error"], header["cluster_sizes"], strict=True)
        )
    ]
    return {"codebook": name, **header, "error": error_of(header), "codebooks": books}


def use_of(sizes: list[int]) -> dict[str, Any]:
    """How evenly frames fall on centroids: how many have any, the least and the most, and the perplexity."""
    sizes_C = np.array(sizes, dtype=np.float64)
    shares = sizes_C[sizes_C > 0] / max(1.0, sizes_C.sum())
    return {
        "used": int((sizes_C > 0).sum()),
        "smallest": int(sizes_C.min()),
        "largest": int(sizes_C.max()),
        "perplexity": round(float(np.exp(-(shares * np.log(shares)).sum())), 1),
    }


def fit_figures(header: dict[str, Any]) -> dict[str, Any]:
    """A header without its long lists, for programs that want the figures."""
    return {key: value for key, value in header.items() if key not in _LEFT_OUT}


def show_fit(facts: dict[str, Any]) -> None:
    """Print what `describe_fit` gives."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    layer = f", layer {facts['layer']}" if "layer" in facts else ""
    kinds = [f"{facts.get('groups')} groups"] * ("groups" in facts) + ["spherical"] * ("spherical" in facts)
    print(
        f"{facts['codebook']}: {facts['num_codebooks']} x {facts['size']:,} centroids of {facts['tokenizer']}{layer}"
        f"{''.join(f', {kind}' for kind in kinds)}; {facts['frames']:,} frames of {facts['segments']:,} segments, seed "
        f"{facts['seed']}, by {facts['backend']}."
    )
    print(f"Mean square {facts['mean_square']:,.4g}, left {facts['error']:,.4g}.")
    if "phones" in facts:
        agreed = facts["phones"]
        pnmi = "-" if agreed["pnmi"] is None else f"{agreed['pnmi']:.3f}"
        print(
            f"Phones over {agreed['frames']:,} frames: PNMI {pnmi}, phone purity {agreed['phone_purity']:.3f}, "
            f"cluster purity {agreed['cluster_purity']:.3f}."
        )
    table = Table()
    for title in ("codebook", "rounds", "error left", "used", "smallest", "largest", "perplexity"):
        table.add_column(title, justify="right")
    for book in facts["codebooks"]:
        counts = (f"{book[name]:,}" for name in ("used", "smallest", "largest", "perplexity"))
        table.add_row(str(book["codebook"]), str(book["rounds"]), f"{book['mean_square_error']:,.4g}", *counts)
    console.print(table)
    others = facts["fitted_with"]
    if len(others) > 1:
        table = Table(title="Fitted together")
        for title in ("codebook", "size", "error left", "of mean square", "PNMI"):
            table.add_column(title, justify="right")
        for each in others:
            error = error_of({**each, "groups": facts.get("groups", 1)})
            pnmi = each.get("pnmi")
            share = error / each["mean_square"] if each["mean_square"] else 0.0
            known = "-" if pnmi is None else f"{pnmi:.3f}"
            table.add_row(each["codebook"], f"{each['size']:,}", f"{error:,.4g}", f"{share:.1%}", known)
        console.print(table)


def draw_fit(facts: dict[str, Any], path: str) -> None:
    """Inertia by round, error by size of the codebooks that were fitted together, use of centroids, distances."""
    with style():
        height = 8.3
        figure = new_figure(height)
        layer = f", layer {facts['layer']}" if "layer" in facts else ""
        head(
            figure,
            f"{facts['codebook']}: {facts['num_codebooks']} × {facts['size']:,} centroids of "
            f"{facts['tokenizer']}{layer}",
            f"{facts['frames']:,} frames of {facts['segments']:,} segments, corpus version {facts['corpus_version']}, "
            f"seed {facts['seed']}, {facts['backend']}",
            f"mean square {facts['mean_square']:,.4g}, left {facts['error']:,.4g}",
        )
        draws = (_draw_curves, _draw_sizes, _draw_use, _draw_distances)
        for place, draw in enumerate(draws):
            left, above = (1.0, 9.0)[place % 2], 1.3 + 3.7 * (place // 2)
            draw(figure.add_axes((left / WIDTH, 1 - (above + 2.75) / height, 6.3 / WIDTH, 2.75 / height)), facts)
        save(figure, path)


def _draw_curves(axes: "Axes", facts: dict[str, Any]) -> None:
    axes.set_title("Inertia by round of k-means", loc="left", fontsize=11)
    curves = facts["curves"]
    for book, curve in enumerate(curves):
        axes.plot(np.arange(1, len(curve) + 1), curve, color=shade(book, len(curves)), linewidth=1.3)
    axes.set_xlabel("round" + (" (a line for each codebook)" if len(curves) > 1 else ""))
    axes.set_ylabel("mean squared distance")


def _draw_sizes(axes: "Axes", facts: dict[str, Any]) -> None:
    axes.set_title("Error by size, of those fitted together", loc="left", fontsize=11)
    others = facts["fitted_with"]
    layers = sorted({each["layer"] for each in others}, key=str)
    if len({each["size"] for each in others}) < 2:
        write_nothing(axes, "one size: fit several with --sizes")
        return
    for place, layer in enumerate(layers):
        of_layer = [each for each in others if each["layer"] == layer]
        shares = [
            error_of({**each, "groups": facts.get("groups", 1)}) / (each["mean_square"] or 1) for each in of_layer
        ]
        label = None if layer is None else f"layer {layer}"
        axes.plot(
            [each["size"] for each in of_layer],
            shares,
            "o-",
            color=shade(place, len(layers)),
            label=label,
            markersize=4,
        )
    axes.set_xscale("log")
    sizes = sorted({each["size"] for each in others})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("centroids")
    axes.set_ylabel("share of the mean square left")
    if len(layers) > 1:
        axes.legend(fontsize=8, frameon=False)


def _draw_use(axes: "Axes", facts: dict[str, Any]) -> None:
    axes.set_title("Frames of each centroid, most used first", loc="left", fontsize=11)
    books = facts["cluster_sizes"]
    for book, sizes in enumerate(books):
        axes.plot(
            np.arange(1, len(sizes) + 1), sorted(sizes, reverse=True), color=shade(book, len(books)), linewidth=1.3
        )
    axes.axhline(facts["frames"] / facts["size"], color=QUIET, linewidth=0.8, linestyle=(0, (4, 4)))
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 2 * max(max(sizes) for sizes in facts["cluster_sizes"]))
    axes.set_xlabel("rank of the centroid (dashed: if all were used alike)")
    axes.set_ylabel("frames")


def _draw_distances(axes: "Axes", facts: dict[str, Any]) -> None:
    found = facts["distances"]
    axes.set_title(f"Distance that codes leave, mean {found['mean']:.4g}", loc="left", fontsize=11)
    edges = np.array(found["edges"])
    axes.bar(edges[:-1], found["counts"], np.diff(edges), align="edge", color=LINE, edgecolor="white", linewidth=0.6)
    axes.set_xlabel("distance of a frame from what its codes stand for")
    axes.set_ylabel(f"frames, of {found['frames']:,}")
