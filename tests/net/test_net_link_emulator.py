"""The emulated link delays and loses packets as told (the benches of bulk transfer stand on it)."""

from __future__ import annotations

import subprocess
import sys

import pytest
from link_emulator import RIGHT_ADDRESS, LinkShape, emulated_link, why_not

pytestmark = [pytest.mark.netns, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

ECHO = "import socket; s = socket.socket(2, 2); s.bind(('', 9)); print('up', flush=True)\nwhile True: s.sendto(*s.recvfrom(99))"
ASK = f"""import socket, time
s = socket.socket(2, 2); s.settimeout(1); back = []
for number in range(100):
    start = time.monotonic(); s.sendto(b'%d' % number, ('{RIGHT_ADDRESS}', 9))
    try: s.recv(99); back.append(time.monotonic() - start)
    except TimeoutError: break
print(len(back), min(back, default=0.0))"""


def ask(shape: LinkShape) -> tuple[int, float]:
    """Round trips until the first lost packet, and the fastest of them in seconds."""
    with emulated_link(shape) as (left, right):
        echo = subprocess.Popen(["ip", "netns", "exec", right, sys.executable, "-c", ECHO], stdout=subprocess.PIPE)
        try:
            assert echo.stdout is not None and echo.stdout.readline() == b"up\n"
            asked = subprocess.run(["ip", "netns", "exec", left, sys.executable, "-c", ASK], check=True, capture_output=True, text=True)
        finally:
            echo.kill()
            echo.communicate()
    count, fastest = asked.stdout.split()
    return int(count), float(fastest)


def test_clean_link_delays_both_ways_and_loses_nothing() -> None:
    count, fastest_s = ask(LinkShape(delay_ms=10.0))
    assert count == 100 and fastest_s >= 0.02


def test_lossy_link_loses() -> None:
    assert ask(LinkShape(delay_ms=1.0, loss=0.3))[0] < 100
