"""`tscale generate MODEL`: the model goes on with a text.

Enters: a model, a prompt from the command line, a file or stdin. Leaves: the continuation on stdout as it is made, or JSON; what it took on
stderr. Ctrl+C ends the answer where it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.inference.batch import Piece
    from tscale_fed.inference.opened import OpenedModel
    from tscale_fed.inference.settings import Settings

EPILOG = """MODEL is the home of a peer or of `tscale train`, or a folder checkpoint-NNN in one.

examples:
  tscale generate HOME --prompt "It was a" --tokens 200 --temperature 0.8
  tscale generate HOME --prompt-file story.txt --top-p 0.95 --seed 7 --count 3
  echo "Call me" | tscale generate HOME --temperature 0 --json --log-probabilities 3
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe `tscale generate` to argparse."""
    parser = subparsers.add_parser(
        "generate",
        help="let a model go on with a text",
        description="Let a model go on with a text.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text to go on with (default: stdin, if it is not a terminal, else nothing)")
    source.add_argument("--prompt-file", type=Path, metavar="FILE")
    parser.add_argument("--document", action="store_true", help="the prompt is the beginning of a document")
    parser.add_argument("--best", action="store_true", help="of a peer's home, the best weights it has measured")
    parser.add_argument("--tokens", type=int, metavar="N", help="at most (default: 256)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="answers, made side by side (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that together reach P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="only tokens with P times the likeliest one's probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: tokens that occurred come less often")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given often")
    parser.add_argument("--seed", type=int, metavar="N", help="equal seeds give equal answers")
    parser.add_argument("--ignore-end", action="store_true", help="go on where a document would end")
    parser.add_argument("--log-probabilities", type=int, metavar="N", help="with --json: of every token and N alternatives")
    parser.add_argument("--json", action="store_true", help="one JSON object per answer, when it is done")
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--weights", choices=["float32", "bfloat16", "int8"], help="default: bfloat16 on a GPU, int8 on a processor")


def run(arguments: argparse.Namespace) -> int:
    """Raises Refused for a model, prompt or setting that cannot be used."""
    settings = _settings(arguments)
    prompt = _prompt(arguments)
    import random
    import secrets
    import time

    import torch

    from tscale_fed.device import torch_device
    from tscale_fed.inference.generate import answer_all, default_format, make_batch, prompt_tokens
    from tscale_fed.inference.opened import open_model
    from tscale_fed.training_thread import default_threads

    model = open_model(arguments.model, arguments.best)
    device = torch_device(arguments.device)
    torch.set_num_threads(default_threads(device, beside_event_loop=False))
    tokens = prompt_tokens(model.tokenizer, prompt, arguments.document)
    kind = arguments.weights or default_format(device)
    batch = make_batch(model, device, kind, len(settings), random.Random(secrets.randbits(63)))
    output = _Output(model, arguments.json, len(settings))
    started = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):  # what is there is shown
        answer_all(batch, [tokens] * len(settings), settings, output.take)
    took = time.monotonic() - started
    output.close()
    made = sum(output.made)
    speed = f"{made} tokens after {len(tokens)} in {took:.1f} s ({made / max(took, 1e-9):.0f}/s)"
    print(f"{model.name}, {model.checkpoint.name}, {kind} weights on {device}: {speed}", file=sys.stderr)
    return 0


def _settings(arguments: argparse.Namespace) -> list[Settings]:
    from tscale_fed.inference import limits
    from tscale_fed.inference.settings import Settings
    from tscale_net.errors import Refused

    if not 1 <= arguments.count <= limits.choices_max:
        raise Refused("bad-setting", f"--count must be 1 to {limits.choices_max}")
    return [
        Settings(
            new_tokens=limits.default_new_tokens if arguments.tokens is None else arguments.tokens,
            temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty, seed=None if arguments.seed is None else arguments.seed + number,
            stop=tuple(arguments.stop), log_probabilities=arguments.log_probabilities, ignore_end=arguments.ignore_end,
        )
        for number in range(arguments.count)
    ]  # fmt: skip


def _prompt(arguments: argparse.Namespace) -> bytes:
    from tscale_fed.inference import limits
    from tscale_net.errors import Refused

    if arguments.prompt is not None:
        return str(arguments.prompt).encode("utf-8", "surrogateescape")
    if arguments.prompt_file is not None:
        with arguments.prompt_file.open("rb") as stream:
            text: bytes = stream.read(limits.prompt_bytes_max + 1)
    elif sys.stdin is None or sys.stdin.isatty():
        return b""
    else:
        text = sys.stdin.buffer.read(limits.prompt_bytes_max + 1)
    if len(text) > limits.prompt_bytes_max:
        raise Refused("bad-prompt", f"the prompt has more than {limits.prompt_bytes_max >> 20} MB: give the last part of it")
    return text


class _Output:
    """Answers on stdout: one as it comes, several when they are done."""

    def __init__(self, model: OpenedModel, as_json: bool, count: int) -> None:
        self._model = model
        self._json = as_json
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._reports: list[list[Any]] = [[] for _ in range(count)]
        self._finish = ["stopped"] * count
        self._live = count == 1 and not as_json
        self.made = [0] * count

    def take(self, number: int, piece: Piece) -> None:
        self.made[number] = piece.made
        self._texts[number].append(piece.text)
        for report in piece.reports:
            alternatives = {self._spelling(token): value for token, value in report.alternatives}
            self._reports[number].append(
                {"token": self._spelling(report.token), "log_probability": report.log_probability, "alternatives": alternatives}
            )
        if piece.finish is not None:
            self._finish[number] = piece.finish
        if self._live:
            sys.stdout.write(piece.text)
            sys.stdout.flush()

    def close(self) -> None:
        for number, texts in enumerate(self._texts):
            text = "".join(texts)
            if self._json:
                found: dict[str, Any] = {"text": text, "tokens": self.made[number], "finish": self._finish[number]}
                if self._reports[number]:
                    found["log_probabilities"] = self._reports[number]
                print(json.dumps(found, ensure_ascii=False))
            elif not self._live:
                print(f"--- {number + 1}\n{text}")
        if self._live:
            print()

    def _spelling(self, token: int) -> str:
        return self._model.tokenizer.decode([token]).decode("utf-8", "replace")
