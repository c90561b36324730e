"""Throughput of an encrypted bulk link beside plain TCP, in the same run, between two processes on loopback.

    python tests/bench/bench_link.py [MiB]

Three rows, median of 3: plain TCP (blocking sockets, the same chunks), bulk frames over a ZmqTransport link, and a blob transfer (credit,
chunk hashes) over it; then the ping of the control channel while bulk is full. Numbers of a shared machine move by a third: trust ratios.
"""

from __future__ import annotations

import asyncio
import random
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "net")]

from tscale_net import limits  # noqa: E402
from tscale_net.identity import Identity  # noqa: E402
from tscale_net.ports import Channel, Frame, PeerId, SystemClock  # noqa: E402
from tscale_net.transfer import Transfers  # noqa: E402
from tscale_net.transport import ZmqTransport  # noqa: E402

KIND = 40
ROUNDS = 3


async def serve(megabytes: int) -> None:
    """The sending process: prints its address and plain port, then sends whatever it is asked for."""
    clock = SystemClock()
    transport = ZmqTransport(Identity.from_seed(bytes(31) + b"1"), clock, random.Random(1), "127.0.0.1:0")
    addresses = await transport.start()
    transfers = Transfers(transport, clock, random.Random(1))
    content = random.Random(2).randbytes(limits.CHUNK_BYTES) * (megabytes * limits.MIB // limits.CHUNK_BYTES)

    async def provide(peer: PeerId, name: str) -> bytes:
        return content

    def plain() -> None:
        while True:
            connection, _ = listening.accept()
            with connection:
                for start in range(0, len(content), limits.CHUNK_BYTES):
                    connection.sendall(content[start : start + limits.CHUNK_BYTES])

    async def frames(peer: PeerId) -> None:
        for start in range(0, len(content), limits.CHUNK_BYTES):
            while not transport.send(peer, KIND, content[start : start + limits.CHUNK_BYTES], Channel.BULK):
                await clock.sleep(0.001)

    transfers.serve(provide)
    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=plain, daemon=True).start()
    print(addresses[0], listening.getsockname()[1], flush=True)
    senders: list[asyncio.Task[None]] = []
    while True:
        event = await transport.next_event()
        if isinstance(event, Frame) and not transfers.handle(event):
            senders.append(asyncio.create_task(frames(event.peer)))


async def measure(address: str, plain_port: int, megabytes: int) -> None:
    clock = SystemClock()
    transport = ZmqTransport(Identity.from_seed(bytes(31) + b"2"), clock, random.Random(2))
    await transport.start()
    transfers = Transfers(transport, clock, random.Random(2))
    peer = await transport.dial(address)
    arrived = asyncio.Event()
    received = 0

    async def pump() -> None:
        nonlocal received
        while True:
            event = await transport.next_event()
            if isinstance(event, Frame) and not transfers.handle(event):
                received += len(event.body)
                arrived.set()

    pumping = asyncio.create_task(pump())

    def read_plain() -> None:
        buffer = bytearray(limits.CHUNK_BYTES)
        with socket.create_connection(("127.0.0.1", plain_port)) as connection:
            while connection.recv_into(buffer):
                pass

    async def plain() -> None:
        await asyncio.to_thread(read_plain)

    async def frames() -> None:
        nonlocal received
        received = 0
        transport.send(peer, KIND, b"go")
        while received < megabytes * limits.MIB:
            arrived.clear()
            await arrived.wait()

    async def transfer() -> None:
        await transfers.fetch("x", [peer], max_bytes=1 << 40)

    base = None
    for label, work in (("plain TCP", plain), ("encrypted link", frames), ("blob transfer", transfer)):
        rates = []
        cpu_s = _cpu_s()
        for _ in range(ROUNDS):
            start_s = time.perf_counter()
            await work()
            rates.append(megabytes * limits.MIB / 1e6 / (time.perf_counter() - start_s))
        median = statistics.median(rates)
        base = base or median
        per_gib = (_cpu_s() - cpu_s) / (ROUNDS * megabytes / 1024)
        print(f"{label:15s} {median:8.0f} MB/s  {base / median:5.1f} x slower than plain  {per_gib:5.2f} CPU-s/GiB at the receiver")
    rtts = [link.rtt_s for link in transport.links() if link.rtt_s is not None]
    if rtts:
        print(f"control ping under load: {rtts[0] * 1000:.1f} ms")
    pumping.cancel()
    await transport.close()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(serve(int(sys.argv[2])))
        return
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    server = subprocess.Popen([sys.executable, __file__, "serve", str(megabytes)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address, port = server.stdout.readline().split()
        asyncio.run(measure(address, int(port), megabytes))
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
