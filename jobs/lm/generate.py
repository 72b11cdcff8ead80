"""A recording continued by trained models; what their layouts are decides the way.

Axes: K codebooks, T frames.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...pipelines.layouts.continuous import ContinuousPlan
from ...pipelines.layouts.grid import GridPlan
from ...pipelines.layouts.plan import LayoutPlan
from ...pipelines.layouts.sequence import SequencePlan
from ...pipelines.layouts.staged import PiecewisePlan
from ...pipelines.layouts.vall_e import TextFirstPlan
from ...tokenizers.spec import StreamSpec, UserError
from ...tokenizers.tokenizer import TextTokenizer, Tokens
from .continuing import Books, Stage, continue_grid, continue_sequence
from .drawing import Drawer
from .filling import ITERATIONS, fill_finer, fill_soundstorm
from .flowing import continue_frames
from .latent_head import NextFrame
from .objectives import Objective
from .prompts import Prompt
from .registry import objective_of
from .settings import Record

GIVEN_S = 3.0  # of a recording that is only given another sound: what is kept of its own, as VALL-E and SoundStorm do


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A run's best model, and the layout that it knows."""

    folder: str
    record: Record
    layout: Any
    plan: LayoutPlan
    objective: Objective

    @property
    def name(self) -> str:
        return layout_name(self.layout)

    @property
    def length(self) -> int:
        return self.record.settings.length

    @property
    def stage(self) -> Stage:
        model = cast(Any, self.objective).model
        return Stage(name=self.name, model=model, specs=self.record.specs, length=self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How much is to follow."""

    num_samples: int  # of the prompt's rate, prompt and all
    given_samples: int  # of the prompt, whose acoustic tokens are given
    iterations: int = ITERATIONS


@dataclass(slots=True, kw_only=True)
class Continued:
    """Prompt and continuation: codes of the streams that were made, or frames of numbers."""

    sounding: str  # the stream that is decoded
    begun: dict[str, int]  # frames of each stream that are the prompt's
    books: Books = field(default_factory=dict)
    frames_TD: Tensor | None = None
    ended: bool = False  # the model said so before all was made

    @property
    def num_frames(self) -> int:
        return len(self.books[self.sounding][0]) if self.frames_TD is None else len(self.frames_TD)

    def tokens(self) -> Tokens:
        """What is decoded."""
        if self.frames_TD is not None:
            return Tokens(codes_KT=torch.empty(0, len(self.frames_TD), dtype=torch.int64), frames_TD=self.frames_TD)
        return Tokens(codes_KT=torch.tensor(self.books[self.sounding], dtype=torch.int64))

    def made(self) -> Books:
        """Of each stream the codes behind the prompt's."""
        return {
            stream: [book[self.begun[stream] :] for book in books]
            for stream, books in self.books.items()
            if stream in self.begun
        }


Runs = Mapping[str, Trained]  # by their layouts


@dataclass(frozen=True, slots=True)
class Way:
    """The layouts of the runs that it takes, and what it does with them."""

    layouts: tuple[str, ...]
    go: Callable[[Runs, Prompt, Asked, Drawer], Continued]
    text: str | None = None  # the layout whose `text` is what is said
    keeps_length: bool = False  # the recording gets another sound, no more of it


def layout_name(layout: Any) -> str:
    return type(layout).__name__.replace("_", "-")


def way_of(runs: list[Trained]) -> Way:
    """What these runs can do together. Raises `UserError` for runs that are no way, or of different streams."""
    for run in runs:
        _require_own_objective(run)
    names = [run.name for run in runs]
    told = " + ".join(names)
    every = "; ".join(" + ".join(way.layouts) for way in WAYS)
    for way in WAYS:
        if sorted(way.layouts) == sorted(names):
            _require_same_streams(runs)
            return way
    lacking = [[name for name in way.layouts if name not in names] for way in WAYS if set(names) < set(way.layouts)]
    if lacking and len(set(names)) == len(names):
        more = " or ".join(" + ".join(each) for each in lacking)
        raise UserError(f"Runs of {told} lack a run of {more}: name it with another --model.")
    raise UserError(f"Runs of {told} cannot go on from a recording together; what can: {every}.")


def _require_own_objective(run: Trained) -> None:
    """Raise `UserError` for a model that has learnt something else than its layout is made for."""
    expected = {objective_of(run.layout, run.plan)}
    expected |= {"next", "parallel"} if expected <= {"next", "parallel"} else set()
    if run.record.objective not in expected:
        raise UserError(
            f"The {run.name} run in {run.folder} was trained with objective {run.record.objective}; to go on from a "
            f"recording it takes {' or '.join(sorted(expected))}."
        )


def _require_same_streams(runs: list[Trained]) -> None:
    """Raise `UserError` if what one run makes is not what another takes."""
    for option in ("semantic", "acoustic", "text"):
        found: dict[str, str] = {}
        for run in runs:
            stream = run.layout.stream if run.name == option else getattr(run.layout, option, None)
            if stream is not None:
                found.setdefault(stream, run.name)
        if len(found) > 1:
            told = ", ".join(f"{name} has {stream!r}" for stream, name in found.items())
            raise UserError(f"The runs are of different {option} streams: {told}. Name runs of the same ones.")
    by_name = {run.name: run for run in runs}
    if "coarse" in by_name and by_name["coarse"].layout.codebooks != by_name["fine"].layout.coarse:
        raise UserError(
            f"The coarse run makes {by_name['coarse'].layout.codebooks} codebook(s), the fine run takes "
            f"{by_name['fine'].layout.coarse}. Name runs of the same number."
        )


def _three_stages(runs: Runs, prompt: Prompt, asked: Asked, drawer: Drawer) -> Continued:
    """AudioLM (Borsos et al. 2022), section 3.4: semantic tokens, then coarse ones, then fine ones."""
    first, second, third = runs["semantic"], runs["coarse"], runs["fine"]
    semantic, acoustic = first.layout.stream, second.layout.acoustic
    num_codebooks = _num_codebooks(third, acoustic)
    books = {**_books(prompt, semantic, 1), **_books(prompt, acoustic, num_codebooks)}
    continued = _begun(acoustic, books)
    totals = {stream: _total(prompt, asked, first if stream == semantic else third, stream) for stream in books}
    for run in (first, second, third):
        plan = cast(SequencePlan | PiecewisePlan, run.plan)
        continue_sequence(run.stage, plan, books, totals, drawer)
    return continued


def _one_sequence(runs: Runs, prompt: Prompt, asked: Asked, drawer: Drawer) -> Continued:
    """`flatten` and `stages`: what comes next in the one sequence."""
    (run,) = runs.values()
    books: Books = {}
    for stream in run.layout.streams:
        is_semantic = stream == getattr(run.layout, "semantic", None)
        books |= _books(prompt, stream, 1 if is_semantic else _num_codebooks(run, stream))
    continued = _begun(sounding_stream(runs), books)
    totals = {stream: _total(prompt, asked, run, stream) for stream in books}
    continue_sequence(run.stage, cast(SequencePlan, run.plan), books, totals, drawer)
    return continued


def _one_grid(runs: Runs, prompt: Prompt, asked: Asked, drawer: Drawer) -> Continued:
    """`delay` and `parallel` (MusicGen, Copet et al. 2023)."""
    (run,) = runs.values()
    plan, stream = cast(GridPlan, run.plan), run.layout.stream
    continued = _begun(stream, _books(prompt, stream, len(plan.columns)))
    continue_grid(run.stage, plan, continued.books, _total(prompt, asked, run, stream), drawer)
    return continued


def _spoken(runs: Runs, prompt: Prompt, asked: Asked, drawer: Drawer) -> Continued:
    """VALL-E (Wang et al. 2023): the first codebook step by step until the model ends it, then the others."""
    first, second = runs["vall-e"], runs["vall-e-nar"]
    text, acoustic = first.layout.text, first.layout.acoustic
    if not isinstance(prompt.tokenizers[text], TextTokenizer):
        raise UserError(
            f"Stream {text!r} ({first.record.specs[text].tokenizer}) is heard, not written: --text cannot become a "
            "part of it. Train on a stream of text-tokens."
        )
    plan = cast(TextFirstPlan, second.plan)
    prompted = _books(prompt, acoustic, plan.num_codebooks)[acoustic]
    known = len(prompted[0])
    books = {**_books(prompt, text, 1), acoustic: prompted[:1]}
    totals = {text: len(books[text][0]), acoustic: _total(prompt, asked, first, acoustic)}
    ended = continue_sequence(first.stage, cast(SequencePlan, first.plan), books, totals, drawer, may_end=True)
    books[acoustic] = prompted
    fill_finer(second.stage, plan, books, known, drawer, text=text, acoustic=acoustic)
    return Continued(sounding=acoustic, begun={acoustic: known}, books=books, ended=ended)


def _parallel_decoding(runs: Runs, prompt: Prompt, asked: Asked, drawer: Drawer) -> Continued:
    """SoundStorm (Borsos et al. 2023) behind a semantic run, or given the recording's own semantic tokens."""
    run = runs["soundstorm"]
    semantic, acoustic = run.layout.semantic, run.layout.acoustic
    books = {**_books(prompt, semantic, 1), **_books(prompt, acoustic, _num_codebooks(run, acoustic))}
    known = min(len(books[acoustic][0]), prompt.frames_of(asked.given_samples, run.record.specs[acoustic]))
    books[acoustic] = [book[:known] for book in books[acoustic]]
    continued = _begun(acoustic, books)
    if "semantic" in runs:
        before = runs["semantic"]
        totals = {semantic: _total(prompt, asked, before, semantic)}
        continue_sequence(before.stage, cast(SequencePlan, before.plan), books, totals, drawer)
    else:
        del continued.begun[semantic]
    fill_soundstorm(
        run.stage,
        cast(GridPlan, run.plan),
        books,
        _total(prompt, asked, run, acoustic),
        drawer,
        semantic=semantic,
        acoustic=acoustic,
        iterations=asked.iterations,
    )
    return continued


def _numbers(runs: Runs, prompt: Prompt, asked: Asked, drawer: Drawer) -> Continued:
    """Latents frame by frame (CALM, Rouard et al. 2025)."""
    run = runs["continuous"]
    stream, plan = run.layout.stream, cast(ContinuousPlan, run.plan)
    if plan.prefix is not None:
        raise UserError(
            f"The continuous run takes {plan.prefix!r} in front, which nobody knows of what is to follow. Train one "
            "without a prefix."
        )
    frames_TD = prompt.tokens[stream].frames_TD
    assert frames_TD is not None
    objective = cast(NextFrame, run.objective)
    total = _total(prompt, asked, run, stream)
    longer_TD = continue_frames(objective, plan, frames_TD, total, drawer, length=run.length)
    return Continued(sounding=stream, begun={stream: len(frames_TD)}, frames_TD=longer_TD)


def sounding_stream(runs: Runs) -> str:
    """The stream that is decoded."""
    layout = next(run.layout for run in runs.values() if run.name != "semantic" or len(runs) == 1)
    return getattr(layout, "acoustic", None) or layout.stream


WAYS = (
    Way(("semantic", "coarse", "fine"), _three_stages),
    Way(("stages",), _one_sequence),
    Way(("flatten",), _one_sequence),
    Way(("delay",), _one_grid),
    Way(("parallel",), _one_grid),
    Way(("vall-e", "vall-e-nar"), _spoken, text="vall-e"),
    Way(("semantic", "soundstorm"), _parallel_decoding),
    Way(("soundstorm",), _parallel_decoding, keeps_length=True),
    Way(("continuous",), _numbers),
)


def _books(prompt: Prompt, stream: str, num_codebooks: int) -> Books:
    """The prompt's first codebooks of a stream."""
    return {stream: [np.asarray(book_T).tolist() for book_T in prompt.tokens[stream].codes_KT[:num_codebooks]]}


def _begun(sounding: str, books: Books) -> Continued:
    return Continued(sounding=sounding, begun={stream: len(each[0]) for stream, each in books.items()}, books=books)


def _num_codebooks(run: Trained, stream: str) -> int:
    """How many of a stream's codebooks a run takes."""
    asked = run.layout.streams[stream]
    return run.record.specs[stream].num_codebooks if asked is None else asked


def _total(prompt: Prompt, asked: Asked, run: Trained, stream: str) -> int:
    """Frames that a stream is to have. Raises `UserError` for one without a clock."""
    spec: StreamSpec = run.record.specs[stream]
    if not spec.has_clock:
        raise UserError(
            f"Stream {stream!r} ({spec.tokenizer}) of the {run.name} run has no clock: nobody knows how long its units "
            "last. Name runs of a stream with a frame every hop."
        )
    return prompt.frames_of(asked.num_samples, spec)
