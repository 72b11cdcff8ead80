"""What a training run tells: lines of JSON, TensorBoard's figures, a picture of the loss, the live line."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..canvas import LINE, QUIET, WIDTH, head, new_figure, save, style
from ..progress import LiveLine, clock
from .checkpoints import write_whole
from .events import EventFile

if TYPE_CHECKING:
    from ..canvas import Axes

LOG = "log.jsonl"
_TRAIN, _HELD_OUT, _BASELINE = "#90a4ae", "#1565c0", "#c62828"


class RunLog:
    """log.jsonl and TensorBoard's file of a run that goes on after step `from_step`: later lines are taken away.

    Lines have no times: a run that was stopped has the same log as one that was not.
    """

    def __init__(self, folder: Path, *, from_step: int) -> None:
        self._folder = folder
        kept = [line for line in read_log(folder) if line["step"] <= from_step] if from_step else []
        write_whole(folder / LOG, "".join(json.dumps(line) + "\n" for line in kept))

    def __enter__(self) -> Self:
        self._file = open(self._folder / LOG, "a", buffering=1)
        kept = read_log(self._folder)
        self._events = EventFile(self._folder, time.time(), from_step=kept[-1]["step"] if kept else None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._events.__exit__(kind, error, trace)

    def add(self, step: int, figures: Mapping[str, float], parts: Mapping[str, float] | None = None) -> None:
        """Figures of a step, by names such as `train/loss`; `parts` go to the log only."""
        told: dict[str, Any] = {"step": step, **figures}
        if parts:
            told["parts"] = dict(parts)
        self._file.write(json.dumps(told) + "\n")
        self._events.add(time.time(), step, figures)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; one that was cut is left out."""
    return read_log_from(folder, 0)[0]


def read_log_from(folder: Path, place: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from a place in the file on, and the place behind them; of a shorter file from its beginning.

    What is no JSON is passed over: a log may be put in place anew while it is followed.
    """
    path = folder / LOG
    if not path.exists():
        return [], 0
    with open(path, "rb") as file:
        file.seek(place if place <= path.stat().st_size else 0)
        begin, content = file.tell(), file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return [line for line in map(_line, whole.splitlines()) if line is not None], begin + len(whole)


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        told = json.loads(text)
    except ValueError:
        return None
    return told if isinstance(told, dict) else None


class TrainProgress:
    """The live line of training: step, loss, tokens a second, time to go."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._live = LiveLine()
        self._started = time.monotonic()
        self._first: int | None = None
        self._line, self._tokens = "", 0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop(self._line if kind is None else "")

    def advance(self, step: int, loss: float, num_tokens: int) -> None:
        """Count a step with its loss, and tokens of all workers."""
        now = time.monotonic()
        if self._first is None:
            self._first = step - 1
        self._tokens += num_tokens
        elapsed = max(now - self._started, 1e-9)
        to_go = elapsed / (step - self._first) * (self._total - step)
        told = f"{clock(to_go)} to go" if step < self._total else clock(elapsed)
        self._line = (
            f"train: step {step:,}/{self._total:,}, loss {loss:.3f}, {self._tokens / elapsed:,.0f} tokens/s, {told}"
        )
        self._live.show(self._line, at_s=now)


def draw_loss(folder: Path, title: str, baseline: tuple[str, float] | None) -> None:
    """loss.png: the training loss, its mean of some steps, the held-out loss, and what the baseline gives."""
    lines = read_log(folder)
    train = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    held_out = [(line["step"], line["held_out/loss"]) for line in lines if "held_out/loss" in line]
    with style():
        figure = new_figure(6.2)
        told = f"{len(train):,} steps" + (f", held out {held_out[-1][1]:.3f}" if held_out else "")
        head(figure, title, told)
        axes = figure.add_axes((1.0 / WIDTH, 0.1, 1 - 1.6 / WIDTH, 0.74))
        _draw_curves(axes, train, held_out, baseline)
        save(figure, str(folder / "loss.png"))


def _draw_curves(
    axes: "Axes",
    train: list[tuple[int, float]],
    held_out: list[tuple[int, float]],
    baseline: tuple[str, float] | None,
) -> None:
    axes.plot(*_columns(train), color=_TRAIN, linewidth=0.6, alpha=0.6)
    axes.plot(*_columns(_means(train)), color=LINE, linewidth=1.2, label="training")
    axes.plot(*_columns(held_out), color=_HELD_OUT, linewidth=1.6, marker="o", markersize=3, label="held out")
    if baseline is not None:
        name, nats = baseline
        axes.axhline(nats, color=_BASELINE, linewidth=1.0, linestyle="--", label=f"{name}: {nats:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss of a target (nats, where it is a token)")
    axes.grid(color="#eceff1", linewidth=0.6)
    axes.legend(frameon=False, labelcolor=QUIET, fontsize=9)


def _means(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means of neighbours, about a hundred of them."""
    width = max(1, math.ceil(len(points) / 100))
    groups = [points[begin : begin + width] for begin in range(0, len(points), width)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
