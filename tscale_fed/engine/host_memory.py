"""CPU offload: weights and momentum in host memory, updated there piece by piece while the GPU goes on with the backward pass.

    GPU    backward of a stage (a layer, or an end of the model) -> bf16 gradient -> copied to host memory on a stream of its own
    host   one thread takes stage after stage: second moments, momentum and weights, codes (host_update.py: all cores) -> codes copied back,
           put in kernel order and transposed on a third stream, behind the last use of the old codes
Nothing of a layer above is needed below, so the update of upper layers hides behind the backward pass of lower ones. `finish` waits for the
rest; after it the weights in `parameters.flat` are those of the step, on the CPU, and may be changed in place until the next `begin_step`,
which makes all codes anew if they were (torch counts in-place changes of a tensor and its views; nobody has to say so).
With several micro-batches each adds its bf16 gradient to the sum in host memory (rounded once per addition), and the last one updates.

What is weaker than on the device: when numbers overflow in the middle of a backward pass, matrices above are updated already. Those from
there on are not, so weights are always finite, but the step is only partly made: go on from a checkpoint.
All results are, bit for bit, those of the device's operations on the same bf16 gradient (host_update.py).
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tscale_fed.engine.engine import on_device
from tscale_fed.engine.host_gradients import HostGradients, Stage
from tscale_fed.engine.host_parameters import HostParameters
from tscale_fed.engine.host_pieces import Piece, Segment, build_pieces
from tscale_fed.engine.host_transfer import Mark, Transfer
from tscale_fed.engine.packed import PackedWeights
from tscale_fed.model.shape import ModelShape
from tscale_fed.optimizer.rule import Optimizer
from tscale_kernels import host_update
from tscale_kernels.dispatch import BackendName
from tscale_kernels.host_update import HostBackend, HostScalars
from tscale_kernels.place_codes import place_codes


@dataclass(slots=True)
class _StageJob:
    """A stage's gradient on its way, and what remains to be done with it."""

    stage: Stage
    arrived: Mark
    last_use: Mark
    part: Tensor | None
    """The gradient of a further micro-batch, to be added; None: it was copied to its place."""
    update: bool
    done: threading.Event = field(default_factory=threading.Event)


