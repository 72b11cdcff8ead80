"""Arrays that lie in a file on this machine, for what memory may not hold."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .spec import RunFailed


def reserved(path: Path, shape: tuple[int, int], dtype: str = "float32") -> NDArray[Any]:
    """An array in a new file. Raises `RunFailed` if there is no room for it."""
    if not shape[0]:
        return np.empty(shape, dtype)
    size_bytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # now, for a full disk kills who writes to the map
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:
                file.truncate(size_bytes)
    except OSError as error:
        raise RunFailed(
            f"There is no room for {size_bytes / 1e6:,.0f} MB of frames in {path.parent} ({error.strerror}). Free "
            "some, name another folder by TMPDIR, or give a smaller --budget."
        ) from error
    return np.memmap(path, dtype, mode="r+", shape=shape)
