"""Best launch configurations on this card: python tests/bench/tune_kernels.py [--ops project expand] [--only int8] [--seconds 240]

Enters: candidates by operation (tune_candidates.toml), the cases of tests/kernels. For every case, the operations that it looks up in the
launch table are found by running it; each candidate takes the row's place in turn. Children compile them side by side into triton's cache,
then this process times them; what does not compile or fit is left out, and a candidate whose result differs from the row's of today too.
Leaves: a table, and a TOML fragment with the best row of every operation and dtype, the sum over its cases deciding; to be pasted into
launch_table.toml. When the seconds are over, what was timed until then decides.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/kernels"), *(str(ROOT / room) for room in ("net", "kernels", "peers"))]

import torch  # noqa: E402
from case_protocol import FULL, SMALL, Case, Setting, Tensors, as_bits, relative_error, replaced_row  # noqa: E402
from run_cases import Builder, found_modules, lacks_fp8, load_cases, short_traceback  # noqa: E402

from tscale_fed.bench.kernel_timing import rotations, time_calls  # noqa: E402
from tscale_fed.bench.kernels import card_name  # noqa: E402
from tscale_kernels import launch_table  # noqa: E402

SIZES = {"small": SMALL, "full": FULL}
SAME_RESULT = 1e-2
"""Relative difference of a candidate's outputs from those of the row in use: wrong kernels are far above, other orders of sums below."""
COMPILE_SHARE = 0.6
Config = dict[str, int]
Wanted = tuple[str, str]
"""(operation, name of the code dtype or "any")."""