class HostMemory:
    """Weights, momentum and the update in host memory. One thread calls it; a thread of its own does the work (`threaded`)."""

    def __init__(
        self,
        parameters: HostParameters,
        optimizer: Optimizer,
        weights: PackedWeights,
        table: Tensor,
        gradients: HostGradients,
        *,
        transfer: Transfer,
        host: HostBackend,
        threaded: bool = True,
        backend: BackendName | None = None,
    ) -> None:
        """`weights` and `table` (fp32 [embedding rows, E]) are the device's copies, which this object keeps up to date."""
        memory = parameters.memory
        self.parameters = parameters
        self.optimizer = optimizer
        self.gradients = gradients
        self._transfer, self._host, self._backend = transfer, host, backend
        self._pieces = build_pieces(parameters.shape, weights, table)
        every = [piece for pieces in self._pieces.values() for piece in pieces]
        packed = [piece for piece in every if piece.matrix is not None]
        code = weights.final.codes.dtype
        self._first_code = min(piece.start for piece in packed)
        self._codes = memory.zeros(parameters.flat.numel() - self._first_code, code)
        self._units = memory.zeros(sum(len(piece.segments) for piece in packed), torch.float32)
        self._staging = torch.empty(max(piece.stop - piece.start for piece in packed), dtype=code, device=table.device)
        self._sums = memory.zeros(max(1, gradients.square_sums.numel()), torch.float32)
        self._guards = memory.zeros(len(self._pieces), torch.float32)
        self._squares = torch.empty(max(host_update.blocks(s.elements) for piece in every for s in piece.segments), dtype=torch.float64)
        self._row_squares = torch.empty(max(s.elements // s.columns for piece in every for s in piece.segments), dtype=torch.float64)
        self._parts: dict[str, list[Tensor]] = {}
        self._part_users: dict[tuple[str, int], _StageJob] = {}
        self._slot_users: dict[int | str, Mark] = {}
        self._placed: Mark = transfer.mark()
        self._seen_version = -1
        self._scalars: HostScalars | None = None
        self._micro_batches = 1
        self._micro_batch = -1
        self._jobs: list[_StageJob] = []
        self._bad: list[str] = []
        self._error: BaseException | None = None
        self._queue: queue.SimpleQueue[_StageJob | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if threaded:
            # The thread holds no reference: whoever drops this object ends it.
            self._thread = threading.Thread(target=_work, args=(self._queue, weakref.ref(self)), name="host update", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._queue.put, None)

    # -- called by the engine ----------------------------------------------------------------------------------------

    def begin_step(self, rate: float | None, micro_batches: int) -> None:
        """Before the first micro-batch of a step. rate None: only gather the gradient in `parameters.flat_grad`."""
        self.refresh()
        optimizer = self.optimizer
        self._scalars = None if rate is None else HostScalars.of(rate, optimizer.beta, optimizer.next_count, optimizer.settings.l2)
        self._micro_batches, self._micro_batch = micro_batches, -1
        self._bad.clear()
        self.gradients.guard.zero_()

    def begin_micro_batch(self) -> None:
        """Before the forward pass of each."""
        self._micro_batch += 1
        self._transfer.before_compute(self._placed)

    def reserve(self, stage: Stage) -> None:
        """Before the computation of a stage: its slot may still be on its way from the stage before the last."""
        mark = self._slot_users.get(self._slot(stage))
        if mark is not None:
            self._transfer.before_compute(mark)

    def gradient_ready(self, stage: Stage) -> None:
        """After the computation of a stage was enqueued, `finish_stage` included."""
        gradients, span = self.gradients, self.gradients.spans[stage]
        target, part = self.parameters.flat_grad[span.start : span.stop], None
        if self._micro_batch > 0:
            target = part = self._free_part(stage)
        guard = self._guards[self._guard_index(stage)].view(1)
        last_use = self._transfer.mark()
        pairs = [(gradients.sent(stage), target), (gradients.guard, guard)]
        if span.last_sum > span.first_sum:
            pairs.append((gradients.sums(stage), self._sums[span.first_sum : span.last_sum]))
        arrived = self._transfer.fetch(pairs)
        self._slot_users[self._slot(stage)] = arrived
        job = _StageJob(stage, arrived, last_use, part, self._micro_batch == self._micro_batches - 1 and self._scalars is not None)
        if part is not None:
            self._part_users[(self._part_kind(stage), self._part_slot(stage))] = job
        self._jobs.append(job)
        if self._thread is None:
            self.do(job)
        else:
            self._queue.put(job)

    def finish(self) -> str | None:
        """Wait for all that is under way. None if the step was made (the caller counts it), else the first matrix that was not updated."""
        for job in self._jobs:
            job.done.wait()
        self._jobs.clear()
        self._part_users.clear()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self._seen_version = self.parameters.flat._version
        return self._bad[0] if self._bad else None

    def refresh(self) -> None:
        """Make the codes of all weights anew if somebody changed a weight since the last step."""
        if self.parameters.flat._version == self._seen_version:
            return
        self._placed.wait()  # codes that are still on their way must not change
        last_use = self._transfer.mark()
        for pieces in self._pieces.values():
            for piece in pieces:
                for number, segment in enumerate(piece.segments if piece.matrix is not None else ()):
                    squares = self._squares[: host_update.blocks(segment.elements)]
                    host_update.weight_squares_of(self.parameters.flat[segment.start : segment.stop], squares, self._host)
                    self._encode(piece, number, squares)
                self._put(piece, last_use)
        self._transfer.before_compute(self._placed)
        self._seen_version = self.parameters.flat._version

    def close(self) -> None:
        """End the thread. Copies that were enqueued are waited for."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._placed.wait()

    # -- the update (the worker thread) ------------------------------------------------------------------------------

    def do(self, job: _StageJob) -> None:
        """One stage. After an error nothing more is updated; `finish` raises it."""
        try:
            if self._error is None:
                with on_device(self.gradients.guard.device):
                    self._take(job)
        except BaseException as error:
            self._error = error
        finally:
            job.done.set()

    @torch.no_grad()
    def _take(self, job: _StageJob) -> None:
        job.arrived.wait()
        span = self.gradients.spans[job.stage]
        if job.part is not None:
            host_update.add_gradient(self.parameters.flat_grad[span.start : span.stop], job.part, self._host)
        if not job.update:
            return
        finite = bool(self._guards[self._guard_index(job.stage)].isfinite())
        for piece in self._pieces[job.stage]:
            means = [self._mean_squares(segment) for segment in piece.segments]
            if finite and all(bool(mean.isfinite().all()) for mean in means):
                self._update(piece, means)
                self._put(piece, job.last_use)
            else:
                self._bad.append(piece.segments[0].name)

    def _mean_squares(self, segment: Segment) -> Tensor:
        """fp32 [moments] mean square gradient. Of one micro-batch the GPU has summed the squares; a sum of several is read once more."""
        if segment.sums is not None and self._micro_batches == 1:
            first, count = segment.sums
            return (self._sums[first : first + count].double().sum() / segment.elements).float().view(1)
        gradient = self.parameters.flat_grad[segment.start : segment.stop].view(-1, segment.columns)
        squares = self._row_squares[: len(gradient)]
        host_update.row_squares(gradient, squares, self._host)
        return (squares / segment.columns if segment.sums is None else squares.sum().view(1) / segment.elements).float()

    def _update(self, piece: Piece, means: list[Tensor]) -> None:
        parameters, optimizer, scalars = self.parameters, self.optimizer, self._scalars
        assert scalars is not None
        for number, (segment, mean) in enumerate(zip(piece.segments, means, strict=True)):
            part = slice(segment.start, segment.stop)
            moments = optimizer.moment_sums[segment.moment : segment.moment + segment.moments]
            moments.mul_(1.0 - torch.tensor(scalars.gap)).add_(mean)
            multipliers = torch.where(moments > 0, -torch.rsqrt(moments * scalars.inverse_count), 0.0)
            squares = self._squares[: host_update.blocks(segment.elements)]
            host_update.update(
                parameters.flat[part], optimizer.momentum[part], parameters.flat_grad[part], multipliers=multipliers, scalars=scalars,
                weight_squares=squares, host=self._host,
            )  # fmt: skip
            if piece.matrix is not None:
                self._encode(piece, number, squares)

    def _encode(self, piece: Piece, number: int, squares: Tensor) -> None:
        """Unit and codes of a segment, in host memory."""
        segment = piece.segments[number]
        unit = host_update.unit_of(squares, segment.elements, self._codes.dtype)
        self._units[piece.unit + number] = unit
        codes = self._codes[segment.start - self._first_code : segment.stop - self._first_code]
        host_update.encode_weights(self.parameters.flat[segment.start : segment.stop], unit, codes, self._host)

    def _put(self, piece: Piece, last_use: Mark) -> None:
        """Send a piece's codes and units, or rows of the embedding, to the device."""
        if piece.table is not None:
            rows = self.parameters.flat[piece.start : piece.stop].view(piece.rows, piece.columns)
            self._placed = self._transfer.put([(rows, piece.table)], _nothing, last_use)
            return
        assert piece.matrix is not None
        matrix, size = piece.matrix, piece.stop - piece.start
        codes = self._codes[piece.start - self._first_code : piece.stop - self._first_code]
        units = self._units[piece.unit : piece.unit + len(piece.segments)]
        source = self._staging[:size]
        self._placed = self._transfer.put([(codes, source), (units, matrix.units)], self._placing(piece, source), last_use)

    def _placing(self, piece: Piece, source: Tensor) -> Callable[[], None]:
        def place() -> None:
            assert piece.matrix is not None
            place_codes(
                source.view(piece.rows, piece.columns), row_map=piece.row_map, column_map=piece.column_map, codes=piece.matrix.codes,
                codes_t=piece.matrix.codes_t, backend=self._backend,
            )  # fmt: skip

        return place

    # -- slots -------------------------------------------------------------------------------------------------------

    def _slot(self, stage: Stage) -> int | str:
        """Which bf16 buffer of `HostGradients` a stage uses."""
        return stage % 2 if isinstance(stage, int) else "ends"

    def _guard_index(self, stage: Stage) -> int:
        return stage + 2 if isinstance(stage, int) else ("embedding", "final").index(stage)

    def _part_kind(self, stage: Stage) -> str:
        return "layer" if isinstance(stage, int) else "ends"

    def _part_slot(self, stage: Stage) -> int:
        return stage % 2 if isinstance(stage, int) else 0

    def _free_part(self, stage: Stage) -> Tensor:
        """Page-locked room for a further micro-batch's gradient, once the host has added what was in it."""
        kind, slot, spans = self._part_kind(stage), self._part_slot(stage), self.gradients.spans
        if kind not in self._parts:
            sizes = [span.stop - span.start for each, span in spans.items() if self._part_kind(each) == kind]
            count = 2 if kind == "layer" else 1
            self._parts[kind] = [self.parameters.memory.zeros(max(sizes), torch.bfloat16) for _ in range(count)]
        user = self._part_users.get((kind, slot))
        if user is not None:
            user.done.wait()
        return self._parts[kind][slot][: spans[stage].stop - spans[stage].start]


def _work(jobs: queue.SimpleQueue[_StageJob | None], owner: weakref.ref[HostMemory]) -> None:
    """The thread: stage after stage until None comes."""
    while (job := jobs.get()) is not None:
        memory = owner()
        if memory is None:
            return
        memory.do(job)
        del memory


def host_bytes(shape: ModelShape, code: torch.dtype, micro_batches: int = 1) -> int:
    """Host memory that this way to train takes: weights, momentum, gradient, codes, and with several micro-batches room for theirs."""
    parameters, ends = shape.trained_parameters, max(shape.embedding_rows, shape.vocab) * shape.width
    layer = (parameters - (shape.embedding_rows + shape.vocab) * shape.width) // len(shape.layers())
    parts = 2 * (2 * layer + ends) if micro_batches > 1 else 0
    return parameters * (4 + 4 + 2) + (parameters - shape.embedding_rows * shape.width) * code.itemsize + parts


def _nothing() -> None:
    return None
