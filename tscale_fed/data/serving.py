"""Handing data files to other peers.

Enters: an open `TokenData`, and blob names that strangers ask for. Leaves: a `FileBlob` for exactly the files that the run's recipe names;
anything else is not here. Names are looked up in a table, so no path is ever made from what was asked.
"""

from __future__ import annotations

from pathlib import Path

from tscale_fed.data.manifest import DataRecipe
from tscale_net.errors import Refused


class FileBlob:
    """A file that is read in parts, as the transfer of blobs wants it: `size`, `read`."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), fewer at the end. Opens the file each time: nothing is held between slow transfers."""
        with self._path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)


class DataServer:
    """The blobs `data/<hash>` of one run."""

    def __init__(self, directory: Path, recipe: DataRecipe) -> None:
        """`directory` holds the files of `recipe`. Raises Refused("bad-data") if one is missing or has another size."""
        self._blobs: dict[str, FileBlob] = {}
        for file in recipe.files():
            path = directory / file.name
            if not path.is_file() or path.stat().st_size != file.size:
                raise Refused("bad-data", f"{path} is missing or has changed: import the text again.")
            self._blobs[file.blob] = FileBlob(path, file.size)

    def blob(self, name: str) -> FileBlob | None:
        """The blob of this name; None if this run has no such file."""
        return self._blobs.get(name)
