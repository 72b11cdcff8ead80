"""Text and audio in one vocabulary, and tasks from the one to the other that a tag in front names."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...tokenizers.spec import StreamSpec, UserError, did_you_mean
from .sequence import Mark, Run, SequencePlan
from .vocabulary import Vocabulary, require_distinct, special, stream_taken

# by name, what a task is given and what it is asked for: roles of streams
TASKS = {
    "asr": ("audio", "text"),
    "tts": ("text", "audio"),
    "mt": ("text", "translation"),
    "ast": ("audio", "translation"),
    "s2st": ("audio", "spoken_translation"),
}
# by role, whose tokens its stream has: text first
_BLOCKS = {"text": "text", "translation": "text", "audio": "audio", "spoken_translation": "audio"}
_TRANSLATED = ("translation", "spoken_translation")


@dataclass(frozen=True, slots=True)
class unified:
    """A tag such as `[ASR English]`, the source, then the target of a task, or the targets of a chain of tasks.

    AudioPaLM (Rubenstein et al. 2023). Text ids are tokens as they are, so that a text language model's embedding can
    be extended by the audio codes, tags and marks that follow them. `tasks` are `asr`, `tts`, `mt`, `ast` and `s2st`,
    all of one source; several are the paper's combined tasks: `("asr", "ast", "s2st")` gives `[ASR AST S2ST English
    French]`, the audio, its transcript, the translation, its sound. `<sep>` stands after the source and between
    targets, `<eos>` at the end; tag and source are given. A tag is one token, where the paper spells it in text ids.
    Audio is a stream of units, or the first `codebooks` of a codec frame by frame; translations are streams of the same
    segments.

    A layout has one language: `where` on the corpus's column `language` chooses it. Layouts of one mixture share a
    vocabulary if they name the same `tags` (None: a layout has its own), and streams of the same tokenizers: a stream
    that is named has its tokens there, though no task takes it. Raises `UserError` for tasks that do not go together or
    lack a stream; a dataset also for two texts, or two audio streams, of other tokenizers, weights or codebooks.
    """

    tasks: tuple[str, ...] = ("asr",)
    text: str | None = None  # stream of the transcript
    audio: str | None = None
    translation: str | None = None  # stream of the text in the target language
    spoken_translation: str | None = None
    language: str | None = None  # as tags name it
    target_language: str | None = None
    codebooks: int = 1  # of audio
    tags: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError(f"Layout unified has no task; there are: {', '.join(TASKS)}.")
        if stray := [task for task in self.tasks if task not in TASKS]:
            raise UserError(
                f"Layout unified: there is no task {stray[0]!r}; there are: {', '.join(TASKS)}."
                f"{did_you_mean(stray[0], TASKS)}"
            )
        for task in self.tasks:
            if self.tasks.count(task) > 1:
                raise UserError(f"Layout unified: task {task} is there twice; keep one.")
            if TASKS[task][0] != self._roles[0]:
                raise UserError(
                    f"Layout unified: {self.tasks[0]} is given {self._roles[0]} and {task} {TASKS[task][0]}; all tasks "
                    "of a chain must be given the same."
                )
        for role in self._roles:
            if getattr(self, role) is None:
                raise UserError(f"Layout unified: {'/'.join(self.tasks)} takes {role}: name its stream ({role}=...).")
        if self.tags is not None and (self.tag not in self.tags or len(set(self.tags)) < len(self.tags)):
            raise UserError(
                f"Layout unified has the tag {self.tag}; tags are {', '.join(self.tags)}: name it there once."
            )

    @property
    def _roles(self) -> list[str]:
        """What is given, then what is asked for in turn."""
        return [TASKS[self.tasks[0]][0], *(TASKS[task][1] for task in self.tasks)]

    @property
    def tag(self) -> str:
        """What is in front: the tasks and, as far as they are named, the languages."""
        languages = [self.language, self.target_language if any(role in _TRANSLATED for role in self._roles) else None]
        return f"[{' '.join([*(task.upper() for task in self.tasks), *filter(None, languages)])}]"

    @property
    def _named(self) -> dict[str, str]:
        """By role its stream."""
        return {role: stream for role in _BLOCKS if (stream := getattr(self, role)) is not None}

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {stream: 1 if _BLOCKS[role] == "text" else self.codebooks for role, stream in self._named.items()}

    @property
    def same_tokens(self) -> tuple[tuple[str, str], ...]:
        """Pairs of streams with the same tokens: both texts, and both audio streams."""
        first: dict[str, str] = {}
        shared = [(first.setdefault(_BLOCKS[role], stream), stream) for role, stream in self._named.items()]
        return tuple(pair for pair in shared if pair[0] != pair[1])

    def plan(self, specs: Mapping[str, StreamSpec]) -> SequencePlan:
        require_distinct("unified", *self._named.values())
        books = {"text": (0,), "audio": tuple(range(self.codebooks))}
        shared: dict[str, tuple[str, StreamSpec]] = {}  # by block the first of its streams
        for role, stream in self._named.items():
            spec = stream_taken("unified", specs, stream, self.streams[stream])
            _require_alike(shared.setdefault(_BLOCKS[role], (stream, spec)), (stream, spec))
        parts: list[Mark | Run] = [Mark(self.tag, is_predicted=False)]
        for number, role in enumerate(self._roles):
            if number > 0:
                parts.append(Mark("<sep>", is_predicted=number > 1))
            block = _BLOCKS[role]
            parts.append(Run(self._named[role], books[block], is_predicted=number > 0, block=block))
        blocks = [(block, book, spec.codebook_size) for block, (_, spec) in shared.items() for book in books[block]]
        marks = special(*(self.tags or (self.tag,)), "<sep>", "<eos>")
        return SequencePlan((*parts, Mark("<eos>")), Vocabulary.of([*blocks, *marks]))


def _require_alike(one: tuple[str, StreamSpec], other: tuple[str, StreamSpec]) -> None:
    """Raise `UserError` for two streams whose ids cannot be the same tokens."""
    (stream, spec), (other_stream, other_spec) = one, other
    if (spec.tokenizer, spec.codebook_size) != (other_spec.tokenizer, other_spec.codebook_size):
        raise UserError(
            f"Layout unified has one vocabulary: streams {stream!r} ({spec.tokenizer}, {spec.codebook_size:,} ids) and "
            f"{other_stream!r} ({other_spec.tokenizer}, {other_spec.codebook_size:,} ids) are of different tokenizers. "
            "Make them with one."
        )
