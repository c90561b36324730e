"""A long-distance link between two network namespaces, without `tc netem` (which not every kernel has).

Enters: rate, one-way delay, jitter, loss, a seed. Leaves: two namespaces, `left` (10.88.0.1) and `right` (10.88.0.2), whose packets meet
only here: a child process reads them from two TUN devices, drops, delays and paces them, and writes them out on the other side.
Needs root, /dev/net/tun and `ip`; `why_not()` says in one sentence what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

LEFT_ADDRESS, RIGHT_ADDRESS = "10.88.0.1", "10.88.0.2"
MTU_BYTES = 1500
QUEUE_MS = 100.0
"""Packets that would wait longer for the rate are dropped, as a router with a short buffer does."""
PACKETS_PER_WAKEUP = 64
POLL_S = 0.5
TUNSETIFF, IFF_TUN_NO_PI, CLONE_NEWNET = 0x400454CA, 0x1001, 0x40000000


@dataclass(frozen=True)
class LinkShape:
    """Both directions alike. `rate_mbit` 0 is no limit; `loss` is a share of all packets."""

    rate_mbit: float = 100.0
    delay_ms: float = 50.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    seed: int = 1


def why_not() -> str | None:
    """The sentence for a skipped test, or None where the emulator can run."""
    if os.geteuid() != 0:
        return "The link emulator needs root to make network namespaces."
    if not os.path.exists("/dev/net/tun"):
        return "The link emulator needs /dev/net/tun."
    return None if shutil.which("ip") else "The link emulator needs the command ip (iproute2)."


@contextlib.contextmanager
def emulated_link(shape: LinkShape) -> Iterator[tuple[str, str]]:
    """Names of the two namespaces (for `ip netns exec NAME ...`). Raises RuntimeError if the link does not come up."""
    names = (f"tsl{os.getpid()}", f"tsr{os.getpid()}")
    made: list[str] = []
    child = None
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            made.append(name)
        figures = [shape.rate_mbit, shape.delay_ms, shape.jitter_ms, shape.loss, shape.seed]
        child = subprocess.Popen([sys.executable, __file__, *names, *map(str, figures)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        if child.stdout.readline() != "up\n":
            raise RuntimeError("The emulated link did not come up; see the message of its process above.")
        yield names
    finally:
        if child is not None:
            child.kill()
            child.communicate()
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=True)


def _open_tun(namespace: str, address: str) -> int:
    """A TUN device inside the namespace; the descriptor stays usable after coming back."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter namespace {namespace}")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"wan0", IFF_TUN_NO_PI))
        subprocess.run(["ip", "address", "add", f"{address}/24", "dev", "wan0"], check=True)
        subprocess.run(["ip", "link", "set", "wan0", "mtu", str(MTU_BYTES), "up"], check=True)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        if libc.setns(home.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot leave the namespace")
    return device


def _forward(ends: tuple[int, int], shape: LinkShape) -> None:
    """Carry packets until killed."""
    draw = random.Random(shape.seed)
    across = {ends[0]: ends[1], ends[1]: ends[0]}
    free_s = dict.fromkeys(ends, 0.0)
    flying: list[tuple[float, int, int, bytes]] = []
    count = 0
    poll = select.epoll()
    for end in ends:
        poll.register(end, select.EPOLLIN)
    while True:
        while flying and flying[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(flying)
            with contextlib.suppress(BlockingIOError):  # a full device queue drops, as a card does
                os.write(end, packet)
        wait_s = min(POLL_S, max(0.0, flying[0][0] - time.monotonic())) if flying else POLL_S
        for end, _ in poll.poll(wait_s):
            for packet in _read_some(end):
                now_s = time.monotonic()
                leaves_s = max(free_s[end], now_s)
                if draw.random() < shape.loss or (leaves_s - now_s) * 1e3 > QUEUE_MS:
                    continue
                if shape.rate_mbit:
                    leaves_s += len(packet) * 8 / (shape.rate_mbit * 1e6)
                    free_s[end] = leaves_s
                count += 1
                delay_ms = max(0.0, shape.delay_ms + draw.uniform(-1.0, 1.0) * shape.jitter_ms)
                heapq.heappush(flying, (leaves_s + delay_ms / 1e3, count, across[end], packet))


def _read_some(end: int) -> Iterator[bytes]:
    for _ in range(PACKETS_PER_WAKEUP):
        try:
            yield os.read(end, 2 * MTU_BYTES)
        except BlockingIOError:
            return


def _main(left: str, right: str, rate: str, delay: str, jitter: str, loss: str, seed: str) -> None:
    ends = _open_tun(left, LEFT_ADDRESS), _open_tun(right, RIGHT_ADDRESS)
    print("up", flush=True)
    _forward(ends, LinkShape(float(rate), float(delay), float(jitter), float(loss), int(seed)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
