"""Writes the tables of the docs that mirror the code: python infra/docs/make_tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. tests/docs holds the docs to what this writes.
"""

# the type checker follows only relative imports from folder to package
# pyright: reportMissingImports=false

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wavemill.jobs.recipe_file import recipe_text
from wavemill.jobs.show import exact_rate
from wavemill.pipelines.error_classes import ERROR_CLASSES
from wavemill.pipelines.layouts.registry import ENTRIES
from wavemill.pipelines.sniff import FORMATS
from wavemill.pipelines.sources import SOURCE_KINDS
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.registry import REGISTRY
from wavemill.tokenizers.spec import FrameRule
from wavemill.tokenizers.tokenizer import Output, TokenizerEntry

FOLDER = Path(__file__).parent
_TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_WHAT_TO_DO = {
    "empty": "Fetch the file again.",
    "not-audio": "Look at it; give raw samples a header: `ffmpeg -f s16le -ar 16000 -i a.raw a.wav`.",
    "no-samples": "Fetch it again, or leave it: there is nothing in it.",
    "truncated": "Fetch it again.",
    "corrupt": "Fetch it again; if the source itself is damaged, cut the good part out with ffmpeg.",
    "length-mismatch": "Write it anew: `ffmpeg -i a.wav b.wav`.",
    "unsupported": "Convert it, or move the limit that the message names.",
    "too-large": "Move the limit that the message names (`--max-bytes`, `--max-recording`, `--max-expansion`).",
    "changed": "Put the old bytes back, or add the new ones as a source of another name.",
    "missing": "Mount or restore it; a whole source that has moved: `--source NAME=FOLDER`.",
    "unreadable": "Mend the permissions or the disk.",
    "not-a-file": "Take it out of the folder or the manifest.",
    "outside-source": "Give the folder that holds the file as a source, or the file's absolute path in a manifest.",
    "bad-name": "Rename the file.",
    "bad-row": "Mend the row that the message names.",
    "unsafe-name": "Unpack the tar yourself and look at the member.",
    "duplicate-member": "Give members names of their own.",
    "out-of-range": "Mend the manifest: the message says how many samples and channels there are.",
    "too-long": "Build into another root with `--window` or `--vad`.",
    "non-finite": "Write it anew from the source; floats beyond full scale usually want a gain.",
    "decoder-hang": "Convert it with ffmpeg; on slow storage give a longer `--deadline`.",
    "decoder-crash": "Convert it with ffmpeg, and report the file.",
    "decoder-memory": "Convert it with ffmpeg, or split it.",
}


def tables() -> dict[str, str]:
    """The content of each table by its name."""
    return {
        "formats": _table(
            ("format", "decoded by", "what counts as its length"),
            ((f"`{name}`", format.backend, format.length_rule) for name, format in FORMATS.items()),
        ),
        "kinds": _table(("kind", "what it is"), ((f"`{kind}`", about) for kind, about in SOURCE_KINDS.items())),
        "errors": _table(
            ("class", "what it means", "what to do"),
            ((f"`{name}`", about, _WHAT_TO_DO[name]) for name, about in ERROR_CLASSES.items()),
        ),
        "corpus": _table(
            ("column", "type", "may be null"),
            ((f"`{f.name}`", str(f.type).replace(" not null", ""), "yes" if f.nullable else "") for f in CORPUS_SCHEMA),
        ),
        "tokenizers": _table(
            (
                *("name", "what it is", "frames/s", "codebooks", "bits/s", "frames of n samples", "last frame"),
                *("long audio", "modes", "published weights, licence"),
            ),
            (_tokenizer(entry) for entry in REGISTRY.values()),
        ),
        "layouts": _table(
            ("layout", "what it is", "after", "streams (1: one codebook)", "other options, by default"),
            (_layout(entry.describe()) for entry in ENTRIES),
        ),
        "recipe": f"```yaml\n{recipe_text('recipe.yaml')}```\n",
    }


def _layout(told: dict[str, Any]) -> tuple[str, ...]:
    """The row of a layout."""
    streams = {
        option["name"]: told["streams"].get(option["name"])
        for option in told["options"]
        if option["name"] in told["streams"]
    }
    others = [
        f"`{option['name']}` {option['default'] or ''}".strip()
        for option in told["options"]
        if option["name"] not in streams
    ]
    return (
        f"[`{told['name']}`](#{told['name']})",
        told["about"],
        told["paper"],
        ", ".join(f"`{option}`" + (" (1)" if books == 1 else "") for option, books in streams.items()),
        ", ".join(others),
    )


def _tokenizer(entry: TokenizerEntry) -> tuple[str, ...]:
    """The row of a tokenizer."""
    spec = entry.spec
    whole = f"n / {spec.hop_length}, rounded up"
    less = f"(n - {spec.window_length})" if spec.window_length else "n"
    windows = f"{less} / {spec.hop_length}, rounded down, + 1"
    rules = {FrameRule.CEIL: whole, FrameRule.ONE: "one", FrameRule.FREE: "as its content has it"}
    frames = rules.get(spec.frame_rule, windows)
    if spec.chunk_length:
        frames += f", of each chunk of {spec.chunk_length:,} samples every {spec.chunk_stride:,}"
    frames += f", at {spec.sample_rate:,} Hz" if entry.takes == "audio" else ""
    has_rate = spec.frame_rule in (FrameRule.FLOOR, FrameRule.CEIL)
    layer = f" Layer {entry.layer} of 0 to {entry.num_layers}." if entry.layer is not None else ""
    return (
        f"`{entry.spec.tokenizer}`",
        f"{entry.kind}: {entry.about}.{layer}",
        exact_rate(spec.frame_rate) if has_rate else "-",
        _codebooks(entry),
        f"{spec.bits_per_second:,.0f}" if has_rate and entry.output is Output.CODES else "-",
        frames,
        entry.last_frame,
        entry.long_audio,
        ", ".join(entry.modes) + (f" ({entry.fast_change})" if entry.fast_change else ""),
        f"`{entry.weights}`, {entry.licence}" if entry.weights else "none needed",
    )


def _codebooks(entry: TokenizerEntry) -> str:
    """The alphabet of a tokenizer, as far as it is known before its source and its weights are."""
    spec = entry.spec
    if entry.needs_units:
        return f"{spec.num_codebooks}, size as fitted"
    if entry.takes == "codes":
        return "as its source"
    if entry.output is not Output.CODES:
        return "float16 numbers, or codes by a fitted codebook"
    if spec.dim:
        return f"{spec.dim} numbers"
    return f"{spec.num_codebooks} x {spec.codebook_size:,}" + (" (fitted)" if entry.needs_codebook else "")


def filled(text: str) -> str:
    """A document with its tables written anew."""
    content = tables()
    return _TABLE.sub(lambda found: f"{found[1]}\n{content[found[2]]}\n{found[3]}", text)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    for document in sorted(FOLDER.glob("*.md")):
        document.write_text(filled(document.read_text()))
