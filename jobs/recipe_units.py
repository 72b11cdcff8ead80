"""Models of units that a recipe names: in which order they and the streams are made, and whether they still fit."""

from collections.abc import Sequence

from ..pipelines.streams import StreamConfig, read_unit_model, sources_first, unit_model_file
from ..storage.root import Root
from ..tokenizers.registry import require_tokenizer
from ..tokenizers.spec import UserError
from .arguments import parse_bytes
from .console import say
from .recipe import Units
from .units import fit_units

BYTES_PER_UNIT = 4


def lacking_units(root: Root, units: Sequence[Units]) -> list[Units]:
    """Those that are not in the root. Raises `UserError` for one that is there and was fitted otherwise."""
    lacking = []
    for model in units:
        if not root.exists(unit_model_file(model.name)):
            lacking.append(model)
            continue
        story = read_unit_model(root, model.name).story
        budget = parse_bytes(model.budget) // BYTES_PER_UNIT
        theirs = {"stream": "stream", "size": "size_asked_for", "budget": "budget_units", "seed": "seed"}
        for key, value in {**model.model_dump(), "budget": budget}.items():
            if key in theirs and key in model.model_fields_set and story.get(theirs[key]) != value:
                raise UserError(
                    f"The model of units {model.name!r} in {root} was fitted with {theirs[key]} "
                    f"{story.get(theirs[key])}, the recipe says {value}. It is kept: give the new one another name, or "
                    f"take {key} out of the recipe."
                )
    return lacking


def rounds(streams: Sequence[StreamConfig], lacking: Sequence[Units]) -> list[tuple[list[StreamConfig], list[Units]]]:
    """Streams that can be made, then the models that are fitted on them, and again, until nothing is left.

    Raises `UserError` for a model that is fitted on what it is needed for.
    """
    left, models, made = sources_first(streams), list(lacking), set[str]()
    found = []
    while left or models:
        names, waiting = {model.name for model in models}, set[str]()
        for stream in left:
            if stream.of in waiting or (_needs_units(stream) and stream.codebook_name in names):
                waiting.add(stream.name)
        made |= {stream.name for stream in left} - waiting
        fitted = [model for model in models if model.stream in made]
        if waiting and not fitted:
            [first, *_] = models
            raise UserError(f"units: the model {first.name!r} is fitted on stream {first.stream!r}, which needs it.")
        found.append(([stream for stream in left if stream.name not in waiting], fitted))
        left = [stream for stream in left if stream.name in waiting]
        models = [model for model in models if model not in fitted]
    return found


def fit_stage_of_units(root: Root, model: Units) -> dict[str, object]:
    """Fit a model of units; its story."""
    story = fit_units(
        root,
        model.stream,
        name=model.name,
        size=model.size,
        budget_units=max(1, parse_bytes(model.budget) // BYTES_PER_UNIT),
        seed=model.seed,
    )
    say(
        f"Model of units {model.name}: {story['num_units']:,} units and {story['size'] - story['num_units']:,} joined "
        f"ones, fitted on {story['units']:,} units of {story['segments']:,} segments of stream {model.stream}."
    )
    return story


def _needs_units(stream: StreamConfig) -> bool:
    return require_tokenizer(stream.tokenizer.tokenizer).needs_units
