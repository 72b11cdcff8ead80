"""Layouts of one stream, one token a step."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...tokenizers.spec import StreamSpec
from .sequence import Mark, Run, SequencePlan
from .vocabulary import Vocabulary, books_of, special, stream_taken


@dataclass(frozen=True, slots=True)
class flatten:
    """All codebooks of a stream, frame by frame: code c of codebook k is token k x codebook_size + c.

    The coarse-to-fine flattening of AudioLM (Borsos et al. 2022) and of the "flattening pattern" of MusicGen (Copet et
    al. 2023), T x K tokens for T frames. With `ends`, `<bos>` and `<eos>` around each segment.
    """

    stream: str
    codebooks: int | None = None  # None: all that are read
    ends: bool = False

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.stream: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> SequencePlan:
        spec = stream_taken("flatten", specs, self.stream, self.codebooks)
        num = spec.num_codebooks if self.codebooks is None else self.codebooks
        run = Run(self.stream, tuple(range(num)))
        blocks = books_of(self.stream, spec, range(num))
        if not self.ends:
            return SequencePlan((run,), Vocabulary.of(blocks))
        return SequencePlan((Mark("<bos>"), run, Mark("<eos>")), Vocabulary.of([*blocks, *special("<bos>", "<eos>")]))


@dataclass(frozen=True, slots=True)
class semantic:
    """The first codebook of a stream, as it is: the units that textless language models train on.

    GSLM (Lakhotia et al. 2021), with deduplicated units where the stream is one of those, and AudioLM's first stage
    (Borsos et al. 2022). With `ends`, `<bos>` and `<eos>` around each segment.
    """

    stream: str
    ends: bool = False

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.stream: 1}

    def plan(self, specs: Mapping[str, StreamSpec]) -> SequencePlan:
        return flatten(self.stream, 1, self.ends).plan(specs)
