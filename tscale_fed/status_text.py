"""A snapshot as plain text: one line for logs, or a page for `tscale-status` without a terminal.

Enters: `Status`. Leaves: text without colours or control characters. Pure functions.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import get_args

from tscale_fed.status import ExchangeTime, PeerRow, PeerState, Status, Transfer
from tscale_fed.units import bytes_text, count_text, duration_text, plain, rate_text, short_hex

NAME_CHARACTERS = 20
REACH_CHARACTERS = 120
PATH_CHARACTERS = 8
PAGE_EVENTS = 8
LEAST_CAUSE = 0.0005
"""Part of the time from which on it is said what a device waits for: the first digit that is shown."""


def loss_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def percent_text(fraction: float | None) -> str:
    """0.056 -> `5.6 %`, 0.98 -> `98 %`."""
    if fraction is None:
        return "-"
    return f"{fraction * 100:.1f} %" if 0 < fraction < 0.0995 else f"{fraction * 100:.0f} %"


def peers_text(peers: list[PeerRow]) -> str:
    """`18 live, 1 suspect, 2 dead`: other peers by state, or `none`."""
    counts = Counter(peer.state for peer in peers)
    return ", ".join(f"{counts[state]} {state}" for state in get_args(PeerState) if counts[state]) or "none"


def agreement_text(status: Status) -> str:
    """`18/19 agree`: peers whose basepoint was compared with ours at the same applied set."""
    if not status.compared_peers:
        return "not compared yet"
    return f"{status.agreeing_peers or 0}/{status.compared_peers} agree"


def transfer_text(transfer: Transfer) -> str:
    done = transfer.done_bytes / transfer.total_bytes if transfer.total_bytes else 1.0
    peers = "1 peer" if transfer.sources == 1 else f"{transfer.sources} peers"
    return f"{transfer.what} {done * 100:.0f} %  {bytes_text(transfer.done_bytes)} of {bytes_text(transfer.total_bytes)} from {peers}"


def refused_text(refused: dict[str, int]) -> str:
    """`bad-signature 3, wrong-run 1`, most frequent first; `nothing` if empty."""
    ordered = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{plain(code, NAME_CHARACTERS)} {count}" for code, count in ordered) or "nothing"


def line(status: Status) -> str:
    """The one-line form for logs, without a time in front."""
    parts = [status.phase, f"step {count_text(status.step)}"]
    if status.transfer is not None:
        parts.append(transfer_text(status.transfer))
    parts.append(f"loss {loss_text(status.train_loss)} (swarm {loss_text(status.swarm_loss)})")
    if status.tokens_per_s is not None:
        parts.append(f"{count_text(status.tokens_per_s)} tok/s")
    if status.busy_fraction is not None:
        parts.append(f"busy {percent_text(status.busy_fraction)}")
    if status.exchange_fraction is not None:
        parts.append(f"exchange {percent_text(status.exchange_fraction)}")
    parts.append(f"peers {peers_text(status.peers)}")
    parts.append(f"sent {bytes_text(status.wire.up_bytes)}  got {bytes_text(status.wire.down_bytes)}")
    parts.append(f"model {short_hex(status.basepoint_hash)}")
    if status.refused:
        parts.append(f"refused {sum(status.refused.values())}")
    return "  ".join(parts)


def peer_cells(peer: PeerRow) -> tuple[str, ...]:
    """One row of the peers table: name, state, path, rtt, share, lag, last delta, rate. Foreign text is made safe here."""
    return (
        plain(peer.name, NAME_CHARACTERS) or short_hex(peer.id),
        peer.state,
        plain(peer.path, PATH_CHARACTERS) or "-",
        "-" if peer.rtt_ms is None else f"{peer.rtt_ms:.0f} ms",
        percent_text(peer.share),
        "-" if peer.lag is None else str(peer.lag),
        "-" if peer.last_delta_s is None else f"{duration_text(peer.last_delta_s)} ago",
        optional_count(peer.tokens_per_s),
    )


PEER_COLUMNS = ("peer", "state", "path", "rtt", "share", "lag", "last", "tok/s")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def page(status: Status) -> str:
    """Everything a person asks first, as lines of text; event times are local clock times."""
    lines = ["  ".join(parts) for parts in summary(status)]
    if status.peers:
        lines += ["", *_table([PEER_COLUMNS, *(peer_cells(peer) for peer in status.peers)])]
    else:
        lines += ["", "no other peers yet"]
    if status.events:
        lines += ["", *(f"{event_time(event.unix_s)}  {event.text}" for event in status.events[-PAGE_EVENTS:])]
    return "\n".join(lines)


def summary(status: Status) -> list[list[str]]:
    """The lines on top: title, me, swarm, wire, reach or what is being fetched, refused. Each is a list of parts, most important first,
    so that a narrow screen can leave out the last ones."""
    now = (
        ["fetch  ", transfer_text(status.transfer)]
        if status.transfer
        else ["reach  ", plain(status.reach, REACH_CHARACTERS) or "not known yet"]
    )
    return [title_parts(status), own_parts(status), swarm_parts(status), wire_parts(status), now, ["refused", refused_text(status.refused)]]


def title_parts(status: Status) -> list[str]:
    return [
        plain(status.run_name, NAME_CHARACTERS) or short_hex(status.run),
        f"{plain(status.name, NAME_CHARACTERS)} ({status.role})",
        status.phase,
        f"up {duration_text(status.uptime_s)}",
        f"loss {loss_text(status.train_loss)} (swarm {loss_text(status.swarm_loss)})",
        f"v{plain(status.version, NAME_CHARACTERS)}",
        f"run {short_hex(status.run)}",
    ]


def own_parts(status: Status) -> list[str]:
    parts = [
        "me     ",
        f"step {count_text(status.step)}",
        f"{optional_count(status.tokens_per_s)} tok/s",
        f"busy {percent_text(status.busy_fraction)}",
        f"exchange {percent_text(status.exchange_fraction)}",
        f"share {percent_text(status.share)}",
    ]
    if status.steps_since_publish is not None and status.publish_every_steps:
        every = f"/{status.publish_every_steps}" if status.publish_every_steps > 1 else " steps ago"
        parts.append(f"delta {status.steps_since_publish}{every}")
    if status.displacement is not None:
        parts.append(f"|d| {status.displacement:.2g}")
    if status.rate is not None:
        parts.append(f"rate {status.rate:.2g}")
    causes = causes_text(status.exchange)
    if causes:
        parts.append(causes)
    return [*parts, f"{count_text(status.tokens)} tokens", plain(status.device, REACH_CHARACTERS) or "no device"]


def causes_text(exchange: ExchangeTime | None) -> str:
    """`receive 0.7 % publish 0.5 %`: what the device waits for in exchanges; small causes are left out."""
    if exchange is None:
        return ""
    causes = {name: getattr(exchange, name) for name in exchange.__struct_fields__}
    return " ".join(f"{name} {percent_text(part)}" for name, part in causes.items() if part >= LEAST_CAUSE)


def swarm_parts(status: Status) -> list[str]:
    parts = ["swarm  ", f"peers {peers_text(status.peers)}"]
    if status.swarm_tokens_per_s is not None:
        parts.append(f"{count_text(status.swarm_tokens_per_s)} tok/s")
    parts.append(f"model {short_hex(status.basepoint_hash)} {agreement_text(status)}")
    if status.average_loss is not None:
        parts.append(f"average {loss_text(status.average_loss)}")
    if status.swarm_batches is not None and status.budget_batches:
        parts.append(f"{percent_text(status.swarm_batches / status.budget_batches)} of {count_text(status.budget_batches)} batches")
    return parts


def wire_parts(status: Status) -> list[str]:
    wire = status.wire
    up = "" if wire.up_bytes_per_s is None else f" at {rate_text(wire.up_bytes_per_s)}"
    down = "" if wire.down_bytes_per_s is None else f" at {rate_text(wire.down_bytes_per_s)}"
    return [
        "wire   ",
        f"sent {bytes_text(wire.up_bytes)}{up}",
        f"got {bytes_text(wire.down_bytes)}{down}",
        f"{bytes_per_param_text(wire.bytes_per_param)} B/param",
        f"deltas {wire.deltas_sent} sent {wire.deltas_applied} applied",
        *(
            [f"one per {duration_text(status.publish_interval_s)}: {plain(status.publish_reason, REACH_CHARACTERS)}"]
            if status.publish_interval_s
            else []
        ),
    ]


def bytes_per_param_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def optional_count(value: float | None) -> str:
    return "-" if value is None else count_text(value)


def event_time(unix_s: float) -> str:
    """Local time of day, `14:03:59`."""
    return time.strftime("%H:%M:%S", time.localtime(unix_s))
