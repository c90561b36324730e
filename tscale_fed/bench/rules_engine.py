"""The peers of the rules bench on the kernels: a peer's whole step is one CUDA graph, and nothing waits for the device.

    positions -> text, labels, targets -> codes of the peer's weights -> forward -> backward -> optimizer           (per peer, in its lane)
A lane is one set of activations, codes and gradient with a stream of its own; peers take turns in their lane (peer p in lane p % lanes),
and lanes run side by side, so that one fills the gaps between the other's small kernels. Graphs are captured at the first step of a peer.
The arithmetic is the engine's (tscale_fed/engine): tests compare the two bit by bit.
Synchronous training has a lane of its own, made when it is first asked for: all peers' fragments are one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_fed.bench.rules_peers import PeerState, moments_of
from tscale_fed.bench.rules_text import RulesText
from tscale_fed.engine.backward import BackwardWork, backward
from tscale_fed.engine.buffers import Buffers, layer_seeds
from tscale_fed.engine.engine import padded_bias
from tscale_fed.engine.forward import Work, forward
from tscale_fed.engine.gradients import Gradients, update_matrices
from tscale_fed.engine.layout import ROW_MULTIPLE, Kind, Sizes
from tscale_fed.engine.packed import PackedWeights
from tscale_fed.engine.passes import capture, score_loss
from tscale_fed.engine.precision import Precision
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_kernels.dispatch import BackendName
from tscale_kernels.optimizer_step import ALL_FINITE, UpdatePlan, optimizer_step
from tscale_net.errors import Refused

EVALUATED_AT_ONCE = 128
"""Fragments per forward pass of an evaluation."""
_SEED_SPREAD = 1_000_003
_EXTRA_ROWS = 1
"""Embedding rows before the first token: that of a dropped token."""


@dataclass(frozen=True)
class Setup:
    """What all lanes share."""

    shape: ModelShape
    text: RulesText
    tokens: int
    precision: Precision
    device: torch.device
    backend: BackendName | None = None


class Lane:
    """Buffers for `fragments` fragments and the work on them."""

    def __init__(self, setup: Setup, fragments: int, kind: Kind) -> None:
        shape, device = setup.shape, setup.device
        if fragments * setup.tokens % ROW_MULTIPLE:
            sentence = f"{fragments} fragments of {setup.tokens} bytes are not a multiple of {ROW_MULTIPLE} bytes; change --fragments"
            raise Refused("bad-bench", sentence)
        self._setup, train = setup, kind != "evaluate"
        self.positions = torch.zeros(fragments, dtype=torch.int64, device=device)
        self.buffers = Buffers(Sizes(shape, fragments, setup.tokens, setup.precision, kind), device)
        self.buffers.signs.fill_(1.0)
        self.packed = PackedWeights(shape, setup.precision.code, device, transposed=train)
        self.table = torch.zeros(shape.embedding_rows, shape.width, device=device)
        bias = padded_bias(shape, setup.text.bias2(), device)
        self.work = Work(self.packed, self.table, bias, self.buffers, False, setup.backend)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if train:
            self.parameters = Parameters(shape, device)
            self.gradients = Gradients(shape, self.parameters)
            self.backward = BackwardWork(self.work, self.gradients, accumulate=False)
            self.plan = UpdatePlan(update_matrices(shape), device)

    def load(self, positions: Tensor, weights: Tensor) -> None:
        """Text that starts at `positions`, codes of `weights` [n]. Everything on the device."""
        b, setup = self.buffers, self._setup
        text, target = setup.text.batch(positions, setup.tokens)
        b.labels.copy_(text.view(-1, 1) + _EXTRA_ROWS)
        b.target.copy_(target.view(-1))
        self.table.copy_(weights[: self.table.numel()].view_as(self.table))
        self.packed.pack(weights, setup.backend)

    def score(self, weights: Tensor) -> None:
        """Add the loss of the fragments at `self.positions` to `loss_sum`."""
        self.load(self.positions, weights)
        forward(self.work)
        score_loss(self.work)

    def train(self, state: PeerState, peer: int, inputs: Inputs, positions: Tensor) -> None:
        """One whole step of a peer."""
        self.load(positions, state.weights[peer])
        self.buffers.seeds.copy_(inputs.seeds[peer])
        self.buffers.loss_sum.zero_()
        forward(self.work)
        backward(self.backward)
        optimizer_step(
            state.weights[peer], state.momentum[peer], self.parameters.flat_grad, self.plan, scalars=inputs.numbers[peer],
            moment_sums=state.moment_sums[peer, : self.plan.moments], bad_matrix=inputs.bad[peer, :1],
            square_sums=self.gradients.square_sums, backend=self._setup.backend,
        )  # fmt: skip


class Inputs:
    """What a tick tells the graphs: per peer positions, noise seeds, the optimizer's numbers; and the flag of a failed gradient."""

    def __init__(self, peers: int, fragments: int, depth: int, device: torch.device) -> None:
        self.positions = torch.zeros(peers, fragments, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(peers, depth, dtype=torch.int32, device=device)
        self.numbers = torch.zeros(peers, 4, device=device)
        self.bad = torch.full((peers, 4), ALL_FINITE, dtype=torch.int32, device=device)

    @staticmethod
    def send(buffer: Tensor, values: Tensor) -> None:
        """Without waiting: pinned memory is not reused before the copy is done."""
        buffer.copy_(values.pin_memory() if buffer.is_cuda else values, non_blocking=True)


class EngineMachine:
    """See the module. `text` is on the device; graphs False: launch kernel by kernel (on a processor always)."""

    def __init__(
        self,
        shape: ModelShape,
        text: RulesText,
        peers: int,
        fragments: int,
        tokens: int,
        precision: Precision,
        *,
        lanes: int = 1,
        graphs: bool = True,
        backend: BackendName | None = None,
    ) -> None:
        device = text.ids.device
        self._setup = Setup(shape, text, tokens, precision, device, backend)
        self._graphs_wanted = graphs and device.type == "cuda"
        self._fragments = fragments
        self.state = PeerState.zeros(peers, shape.trained_parameters, moments_of(shape), device)
        self._inputs = Inputs(peers, fragments, len(shape.layers()), device)
        self._lanes = [Lane(self._setup, fragments, "keep") for _ in range(min(lanes, peers))]
        self._judge = Lane(self._setup, EVALUATED_AT_ONCE, "evaluate")
        self._judged = torch.zeros(shape.trained_parameters, device=device)
        self._joint: tuple[Lane, Tensor] | None = None
        self._runs: dict[str, Callable[[], None]] = {}
        self._seed = 0

    def reset(self, start: Tensor, seed: int) -> None:
        self.state.reset(start)
        self._inputs.bad.fill_(ALL_FINITE)
        self._seed = seed

    def step(self, peers: Sequence[int], positions: Tensor, rate: float) -> None:
        self._tell(peers, rate)
        whole = torch.zeros(self._inputs.positions.shape, dtype=torch.int64)
        whole[list(peers)] = positions
        Inputs.send(self._inputs.positions, whole)
        self._prepare(peers)
        for lane in self._lanes:
            if lane.stream is not None:
                lane.stream.wait_stream(torch.cuda.current_stream())
        for peer in peers:
            stream = self._lane_of(peer).stream
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                self._runs[f"peer {peer}"]()
        for lane in self._lanes:
            if lane.stream is not None:
                torch.cuda.current_stream().wait_stream(lane.stream)

    def joint_step(self, positions: Tensor, rate: float) -> None:
        if self._joint is None:
            where = torch.zeros(positions.numel(), dtype=torch.int64, device=self._setup.device)
            self._joint = (Lane(self._setup, positions.numel(), "keep"), where)
        lane, where = self._joint
        Inputs.send(where, positions.flatten().clone())
        self._tell([0], rate)
        if "joint" not in self._runs:
            self._runs["joint"] = self._made(lambda: lane.train(self.state, 0, self._inputs, where), undo=True)
        self._runs["joint"]()

    def loss(self, weights: Tensor, fragments: int) -> float:
        lane, text = self._judge, self._setup.text
        places = text.held_out_positions(fragments, self._setup.tokens)
        if fragments % EVALUATED_AT_ONCE:
            raise ValueError(f"{fragments} fragments are not a multiple of {EVALUATED_AT_ONCE}")
        self._judged.copy_(weights)
        if "judge" not in self._runs:
            self._runs["judge"] = self._made(lambda: lane.score(self._judged), undo=False)
        lane.buffers.loss_sum.zero_()
        for part in places.split(EVALUATED_AT_ONCE):
            Inputs.send(lane.positions, part.clone())
            self._runs["judge"]()
        return float(lane.buffers.loss_sum) / (fragments * (self._setup.tokens - 1))

    def failed(self) -> bool:
        return bool((self._inputs.bad[:, 0] != ALL_FINITE).any())

    # -- graphs --------------------------------------------------------------------------------------------------------

    def _lane_of(self, peer: int) -> Lane:
        return self._lanes[peer % len(self._lanes)]

    def _tell(self, peers: Sequence[int], rate: float) -> None:
        """Numbers and seeds of the next step of `peers`."""
        numbers = torch.zeros(self._inputs.numbers.shape)
        seeds = torch.zeros(self._inputs.seeds.shape, dtype=torch.int32)
        for peer in peers:
            counts = self.state.counts[peer]
            seed = (self._seed * _SEED_SPREAD + peer) * _SEED_SPREAD + int(counts.own_steps)
            seeds[peer] = layer_seeds(seed, 0, seeds.shape[1])
            numbers[peer] = torch.tensor(counts.next_scalars(rate))
        Inputs.send(self._inputs.numbers, numbers)
        Inputs.send(self._inputs.seeds, seeds)

    def _prepare(self, peers: Sequence[int]) -> None:
        for peer in peers:
            if f"peer {peer}" not in self._runs:
                self._runs[f"peer {peer}"] = self._made(self._training_of(peer), undo=True)

    def _training_of(self, peer: int) -> Callable[[], None]:
        lane, inputs = self._lane_of(peer), self._inputs
        return lambda: lane.train(self.state, peer, inputs, inputs.positions[peer])

    def _made(self, function: Callable[[], None], *, undo: bool) -> Callable[[], None]:
        """A graph of `function`. Capturing runs it once; `undo`: the peers' state and flags are put back afterwards."""
        if not self._graphs_wanted:
            return function
        state, bad = self.state, self._inputs.bad
        changed = (state.weights, state.momentum, state.moment_sums, bad) if undo else ()
        before = [each.clone() for each in changed]
        graph = capture(function)
        for tensor, kept in zip(changed, before, strict=True):
            tensor.copy_(kept)
        return graph.replay
