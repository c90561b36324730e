"""The token data of a run on this machine: own, already here, or fetched from other peers.

Enters: the run's data recipe, a directory, linked peers. Leaves: open `TokenData`. Every file is checked against the hash in the manifest
before it is used; a broken-off fetch continues with the files that are missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from tscale_fed.data.assemble import assemble, missing_files
from tscale_fed.data.manifest import MANIFEST_FILE, UNIGRAMS_FILE, DataFile, DataRecipe, read_manifest
from tscale_fed.data.token_data import TokenData
from tscale_net.errors import Refused
from tscale_net.ports import PeerId
from tscale_net.transfer import Transfers

Progress = Callable[[int, int], None]
"""(bytes here, bytes in all)."""

PART_SUFFIX = ".fetched"


def local_data(recipe: DataRecipe, folders: Sequence[Path]) -> TokenData | None:
    """The run's own data, if one of `folders` holds exactly it."""
    for folder in folders:
        if (folder / MANIFEST_FILE).is_file() and read_manifest(folder) == recipe.data:
            return TokenData.open(folder)
    return None


async def own_text(
    recipe: DataRecipe, folder: Path, kept_in: Path, transfers: Transfers, sources: Callable[[], Sequence[PeerId]], progress: Progress
) -> TokenData:
    """Text of one's own in `folder`, made with the run's tokenizer. The run's unigram counts are fetched to `kept_in`: the model's output
    bias is one for all peers, so it must not come from that text.

    Raises Refused: "wrong-tokenizer", "no-source", "bad-data", "disk".
    """
    recipe.check_own_data(read_manifest(folder))
    try:
        kept_in.mkdir(parents=True, exist_ok=True)
        missing = await asyncio.to_thread(missing_files, kept_in, recipe.data.vocabulary_files())
        await _fetch_all(missing, sum(f.size for f in missing), kept_in, transfers, sources, progress)
    except OSError as error:
        detail = f"the run's token counts cannot be written to {kept_in} ({error.strerror}): make room, or choose another --home"
        raise Refused("disk", detail) from None
    return TokenData.open(folder, unigrams=kept_in / UNIGRAMS_FILE)


async def fetch_data(
    recipe: DataRecipe, folder: Path, transfers: Transfers, sources: Callable[[], Sequence[PeerId]], progress: Progress
) -> TokenData:
    """Bring all shards to `folder` and open them.

    Raises Refused: "data-not-served" if the run wants everybody to bring own text, "no-source", "bad-data", "disk".
    """
    if not recipe.served:
        raise Refused(
            "data-not-served",
            "this run serves no text: import your own with "
            f"`tscale data import … --tokenizer {recipe.data.tokenizer.kind}` and pass --data-dir",
        )
    parts = folder.with_name(folder.name + PART_SUFFIX)
    files = recipe.files()
    try:
        parts.mkdir(parents=True, exist_ok=True)
        missing = await asyncio.to_thread(missing_files, parts, files)
        await _fetch_all(missing, sum(f.size for f in files), parts, transfers, sources, progress)
        await asyncio.to_thread(assemble, folder, recipe.data, {f.name: parts / f.name for f in files if f.size})
        for leftover in parts.iterdir():
            leftover.unlink()
        parts.rmdir()
    except OSError as error:
        raise Refused("disk", f"the run's data cannot be written to {folder} ({error.strerror}): make room, or choose --data-dir") from None
    return TokenData.open(folder)


async def _fetch_all(
    missing: Sequence[DataFile], total: int, parts: Path, transfers: Transfers, sources: Callable[[], Sequence[PeerId]], progress: Progress
) -> None:
    done = total - sum(f.size for f in missing)
    for file in missing:
        if file.size == 0:
            continue
        before = done

        def show(here: int, _: int, before: int = before) -> None:
            progress(before + here, total)

        unfinished = parts / f"{file.name}.unfinished"
        try:
            with unfinished.open("wb") as sink:
                await transfers.fetch(
                    file.blob, sources(), max_bytes=file.size, expected_hash=bytes.fromhex(file.hash), sink=sink, progress=show
                )
            unfinished.rename(parts / file.name)
        finally:
            unfinished.unlink(missing_ok=True)
        done += file.size
