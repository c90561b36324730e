"""Several processes of one owner: equal to one process, equal among themselves, any number on resume, clean ends.

The scenes are played once, by group_scenarios.py in a process of its own (a process that has computed cannot be forked safely).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_run import make_data

from tscale_fed.model.shape import ModelShape
from tscale_fed.parallel.buckets import build_buckets
from tscale_fed.parallel.world import World, world_from
from tscale_net.errors import Refused

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("group")
    data = make_data(folder)
    command = [sys.executable, str(HERE / "group_scenarios.py"), str(data.directory), str(folder / "seen.json")]
    environment = {"PYTHONPATH": ":".join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[Any]] = json.loads((folder / "seen.json").read_text())
    return found


def same(ranks: list[Any], key: str) -> Any:
    """The value that all ranks agree on."""
    assert None not in ranks, "a rank failed: run group_scenarios.py by hand"
    values = [rank[key] for rank in ranks]
    assert all(value == values[0] for value in values), f"ranks differ in {key}"
    return values[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_one_process_with_as_many_batches(seen: dict[str, list[Any]], ranks: int) -> None:
    group, alone = seen[f"exact {ranks}"], seen[f"one process for {ranks}"][0]
    assert same(group, "losses") == pytest.approx(alone["losses"], rel=1e-5)
    assert same(group, "weights") == pytest.approx(alone["weights"], abs=1e-5)
    assert same(group, "held_out") == pytest.approx(alone["held_out"], rel=1e-5), "evaluation batches are dealt over the ranks"
    assert same(group, "tokens") == alone["tokens"]
    assert same(group, "checksum")
    assert same(group, "bytes_per_weight") == pytest.approx(4 * 2 * (ranks - 1) / ranks, rel=1e-3)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_one_bit_learns_on_equal_replicas_for_a_thirtieth_of_the_bytes(seen: dict[str, list[Any]], ranks: int) -> None:
    group = seen[f"onebit {ranks}"]
    assert same(group, "checksum")
    losses = same(group, "losses")
    assert losses[-1] < losses[0] - 0.05
    assert same(group, "bytes_per_weight") < 8 * (ranks - 1) / ranks / 29


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_one_bit_has_not_delivered_is_in_the_checkpoint(seen: dict[str, list[Any]], ranks: int) -> None:
    """Parts that do not divide by the ranks, a row without gradients: mean gradients put in = delivered + held back."""
    group = seen[f"conservation {ranks}"]
    assert same(group, "checksum")
    assert same(group, "off") < 1e-5 < same(group, "kept")


def test_a_checkpoint_of_two_goes_on_with_one_two_and_three(seen: dict[str, list[Any]]) -> None:
    saved = seen["saved by 2"]
    for ranks in (1, 2, 3):
        resumed = seen[f"resumed by {ranks}"]
        assert same(resumed, "before")[:2] == same(saved, "before")[:2]
        assert same(resumed, "after")
    assert same(seen["resumed by 2"], "before") == same(saved, "before")
    assert same(seen["resumed by 2"], "after") == same(saved, "after"), "with as many ranks, nothing shows that it was interrupted"


def test_other_text_and_other_weights_are_refused_by_all_with_one_sentence(seen: dict[str, list[Any]]) -> None:
    first = seen["differences"][0]
    assert all(said == first for said in seen["differences"])
    assert first[0].startswith("parallel-differs: rank 1 has another text (")
    assert first[1] == ""
    assert first[2].startswith("replicas-differ: after step 7, rank 1 holds other weights")


def test_numbers_that_overflow_on_one_rank_stop_all(seen: dict[str, list[Any]]) -> None:
    first, second = seen["infinite"]
    assert first == second and first.startswith("loss-not-finite: the training loss became nan at step 1")


def test_a_rank_that_dies_leaves_the_others_with_their_last_step(seen: dict[str, list[Any]]) -> None:
    survivor, dead = seen["lost"]
    assert dead is None
    sentence, steps, is_the_last_whole_step, lines = survivor
    assert sentence.startswith("rank-lost: another process of this run has ended") and "go on from the last checkpoint" in sentence
    assert steps == 2 and is_the_last_whole_step
    assert "saved" in lines.splitlines()[-1]


def test_the_hook_serves_torchs_own_data_parallel(seen: dict[str, list[Any]]) -> None:
    exact, onebit = seen["ddp exact"], seen["ddp onebit"]
    assert same(onebit, "checksum") != same(exact, "checksum")
    assert same(onebit, "buckets") > 1
    before, after, exact_after = (same(onebit, "losses")[0], same(onebit, "losses")[-1], same(exact, "losses")[-1])
    assert before == pytest.approx(same(exact, "losses")[0])
    assert after < before - 1.0 and after == pytest.approx(exact_after, rel=0.12)
    assert same(onebit, "bytes_per_weight") < 0.14


def test_the_bench_measures_one_process_and_two(seen: dict[str, list[Any]]) -> None:
    *codes, rows = seen["bench"]
    assert codes == [0, 0]
    one, exact, onebit = rows
    assert [row["row"] for row in rows] == ["one", "exact", "onebit"]
    assert exact["tokens_per_step"] == onebit["tokens_per_step"] == 2 * one["tokens_per_step"]
    assert exact["replicas"] == onebit["replicas"] == "bit-identical"
    assert exact["bytes_per_weight"] == pytest.approx(4.0) and onebit["bytes_per_weight"] < 0.14
    assert len(exact["train_loss"]) == 8 and exact["held_out_loss"][-1][0] == exact["train_loss"][-1][0]
    assert len(exact["held_out_loss"]) == 2


# -- without processes -------------------------------------------------------------------------------------------------


def test_buckets_cover_the_model_once_in_the_order_of_the_backward_pass() -> None:
    shape = ModelShape.parse("e128h1d6w16", 300)
    for least in (1, 200_000, 1 << 30):
        buckets = build_buckets(shape, least)
        stages = [stage for bucket in buckets for stage in bucket.stages]
        assert stages == ["final", 5, 4, 3, 2, 1, 0, "embedding"]
        spans = sorted((bucket.start, bucket.stop) for bucket in buckets)
        assert spans[0][0] == 0 and spans[-1][1] == shape.trained_parameters
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
        moments = sorted((bucket.moments.start, bucket.moments.stop) for bucket in buckets)
        assert moments[-1][1] == 2 * 300 + 1 + 6 * 7
        assert all(a[1] == b[0] for a, b in zip(moments, moments[1:], strict=False))
    assert len(build_buckets(shape, 1)) == 8 and len(build_buckets(shape, 1 << 30)) == 3


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def test_a_process_learns_its_place_from_the_environment() -> None:
    assert world_from({"PATH": "/bin"}) is None
    world = world_from(TORCHRUN)
    assert world == World(3, 4, 1, 2) and not world.leader
    assert world.data_key("alone") == "alone/rank-3" and World(0, 4, 0, 2).data_key("alone") == "alone"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is not set"),
        ({"RANK": "-1"}, "RANK='-1' is no whole number"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 and LOCAL_WORLD_SIZE=2 do not fit"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        world_from({**TORCHRUN, **change})
    assert refused.value.code == "bad-world"
