"""One `tscale-peer` process of the demo: started, watched through its control socket, stopped.

Enters: a folder and flags. Leaves: snapshots, or `Refused` with the process's last lines if it died. Nothing is shared with the process but
its command line, its output file and the control socket that any user has.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tscale_fed.control_client import AsyncControlClient
from tscale_fed.limits import DEMO_LAST_LINES, DEMO_LEAVE_S, DEMO_POLL_S, DEMO_START_S
from tscale_fed.status import Status
from tscale_net.errors import Refused
from tscale_net.ports import Clock

PROGRAM = "import sys; from tscale_fed.cli import peer_main; sys.exit(peer_main())"
"""What the console script `tscale-peer` does, with this interpreter."""


class DemoProcess:
    """A peer with a home of its own under `folder`. `label` is what the demo calls it."""

    def __init__(self, label: str, folder: Path, clock: Clock, start_s: float = DEMO_START_S) -> None:
        """`start_s`: how long it may take until it trains."""
        self.label = label
        self.home = folder / label
        self.log = folder / f"{label}.log"
        self._clock = clock
        self._start_s = start_s
        self._client = AsyncControlClient(self.home)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, *flags: str) -> Status:
        """Start it and wait until it trains; returns that first snapshot. Raises Refused if it dies or takes too long.

        It gets a session of its own, so that Ctrl+C reaches the demo alone, which then asks it to leave.
        """
        command = [sys.executable, "-c", PROGRAM, "--home", str(self.home), "--listen", "127.0.0.1:0", *flags]
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=descriptor, stderr=descriptor, start_new_session=True
            )
        finally:
            os.close(descriptor)
        return await self._until_training()

    async def _until_training(self) -> Status:
        begun = self._clock.now()
        while self._clock.now() - begun < self._start_s:
            status = await self.snapshot()
            if status is not None and status.phase == "training":
                return status
            await self._clock.sleep(DEMO_POLL_S)
        raise Refused("demo-slow", f"the {self.label} does not train after {self._start_s:.0f} s; its last lines:\n{self.last_lines()}")

    async def snapshot(self) -> Status | None:
        """Its state now; None if it does not answer (yet). Raises Refused if the process has ended."""
        if self._process is not None and self._process.returncode is not None:
            raise Refused("demo-died", f"the {self.label} ended with code {self._process.returncode}; its last lines:\n{self.last_lines()}")
        try:
            return await self._client.snapshot()
        except Refused:
            return None

    async def pause(self) -> None:
        await self._client.command("pause")

    async def leave(self) -> int:
        """Ask it to publish its rest and leave, as Ctrl+C would; kill it if it does not. Returns its exit code."""
        if self._process is None:
            return 0
        if self._process.returncode is None:
            self._process.terminate()
        try:
            async with asyncio.timeout(DEMO_LEAVE_S):
                return await self._process.wait()
        except TimeoutError:
            self._process.kill()
            return await self._process.wait()

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def last_lines(self) -> str:
        """The end of its output."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(f"    {line}" for line in lines[-DEMO_LAST_LINES:]) or "    (none)"
