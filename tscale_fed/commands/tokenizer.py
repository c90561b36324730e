"""`tscale tokenizer`: `train` makes one from text, `show` says what is in one and how it writes a text, `convert` writes TScale's form.

Progress goes to stderr, the result to stdout. A file appears whole under its name or not at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tscale_net.errors import Refused

if TYPE_CHECKING:
    from tscale_fed.data.tokenizer import Tokenizer
    from tscale_fed.data.word_tokenizer import WordKind

KINDS = ("bpe", "char", "word", "word-capital", "greedy", "greedy-capital")
DEFAULT_SIZE = 8192
"""Right for models of 1 to 10 million weights; 32768 to 50000 for larger ones."""
SHOWN_TOKENS = 64


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe `tscale tokenizer` to argparse."""
    parser = subparsers.add_parser("tokenizer", help="make a tokenizer from text, look at one", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    training = actions.add_parser("train", help="text -> tokenizer file", allow_abbrev=False)
    training.add_argument("sources", nargs="+", metavar="SRC", help="file, folder, .jsonl, or builtin:demo")
    training.add_argument("--kind", choices=KINDS, default="bpe", help="byte-level BPE, or TScale's (default: %(default)s)")
    training.add_argument("--size", type=int, default=DEFAULT_SIZE, metavar="N", help="tokens (bpe) or words (default: %(default)s)")
    training.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to make, for example words.json")

    showing = actions.add_parser("show", help="what is in a tokenizer, and how it writes a text", allow_abbrev=False)
    showing.add_argument("tokenizer", metavar="NAME", help="bytes, gpt2, a tokenizer.json, or a tokenizer .bin of TScale")
    showing.add_argument("text", nargs="?", metavar="TEXT", help="a text to write with it")

    converting = actions.add_parser("convert", help="between our word tokenizers and TScale's binary files", allow_abbrev=False)
    converting.add_argument("tokenizer", type=Path, metavar="FILE")
    converting.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends in .bin for TScale's form, in .json for ours")


def run(args: argparse.Namespace) -> int:
    """Run the action. Raises Refused, whose sentence `tscale` prints."""
    {"train": _train, "show": _show, "convert": _convert}[args.action](args)
    return 0


def _train(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise Refused("exists", f"{args.out} is there already: name another file with --out.")
    if not 1 <= args.size <= 1 << 20:
        raise Refused("bad-size", f"--size {args.size} must lie in 1..{1 << 20}.")
    source = _trained_bpe(args.sources, args.size) if args.kind == "bpe" else _trained_words(args.sources, args.kind, args.size)
    _write(args.out, source)
    from tscale_fed.data.tokenizer import load_tokenizer

    print(f"{args.out}: {_facts(load_tokenizer(args.out))}")


def _texts(sources: list[str]) -> Iterator[bytes]:
    """Texts of the sources, with progress by bytes."""
    from tscale_fed.console import Console
    from tscale_fed.data.limits import MAX_PIECE_BYTES
    from tscale_fed.data.sources import find_sources, read_pieces
    from tscale_net.ports import SystemClock

    files = find_sources(sources)
    total = sum(file.size for file in files)
    console = Console(sys.stderr, SystemClock())
    done = 0

    def seen(block: bytes) -> None:
        nonlocal done
        done += len(block)
        console.progress("reading", done, total)

    try:
        for file in files:
            for piece in read_pieces(file, MAX_PIECE_BYTES, seen):
                yield piece.text
    finally:
        console.close()


def _trained_words(sources: list[str], kind: WordKind, size: int) -> bytes:
    from tscale_fed.data.word_file import encode_vocabulary
    from tscale_fed.data.word_training import train_words

    def progress(done: int, total: int) -> None:
        print(f"\rpieces: round {done} of {total}", end="" if done < total else "\n", file=sys.stderr)

    return encode_vocabulary(train_words(_texts(sources), kind, size, progress))


def _trained_bpe(sources: list[str], size: int) -> bytes:
    """Byte-level BPE as GPT-2's (Sennrich et al. 2016; Radford et al. 2019), by the `tokenizers` library."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + 1:
        raise Refused("bad-size", f"--size {size} is too small for BPE: bytes alone are {len(alphabet)} tokens.")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator((text.decode("utf-8", "replace") for text in _texts(sources)), trainer)
    return inner.to_str(pretty=True).encode()


def _show(args: argparse.Namespace) -> None:
    from tscale_fed.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    print(_facts(tokenizer))
    if args.text is None:
        return
    ids = tokenizer.encode(os.fsencode(args.text))
    for token in ids[:SHOWN_TOKENS].tolist():
        print(f"{token:8d}  {tokenizer.decode([token])!r}")
    if ids.size > SHOWN_TOKENS:
        print(f"     ...  {ids.size - SHOWN_TOKENS} more")
    back = "comes back exactly" if tokenizer.decode(ids.tolist()) == os.fsencode(args.text) else "does not come back exactly"
    print(f"{ids.size} tokens for {len(os.fsencode(args.text))} bytes; the text {back}")


def _convert(args: argparse.Namespace) -> None:
    from tscale_fed.data.tokenizer import load_tokenizer
    from tscale_fed.data.word_file import encode_vocabulary, write_original
    from tscale_fed.data.word_tokenizer import WordTokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    if not isinstance(tokenizer, WordTokenizer):
        raise Refused("bad-tokenizer", f"{args.tokenizer} is no word tokenizer: only these have a form in TScale.")
    form = {".bin": write_original, ".json": encode_vocabulary}.get(args.out.suffix)
    if form is None:
        raise Refused("bad-name", f"{args.out} must end in .bin for TScale's form or in .json for ours.")
    _write(args.out, form(tokenizer.vocabulary))
    print(f"{args.out}: {_facts(tokenizer)}")


def _facts(tokenizer: Tokenizer) -> str:
    kind = getattr(getattr(tokenizer, "vocabulary", None), "kind", tokenizer.record.kind)
    return f"{kind} tokenizer {tokenizer.hash[:12]}, vocabulary {tokenizer.vocab} with fragment start and document start"


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
