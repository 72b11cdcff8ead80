"""Draws the docs' pictures of layouts, each from a real segment: python infra/docs/make_pictures.py DEMO [NAME ...]

DEMO is the dataset of `wavemill demo`, whose codebooks are taken. Segments are clips of its samples with further
streams: see tests/layout_roots.py.
"""

# the type checker follows only relative imports from folder to package
# pyright: reportMissingImports=false

import sys
import tempfile
from pathlib import Path

from wavemill.jobs.layout_pictures import draw_layout
from wavemill.pipelines.layouts.closeup import differing, lay_out
from wavemill.pipelines.layouts.registry import LAYOUTS, parse_layout
from wavemill.storage.layouts import GroupBy
from wavemill.storage.root import Root

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))


def make_pictures(demo: Path, names: list[str]) -> None:
    """Draw these layouts, all if none are named, to infra/docs/layouts."""
    from layout_roots import make_layout_root, make_talkers_root

    samples, folder = REPO / "jobs" / "samples", REPO / "infra" / "docs" / "layouts"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        every = make_layout_root(Path(place) / "every", samples, demo / "codebooks")
        talkers = make_talkers_root(Path(place) / "talkers", samples)
        for name in names or LAYOUTS:
            entry = LAYOUTS[name]
            separated = entry.grouping is not None and entry.grouping.by is GroupBy.PARENT
            segment = lay_out(Root(talkers if separated else every), parse_layout(entry.example))
            assert not differing(segment, segment.inverted()), name
            draw_layout(segment, str(folder / f"{name}.png"))
            print(f"infra/docs/layouts/{name}.png")


if __name__ == "__main__":
    make_pictures(Path(sys.argv[1]), sys.argv[2:])
