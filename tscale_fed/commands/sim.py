"""`tscale-peer sim`: a whole swarm in virtual time on this machine; see tscale_fed/sim/.

Enters: the flags of a scenario. Leaves: a table (or JSON), curves; exit code 0 if all replicas ended equal, 1 if not, 130 after Ctrl+C,
which prints what there is.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tscale_fed.sim.outcome import Outcome, Sample
    from tscale_fed.sim.scenario import Partition, Scenario

EXIT_STOPPED = 130
PROGRESS_BAR_CHARACTERS = 24

DESCRIPTION = """Simulate a swarm: the same peer code on virtual time and links in memory. Hours of many peers pass in seconds, and one
seed always gives the same run. Peers publish about once an interval, die, come back, lose the network, as the flags say."""

EPILOG = """examples:
  tscale-peer sim --peers 64 --minutes 10                       traffic and agreement of a larger swarm
  tscale-peer sim --peers 8 --minutes 4 --model tiny --kill 0.3 a real small model while peers die at every third exchange
  tscale-peer sim --peers 16 --partition 3-6 --plot curves      two halves that part and meet again; CSV and PNG in ./curves
"""


def sim_parser() -> argparse.ArgumentParser:
    """The parser of `tscale-peer sim`."""
    parser = argparse.ArgumentParser(
        prog="tscale-peer sim",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    swarm = parser.add_argument_group("the swarm")
    swarm.add_argument("--peers", type=int, default=16, metavar="N", help="how many (default: %(default)s)")
    swarm.add_argument("--minutes", type=float, default=10.0, metavar="M", help="virtual minutes of training (default: %(default)s)")
    swarm.add_argument(
        "--model", choices=("none", "tiny"), default="none", help="none: noisy gradients of a bowl; tiny: a real small model"
    )
    swarm.add_argument("--codec", default="sign", metavar="NAME", help="how deltas are packed, as in a run file (default: %(default)s)")
    swarm.add_argument(
        "--spread", choices=("auto", "flood", "owners"), default="auto", help="deltas to all, or sums by owners of chunks (default: auto)"
    )
    swarm.add_argument(
        "--interval", type=float, default=0.0, metavar="S", help="seconds between two deltas of a peer of speed 1 (default: 60; tiny: 5)"
    )
    swarm.add_argument("--speeds", type=_numbers, default=(1.0,), metavar="A,B,..", help="training speeds, dealt out in turn: 1,4,10")
    swarm.add_argument("--uneven", type=float, default=0.0, metavar="X", help="how far the peers' data differ (--model none; 0: equal)")
    swarm.add_argument("--signatures", choices=("real", "none"), default="none", help="none: nobody signs or checks (default)")
    swarm.add_argument("--seed", type=int, default=1, metavar="N", help="the same seed gives the same run (default: %(default)s)")

    links = parser.add_argument_group("links")
    links.add_argument("--rate-mbit", type=float, default=100.0, metavar="X", help="of every peer, up and down (default: %(default)s)")
    links.add_argument("--latency-ms", type=float, default=50.0, metavar="X", help="one way (default: %(default)s)")
    links.add_argument(
        "--lags", type=_numbers, default=(1.0,), metavar="A,B,..", help="latency of peers by these factors, dealt out in turn"
    )
    links.add_argument("--loss", type=float, default=0.0, metavar="P", help="part of the segments lost, 0.01 = 1 %%: TCP slows down")
    links.add_argument("--dial-only", type=float, default=0.0, metavar="P", help="part of the peers that nobody can dial")

    mishaps = parser.add_argument_group("mishaps")
    mishaps.add_argument("--kill", type=float, default=0.0, metavar="P", help="part of the peers killed after each of their exchanges")
    mishaps.add_argument(
        "--rejoin", type=float, default=20.0, metavar="S", help="a killed peer starts again after about this (default: %(default)s)"
    )
    mishaps.add_argument(
        "--replace-per-hour", type=float, default=0.0, metavar="P", help="part of the swarm replaced by newcomers in an hour"
    )
    mishaps.add_argument("--partition", type=_partition, metavar="A-B[:P]", help="from minute A to B a part P (default: half) is cut off")
    mishaps.add_argument("--bad-clock", type=float, default=0.0, metavar="S", help="clocks are wrong by up to so many seconds")
    mishaps.add_argument("--stall", type=float, default=0.0, metavar="S", help="once a minute every process stands still for so long")
    mishaps.add_argument("--slow-disk", type=float, default=0.0, metavar="MS", help="every write to the delta log takes so long")

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    output.add_argument("--plot", type=Path, metavar="DIR", help="write loss over time, bytes and tokens: CSV, and PNG with matplotlib")
    output.add_argument("--debug", action="store_true", help="show Python tracebacks")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Raises Refused for a scenario that cannot be, OSError for files."""
    import tempfile

    from tscale_fed.sim.objective import objective_of
    from tscale_fed.sim.report import json_text, table_lines
    from tscale_fed.sim.simulate import simulate
    from tscale_net.ports import SystemClock

    scenario = scenario_of(arguments)
    if arguments.plot is not None:
        arguments.plot.mkdir(parents=True, exist_ok=True)
    watch = _Watch(scenario.minutes)
    before = signal.signal(signal.SIGINT, watch.stop)
    try:
        with tempfile.TemporaryDirectory(prefix="tscale-sim-") as folder:
            objective = objective_of(scenario, Path(folder), SystemClock())
            outcome = simulate(scenario, objective, watch.show)
    finally:
        signal.signal(signal.SIGINT, before)
        watch.close()
    print(json_text(outcome) if arguments.json else "\n".join(table_lines(outcome, objective.unit)))
    if arguments.plot is not None:
        _plot(outcome, objective.unit, arguments.plot, quiet=arguments.json)
    if outcome.stopped:
        return EXIT_STOPPED
    return 0 if outcome.ending is not None and outcome.ending.hashes == 1 else 1


