"""What a bootstrap peer says of us: clock, round trip, and the address it sees.

Enters: an address as typed. Leaves: lines. One question to its hello door (the port after the links'); no link is made, nothing is pinned.
"""

from __future__ import annotations

from dataclasses import dataclass

from tscale_fed.doctor import limits
from tscale_fed.doctor.report import Line
from tscale_net.address import parse, split_host_port
from tscale_net.dialler import resolve
from tscale_net.errors import Refused
from tscale_net.hello import ask
from tscale_net.identity import peer_id_of
from tscale_net.own_addresses import own_hosts
from tscale_net.ports import Clock


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a hello door."""

    name: str
    peer_id: str
    exchange_s: float
    """From the first SYN to the answer: two round trips and the door's work."""
    clock_offset_s: float
    """Its clock less ours at the middle of the exchange."""
    observed: str
    """host:port that it saw us come from."""


async def remote_lines(address: str, clock: Clock) -> list[Line]:
    """All of this group. Raises Refused("bad-address") only for an address that cannot be read."""
    target = parse(address)
    try:
        answer = await question(address, clock)
    except Refused as refusal:
        return [Line("bootstrap", "fail", refusal.detail, "check the address and that the peer runs, or name another one")]
    if target.peer_id is not None and target.peer_id != answer.peer_id:
        fix = "ask its owner whether the identity was replaced; until then do not join there"
        return [Line("bootstrap", "fail", f"{target.host_port} is {answer.peer_id}, not {target.peer_id}", fix)]
    host, _ = split_host_port(answer.observed)
    family = "::" if ":" in host else "0.0.0.0"
    return [bootstrap_line(address, answer), clock_line(answer.clock_offset_s), nat_line(host, own_hosts(family))]


async def question(address: str, clock: Clock) -> Answer:
    """Raises Refused with what was tried."""
    target = parse(address)
    hosts = await resolve(target)
    started, began = clock.wall(), clock.now()
    body = await ask(target, hosts)
    took = clock.now() - began
    return Answer(body.name, peer_id_of(body.public_key), took, body.unix_ms / 1000 - (started + took / 2), body.observed)


def bootstrap_line(address: str, answer: Answer) -> Line:
    round_trip_s = answer.exchange_s / 2
    found = f"{address} is {answer.name} ({answer.peer_id}), round trip {round_trip_s * 1000:.0f} ms"
    if round_trip_s > limits.ROUND_TRIP_WARN_S:
        return Line("bootstrap", "warn", found, "name a nearer peer with --bootstrap, or look for what fills your line")
    return Line("bootstrap", "ok", found)


def clock_line(offset_s: float) -> Line:
    """`offset_s`: the other clock less ours."""
    found = f"{abs(offset_s):.1f} s {'behind' if offset_s > 0 else 'ahead of'} the bootstrap's"
    fix = "switch time synchronisation on (timedatectl set-ntp true)"
    if abs(offset_s) > limits.CLOCK_FAIL_S:
        return Line("clock", "fail", found, f"peers refuse clocks off by more than {limits.CLOCK_FAIL_S:.0f} s: {fix}")
    if abs(offset_s) > limits.CLOCK_WARN_S:
        return Line("clock", "warn", found, fix)
    return Line("clock", "ok", found)


def nat_line(observed_host: str, own: list[str]) -> Line:
    """Whether the address seen from outside is one of this machine's."""
    if observed_host in own or observed_host in ("127.0.0.1", "::1"):
        return Line("nat", "ok", f"no address translation on the way: seen as {observed_host}")
    fix = "nothing: links that this peer dials carry everything; to be dialled, forward a TCP port in your router and use --advertise"
    return Line("nat", "warn", f"behind a router: seen as {observed_host}", fix)
