"""What decides a training run, and the record of it that its folder keeps: run.json."""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from ...pipelines.layouts.plan import LayoutPlan
from ...pipelines.layouts.registry import NamedLayout, parse_layout
from ...storage.root import Root
from ...tokenizers.spec import StreamSpec, UserError
from .model import ModelConfig
from .objectives import Objective, ObjectiveContext
from .registry import make_objective

RECORD = "run.json"
_FORMAT = 2
_FREE = ("root", "evaluate_every", "save_every")  # settings that decide no weights


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """What decides the weights: the same settings, snapshot and machine give the same."""

    root: str
    layout: str  # as `parse_layout` takes it
    objective: str | None = None  # None: what the layout is made for
    options: Mapping[str, str] = field(default_factory=dict)  # of the objective
    model: ModelConfig = field(default_factory=ModelConfig)
    pin: str | None = None
    steps: int = 1_000
    batch_size: int = 16  # sequences of a step, on all workers together
    length: int = 512  # steps of a sequence
    packing: str = "best-fit"
    learning_rate: float = 1e-3  # the highest
    warmup: int = 100  # steps
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's norm; 0: none
    seed: int = 0
    held_out_batches: int = 32  # at most, to evaluate on
    evaluate_every: int = 100  # steps
    save_every: int = 500  # steps

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "TrainSettings":
        return cls(**{**told, "model": ModelConfig(**told["model"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows of the corpus whose `column` lies in one of the spans, their ends with them, are held out."""

    column: str
    spans: Sequence[tuple[str, str]]

    @property
    def held_out(self) -> Any:
        """Which rows of the corpus are held out, as a pyarrow expression."""
        column = pc.field(self.column)
        return reduce(operator.or_, ((column >= first) & (column <= last) for first, last in self.spans))

    @property
    def learnt(self) -> Any:
        """Which rows are learnt from."""
        column = pc.field(self.column)
        return reduce(operator.and_, ((column < first) | (column > last) for first, last in self.spans))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a run was begun with: enough to build its model without the dataset."""

    settings: TrainSettings
    objective: str
    split: Split
    versions: dict[str, int]
    specs: dict[str, StreamSpec]  # of the streams as they are read, by the names that the layout knows them by

    def build(self) -> "Built":
        """Raises `UserError` for a layout or an objective that is unknown."""
        layout = parse_layout(self.settings.layout)
        plan = layout.plan(self.specs)
        context = ObjectiveContext(
            plan, self.specs, self.settings.model, self.settings.root, layout, self.settings.options
        )
        return Built(layout, plan, make_objective(self.objective, context))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "settings": self.settings.to_json(),
            "objective": self.objective,
            "split": asdict(self.split),
            "versions": self.versions,
            "specs": {name: spec.to_json() for name, spec in self.specs.items()},
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Record":
        return cls(
            settings=TrainSettings.from_json(told["settings"]),
            objective=told["objective"],
            split=Split(
                column=told["split"]["column"], spans=[(first, last) for first, last in told["split"]["spans"]]
            ),
            versions=told["versions"],
            specs={name: StreamSpec.from_json(spec) for name, spec in told["specs"].items()},
        )


@dataclass(frozen=True, slots=True)
class Built:
    """A layout, its plan and the objective that a record describes, with weights as they are at first."""

    layout: NamedLayout
    plan: LayoutPlan
    objective: Objective


def read_record(folder: Path) -> Record | None:
    """The record of a run; None if the folder has none. Raises `UserError` for one that cannot be read."""
    try:
        told = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RECORD} cannot be read: {error}. Name another folder, or restore it.") from error
    if not isinstance(told, dict) or told.get("format") != _FORMAT:
        raise UserError(f"{folder / RECORD} is not of a training run that this wavemill knows. Name another folder.")
    return Record.from_json(told)


def require_same_settings(folder: Path, begun: TrainSettings, asked: TrainSettings) -> None:
    """Raise `UserError` if a run would go on with other settings than it was begun with."""
    before, now = _flat(begun), _flat(asked)
    for name, value in now.items():
        if value != before[name]:
            flag = "--" + name.replace("_", "-")
            was, now_is = (f"{flag} {_said(before[name])}", _said(value))
            if isinstance(value, bool):
                was, now_is = (flag if on else f"--no-{name}" for on in (before[name], value))
            raise UserError(
                f"The run in {folder} was begun with {was}, now it is {now_is}: its weights would be those of "
                "neither. Go on with the same settings, or name another folder with --to."
            )


def begun_or(asked: TrainSettings, record: Record) -> TrainSettings:
    """The settings to go on with: those asked for, what they leave to the layout as it was chosen."""
    return replace(asked, objective=asked.objective or record.objective)


def placed(settings: TrainSettings) -> TrainSettings:
    """The same, its root and a model's folder named as they are from any working directory. Raises `UserError`."""
    options = dict(settings.options)
    if (folder := Path(options.get("model", "")).expanduser()).is_dir() and "model" in options:
        options["model"] = str(folder.absolute())
    return replace(settings, root=Root(settings.root).uri, options=options)


def _flat(settings: TrainSettings) -> dict[str, Any]:
    told = {each.name: getattr(settings, each.name) for each in fields(settings) if each.name not in _FREE}
    model, options = told.pop("model"), told.pop("options")
    told["objective"] = ",".join([str(told["objective"]), *(f"{key}={options[key]}" for key in sorted(options))])
    names = {"num_layers": "layers", "num_heads": "heads"}
    return told | {names.get(name, name): value for name, value in asdict(model).items()}


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)
