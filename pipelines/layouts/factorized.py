"""Two streams of the same sound, the one that says what it is before the one that says how it sounds."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...tokenizers.spec import StreamSpec
from .sequence import Mark, Run, SequencePlan
from .vocabulary import Vocabulary, books_of, require_distinct, special, stream_taken


@dataclass(frozen=True, slots=True)
class factorized:
    """`<reason>`, the tokens of a reasoning stream, `<reconstruct>`, those of a reconstruction stream, `<eos>`.

    UniAudio 2.0 (Yang et al. 2026): a codec whose reasoning tokens, few and close to text, come first, and whose
    reconstruction tokens follow from them. Any two streams do: units, phones or text before a codec. Codebooks lie
    frame by frame here, one a step; the paper's model reads those of a frame at once. With `given`, the reasoning
    tokens are not predicted, as in the paper's task from the ones to the others.
    """

    reasoning: str
    reconstruction: str
    reasoning_codebooks: int | None = None  # None: all that are read
    codebooks: int | None = None  # of the reconstruction stream; None: all that are read
    given: bool = False

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.reasoning: self.reasoning_codebooks, self.reconstruction: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> SequencePlan:
        require_distinct("factorized", self.reasoning, self.reconstruction)
        blocks, runs = [], []
        for stream, num in self.streams.items():
            spec = stream_taken("factorized", specs, stream, num)
            books = tuple(range(spec.num_codebooks if num is None else num))
            blocks += books_of(stream, spec, books)
            runs.append(Run(stream, books, is_predicted=not (self.given and stream == self.reasoning)))
        reasoning, reconstruction = runs
        parts = (
            Mark("<reason>", is_predicted=not self.given),
            reasoning,
            Mark("<reconstruct>", is_predicted=not self.given),
            reconstruction,
            Mark("<eos>"),
        )
        return SequencePlan(parts, Vocabulary.of([*blocks, *special("<reason>", "<reconstruct>", "<eos>")]))
