"""Runs cases: finds them, runs one on both backends, says PASS, FAIL or SKIP in one line that carries the figures.

Enters: names of cases modules, a setting. Leaves: outcomes; an error inside a case (a kernel that does not compile too) is an outcome.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from case_protocol import CODES, Case, Setting, Skip, Tensors, compare

from tscale_kernels.tiles import capability

CASE_MODULES = ("cases_matmul", "cases_backward", "cases_attention", "cases_ends")
QUICK_TOO = ("attend odd local documents int8", "attend_backward odd local documents int8")
FIRST_CAPABILITY_WITH_FP8 = (8, 9)
Builder = Callable[[Setting], Case]
HERE = Path(__file__).resolve().parent
_LONGEST_MESSAGE = 700
_MOST_ROWS_FOR_EXACT = 20_000
"""fp64 results of larger sizes would need many times the memory of the op; the same formula is compared at smaller ones."""
_WAITS_FOR_MEMORY, _SECONDS_FOR_MEMORY = 8, 2.0


@dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    name: str
    verdict: Literal["PASS", "FAIL", "SKIP"]
    text: str
    seconds: float

    def line(self) -> str:
        return f"{self.verdict} {self.name} ({self.seconds:.1f} s): {self.text}"


def found_modules() -> list[str]:
    """Cases modules of this folder, the four of the contract first."""
    known = [name for name in CASE_MODULES if (HERE / f"{name}.py").exists()]
    return known + sorted(path.stem for path in HERE.glob("cases_*.py") if path.stem not in known)


def load_cases(modules: list[str], wanted: list[str] | None = None, without: list[str] | None = None) -> dict[str, Builder]:
    """Name -> builder of every case whose name contains one of `wanted` (or is it, if that begins with "="), and none of `without`.

    A module that cannot be imported is one case that fails. Raises ValueError for "=NAME" if no case has that name.
    """
    cases: dict[str, Builder] = {}
    for module in modules:
        try:
            found = dict(importlib.import_module(module).CASES)
        except Exception as error:
            found = {f"import {module}": _raises(error)}
        twice = cases.keys() & found.keys()
        if twice:
            raise ValueError(f"{module}: cases {sorted(twice)} are those of another module; choose other names")
        cases.update(found)
    unknown = [word for word in wanted or [] if word.startswith("=") and word[1:] not in cases]
    if unknown:
        raise ValueError(f"no case is called {', '.join(word[1:] for word in unknown)}")
    chosen = {name: build for name, build in cases.items() if not wanted or any(_fits(name, word) for word in wanted)}
    return {name: build for name, build in chosen.items() if not any(_fits(name, word) for word in without or [])}


def quick_cases(cases: dict[str, Builder]) -> dict[str, Builder]:
    """Of every op the first case with each code dtype in its name, and the first without.

    Of attention the case whose shapes are odd in every respect as well, since a block that is cut is where a mask can be wrong.
    """
    first: dict[tuple[str, str], str] = {}
    for name in cases:
        op, *words = re.split(r"[ ,]+", name)
        first.setdefault((op, next((word for word in words if word in CODES), "")), name)
    names = {*first.values(), *QUICK_TOO}
    return {name: build for name, build in cases.items() if name in names}


def _fits(name: str, word: str) -> bool:
    return name == word[1:] if word.startswith("=") else word in name


def check(name: str, build: Builder, setting: Setting) -> Outcome:
    """One case on both backends, compared as its limits say."""
    start = time.perf_counter()
    if lacks_fp8(name, capability(setting.device)):
        return Outcome(name, "SKIP", "the card has no fp8", 0.0)
    try:
        good, text = _with_memory(lambda: _compared(build(setting), exact=setting.sizes.rows <= _MOST_ROWS_FOR_EXACT))
        verdict: Literal["PASS", "FAIL", "SKIP"] = "PASS" if good else "FAIL"
    except Skip as reason:
        verdict, text = "SKIP", str(reason)
    except Exception as error:
        verdict, text = "FAIL", short_traceback(error)
    return Outcome(name, verdict, text, time.perf_counter() - start)


def _with_memory(work: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
    """The result of `work`; where the card's memory is taken by processes beside this one, wait for them and try again."""
    for _ in range(_WAITS_FOR_MEMORY):
        try:
            return work()
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()  # out of the handler, which keeps the tensors of the failed try alive
        time.sleep(_SECONDS_FOR_MEMORY)
    return work()


def _compared(case: Case, exact: bool) -> tuple[bool, str]:
    reference, outputs = case.outputs(), case.outputs()
    case.run(reference, "ref")
    case.run(outputs, "triton")
    if outputs and next(iter(outputs.values())).device.type == "cuda":
        torch.cuda.synchronize()
    results = [compare(name, outputs[name], reference[name], limit) for name, limit in case.limits.items()]
    if exact and case.exact is not None:
        results += _against_exact(case, {"ref": reference, "triton": outputs})
    good = all(result for result, _ in results)
    return good, "; ".join(text for result, text in results if good or not result) or "nothing compared"


def _against_exact(case: Case, backends: dict[str, Tensors]) -> list[tuple[bool, str]]:
    assert case.exact is not None
    exact = case.exact()
    return [
        compare(f"{backend} {name} to fp64", outputs[name].double(), exact[name], limit)
        for backend, outputs in backends.items()
        for name, limit in case.exact_limits.items()
    ]


def lacks_fp8(name: str, capability: tuple[int, int]) -> bool:
    """Whether a case of this name has fp8 operands and the card no instructions for them."""
    return "e4m3" in name and capability < FIRST_CAPABILITY_WITH_FP8


def is_broken_device(error_text: str) -> bool:
    """Whether the CUDA context is lost, so that the process must be left."""
    return any(words in error_text for words in ("CUDA error", "illegal memory access", "misaligned address", "device-side assert"))


def short_traceback(error: BaseException) -> str:
    """Where in the project, and the beginning of what was said (a compiler's message can be pages long)."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if HERE.parents[1] in Path(frame.filename).parents]
    message, cause = f"{type(error).__name__}: {error}".strip(), error.__cause__
    while cause is not None:
        message, cause = f"{message} | because {type(cause).__name__}: {cause}", cause.__cause__
    message = message if len(message) <= _LONGEST_MESSAGE else f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
    return f"{' > '.join(part for part in own if not part.startswith('run_cases'))} {message}"


def run_parts(script: str, processes: int, words: list[str], own_part: Iterable[str]) -> tuple[list[str], bool]:
    """A script in several processes, each with `words` and its --part of the cases; this process makes the lines of part 0.

    Returns all lines, and whether all other processes ended with 0.
    """
    command = [sys.executable, script, *words, "--processes", str(processes), "--part"]
    children = [subprocess.Popen([*command, str(part)], stdout=subprocess.PIPE, text=True) for part in range(1, processes)]
    with ThreadPoolExecutor(processes) as pool:  # each is read while it runs, or one would wait for room in its pipe
        texts = [pool.submit(child.communicate) for child in children]
        lines = list(own_part)
        lines += [line for text in texts for line in text.result()[0].splitlines()]
    return lines, all(child.returncode == 0 for child in children)


def usable_processes() -> int:
    """How many processes share the cases unless the caller says otherwise."""
    return min(4, len(os.sched_getaffinity(0)))


def _raises(error: Exception) -> Builder:
    def build(setting: Setting) -> Case:
        raise error

    return build
