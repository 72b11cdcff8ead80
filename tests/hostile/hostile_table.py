"""A plugin of these tests: a table of what was offered and what came of it, then figures that the tests counted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_teller import CASE, FIGURE, PEAKS, SUMS, Teller
from hostile_tools import OpenWatch, World, sound
from hostile_watch import connections_out, files_outside, objects_unpickled, programs_run, this_process

HERE = Path(__file__).parent


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Teller:
    return Teller(record_property)


@pytest.fixture
def world(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tell: Teller) -> Iterator[World]:
    """A watched world with one good recording; on leaving, nobody may have connected, run or read anything."""
    world = World.make(tmp_path / "world")
    (world.source / "good.wav").write_bytes(sound())
    watch = OpenWatch(world.canaries)
    with this_process() as events:
        yield world
        opened = watch.opened()
    watch.close()
    world.listener.close()
    outside = {*map(str, opened), *files_outside(events, tmp_path_factory.getbasetemp().parent)}
    connections = connections_out(events)
    executed = programs_run(events) | objects_unpickled(events) | {str(path) for path in world.folder.rglob("touched")}
    tell.figure("outside", len(outside))
    tell.figure("connections", world.listener.hits + len(connections))
    tell.figure("executed", len(executed))
    assert outside == set()
    assert (world.listener.hits, connections) == (0, set())
    assert executed == set()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table where only these tests were asked for."""
    if not all(
        HERE in (path := Path(argument.partition("::")[0]).absolute(), *path.parents) for argument in config.args
    ):
        return
    every = [report for reports in terminalreporter.stats.values() for report in reports]
    failed = {report.nodeid for report in every if getattr(report, "failed", False)}
    torn_down = [report for report in every if getattr(report, "when", "") == "teardown"]
    told = [(report.nodeid, *each) for report in torn_down for each in report.user_properties]
    cases = [(offered, "FAILED" if test in failed else came) for test, kind, (offered, came) in told if kind == CASE]
    figures = [(name, value) for _, kind, (name, value) in told if kind == FIGURE]
    if not cases:
        return
    terminalreporter.section("hostile input")
    for number, (offered, came) in enumerate(cases, start=1):
        terminalreporter.write_line(f"{number:4}  {_line(offered, 100):<100}  {_line(came, 110)}")
    terminalreporter.write_line(f"{len(cases):>16,}  cases, {sum(came == 'FAILED' for _, came in cases):,} failed")
    for name, words in SUMS.items():
        terminalreporter.write_line(f"{sum(value for each, value in figures if each == name):>16,}  {words}")
    for name, words in PEAKS.items():
        terminalreporter.write_line(
            f"{max((value for each, value in figures if each == name), default=0):>16,}  {words}"
        )


def _line(text: str, length: int) -> str:
    line = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    return line if len(line) <= length else f"{line[: length - 1]}…"
