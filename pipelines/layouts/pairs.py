"""Layouts of two recordings that belong together: one is given, the other predicted."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...storage.layouts import GroupBy, Grouping, member
from ...tokenizers.spec import StreamSpec
from .sequence import Mark, Run, SequencePlan
from .vocabulary import Vocabulary, books_of, special, stream_taken


@dataclass(frozen=True, slots=True)
class units_to_units:
    """Source units, `<sep>`, target units, `<eos>`: speech-to-speech translation by units.

    Lee et al. (2022), and SeamlessM4T (2023). Their targets are deduplicated units: take a stream of those, whose
    durations are the vocoder's. The source of a pair is the first of its two rows in the corpus; it and `<sep>` are
    given, not predicted. Both have the same tokens, unless `target` names another stream, whose tokens come behind.

    A pair is left out if either row has an error in either stream: also in one that is not read of it, as `target` of
    the first row.
    """

    source: str
    target: str | None = None  # None: the stream of the source

    @property
    def grouping(self) -> Grouping:
        return Grouping(GroupBy.PAIR, 2)

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.source: 1, self._target: 1}

    @property
    def _target(self) -> str:
        return self.source if self.target is None else self.target

    def plan(self, specs: Mapping[str, StreamSpec]) -> SequencePlan:
        runs = (
            Run(member(self.source, 0), (0,), is_predicted=False, block=self.source),
            Run(member(self._target, 1), (0,), block=self._target),
        )
        taken = {run.name: stream_taken("units-to-units", specs, run.stream) for run in runs}
        blocks = [block for name, spec in taken.items() for block in books_of(name, spec, (0,))]
        vocabulary = Vocabulary.of([*blocks, *special("<sep>", "<eos>")])
        return SequencePlan((runs[0], Mark("<sep>", is_predicted=False), runs[1], Mark("<eos>")), vocabulary)
