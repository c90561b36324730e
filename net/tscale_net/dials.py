"""Dials that are under way, and which of two connections survives when both sides dial at once.

Enters: wishes to dial, HELLOs of peers that dial us, links that stand. Leaves: per peer at most one dial; a verdict on each incoming HELLO.

The rule, so that both sides decide alike without talking: of two crossing dials the one by the smaller peer id is kept. The smaller side
turns the other's HELLO away if its own has left already (else it gives its own dial up, unheard); the larger side gives its own up.
A side that gave up waits for the other's link. Against a link that stands, a HELLO made after it (higher `order`) or by another run of
the program (`instance`) replaces it: the peer lost it, or was restarted. One made before it is a left-over of the crossing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tscale_net import limits
from tscale_net.errors import REASONS, Refused
from tscale_net.messages import HelloBody
from tscale_net.ports import PeerId
from tscale_net.tasks import TaskOwner


class Dial:
    """One attempt to reach a peer; several callers may wait for it."""

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.hello_sent = False
        """From here on the peer may know of this dial."""
        self.given_up = False
        """The link of the other side's dial is awaited instead."""
        self.done: asyncio.Future[PeerId] = asyncio.get_running_loop().create_future()
        self.waiters = 0
        self.task: asyncio.Task[None] | None = None


class Dials:
    """All dials of one transport."""

    def __init__(self, own_id: PeerId, tasks: TaskOwner) -> None:
        self._own_id = own_id
        self._tasks = tasks
        self._dials: dict[PeerId, Dial] = {}

    async def join(self, peer: PeerId, work: Callable[[Dial], Coroutine[Any, Any, None]]) -> PeerId:
        """Wait for the dial to `peer`, starting it by `work` if there is none. Raises what it raises.

        The dial ends when its last waiter is cancelled.
        """
        dial = self._dials.get(peer)
        if dial is None:
            dial = self._dials[peer] = Dial(peer)
            dial.task = self._tasks.spawn(self._run(dial, work), f"dial {peer[-6:]}")
        dial.waiters += 1
        try:
            return await asyncio.shield(dial.done)
        finally:
            dial.waiters -= 1
            if dial.waiters == 0:
                self._finish(dial)
                if dial.task is not None:
                    dial.task.cancel()

    async def _run(self, dial: Dial, work: Callable[[Dial], Coroutine[Any, Any, None]]) -> None:
        try:
            await work(dial)
            return
        except Refused as refusal:
            if refusal.code != "duplicate-dial":
                self._fail(dial, refusal)
                return
        await self._await_other_side(dial)

    async def _await_other_side(self, dial: Dial) -> None:
        dial.given_up = True
        try:
            async with asyncio.timeout(limits.DUPLICATE_WAIT_S):
                await asyncio.shield(dial.done)
        except TimeoutError:
            reason = f"{dial.peer} dialled this peer at the same moment, but its connection did not come about. Try again."
            self._fail(dial, Refused("duplicate-dial", reason))

    def give_up(self, peer: PeerId) -> None:
        """Stop the own dial in favour of the peer's."""
        dial = self._dials.get(peer)
        if dial is not None and not dial.given_up:
            if dial.task is not None:
                dial.task.cancel()
            dial.task = self._tasks.spawn(self._await_other_side(dial), f"await dial of {peer[-6:]}")

    def link_stands(self, peer: PeerId) -> None:
        """Tell waiters that a link to the peer stands, whoever dialled it."""
        dial = self._dials.get(peer)
        if dial is not None:
            self._finish(dial)
            if not dial.done.done():
                dial.done.set_result(peer)

    def verdict(self, peer: PeerId, hello: HelloBody, standing: HelloBody | None) -> None:
        """Raise Refused("duplicate-dial") if this incoming HELLO has to yield to the own dial or to the link that stands.

        `standing` is the HELLO by which the present link with the peer was made, if there is one.
        """
        if standing is not None and standing.instance == hello.instance and hello.order < standing.order:
            raise Refused("duplicate-dial", REASONS["duplicate-dial"])
        dial = self._dials.get(peer)
        if dial is not None and dial.hello_sent and not dial.given_up and self._own_id < peer:
            raise Refused("duplicate-dial", REASONS["duplicate-dial"])

    def _fail(self, dial: Dial, refusal: Refused) -> None:
        self._finish(dial)
        if not dial.done.done():
            dial.done.set_exception(refusal)
            dial.done.exception()  # a dial that nobody waits for any more is no error

    def _finish(self, dial: Dial) -> None:
        if self._dials.get(dial.peer) is dial:
            del self._dials[dial.peer]
