"""The job that continues a recording with trained language models, and says what became of it."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ..pipelines.layouts.registry import parse_layout
from ..pipelines.listen import wav_bytes
from ..pipelines.resample import resampled_length
from ..storage.root import Root
from ..storage.stores import has_scheme
from ..tokenizers.spec import UserError
from ..tokenizers.tokenizer import sound_of
from .arguments import parse_weights
from .lm.checkpoints import newest_checkpoint
from .lm.data import training_part
from .lm.drawing import Drawer, Sampling
from .lm.filling import ITERATIONS
from .lm.generate import GIVEN_S, Asked, Continued, Trained, Way, sounding_stream, way_of
from .lm.prompts import Prompt, read_prompt, spoken
from .lm.sameness import Sameness, compare
from .progress import LiveLine, clock
from .train_lm import load_run, run_folder

_SECONDS = 5.0
_MOST_S = 3_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """What is made, and how."""

    seconds: float | None = None  # after the prompt; None: 5
    prompt_seconds: float | None = None  # of the recording; None: all of it
    text: str | None = None  # what is to be said
    prompt_text: str | None = None  # what is said in the prompt; None: what the file beside it says
    sampling: Sampling = field(default_factory=Sampling)
    iterations: int = ITERATIONS
    seed: int = 0
    root: str | None = None  # where the dataset is now; None: where the runs read it
    device: str = "cpu"
    weights: Sequence[str] = ()  # STREAM=PLACE: where weights of streams are now
    local_files_only: bool = False


def generate(prompt: str, to: str, models: Sequence[str], options: GenerateOptions) -> dict[str, Any]:
    """Continue a recording, write the sound of prompt and continuation, and say how alike its codes are to the data's.

    The same seed, runs and machine give the same file. Raises `UserError`.
    """
    _require_place(to)
    _require_seconds("--seconds", options.seconds)
    _require_seconds("--prompt-seconds", options.prompt_seconds)
    runs = [_opened(folder, options) for folder in models]
    root = _same_root(runs, options.root)
    way = way_of(runs)
    by_name = {run.name: run for run in runs}
    sounding = _sounding(by_name)
    text = _text(way, prompt, options)
    for run in runs:
        _require_its_dataset(run)
    versions = {name: run.record.versions[name] for run in runs for name in run.record.specs}
    read = read_prompt(
        prompt,
        Root(root),
        versions,
        seconds=None if way.keeps_length else options.prompt_seconds,
        text=text,
        weights=parse_weights(list(options.weights), versions),
        local_files_only=options.local_files_only,
    )
    asked = _asked(way, read, options)
    generator = torch.Generator().manual_seed(options.seed)
    with _Shown() as shown:
        drawer = Drawer(sampling=options.sampling, generator=generator, on_draw=shown.on_draw)
        continued = way.go(by_name, read, asked, drawer)
    num_samples, made_s = _write_sound(to, read, asked, continued)
    return {
        "prompt": prompt,
        "to": to,
        "layouts": [run.record.settings.layout for run in runs],
        "stream": sounding,
        "samples": num_samples,
        "sample_rate": read.tokenizers[sounding].spec.decode_sample_rate,
        "prompt_s": asked.given_samples / read.sample_rate,
        "made_s": made_s,
        "frames": continued.num_frames - continued.begun[sounding],
        "ended": continued.ended,
        "seed": options.seed,
        "codebooks": [asdict(each) for each in _compared(runs, root, continued)],
    }


class _Shown:
    """The live line: the stage, its draws, how fast."""

    def __init__(self) -> None:
        self._live, self._stage, self._begun, self._line = LiveLine(), "", 0.0, ""

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop(self._line if kind is None else "")

    def on_draw(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._begun = stage, now
        elapsed = max(now - self._begun, 1e-9)
        told = f"{clock(elapsed / done * (total - done))} to go" if done < total else clock(elapsed)
        self._line = f"generate: {stage}, {done:,}/{total:,} draws, {done / elapsed:,.0f} a second, {told}"
        self._live.show(self._line, at_s=now)


def _opened(folder: str, options: GenerateOptions) -> Trained:
    record, objective = load_run(folder)
    if options.root is not None:
        record = replace(record, settings=replace(record.settings, root=options.root))
    layout = parse_layout(record.settings.layout)
    return Trained(
        folder=folder,
        record=record,
        layout=layout,
        plan=layout.plan(record.specs),
        objective=objective.to(options.device),
    )


def _same_root(runs: Sequence[Trained], given: str | None) -> str:
    """Raises `UserError` for runs of several datasets."""
    roots = [run.record.settings.root for run in runs]
    if given is None and len({root if has_scheme(root) else os.path.abspath(root) for root in roots}) > 1:
        told = ", ".join(f"{run.folder} of {root}" for run, root in zip(runs, roots, strict=True))
        raise UserError(
            f"The runs were trained on several datasets: {told}. Name runs of one; if it has moved, say with --root "
            "where it is."
        )
    return roots[0]


def _require_its_dataset(run: Trained) -> None:
    """Raise `UserError` unless the tables are there that the run was trained on."""
    checkpoint = newest_checkpoint(run_folder(run.folder))
    assert checkpoint is not None, "a run that was opened has one"
    ours = training_part(run.record, rank=0, world_size=1).selection.identity()
    [theirs] = checkpoint.told["loader"]["datasets"]
    if ours["order"] != theirs["order"]:
        raise UserError(
            f"The streams in {run.record.settings.root} are others than those that {run.folder} was trained on: they "
            "were made anew since, or are another dataset's. Name its own with --root, or train again."
        )


def _sounding(runs: Mapping[str, Trained]) -> str:
    """The stream that is decoded. Raises `UserError` for one without a way back to sound."""
    stream = sounding_stream(runs)
    spec = next(run.record.specs[stream] for run in runs.values() if stream in run.record.specs)
    if not spec.decode_sample_rate:
        raise UserError(
            f"Stream {stream!r} ({spec.tokenizer}) has no way back to sound, so nobody could hear what is generated. "
            "Name runs of a stream that `wavemill decode` takes."
        )
    return stream


def _text(way: Way, prompt: str, options: GenerateOptions) -> str | None:
    """What is said in the prompt and after it, where the runs ask for it. Raises `UserError`."""
    if way.text is None:
        if options.text is not None or options.prompt_text is not None:
            raise UserError(
                f"Runs of {' + '.join(way.layouts)} take no text: leave out --text and --prompt-text, or name runs of "
                "vall-e and vall-e-nar."
            )
        return None
    if not (options.text or "").strip():
        raise UserError(f"Runs of {' + '.join(way.layouts)} say what they are told to: give --text.")
    if options.prompt_seconds is not None and options.prompt_text is None:
        raise UserError("--prompt-seconds takes a part of the recording: say what is said in it with --prompt-text.")
    return spoken(prompt, options.prompt_text, options.text or "")


def _asked(way: Way, prompt: Prompt, options: GenerateOptions) -> Asked:
    if not way.keeps_length:
        seconds = _SECONDS if options.seconds is None else options.seconds
        total = prompt.samples_after(seconds)
        return Asked(num_samples=total, given_samples=prompt.num_samples, iterations=options.iterations)
    if options.seconds is not None:
        raise UserError(
            f"Runs of {' + '.join(way.layouts)} give a recording another sound, and no end: leave out --seconds, or "
            "name a semantic run, too."
        )
    length_s = prompt.num_samples / prompt.sample_rate
    given_s = min(GIVEN_S, length_s / 2) if options.prompt_seconds is None else options.prompt_seconds
    if given_s >= length_s:
        raise UserError(
            f"The prompt has {length_s:.2f} s, and {given_s:g} s of it are to stay as they are: nothing is left to "
            "make. Give fewer --prompt-seconds."
        )
    given = max(1, round(given_s * prompt.sample_rate))
    return Asked(num_samples=prompt.num_samples, given_samples=given, iterations=options.iterations)


def _write_sound(to: str, prompt: Prompt, asked: Asked, continued: Continued) -> tuple[int, float]:
    """Samples of the sound, and seconds of it behind the prompt. Raises `UserError` where it cannot be written."""
    tokenizer = prompt.tokenizers[continued.sounding]
    rate = tokenizer.spec.decode_sample_rate
    before, most = (resampled_length(num, prompt.sample_rate, rate) for num in (asked.given_samples, asked.num_samples))
    sound_N = sound_of(tokenizer, continued.tokens())[..., :most]
    try:
        Path(to).write_bytes(wav_bytes(sound_N, rate))
    except OSError as error:
        raise UserError(f"Cannot write the sound {to}: {error.strerror}.") from error
    num_samples = sound_N.shape[-1]
    return num_samples, max(0, num_samples - before) / rate


def _compared(runs: Sequence[Trained], root: str, continued: Continued) -> list[Sameness]:
    found = []
    for stream, books in continued.made().items():
        record = next(run.record for run in runs if stream in run.record.specs)
        found += compare(record, root, stream, books)
    return found


def _require_place(to: str) -> None:
    """Raise `UserError` if no sound can be written there. Called before anything is computed."""
    if Path(to).suffix.lower() != ".wav":
        raise UserError(f"--to {to!r}: the sound is a WAV file; name it SOMETHING.wav.")
    if not Path(to).absolute().parent.is_dir():
        raise UserError(f"--to {to!r}: there is no folder {Path(to).parent}. Make it first.")


def _require_seconds(flag: str, seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds <= _MOST_S:
        raise UserError(f"{flag} is {seconds:g}; it must be more than 0, and at most {_MOST_S:,.0f}.")
