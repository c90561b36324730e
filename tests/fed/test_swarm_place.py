"""Where the basepoint goes: a decision from sizes alone, so every card can be asked."""

from __future__ import annotations

import pytest

from tscale_fed.engine.memory_plan import ROWS_ENOUGH, choose_plan
from tscale_fed.engine.place import DEVICE_BYTES_PER_PARAMETER, choose_place
from tscale_fed.engine.precision import Precision
from tscale_fed.engine.swarm_place import choose_swarm_place, swarm_bytes, workspace_bytes
from tscale_fed.model.shape import ModelShape
from tscale_net.errors import Refused
from tscale_peers import limits

SHAPE = ModelShape.parse("e1280h20d42w1024", 50257)
INT8 = Precision("int8", "bfloat16", kernels=True)
STEP = {"fragments": 24, "tokens": 1024, "precision": INT8}
GB = 10**9


@pytest.mark.parametrize(("gigabytes", "place"), [(8, "host"), (16, "host"), (24, "host"), (40, "device"), (48, "device"), (80, "device")])
def test_automatic_choice_for_cards_of_the_large_model(gigabytes: int, place: str) -> None:
    assert choose_swarm_place("auto", SHAPE, free=int(0.95 * gigabytes * GB), **STEP) == place


@pytest.mark.parametrize("gigabytes", range(20, 90, 2))
def test_on_the_device_it_never_drives_the_weights_away_or_starves_the_micro_batch(gigabytes: int) -> None:
    free = gigabytes * GB
    if choose_swarm_place("auto", SHAPE, free=free, **STEP) == "host":
        return
    left = free - swarm_bytes(SHAPE.trained_parameters)
    assert choose_place("auto", SHAPE, free=left, **STEP) == "device"
    weights = DEVICE_BYTES_PER_PARAMETER * SHAPE.trained_parameters
    with_it, without = (choose_plan(SHAPE, free_bytes=room - weights, **STEP).sizes for room in (left, free))
    assert with_it.fragments == without.fragments or with_it.rows >= ROWS_ENOUGH


def test_what_was_asked_for_is_done_or_refused_with_the_reason() -> None:
    assert choose_swarm_place("host", SHAPE, free=80 * GB, **STEP) == "host"
    assert choose_swarm_place("device", SHAPE, free=40 * GB, **STEP) == "device"
    with pytest.raises(Refused, match="optimizer_memory"):
        choose_swarm_place("device", SHAPE, free=80 * GB, optimizer_memory="host", **STEP)
    with pytest.raises(Refused, match="7.8 GB for it"):
        choose_swarm_place("device", SHAPE, free=30 * GB, **STEP)
    with pytest.raises(ValueError, match="auto, device or host"):
        choose_swarm_place("gpu", SHAPE, free=80 * GB, **STEP)


def test_where_there_is_one_memory_or_weights_are_on_the_host_nothing_is_chosen() -> None:
    assert choose_swarm_place("auto", SHAPE, free=None, **STEP) == "device"
    assert choose_swarm_place("auto", SHAPE, free=80 * GB, optimizer_memory="host", **STEP) == "host"


def test_the_autograd_model_has_no_plan_so_half_of_the_memory_stays_free() -> None:
    step = {**STEP, "precision": Precision("float32")}
    assert choose_swarm_place("auto", SHAPE, free=80 * GB, **step) == "device"
    assert choose_swarm_place("auto", SHAPE, free=30 * GB, **step) == "host"
    assert choose_swarm_place("device", SHAPE, free=30 * GB, **step) == "device"


def test_the_workspace_is_an_eighth_of_the_weights_and_what_is_uploaded() -> None:
    size = SHAPE.trained_parameters
    fixed = 4 * limits.span_values + 8 * limits.inbox_bytes + limits.reading_copies_bytes
    assert workspace_bytes(size) == pytest.approx(4 * size / limits.draft_slices + size / 8 + fixed, rel=1e-6)
    assert swarm_bytes(size) == workspace_bytes(size) + 4 * size
    assert workspace_bytes(1000) == 4 * 2000 + 125 + 8 * limits.inbox_bytes + limits.reading_copies_bytes
