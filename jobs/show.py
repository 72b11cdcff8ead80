"""For people: what `corpus show`, `inspect`, `phones` and `quarantine` print without --json."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..pipelines.policy import CorpusPolicy


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


def show_dataset(dataset: dict[str, Any]) -> None:
    """Print a corpus and its streams."""
    show_corpus(dataset["corpus"])
    if not dataset["streams"]:
        Console().print("There is no stream yet: make some with `wavemill tokenize`.")
        return
    table = Table(title="streams")
    table.add_column("", style="bold")
    for stream in dataset["streams"]:
        table.add_column(stream["stream"], justify="right")
    for title, figure in _STREAM_FIGURES.items():
        table.add_row(title, *(figure(stream) for stream in dataset["streams"]))
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


_STREAM_FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokenizer": lambda stream: f"{stream['tokenizer']}@{stream['fingerprint']}",
    "frames per second": lambda stream: stream["frame_rate"],
    "codebooks": lambda stream: f"{stream['num_codebooks']} x {stream['codebook_size']:,}",
    "hours": lambda stream: f"{stream['hours']:.2f}",
    "used codes": lambda stream: _range([f"{book['used_codes']:,}" for book in stream["codebooks"]]),
    "entropy, bits per code": lambda stream: _range([f"{book['entropy_bits']:.2f}" for book in stream["codebooks"]]),
    "bits per second": lambda stream: f"{stream['bits_per_second']:,.0f}",
    "entropy, bits per second": lambda stream: f"{stream['entropy_bits_per_second']:,.0f}",
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
        print(f"\n{stream['stream']}: {stream['tokenizer']}, {about}")
        if stream["first_codes"] is None:
            print(f"    no codes: {_safe(stream['missing'])}")
            continue
        shown = len(stream["first_codes"][0])
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


def _range(values: list[str]) -> str:
    """The first codebook's value and the last's, or the one value they share."""
    return values[0] if len(set(values)) == 1 else f"{values[0]} ... {values[-1]}"


def _safe(text: str) -> str:
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