@dataclass(frozen=True)
class Trial:
    """One candidate in one case. ms None: it did not compile, did not fit or was wrong, as `text` says."""

    wanted: Wanted
    case: str
    config: Config
    ms: float | None
    text: str = ""


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", default=[], metavar="OP", help="operations of the launch table (all that have candidates)")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose name contains one of the words")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--processes", type=int, default=12, help="children that compile")
    parser.add_argument("--candidates", type=Path, default=Path(__file__).with_name("tune_candidates.toml"))
    parser.add_argument("--out", type=Path, default=None, help="file for the TOML fragment (it is printed too)")
    parser.add_argument("--part", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


# -- candidates ----------------------------------------------------------------------------------------------------------


def read_candidates(path: Path) -> dict[str, list[Config]]:
    """Operation -> configurations. A section lists values per key; all combinations are tried. `same` names an operation to take over."""
    sections = tomllib.loads(path.read_text())
    grids = {op: sections[section["same"]] if "same" in section else section for op, section in sections.items()}
    return {op: [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] for op, grid in grids.items()}


@contextmanager
def looked_up() -> Iterator[list[tuple[str, int, Any]]]:
    """The (operation, architecture, code) that are looked up in the launch table meanwhile."""
    original, found = launch_table._row, []

    def row(op: str, arch: int, code: Any) -> Config:
        found.append((op, arch, code))
        return original(op, arch, code)

    launch_table._row = row  # type: ignore[assignment]
    try:
        yield found
    finally:
        launch_table._row = original


def trials_of(case: Case, candidates: dict[str, list[Config]], ops: list[str]) -> list[tuple[Wanted, Config]]:
    """What to try in a case, the row in use first: every candidate of every operation that it looks up. Runs the case once."""
    with looked_up() as found:
        case.run(case.outputs(), "triton")
    trials: list[tuple[Wanted, Config]] = []
    for op, arch, code in dict.fromkeys(found):
        if op in candidates and (not ops or op in ops):
            wanted = (op, launch_table.CODE_NAMES[code] if code is not None else "any")
            now = launch_table._row(op, arch, code)
            others = [config for config in candidates[op] if {**now, **config} != now]
            trials += [(wanted, config) for config in ({}, *others)]
    return trials


# -- a child: compile ----------------------------------------------------------------------------------------------------


def compile_part(options: argparse.Namespace) -> int:
    """Run candidates number part, part + processes, ... of every case once; errors are the parent's to report."""
    torch.set_num_threads(1)
    candidates = read_candidates(options.candidates)
    for name, build in wanted_cases(options):
        try:
            case = build(Setting(SIZES[options.size], torch.device("cuda"), 1))
            out = case.outputs()
            trials = trials_of(case, candidates, options.ops) if case.timed else []
        except Exception:
            continue
        for (op, _), config in trials[options.part :: options.processes]:
            with replaced_row(op, config):
                try:
                    case.run(out, "triton")
                    torch.cuda.synchronize()
                except Exception:
                    if _device_is_lost():
                        return 3
        print(json.dumps(name), flush=True)
    return 0


def _device_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def wanted_cases(options: argparse.Namespace) -> list[tuple[str, Builder]]:
    capability = torch.cuda.get_device_capability()
    cases = load_cases(found_modules(), options.only).items()
    return [(name, build) for name, build in cases if not lacks_fp8(name, capability)]


def compile_all(options: argparse.Namespace, until: float) -> None:
    """Children until all is compiled or the time is over."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--part"]
    children = [subprocess.Popen([*command, str(part)], stdout=subprocess.DEVNULL) for part in range(options.processes)]
    for child in children:
        try:
            child.wait(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


# -- the parent: time ------------------------------------------------------------------------------------------------------


def time_case(name: str, build: Builder, options: argparse.Namespace, candidates: dict[str, list[Config]], until: float) -> list[Trial]:
    """Every candidate of one case."""
    device, sizes = torch.device("cuda"), SIZES[options.size]
    first = build(Setting(sizes, device, 1))
    trials = trials_of(first, candidates, options.ops) if first.timed else []
    if not trials:
        return []
    cases = [first, *(build(Setting(sizes, device, seed)) for seed in range(2, 1 + rotations(first.bytes_moved, device)))]
    want = first.outputs()
    first.run(want, "triton")
    results = []
    for wanted, config in trials:
        if time.monotonic() > until:
            break
        with replaced_row(wanted[0], config):
            results.append(time_candidate(wanted, name, config, cases, want))
    return results


def time_candidate(wanted: Wanted, name: str, config: Config, cases: list[Case], want: Tensors) -> Trial:
    """One candidate, whose row is in force."""
    try:
        got = cases[0].outputs()
        cases[0].run(got, "triton")
        wrong = [key for key in cases[0].limits if not similar(got[key], want[key])]
        if wrong:
            return Trial(wanted, name, config, None, f"other results: {', '.join(wrong)}")
        return Trial(wanted, name, config, time_calls([_call(case) for case in cases], seconds=0.05).ms)
    except Exception as error:  # out of shared memory or registers, not divisible: no candidate here
        if _device_is_lost():
            raise
        return Trial(wanted, name, config, None, short_traceback(error)[-150:])


def _call(case: Case) -> Any:
    out = case.outputs()
    return lambda: case.run(out, "triton")


def similar(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether a result is the row's of today, apart from rounding."""
    if torch.equal(as_bits(got), as_bits(want)):
        return True
    return relative_error(got, want) <= SAME_RESULT


def best_rows(trials: list[Trial]) -> dict[Wanted, tuple[Config, float, float]]:
    """(operation, dtype) -> (best configuration, its ms, ms of the row in use), over candidates that were timed in every case."""
    times: dict[Wanted, dict[str, dict[str, float]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for trial in trials:
        if trial.ms is not None:
            times[trial.wanted][json.dumps(trial.config)][trial.case] = trial.ms
    best = {}
    for wanted, configs in times.items():
        now = configs.get("{}", {})
        sums = {config: sum(cases.values()) for config, cases in configs.items() if cases.keys() == now.keys()}
        if sums:
            config = min(sums, key=lambda key: sums[key])
            best[wanted] = (json.loads(config), sums[config], sums["{}"])
    return best


def fragment(best: dict[Wanted, tuple[Config, float, float]], capability: tuple[int, int], note: str) -> str:
    """Rows for launch_table.toml."""
    arch = launch_table.architecture(capability)
    lines = [f"[sm_{arch}]"]
    for (op, name), (config, ms, before) in sorted(best.items()):
        code = next((code for code, known in launch_table.CODE_NAMES.items() if known == name), None)
        row = {**launch_table.launch(op, capability, code), **config}
        values = ", ".join(f"{key} = {value}" for key, value in row.items())
        lines.append(f'{op}.{name} = {{ {values}, note = "{note}: {ms:.3f} ms, {before:.3f} before" }}')
    return "\n".join(lines) + "\n"


def table(trials: list[Trial]) -> list[str]:
    """Per operation, dtype and case the row in use and the five best, then how many failed, with one reason."""
    lines = []
    groups: dict[tuple[Wanted, str], list[Trial]] = collections.defaultdict(list)
    for trial in trials:
        groups[trial.wanted, trial.case].append(trial)
    for (wanted, case), group in groups.items():
        good = sorted((trial for trial in group if trial.ms is not None), key=lambda trial: trial.ms or 0.0)
        bad = [trial for trial in group if trial.ms is None]
        lines.append(f"{'.'.join(wanted)} in {case}: {len(good)} timed, {len(bad)} not{f' ({bad[0].text})' if bad else ''}")
        shown = [*good[:5], *(trial for trial in good[5:] if not trial.config)]
        lines += [f"  {trial.ms:8.4f} ms  {trial.config or 'the row in use'}" for trial in shown]
    return lines


def main() -> int:
    options = options_of()
    if not torch.cuda.is_available():
        print("tune_kernels: no CUDA device here, nothing to tune", file=sys.stderr)
        return 2
    if options.part is not None:
        return compile_part(options)
    start = time.monotonic()
    candidates = read_candidates(options.candidates)
    compile_all(options, start + COMPILE_SHARE * options.seconds)
    print(f"compiled for {time.monotonic() - start:.0f} s", flush=True)
    trials: list[Trial] = []
    for name, build in wanted_cases(options):
        if time.monotonic() > start + options.seconds:
            print(f"not timed, the seconds are over: {name} and what follows")
            break
        try:
            trials += time_case(name, build, options, candidates, start + options.seconds)
        except Exception as error:
            print(f"{name}: {short_traceback(error)}", flush=True)
            if _device_is_lost():
                break
        torch.cuda.empty_cache()
    print("\n".join(table(trials)))
    note = f"{card_name(torch.cuda.get_device_name())}, {SIZES[options.size].name}"
    text = fragment(best_rows(trials), torch.cuda.get_device_capability(), note)
    print("\n" + text)
    if options.out:
        options.out.write_text(text)
    return 0 if trials else 1


if __name__ == "__main__":
    sys.exit(main())
