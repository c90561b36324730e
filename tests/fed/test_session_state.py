"""A peer's state, copied part by part while it trains and publishes: what comes back is a peer that nobody has to wait for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_run import make_data, make_trainer

from tests.peers.core_kit import RUN, StillClock, author
from tscale_fed import session_state
from tscale_fed.new_run import tensor_specs
from tscale_fed.session_state import StateCopy
from tscale_fed.trainer import Trainer
from tscale_peers.applied import AppliedSet
from tscale_peers.basepoint import Replica
from tscale_peers.codec import codec_named
from tscale_peers.delta_log import MemoryLog
from tscale_peers.exchange import Exchange, OuterRule
from tscale_peers.layout import Layout
from tscale_peers.meeting import MeetingPoint, Progress
from tscale_peers.packet import Packet, Terms
from tscale_peers.pledges import Pledges


class Peer:
    """A trainer and its exchange, without a swarm."""

    def __init__(self, trainer: Trainer, keep: bool) -> None:
        self.trainer = trainer
        shape = trainer.engine.parameters.shape
        self.terms = Terms(RUN, Layout.build(tensor_specs(shape), 1 << 13), codec_named("sign"))
        replica = Replica(self.terms.layout, self.terms.codec)
        replica.set_start(trainer.weights)
        self.log = MemoryLog()
        self.exchange = self.around(replica, trainer.weights, keep=keep)
        self.meeting = MeetingPoint(
            self.exchange, replica, self.log, 1, StillClock(), lambda body: Packet.decode(body, self.terms)
        )  # fmt: skip
        self.meeting.post = lambda met: None
        self.meeting.may_publish = True
        self.spreading = SimpleNamespace(summing=SimpleNamespace(sums=SimpleNamespace(encode=lambda: b"sums")))

    def around(self, replica: Replica, weights: torch.Tensor, **options: object) -> Exchange:
        who = author(1)
        keep = options.pop("keep", True)
        return Exchange(
            replica, weights, OuterRule(), (who.public_key, who.sign), 1, self.log, self.terms, StillClock(),
            keep_displacement=bool(keep), **options,  # type: ignore[arg-type]
        )  # fmt: skip

    def step(self) -> None:
        self.trainer.step()
        self.meeting.meet(Progress(self.trainer.steps, self.trainer.steps, self.trainer.tokens, 1.0, trained=True))

    def copy(self) -> StateCopy:
        return StateCopy(self, self.trainer, lambda: {"run": "aa"})  # type: ignore[arg-type]

    def back(self, state: session_state.State) -> Exchange:
        """The exchange as it is after a restart from this state, with the log as it is now."""
        _, tensors, blobs, _ = state
        replica = Replica(self.terms.layout, self.terms.codec)
        replica.restore(tensors["basepoint"], AppliedSet.decode(blobs["applied"], len(self.terms.layout.chunks)))
        pledges = Pledges(self.exchange.stream_key, MemoryLog(), self.terms, blobs["pledges"])
        return self.around(
            replica, tensors["weights"].clone(), displacement=tensors["displacement"].clone(), paid=blobs["paid"], pledges=pledges
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))  # type: ignore[return-value]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "implied"])
def test_a_small_model_goes_at_one_moment_with_everything_that_it_had(data: Path, keep: bool) -> None:
    peer = Peer(make_trainer(data), keep)  # type: ignore[arg-type]
    for _ in range(3):
        peer.step()
    peer.trainer.step()
    peer.exchange.mark_trained()
    copy = peer.copy()
    assert len(copy.parts) == 1
    steps, tensors, blobs, facts = copy.at_once()
    want = {**peer.trainer.state_tensors(), "basepoint": peer.exchange.replica.basepoint, "displacement": peer.exchange.displacement()}
    assert tensors.keys() == want.keys() and all(torch.equal(tensors[name], want[name]) for name in want)
    assert blobs["applied"] == peer.exchange.replica.applied.encode() and blobs["paid"] == peer.exchange.paid.encode()
    assert blobs["pledges"] == peer.exchange.pledges.encode(
        [peer.exchange.pledges.saved_chunk(chunk.index) for chunk in peer.terms.layout.chunks]
    )
    assert blobs["sums"] == b"sums"
    assert steps == facts["copied_from_step"] == 4 and facts["run"] == "aa" and facts["tokens"] == peer.trainer.tokens
    peer.step()
    assert not torch.equal(tensors["weights"], peer.trainer.weights), "a copy"


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "implied"])
def test_a_large_model_is_copied_between_steps_and_comes_back_whole(data: Path, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step publishes, so every part has another set of own packets; the log has all of them."""
    peer = Peer(make_trainer(data), keep)  # type: ignore[arg-type]
    monkeypatch.setattr(session_state, "CHECKPOINT_PART_VALUES", peer.terms.layout.size // 3)
    peer.step()
    copy = peer.copy()
    assert len(copy.parts) >= 3
    moments: list[torch.Tensor] = []
    for part in copy.parts:
        copy.take(part)
        moments.append(part.of(peer.trainer.weights).clone())
        peer.step()
    state = copy.finish()
    steps, tensors, _, facts = state
    assert steps == 1 + len(copy.parts) and facts["copied_from_step"] == 1 and "average_sum" not in tensors
    assert torch.equal(tensors["weights"], torch.cat(moments)) and len(tensors["momentum"]) == peer.terms.layout.size
    back = peer.back(state)
    assert back.recovered == sum((len(copy.parts) - at) * len(part.chunks) for at, part in enumerate(copy.parts))
    assert back.replica.state() == peer.exchange.replica.state()
    assert back.paid.encode() == peer.exchange.paid.encode()
    held = back.replica.weights() + back.displacement()
    assert (back.weights - held).abs().max() <= 2.0**-22
    assert (back.weights - tensors["weights"]).abs().max() <= 2.0**-22, "in the sum rule own packets leave the weights where they were"
