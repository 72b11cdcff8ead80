"""What tests say of the hostile things that they offer: lines of a table and figures below it."""

from collections.abc import Callable

CASE, FIGURE = "hostile-case", "hostile-figure"
SUMS = {
    "outside": "files opened outside of the source, the dataset and the environment",
    "connections": "connections or look-ups beyond the store that was named",
    "executed": "payloads executed, programs started, objects unpickled",
    "secrets": "secrets found in what was printed, stored or logged",
    "searched": "bytes that were searched for secrets",
}
PEAKS = {"peak_bytes": "bytes, the most that any process had in memory"}


class Teller:
    """Puts lines into the table and counts into its figures."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def case(self, offered: str, came: str) -> None:
        """What was offered; the error class, the codes or the sentence that came of it."""
        self._record(CASE, (offered, came))

    def figure(self, name: str, value: int) -> None:
        """Something that was counted, by a name of `SUMS`, or measured, by one of `PEAKS`."""
        assert name in {**SUMS, **PEAKS}
        self._record(FIGURE, (name, value))
