"""For people: what `corpus show`, `inspect`, `phones` and `quarantine` print without --json."""

from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..pipelines.policy import CorpusPolicy

if TYPE_CHECKING:  # it imports torch, which looking at a dataset does without
    from ..tokenizers.tokenizer import TokenizerEntry


def show_corpus(corpus: dict[str, Any]) -> None:
    """Print a corpus's figures."""
    table = Table(title=Text(f"corpus {_safe(corpus['root'])}, version {corpus['version']}"), show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("segments", f"{corpus['segments']:,}")
    table.add_row("made of", Text(CorpusPolicy.from_json(corpus["policy"]).words()))
    table.add_row("recordings", f"{corpus['recordings']:,}")
    table.add_row("audio", f"{corpus['hours']:.2f} h in {corpus['shards']:,} shards")
    table.add_row("speakers", f"{corpus['speakers']:,}" if corpus["speakers"] else "not known")
    for name in ("sources", "formats", "sample_rates", "languages"):
        table.add_row(name.replace("_", " "), Text(_counts(corpus[name])))
    table.add_row("errors", Text(f"{corpus['errors']:,}  {_counts(corpus['errors_by_class'])}"))
    Console().print(table)


def show_kinds(kinds: dict[str, str]) -> None:
    """Print the kinds of sources, a line each."""
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, sentence in kinds.items():
        table.add_row(name, Text(sentence))
    Console().print(table)


def describe_entries(entries: Iterable["TokenizerEntry"]) -> list[dict[str, Any]]:
    """Everything that the registry knows of tokenizers, for programs."""
    return [
        {
            "name": entry.spec.tokenizer,
            "kind": entry.kind,
            "takes": entry.takes,
            "about": entry.about,
            "frame_rate": exact_rate(entry.spec.frame_rate),
            "bits_per_second": entry.spec.bits_per_second,
            "output": entry.output.value,
            "needs_codebook": entry.needs_codebook,
            "needs_units": entry.needs_units,
            "decodes": bool(entry.spec.decode_sample_rate),
            "last_frame": entry.last_frame,
            "long_audio": entry.long_audio,
            "layer": entry.layer,
            "num_layers": entry.num_layers,
            "modes": [mode.value for mode in entry.modes],
            "fast_change": entry.fast_change,
            "weights": entry.weights,
            "licence": entry.licence,
            "spec": entry.spec.to_json(),
        }
        for entry in entries
    ]


def exact_rate(rate: Fraction) -> str:
    """A rate as a decimal number where that is exact, else as a fraction: 75, 12.5, 86.1328125, 50/3."""
    digits = next((digits for digits in range(10) if (rate * 10**digits).denominator == 1), None)
    return str(rate) if digits is None else f"{float(rate):.{digits}f}"


def show_tokenizers(entries: list[dict[str, Any]]) -> None:
    """Print a table of the tokenizers of each kind, and one of their published weights."""
    for kind, last in (("semantic", "layers"), ("acoustic", "decodes")):
        columns = ("frames/s", "codebooks", "bits/s", "frames", last)
        table = _listing(f"{kind} tokenizers", ("name", *columns))
        for entry in entries:
            if entry["kind"] == kind:
                spec = entry["spec"]
                layers = "-" if entry["layer"] is None else f"{entry['layer']} of 0-{entry['num_layers']}"
                codes = entry["output"] == "codes"
                table.add_row(
                    entry["name"],
                    "-" if spec["frame_rule"] == "one" else entry["frame_rate"],
                    f"{spec['num_codebooks']} x {spec['codebook_size']:,}" if codes else "numbers",
                    f"{entry['bits_per_second']:,.0f}" if codes else "-",
                    spec["frame_rule"],
                    layers if kind == "semantic" else f"{spec['decode_sample_rate'] / 1000:g} kHz",
                )
        Console().print(table)
    table = _listing("tokenizers of texts and of other streams", ("name", "takes", "gives"))
    for entry in entries:
        if entry["kind"] in ("text", "derived"):
            spec = entry["spec"]
            codes = f"{spec['dim']:,} numbers" if spec.get("dim") else f"1 x {spec['codebook_size']:,} codes"
            if entry["needs_units"]:
                codes = f"{spec['num_codebooks']} x as many codes as fitted"
            gives = [codes, *(part for part in ("durations", "text") if spec.get(part))]
            if entry["takes"] == "codes" and not entry["needs_units"]:
                gives[0] = "its source's codes"
            table.add_row(entry["name"], entry["takes"], ", ".join(gives))
    Console().print(table)
    table = _listing("published weights", ("name", "where", "licence"))
    for entry in entries:
        if entry["weights"]:
            table.add_row(entry["name"], entry["weights"], entry["licence"])
    Console().print(table)
    print("Frames: floor, whole windows only; ceil, the last hop is padded; one, a vector")
    print("for the segment. Layers: the default of those there are. Codebooks are the")
    print("tokenizer's own, but for features (mfcc-kmeans, mel-rvq, all with layers), whose")
    print("codebooks are fitted or imported. Numbers (all -latents, wavlm-sv) are kept in")
    print("float16, or become codes by a codebook that is fitted for them and named.")


def _listing(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(columns):
        figure = name in ("frames/s", "codebooks", "bits/s")
        table.add_column(
            name, style=None if number else "bold", justify="right" if figure else "left", no_wrap=name != "licence"
        )
    return table


def show_checked(checked: dict[str, Any]) -> None:
    """Print what was compared and what differs, a line for each promise."""
    table = Table(title=Text(f"{checked['tokenizer']}@{checked['fingerprint']}"), title_justify="left")
    table.add_column("promise")
    table.add_column("compared", justify="right")
    table.add_column("differ", justify="right")
    table.add_column("near-ties", justify="right", no_wrap=True)
    table.add_column("")
    for promise in checked["promises"]:
        table.add_row(
            promise["name"],
            f"{promise['compared']:,} {promise['of']}",
            f"{promise['different']:,}",
            f"{promise['near_ties']:,}",
            "kept" if promise["kept"] else Text("NOT KEPT", style="bold red"),
        )
    Console().print(table)
    left = f"; {checked['unreadable']:,} could not be read" if checked["unreadable"] else ""
    taken = f"{checked['segments']:,} segments, {checked['duration_s']:.1f} s{left}"
    print(f"{taken}. Codebook: {_safe(checked['codebook'])}.")
    if checked["fast"]:
        changed, compared = checked["fast"]["changed"], checked["fast"]["compared"]
        print(f"Mode fast changes {changed:,} of {compared:,} codes ({changed / max(compared, 1):.2%}) here.")
    print(f"Miss rate: {checked['miss_rate']:.4%} of the codes that were compared.")


def show_dataset(dataset: dict[str, Any]) -> None:
    """Print a corpus and its streams."""
    show_corpus(dataset["corpus"])
    if not dataset["streams"]:
        Console().print("There is no stream yet: make some with `wavemill tokenize`.")
        return
    for begin in range(0, len(dataset["streams"]), _STREAMS_IN_A_TABLE):
        streams = dataset["streams"][begin : begin + _STREAMS_IN_A_TABLE]
        table = Table(title=None if begin else "streams")
        table.add_column("", style="bold")
        for stream in streams:
            table.add_column(stream["stream"], justify="right", overflow="fold")
        for title, figure in _STREAM_FIGURES.items():
            figures = [figure(stream) for stream in streams]
            if set(figures) != {"-"}:
                table.add_row(title, *figures)
        Console().print(table)
    for stream in dataset["streams"]:
        if stream["errors"]:
            Console().print(Text(f"{stream['stream']}: errors {_counts(stream['errors_by_class'])}"))
        if stream["shards_missing"]:
            Console().print(Text(f"{stream['stream']}: {stream['shards_missing']:,} shards are not done yet"))
        if stream["shards_looked_at"] < stream["shards"]:
            Console().print(
                Text(f"{stream['stream']}: figures from {stream['shards_looked_at']:,} of {stream['shards']:,} shards")
            )


_STREAMS_IN_A_TABLE = 3  # so that it fits 80 columns
_STREAM_FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokenizer": lambda stream: f"{stream['tokenizer']}@{stream['fingerprint']}",
    "frames per second": lambda stream: stream["frame_rate"] if stream["bits_per_second"] else "-",
    "codebooks": lambda stream: (
        f"{stream['num_codebooks']} x {stream['codebook_size']:,}" if stream["num_codebooks"] else "-"
    ),
    "numbers in a frame": lambda stream: f"{stream['dim']:,}" if stream["dim"] else "-",
    "hours": lambda stream: "-" if stream["hours"] is None else f"{stream['hours']:.2f}",
    "used codes": lambda stream: _range([f"{book['used_codes']:,}" for book in stream["codebooks"]]),
    "entropy, bits per code": lambda stream: _range([f"{book['entropy_bits']:.2f}" for book in stream["codebooks"]]),
    "bits per second": lambda stream: f"{stream['bits_per_second']:,.0f}",
    "entropy, bits per second": lambda stream: (
        f"{stream['entropy_bits_per_second']:,.0f}" if stream["num_codebooks"] else "-"
    ),
    "mean of each number": lambda stream: _extent(stream["mean"]),
    "deviation of each number": lambda stream: _extent(stream["deviation"]),
    "bytes per code": lambda stream: f"{stream['bytes_per_code']:.2f}" if stream["bytes_per_code"] else "-",
    "errors": lambda stream: f"{stream['errors']:,}",
}


def show_segment(segment: dict[str, Any]) -> None:
    """Print one segment: what the corpus knows of it, then each stream's frames and first codes."""
    row = segment["corpus"]
    width = max(map(len, row))
    for name, value in row.items():
        if name in ("words", "phones"):
            value = None if value is None else f"{len(value):,}: {' '.join(label['label'] for label in value[:20])}"
        if value is not None and value != "":
            print(f"{name:<{width}}  {_safe(str(value))}")
    for stream in segment["streams"]:
        about = f"{stream['num_codebooks']} x {stream['codebook_size']:,} codes, {stream['frame_rate']} frames a second"
        if stream["dim"]:
            about = f"frames of {stream['dim']:,} numbers"
        print(f"\n{stream['stream']}: {stream['tokenizer']}, {about}")
        if stream["first_codes"] is None:
            print(f"    no codes: {_safe(stream['missing'])}")
            continue
        shown = len(stream["first_codes"][0]) if stream["first_codes"] else 0
        print(f"    {stream['frames']:,} frames" + (f", the first {shown}:" if 0 < shown < stream["frames"] else ""))
        digits = len(str(stream["codebook_size"] - 1))
        for codes in stream["first_codes"]:
            print("    " + " ".join(f"{code:>{digits}}" for code in codes))


def show_phones(facts: dict[str, Any]) -> None:
    """Print how well units and phones agree, beside shuffled phones, and what was counted."""
    chance = facts["shuffled"]
    table = Table(title=Text(f"{facts['stream']}, codebook {facts['codebook']}: units and phones"))
    table.add_column("", style="bold")
    table.add_column("", justify="right")
    table.add_column("phones shuffled", justify="right")
    for title, name in (("PNMI", "pnmi"), ("phone purity", "phone_purity"), ("cluster purity", "cluster_purity")):
        table.add_row(title, *("-" if side[name] is None else f"{side[name]:.3f}" for side in (facts, chance)))
    table.add_row("units' entropy, bits", f"{facts['unit_entropy_bits']:.2f}")
    table.add_row("phones' entropy, bits", f"{facts['phone_entropy_bits']:.2f}")
    table.add_row("shared, bits", f"{facts['mutual_information_bits']:.2f}", f"{chance['mutual_information_bits']:.2f}")
    table.add_row("phones", f"{len(facts['phones']):,}")
    table.add_row("used units", f"{facts['used_units']:,} of {facts['codebook_size']:,}")
    table.add_row("frames", f"{facts['frames']:,}")
    Console().print(table)
    print(f"{facts['frames_outside']:,} frames of {facts['segments']:,} labelled segments lie outside all phones.")
    for count, words in (
        (facts["segments_without_labels"], "segments have no phones"),
        (facts["segments_without_codes"], "segments have an error instead of codes"),
        (facts["shards_missing"], "shards are not done yet"),
    ):
        if count:
            print(f"Left out: {count:,} {words}.")


def show_quarantine(rows: list[dict[str, Any]], *, limit: int) -> None:
    """Print rows with errors, two lines each, with the counts by class below."""
    if not rows:
        print("No errors: nothing is quarantined.")
        return
    for row in rows[:limit]:
        print(f"{row['id']}  {_safe('/'.join(filter(None, (row['source'], row['path'], row['member']))))}")
        print(f"    {row['error']}: {_safe(row['error_message'])} (found in {', '.join(row['found_in'])})")
    shown = f" (the first {limit:,} shown)" if len(rows) > limit else ""
    print(f"{len(rows):,} segments{shown}: {_counts(Counter(row['error'] for row in rows))}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{_safe(str(name))} {count:,}" for name, count in counts.items()) or "-"


def _extent(values: list[float] | None) -> str:
    """The least of them and the largest."""
    return "-" if values is None else f"{min(values):.3g} ... {max(values):.3g}"


def _range(values: list[str]) -> str:
    """The first codebook's value and the last's, or the one value they share; a dash without codebooks."""
    if not values:
        return "-"
    return values[0] if len(set(values)) == 1 else f"{values[0]} ... {values[-1]}"


def _safe(text: str) -> str:
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
