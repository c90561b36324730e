"""A run without a swarm: steps, progress lines, evaluations, checkpoints, until the last step or until it is asked to stop.

Enters: a trainer at step 0, an evaluator, the checkpoints of an earlier session; the other processes of the run, if there are any. Leaves:
checkpoints, and lines for people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tscale_fed.checkpoint import Checkpoint, CheckpointStore
from tscale_fed.config import RunConfig
from tscale_fed.console import Console, RateMeter
from tscale_fed.evaluate import Evaluator
from tscale_fed.parallel.team import Alone, Decision, Team
from tscale_fed.trainer import StepReport, Trainer
from tscale_fed.units import count_text, duration_text
from tscale_net.errors import Refused
from tscale_net.ports import Clock

PROGRESS_INTERVAL_S = 5.0
"""Between two progress lines: often enough to see that it lives."""
RATE_WINDOW_S = 60.0
"""Tokens per second and time left are means over this long: evaluations and checkpoints are included."""
KIND = "alone"
"""Marks a checkpoint of this kind of run among the facts."""


class LoneRun:
    """Owns the loop of `tscale train`."""

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        evaluator: Evaluator,
        store: CheckpointStore,
        console: Console,
        clock: Clock,
        until_step: int,
        team: Team | None = None,
    ) -> None:
        """`team`: the processes that make every step together; all of them have a LoneRun."""
        self._config = config
        self._trainer = trainer
        self._evaluator = evaluator
        self._store = store
        self._console = console
        self._clock = clock
        self._until_step = until_step
        self._team = team or Alone()
        self._steps_rate = RateMeter(RATE_WINDOW_S)
        self._tokens_rate = RateMeter(RATE_WINDOW_S)
        self._saved_at_step = -1

    def run(self, stop: Callable[[], bool]) -> None:
        """Resume if there is something to resume, then step until the last step or until `stop()`; then evaluate and save.

        A periodic checkpoint that cannot be written is a warning, the last one an error. If another process of the team is lost, the state
        before the broken step is saved. Raises Refused; KeyboardInterrupt passes through.
        """
        self._resume()
        if self._trainer.steps >= self._until_step:
            self._console.say(f"already at step {self._trainer.steps}: nothing to do; a larger --steps or budget_batches goes on from here")
            return
        try:
            self._evaluate()
            if not self._loop(stop):
                self._evaluate()
            held_back = self._team.held_back()
        except Refused as refused:
            if refused.code == "rank-lost":
                self._save_what_is_left()
            raise
        self._save(held_back)

    def _loop(self, stop: Callable[[], bool]) -> bool:
        """Until the last step (False), or a stop (True)."""
        next_line_s = self._clock.now()
        next_eval_s = self._later(self._config.eval.every_s)
        next_save_s = self._later(self._config.checkpoint.every_s)
        stopped = self._team.agree(Decision(stop(), False, False), self._trainer).stop
        while not stopped and self._trainer.steps < self._until_step:
            report = self._trainer.step()
            now = self._clock.now()
            self._steps_rate.add(now, self._trainer.steps)
            self._tokens_rate.add(now, self._trainer.tokens)
            last = self._trainer.steps >= self._until_step
            if now >= next_line_s or last:
                self._console.say(self._progress_line(report))
                next_line_s = now + PROGRESS_INTERVAL_S
            wish = Decision(stop(), now >= next_eval_s and not last, now >= next_save_s and not last)
            stopped, evaluate, save = self._team.agree(wish, self._trainer)
            if evaluate:
                self._evaluate()
                next_eval_s = self._later(self._config.eval.every_s)
            if save:
                self._save_or_warn(self._team.held_back())
                self._team.regroup()
                next_save_s = self._later(self._config.checkpoint.every_s)
        return stopped

    def _later(self, interval_s: float) -> float:
        return self._clock.now() + interval_s if interval_s else float("inf")

    def _progress_line(self, report: StepReport) -> str:
        parts = [f"step {report.step} of {self._until_step}", f"loss {self._trainer.loss_average:.3f}"]
        tokens_per_s, steps_per_s = self._tokens_rate.per_s(), self._steps_rate.per_s()
        if tokens_per_s and steps_per_s:
            parts.append(f"{count_text(tokens_per_s)} tokens/s")
            parts.append(f"{duration_text((self._until_step - report.step) / steps_per_s)} left")
        return "  ".join([*parts, f"rate {report.rate:.4g}"])

    def _evaluate(self) -> None:
        test = self._evaluator.loss(self._trainer.weights, "test")
        train = self._evaluator.loss(self._trainer.weights, "train")
        self._console.say(
            f"held-out loss {test.loss:.4f} nats/token ({test.bits_per_byte:.3f} bits/byte), on training text {train.loss:.4f}, "
            f"at step {self._trainer.steps}"
        )

    def _save_or_warn(self, held_back: Mapping[str, Tensor]) -> None:
        try:
            self._save(held_back)
        except Refused as refused:
            self._console.warn(f"{refused.detail}; training goes on and tries again later")

    def _save(self, held_back: Mapping[str, Tensor]) -> None:
        """The leader writes; `held_back` belongs to the team."""
        if self._saved_at_step == self._trainer.steps or not self._team.leader:
            return
        path = self._store.save(self._trainer.steps, {**self._trainer.state_tensors(), **held_back}, {}, self._facts())
        self._saved_at_step = self._trainer.steps
        self._console.say(f"saved {path}")

    def _save_what_is_left(self) -> None:
        """After a lost process: the last whole step, on a stream that does not wait for the one that will never come."""
        with self._trainer.beside_broken_step():
            self._save_or_warn({})

    def _facts(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "written_unix": self._clock.wall(),
            "recipe": self._trainer.recipe.to_manifest(),
            "data": self._trainer.data.hash,
            "trainer": self._trainer.state_facts(),
        }

    def _resume(self) -> None:
        found = self._load() if self._team.leader else None
        self._team.spread(self._trainer, {} if found is None else found.tensors)

    def _load(self) -> Checkpoint | None:
        found, notes = self._store.latest()
        for note in notes:
            self._console.warn(note)
        if found is None:
            return None
        self._refuse_other_run(found)
        self._trainer.load_state(found.tensors, found.facts["trainer"])
        self._saved_at_step = self._trainer.steps
        self._console.say(f"going on from {found.path.name}, step {self._trainer.steps}")
        return found

    def _refuse_other_run(self, found: Checkpoint) -> None:
        """The model, the seed and the data must be those of the checkpoint; a changed batch or optimizer is taken and said."""
        if found.facts.get("kind") != KIND:
            raise Refused("wrong-checkpoint", f"{found.path} was not written by `tscale train`: use another --home")
        then, now = found.facts["recipe"], self._trainer.recipe.to_manifest()
        changed = [key for key in ("seed", "model") if then[key] != now[key]] + ["data"] * (found.facts["data"] != self._trainer.data.hash)
        if changed:
            what = f"{found.path} has another {' and '.join(changed)} than the run file"
            raise Refused("wrong-checkpoint", f"{what}: use another --home or [run] name")
        for section in ("batch", "optimizer"):
            if then[section] != now[section]:
                self._console.warn(f"[{section}] has changed since {found.path.name}: going on with the new values")
