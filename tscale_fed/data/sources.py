"""From files to pieces of text, in a fixed order and with bounded memory.

Enters: paths of text files, folders, jsonl files. Leaves: `SourceFile`s, and for each its `Piece`s.

A document is a file, or one line of a .jsonl file (field "text"). A folder gives its text files, sorted by relative path, hidden ones
left out. A document longer than WHOLE_PIECES pieces is cut into pieces of `piece_bytes` to twice that: at the first blank line after
that size, else at the last line end, else the last space. The cut lies before the last whitespace character of a gap, where GPT-2's rule
for splitting text into words cuts as well, so the ids are those of the uncut text. Text that is not UTF-8 passes through as it is:
tokenizers decide.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from tscale_fed.data import limits
from tscale_net.errors import Refused

JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex"})
PACKED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".parquet", ".arrow", ".pdf", ".epub", ".docx"})
UTF8_MARK = b"\xef\xbb\xbf"
DEMO = "builtin:demo"
"""As a source: the public-domain text that ships with the package."""

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n(?=[^ \t\r\n])")
_LINE_END = re.compile(rb"\n(?=[^ \t\r\n])")
_SPACE = re.compile(rb" (?=[^ \t\r\n])")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read. `name` is what the import record keeps: relative to the folder that was named, no private path."""

    path: Path
    name: str
    size: int

    @property
    def is_jsonl(self) -> bool:
        return self.path.suffix.lower() in JSONL_SUFFIXES


@dataclass(frozen=True, slots=True)
class Piece:
    """A document or a part of one. `starts_document` is False where the text continues the piece before."""

    text: bytes
    starts_document: bool


class _Record(msgspec.Struct):
    text: str


_decode_record = msgspec.json.Decoder(_Record).decode


def demo_folder() -> Path:
    """The demo text inside the installed package."""
    return Path(__file__).parent / "text"


def find_sources(sources: Iterable[str | Path]) -> list[SourceFile]:
    """Every file behind the given files and folders, in import order.

    Raises Refused: "no-source" (missing path, folder without text), "packed-source" (compressed or binary format), "empty-source".
    """
    found: list[SourceFile] = []
    for source in sources:
        path = demo_folder() if str(source) == DEMO else Path(source)
        if path.is_dir():
            found.extend(_folder_files(path))
        elif path.is_file():
            if path.suffix.lower() in PACKED_SUFFIXES:
                raise Refused("packed-source", f"{path} is packed or not plain text: unpack it to .txt or .jsonl first.")
            found.append(SourceFile(path, path.name, path.stat().st_size))
        else:
            raise Refused("no-source", f"No file or folder {path}: check the path.")
    if sum(file.size for file in found) == 0:
        named = ", ".join(str(file.path) for file in found) or "The list of sources"
        raise Refused("empty-source", f"{named} holds no text: name a file with text in it.")
    return found


def _folder_files(folder: Path) -> list[SourceFile]:
    """Text and jsonl files below a folder. Folders behind symbolic links are not entered: they may form a circle."""
    names: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in TEXT_SUFFIXES | JSONL_SUFFIXES:
                names.append((Path(parent) / name).relative_to(folder).as_posix())
    if not names:
        wanted = " ".join(sorted(TEXT_SUFFIXES | JSONL_SUFFIXES))
        raise Refused("no-source", f"Folder {folder} has no text files ({wanted}): name the files themselves if they end otherwise.")
    return [SourceFile(folder / name, name, (folder / name).stat().st_size) for name in sorted(names)]


def piece_bytes_for(total_bytes: int) -> int:
    """Size at which long documents are cut: a power of two, about 1/256 of the sources, within limits.py."""
    wanted = max(1, total_bytes // limits.PIECES_PER_IMPORT)
    return min(max(1 << (wanted.bit_length() - 1), limits.MIN_PIECE_BYTES), limits.MAX_PIECE_BYTES)


def read_pieces(file: SourceFile, piece_bytes: int, seen: Callable[[bytes], None]) -> Iterator[Piece]:
    """The pieces of one file; `seen` gets every byte read, in order (for hashing and progress).

    Raises Refused: "bad-line" (jsonl, with file and line number), "no-source" (not readable).
    """
    try:
        with file.path.open("rb") as stream:
            if file.is_jsonl:
                yield from _jsonl_pieces(stream, file.path, piece_bytes, seen)
            else:
                yield from _cut(_blocks(stream, seen), piece_bytes)
    except OSError as error:
        raise Refused("no-source", f"{file.path} cannot be read ({error.strerror}): check its permissions and its disk.") from error


def _blocks(stream: BinaryIO, seen: Callable[[bytes], None]) -> Iterator[bytes]:
    first = True
    while block := stream.read(limits.READ_BLOCK_BYTES):
        seen(block)
        yield block.removeprefix(UTF8_MARK) if first else block
        first = False


def _jsonl_pieces(stream: BinaryIO, path: Path, piece_bytes: int, seen: Callable[[bytes], None]) -> Iterator[Piece]:
    number = 0
    while line := stream.readline(limits.MAX_LINE_BYTES):
        number += 1
        seen(line)
        if len(line) == limits.MAX_LINE_BYTES:
            raise Refused("bad-line", f"{path} line {number} is longer than {limits.MAX_LINE_BYTES // limits.MIB} MB: not a jsonl file.")
        if not line.strip():
            continue
        yield from _cut([_record_text(line, path, number)], piece_bytes)


def _record_text(line: bytes, path: Path, number: int) -> bytes:
    try:
        return _decode_record(line).text.encode()
    except msgspec.ValidationError as error:
        detail = f'{path} line {number} has no text: each line must be an object with a string field "text" ({error}).'
        raise Refused("bad-line", detail) from error
    except (msgspec.DecodeError, UnicodeError) as error:
        raise Refused("bad-line", f"{path} line {number} is not valid JSON ({error}): repair or remove the line.") from error


def _cut(blocks: Iterable[bytes], piece_bytes: int) -> Iterator[Piece]:
    """Cut one document, given block by block; whole if it is short. The last piece may be small."""
    uncut_bytes = limits.WHOLE_PIECES * piece_bytes
    rest = b""
    starts = True
    for block in blocks:
        rest += block
        begin = 0
        while len(rest) - begin > uncut_bytes:
            end = _cut_position(rest, begin, piece_bytes)
            yield Piece(rest[begin:end], starts)
            starts = False
            uncut_bytes = 2 * piece_bytes
            begin = end
        rest = rest[begin:]
    if rest:
        yield Piece(rest, starts)


def _cut_position(text: bytes, begin: int, piece_bytes: int) -> int:
    """Where the piece that begins at `begin` ends; more than 2 * piece_bytes of text follow `begin`."""
    middle, last = begin + piece_bytes, begin + 2 * piece_bytes
    # The pattern looks one byte past its end, hence `last + 1`.
    if blank := _BLANK_LINE.search(text, middle, last + 1):
        return blank.end() - 1
    for pattern in (_LINE_END, _SPACE):
        gaps = list(pattern.finditer(text, middle, last + 1))
        if gaps:
            return gaps[-1].start()
    # One unbroken run of bytes: do not cut inside a UTF-8 character (continuation bytes are 10xxxxxx, at most three of them).
    for end in range(last, last - 4, -1):
        if text[end] & 0xC0 != 0x80:
            return end
    return last
