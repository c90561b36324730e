"""Learning rate: enters what the swarm and this peer have done, leaves the rate of the next step.

Rule (TScale, with the swarm's batches in place of one trainer's iterations):
    rate * min(1, NN * (1 - done / budget)) [with tail NN] * min(1, (done + 1) / warmup)
A peer that joined a running swarm multiplies this by min(1, (own steps since it joined + 1) / join warm-up): its momentum is still empty.
"""

from tscale_fed.optimizer.rule import OptimizerSettings


def rate(settings: OptimizerSettings, batches_done: float, budget_batches: float, steps_since_join: int | None = None) -> float:
    """Rate of the next step.

    batches_done, budget_batches  the swarm's batches so far and in all (the budget only matters with a tail)
    steps_since_join  own steps since this peer joined a running swarm; None for a peer that was there from the start
    """
    value = settings.rate
    if settings.tail is not None:
        if budget_batches <= 0:
            raise ValueError("a rate with a tail needs a budget of batches; set budget_batches or leave the tail out")
        value *= min(1.0, max(0.0, 1.0 - batches_done / budget_batches) * settings.tail)
    if settings.warmup_batches > 0:
        value *= min(1.0, (batches_done + 1.0) / settings.warmup_batches)
    if steps_since_join is not None and settings.join_warmup_steps > 0:
        value *= min(1.0, (steps_since_join + 1.0) / settings.join_warmup_steps)
    return value
