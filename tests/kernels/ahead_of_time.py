"""Compiles kernels for cards that are not here, and checks what came out: python tests/kernels/ahead_of_time.py [--cards 90] [--only WORD]

Enters: the cases (case_protocol.py). Each runs its op on CPU tensors while launches are intercepted, so that triton compiles exactly what
that launch would need on the card, configurations of the launch table included, and runs nothing. Leaves: one line per kernel and card with
registers, stack, shared memory and tensor-core instructions, and what is wrong with it:
- an operand type of a dot without its instruction (fp8 that silently runs as fp16), 16-bit instructions in a kernel of 8-bit dots alone
- a descriptor load that did not become UTMALDG on sm_90 and newer; a matrix product of a case without one there
- a stack (spilled registers) that SPILLS does not list; more shared memory than the card has
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    _ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(_ROOT / room) for room in ("kernels", "net", "peers", ".")]

import torch
import triton
from case_protocol import GATE, Setting, Skip
from run_cases import Builder, found_modules, lacks_fp8, load_cases, run_parts, short_traceback, usable_processes
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tscale_kernels import tiles
from tscale_kernels.launch_table import SHARED_MEMORY_BYTES

CARDS = tuple(SHARED_MEMORY_BYTES)
_EPILOGUE = "some 30 of 255 registers, in the epilogue alone; with 8 warps none, but then two programs do not fit one processor"
SPILLS: dict[tuple[str, int], tuple[int, str]] = {
    ("through_relu_norm_kernel", 90): (176, _EPILOGUE),
    ("through_norm_add_kernel", 90): (176, _EPILOGUE),
    ("weight_gradient_kernel", 90): (256, "64 of 255 registers, in the epilogue, only where it adds to a gradient; as above"),
}
"""(kernel, card) -> (bytes of stack allowed, why)."""
WITHOUT_DESCRIPTORS: dict[str, str] = {}
"""Kernels of matrix-product cases that read operands through pointers on every card, and why."""

QUICK = {
    90: [
        "project int8", "add_normalise int8 combiner", "attend int8", "attend_backward int8", "through_norm_add int8 joined",
        "weight_gradient projection int8", "transpose_products int8", "rows_and_transpose int8 joined",
    ],
    89: ["project e4m3"],
    80: ["weight_gradient ffn_down int8"],
}  # fmt: skip
"""Card -> cases that the default test suite compiles for it: a kernel of each kind, two of them through pointers."""
FAULT = "  FAULT"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"\b((?:UTC)?[IQHO]G?MMA|UTMALDG|UTMASTG|LDGSTS|LDL|STL)\b")
_WANTED = {"i8": "I", "f8E4M3FN": "Q", "bf16": "H", "f16": "H"}
"""Type of a dot's operand in triton's IR -> first letter of its tensor-core instruction."""


@dataclass(frozen=True)
class Compiled:
    """One kernel on one card."""

    case: str
    kernel: str
    card: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    operand_types: frozenset[str]
    seconds: float
    loads_descriptors: bool
    is_product: bool
    config: str

    def faults(self) -> list[str]:
        """What the gate refuses; empty for a good kernel."""
        allowed = SPILLS.get((self.kernel, self.card), (0, ""))[0]
        missing = [kind for kind in sorted(self.operand_types) if self._lacks(kind)]
        found = [f"no tensor-core instruction for {kind}: found {self._tensor_cores()}" for kind in missing]
        if self.operand_types and self.operand_types <= {"i8", "f8E4M3FN"} and self._count("H"):
            found.append(f"16-bit tensor-core instructions in an 8-bit kernel: {self._tensor_cores()}")
        if self.stack_bytes > allowed:
            found.append(f"{self.stack_bytes} bytes of stack (spilled registers), {allowed} allowed")
        if self.shared_bytes > SHARED_MEMORY_BYTES[self.card]:
            found.append(f"{self.shared_bytes} bytes of shared memory, the card has {SHARED_MEMORY_BYTES[self.card]}")
        if self.card >= 90 and not self.instructions.get("UTMALDG"):
            if self.loads_descriptors:
                found.append("descriptor loads did not become UTMALDG")
            elif self.is_product and self.operand_types and self.kernel not in WITHOUT_DESCRIPTORS:
                found.append("a matrix product without descriptors (list it in WITHOUT_DESCRIPTORS if that is better)")
        return found

    def line(self) -> str:
        shown = " ".join(f"{name} {count}" for name, count in sorted(self.instructions.items()))
        sizes = f"{self.registers:3d} registers, stack {self.stack_bytes}, shared {self.shared_bytes / 1024:.0f} KiB"
        return f"sm_{self.card} {self.kernel} [{self.case}] {sizes}, {shown or 'no tensor cores'}, {self.config}, {self.seconds:.1f} s"

    def _tensor_cores(self) -> str:
        return ", ".join(name for name in sorted(self.instructions) if "MMA" in name) or "none"

    def _count(self, letter: str) -> int:
        return sum(count for name, count in self.instructions.items() if re.fullmatch(rf"(UTC)?{letter}G?MMA", name))

    def _lacks(self, kind: str) -> bool:
        if kind not in _WANTED:
            return False
        names = [name for name in self.instructions if re.fullmatch(rf"(UTC)?{_WANTED[kind]}G?MMA", name)]
        return not any("G" in name for name in names) if self.card == 90 else not names


@dataclass
class Recorder:
    """Collects the kernels that launches compile, instead of launching."""

    card: int
    kernels: list[tuple[str, Any, float]] = field(default_factory=list)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.card, 32)

    def get_current_device(self) -> int:
        return self.card

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def pretended_card(card: int) -> Iterator[Recorder]:
    """Within it, CPU tensors are taken for the card's, and launches only compile."""
    recorder = Recorder(card)
    capability = divmod(card, 10)
    original_run, original_capability = JITFunction.run, tiles.capability

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = original_run(self, *args, grid=grid, warmup=True, **kwargs)
        recorder.kernels.append((self.fn.__name__, kernel, time.perf_counter() - start))
        return kernel

    def pretended(device: torch.device) -> tuple[int, int]:
        return capability

    copies = [module for name, module in sys.modules.items() if name.startswith("tscale_kernels.") and _holds(module, original_capability)]
    JITFunction.run = run
    triton.runtime.driver.set_active(recorder)
    for module in copies:
        module.capability = pretended
    try:
        yield recorder
    finally:
        JITFunction.run = original_run
        triton.runtime.driver._active = None
        for module in copies:
            module.capability = original_capability