def scenario_of(arguments: argparse.Namespace) -> Scenario:
    """Raises Refused("bad-scenario")."""
    from tscale_fed.sim.scenario import Scenario

    return Scenario(
        peers=arguments.peers, minutes=arguments.minutes, rate_mbit=arguments.rate_mbit, latency_ms=arguments.latency_ms,
        loss=arguments.loss, kill=arguments.kill, rejoin_s=arguments.rejoin, replace_per_hour=arguments.replace_per_hour,
        partition=arguments.partition, speeds=arguments.speeds, lags=arguments.lags, dial_only=arguments.dial_only,
        bad_clock_s=arguments.bad_clock, stall_s=arguments.stall, disk_ms=arguments.slow_disk, uneven=arguments.uneven,
        codec=arguments.codec, spread=arguments.spread, interval_s=arguments.interval, model=arguments.model,
        signatures=arguments.signatures, seed=arguments.seed,
    )  # fmt: skip


class _Watch:
    """The progress line, on a terminal, and Ctrl+C."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._stopped = False
        self._terminal = sys.stderr.isatty()
        self._drawn = False

    def stop(self, number: int, frame: Any) -> None:
        """First Ctrl+C: end here. The second one is not waited for."""
        self._stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def show(self, sample: Sample) -> bool:
        """Redraw; True if it shall stop."""
        from tscale_fed.console import bar_text
        from tscale_fed.units import bytes_text

        if self._terminal:
            bar = bar_text(min(1.0, sample.minute / self._minutes), PROGRESS_BAR_CHARACTERS)
            moved = bytes_text(sample.bytes_per_peer)
            text = f"{bar} {sample.minute:6.1f} min  {sample.living} live  loss {sample.loss:.4f}  {moved} per peer"
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
            self._drawn = True
        return self._stopped

    def close(self) -> None:
        """Leave the cursor on a clean line."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _plot(outcome: Outcome, unit: str, folder: Path, quiet: bool) -> None:
    from tscale_fed.sim.curves import AXES, chart_lines, csv_text
    from tscale_fed.sim.figure import can_draw, write_figure

    table = folder / "simulation.csv"
    table.write_text(csv_text(outcome.samples), encoding="utf-8")
    written = [table]
    if can_draw():
        picture = folder / "simulation.png"
        write_figure(outcome.samples, unit, f"{outcome.scenario['peers']} peers, seed {outcome.scenario['seed']}", picture)
        written.append(picture)
    elif not quiet:
        for axis in AXES:
            print("\n".join(["", *chart_lines(outcome.samples, axis)]))
        print("\nno picture: matplotlib is missing; `pip install -e '.[plot]'` in the folder of tscale-fed adds it")
    if not quiet:
        print(f"written: {', '.join(str(path) for path in written)}")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in re.split("[,:]", text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers: write for example 1,4,10") from None


def _partition(text: str) -> Partition:
    from tscale_fed.sim.scenario import HALF, Partition

    match = re.fullmatch(r"([0-9.]+)-([0-9.]+)(?::([0-9.]+))?", text)
    try:
        if match is None:
            raise ValueError
        return Partition(float(match[1]), float(match[2]), float(match[3]) if match[3] else HALF)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a span of minutes: write for example 3-6, or 3-6:0.25") from None
