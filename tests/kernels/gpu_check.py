"""Every case on the GPU, Triton against the reference: python tests/kernels/gpu_check.py [--sizes tiny small full] [--only WORD ...]

Several processes share the cases, so that kernels compile side by side. One that loses its CUDA context (an illegal access) is started
again behind the case that did it; a case that does not end is named when the time is over. One line per case as it ends, then a summary
with the full text of every failure, short enough for a log that keeps its last 12,000 characters. Exits with 1 if a case failed, 2
without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(_ROOT / room) for room in ("kernels", "net", "peers", ".")]
    if "--device=cpu" in sys.argv:  # how this script itself is tried out where no GPU is
        os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from case_protocol import FULL, SMALL, TINY, Setting  # noqa: E402
from run_cases import Outcome, check, found_modules, is_broken_device, load_cases  # noqa: E402

SIZES = {"tiny": TINY, "small": SMALL, "full": FULL}
PROCESSES = 6
SUMMARY_CHARACTERS = 9000
_LOST_DEVICE = 3


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="cases modules (all)")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "small"])
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose name contains one of the words")
    parser.add_argument("--without", nargs="*", default=[], metavar="WORD", help="no cases whose name contains one of the words")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run (fresh numbers otherwise)")
    parser.add_argument("--seconds", type=float, default=115.0, help="what has not ended by then fails")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def complete(options: argparse.Namespace) -> None:
    """What was left open: all modules, fresh numbers."""
    options.modules = options.modules or found_modules()
    options.seed = secrets.randbelow(2**31) if options.seed is None else options.seed


# -- a child: some of the cases -----------------------------------------------------------------------------------------


def run_part(options: argparse.Namespace) -> int:
    """Cases number part, part + processes, ... without the first `skip` of them; JSON lines on stdout."""
    if options.device == "cpu":
        import interpreter_fix

        interpreter_fix.install()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    chosen = load_cases(options.modules, options.only, options.without)
    cases = [(size, name, build) for size in options.sizes for name, build in chosen.items()]
    for size, name, build in cases[options.part :: options.processes][options.skip :]:
        title = f"{name} @{size}"
        print(json.dumps({"start": title}), flush=True)
        outcome = check(name, build, Setting(SIZES[size], device, options.seed))
        print(json.dumps({**asdict(outcome), "name": title}), flush=True)
        if outcome.verdict == "FAIL" and is_broken_device(outcome.text):
            return _LOST_DEVICE
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


# -- the parent ----------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One child at a time, and what it has said."""

    number: int
    outcomes: list[Outcome] = field(default_factory=list)
    running: str | None = None
    process: subprocess.Popen[str] | None = None
    errors: str = ""

    def run(self, options: argparse.Namespace, said: queue.Queue[Outcome]) -> None:
        """Until all its cases have an outcome. A child that dies without one is restarted behind the case it was at."""
        code = _LOST_DEVICE
        while code:
            before = len(self.outcomes)
            code = self._run_child(options, said)
            if code and self.running:
                self._note(Outcome(self.running, "FAIL", f"the process ended with code {code}: {self.errors[-500:]}", 0.0), said)
            elif code and len(self.outcomes) == before:
                self._note(Outcome(f"part {self.number}", "FAIL", f"no case could start, code {code}: {self.errors[-500:]}", 0.0), said)
                return

    def _run_child(self, options: argparse.Namespace, said: queue.Queue[Outcome]) -> int:
        words = [*options.modules, "--sizes", *options.sizes, f"--device={options.device}", "--seed", str(options.seed)]
        words += ["--processes", str(options.processes), "--part", str(self.number), "--skip", str(len(self.outcomes))]
        words += [*(["--only", *options.only] if options.only else []), *(["--without", *options.without] if options.without else [])]
        command = [sys.executable, str(Path(__file__).resolve()), *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        listener = threading.Thread(target=self._collect_errors, args=(self.process,), daemon=True)
        listener.start()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"start"'):
                self.running = json.loads(line)["start"]
            elif line.startswith('{"name"'):
                self._note(Outcome(**json.loads(line)), said)
        listener.join()
        return self.process.wait()

    def _collect_errors(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.errors = process.stderr.read()

    def _note(self, outcome: Outcome, said: queue.Queue[Outcome]) -> None:
        self.running = None
        self.outcomes.append(outcome)
        said.put(outcome)


def run_all(options: argparse.Namespace, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Outcomes of all cases, each told as it comes; what runs when the time is over fails."""
    said: queue.Queue[Outcome] = queue.Queue()
    parts = [Part(number) for number in range(options.processes)]
    threads = [threading.Thread(target=part.run, args=(options, said), daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + options.seconds
    outcomes: list[Outcome] = []
    while (alive := any(thread.is_alive() for thread in threads)) or not said.empty():
        try:
            outcomes.append(said.get(timeout=0.2))
            tell(outcomes[-1])
        except queue.Empty:
            if alive and time.monotonic() > deadline:
                return outcomes + stop(parts, options.seconds)
    return outcomes


def stop(parts: list[Part], seconds: float) -> list[Outcome]:
    """Kill what still runs, and say what it was at."""
    late = []
    for part in parts:
        if part.process is not None and part.process.poll() is None:
            at = part.running or f"part {part.number} (starting)"
            part.process.kill()
            late.append(Outcome(at, "FAIL", f"had not ended after {seconds:.0f} s in all; the cases behind it did not run", seconds))
    return late


def short_line(outcome: Outcome) -> str:
    text = outcome.text if outcome.verdict == "PASS" else outcome.text.split(":")[0]
    return f"{outcome.verdict} {outcome.name} {outcome.seconds:.1f}s {text}"[:150]


def summary(outcomes: list[Outcome], options: argparse.Namespace, seconds: float) -> str:
    """Failures in full, then the counts."""
    failed = [outcome for outcome in outcomes if outcome.verdict == "FAIL"]
    room = SUMMARY_CHARACTERS // max(1, len(failed))
    lines = [outcome.line()[: max(120, room)] for outcome in failed]
    skipped = sum(outcome.verdict == "SKIP" for outcome in outcomes)
    card = torch.cuda.get_device_name() if options.device == "cuda" else "interpreter"
    counts = f"{len(outcomes)} cases: {len(outcomes) - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped"
    return "\n".join(["", *lines, f"{counts}; {card}, torch {torch.__version__}, seed {options.seed}, {seconds:.0f} s"])


def main() -> int:
    options = options_of()
    if options.part is not None:
        return run_part(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: no CUDA device here; tests/kernels/interpreted.py runs the same cases without one", file=sys.stderr)
        return 2
    complete(options)
    start = time.monotonic()
    outcomes = run_all(options, lambda outcome: print(short_line(outcome), flush=True))
    print(summary(outcomes, options, time.monotonic() - start))
    return 1 if not outcomes or any(outcome.verdict == "FAIL" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