def _holds(module: Any, function: Any) -> bool:
    return getattr(module, "capability", None) is function


def compile_case(name: str, build: Builder, cards: tuple[int, ...], seen: set[str], timed_only: bool = False) -> Iterator[Compiled | str]:
    """The kernels of one case on every card, or a sentence on what failed.

    seen: hashes of kernels already yielded, not yielded again. timed_only: nothing for a case that only checks an odd shape.
    """
    try:
        case = build(Setting(GATE, torch.device("cpu"), 1))
        if timed_only and not case.timed:
            return
        out = case.outputs()
    except Skip:
        return
    except Exception as error:
        yield f"{name}: {short_traceback(error)}"
        return
    for card in cards:
        if lacks_fp8(name, divmod(card, 10)):
            continue
        with pretended_card(card) as recorder:
            try:
                case.run(out, "triton")
            except Exception as error:
                yield f"{name} on sm_{card}: {short_traceback(error)}"
        for kernel_name, kernel, seconds in recorder.kernels:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                yield inspect_kernel(name, kernel_name, kernel, card, seconds, case.matmul is not None)


def inspect_kernel(case: str, name: str, kernel: Any, card: int, seconds: float, is_product: bool) -> Compiled:
    """What the compiled kernel says about itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "--print-code", "--no-dataflow", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers, f"cuobjdump says no resource usage of {name}: {usage[-300:]}"
    ir = kernel.asm["ttir"]
    dots = [kind for types in re.findall(r"tt\.dot .*? : tensor<\d+x\d+x(\w+)[^>]*> \* tensor<\d+x\d+x(\w+)", ir) for kind in types]
    metadata = kernel.metadata
    return Compiled(
        case, name, card, int(numbers[1]), int(numbers[2]), metadata.shared, dict(collections.Counter(_INSTRUCTION.findall(code))),
        frozenset(dots), seconds, "tt.descriptor_load" in ir, is_product, f"{metadata.num_warps} warps {metadata.num_stages} stages",
    )  # fmt: skip


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="cases modules (all)")
    parser.add_argument("--cards", nargs="*", type=int, default=list(CARDS), choices=CARDS)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose name contains one of the words")
    parser.add_argument("--quick", action="store_true", help="the cases of QUICK alone, a kernel of each kind")
    parser.add_argument("--timed", action="store_true", help="leave out cases that only check odd shapes")
    parser.add_argument("--processes", type=int, default=usable_processes())
    parser.add_argument("--part", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def chosen_cases(options: argparse.Namespace) -> list[tuple[str, Builder, tuple[int, ...]]]:
    """Cases and the cards to compile them for. Raises ValueError if QUICK names a case that does not exist."""
    if not options.quick:
        cases = load_cases(options.modules or found_modules(), options.only)
        return [(name, build, tuple(options.cards)) for name, build in cases.items()]
    cards = {name: tuple(card for card, names in QUICK.items() if name in names) for names in QUICK.values() for name in names}
    return [(name, build, cards[name]) for name, build in load_cases(found_modules(), [f"={name}" for name in cards]).items()]


def run_part(options: argparse.Namespace, part: int) -> Iterator[str]:
    """Cases number part, part + processes, ...; their kernels and faults as lines."""
    torch.set_num_threads(1)
    seen: set[str] = set()
    for name, build, cards in chosen_cases(options)[part :: options.processes]:
        for result in compile_case(name, build, cards, seen, options.timed):
            if not isinstance(result, str):
                yield result.line()
            yield from (f"{FAULT} {fault}" for fault in ([result] if isinstance(result, str) else result.faults()))


def main() -> int:
    options = options_of()
    if options.part is not None:
        for line in run_part(options, options.part):
            print(line, flush=True)
        return 0
    lines, ended = run_parts(sys.argv[0], options.processes, sys.argv[1:], run_part(options, 0))
    print("\n".join(lines))
    faults, kernels = (sum(line.startswith(FAULT) is fault for line in lines) for fault in (True, False))
    print(f"{kernels} kernels, {faults} faults, triton {triton.__version__}")
    return 0 if ended and kernels and not faults else 1


if __name__ == "__main__":
    sys.exit(main())
