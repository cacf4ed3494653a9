"""Files that are replaced completely or not at all."""

import os
from pathlib import Path


def write_durably(path: Path, *contents: bytes | memoryview) -> None:
    """Replace the file at `path`, even if the machine stops: write aside, fsync, rename, fsync."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
