"""What is said and when, as text behind the units that it is read from."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...tokenizers.spec import StreamSpec
from .sequence import Mark, Run, SequencePlan
from .timed import timed_stream
from .vocabulary import Vocabulary, books_of, require_distinct, special, stream_taken


@dataclass(frozen=True, slots=True)
class transcript:
    """Codes of speech, which are given, then `<text>` and what is said with its timestamps, then `<eos>`.

    Recognition with times as Whisper has it (Radford et al. 2022), from tokens: ids of words between timestamps of
    0.02 s, from a stream made with `whisper-text` (sentences) or `word-tokens` (words). They come first in the
    vocabulary, the ids as in their text tokenizer.
    """

    text: str
    audio: str
    codebooks: int | None = 1  # None: all that are read

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.text: 1, self.audio: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> SequencePlan:
        require_distinct("transcript", self.text, self.audio)
        text = timed_stream("transcript", specs, self.text)
        audio = stream_taken("transcript", specs, self.audio, self.codebooks)
        books = tuple(range(audio.num_codebooks if self.codebooks is None else self.codebooks))
        blocks = [*books_of(self.text, text, [0]), *books_of(self.audio, audio, books), *special("<text>", "<eos>")]
        parts = (
            Run(self.audio, books, is_predicted=False),
            Mark("<text>", is_predicted=False),
            Run(self.text, (0,)),
            Mark("<eos>"),
        )
        return SequencePlan(parts, Vocabulary.of(blocks))
