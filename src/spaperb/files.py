"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a path to write to, and move it to ``path`` once it is written.

    Parameters
    ----------
    path
        Where the file is to be; its folder is made if it is missing.
    overwrite
        Whether to replace a file that is there by then.

    Raises
    ------
    FileExistsError
        If a file is there and is not to be replaced; it stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".spaperb-") as folder:
        whole = Path(folder) / path.name
        yield whole
        if overwrite:
            os.replace(whole, path)
        else:
            os.link(whole, path)  # unlike a rename, refuses to replace a file
