"""An open recording: what a decoder is given instead of a name. A leaf."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass


@dataclass(slots=True)
class OpenRecording(AbstractContextManager["OpenRecording"]):
    """A recording's bytes: `size` of them from `offset` of an open, regular file. A context manager that closes it."""

    fd: int
    offset: int
    size: int
    whole: bool  # the file is the recording
    name: str  # the last part of its path, for people

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)
