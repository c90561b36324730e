"""Checkpoints: bits survive, damage is noticed, an interrupted or impossible write costs nothing that was there before."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tscale_fed import checkpoint as checkpoint_module
from tscale_fed.checkpoint import STATE_FILE, TENSORS_FILE, CheckpointStore
from tscale_net.errors import Refused

Usage = namedtuple("Usage", "total used free")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": torch.randn(1000, generator=generator),
        "basepoint": torch.randint(-(2**30), 2**30, (1000,), generator=generator, dtype=torch.int32),
        "scalar": torch.tensor(math.pi, dtype=torch.float64),
        "empty": torch.zeros(0, 128),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numpy().tobytes() == b.numpy().tobytes()


def store(tmp_path: Path, keep: int = 3) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep)


def save(into: CheckpointStore, steps: int) -> Path:
    return into.save(steps, tensors(steps), {"applied": bytes([steps % 256]) * 7}, {"loss": 0.1 + steps})


def test_everything_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    odd = {"nan_payload": torch.tensor([math.nan, -0.0, math.inf, 1e-45]), **tensors()}
    blobs = {"applied": b"\x00\xff" * 100, "empty": b""}
    facts = {"third": 1 / 3, "swarm_batches": 12, "name": "brave-otter", "list": [1, 2.5, None]}
    store(tmp_path).save(42, odd, blobs, facts)
    found, notes = store(tmp_path).latest()
    assert found is not None and notes == []
    assert found.tensors.keys() == odd.keys()
    assert all(same_bits(found.tensors[name], odd[name]) for name in odd)
    assert found.blobs == blobs
    assert found.facts == {"own_steps": 42, **facts}


def test_tensors_read_back_outlive_their_file(tmp_path: Path) -> None:
    found = store(tmp_path).load(save(store(tmp_path), 1))
    shutil.rmtree(found.path)
    assert same_bits(found.tensors["weights"], tensors(1)["weights"])


def test_no_checkpoint_is_no_fault(tmp_path: Path) -> None:
    assert store(tmp_path).latest() == (None, [])


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    kept = store(tmp_path, keep=2)
    for steps in (1, 2, 10, 100):
        save(kept, steps)
    assert [path.name for path in kept.paths()] == ["checkpoint-0000000010", "checkpoint-0000000100"]


def test_two_of_one_step_are_in_order(tmp_path: Path) -> None:
    kept = store(tmp_path, keep=2)
    for mark in range(12):
        kept.save(5, tensors(), {}, {"mark": mark})
    found, _ = kept.latest()
    assert found is not None and found.facts["mark"] == 11
    assert len(kept.paths()) == 2


@pytest.mark.parametrize("name", [TENSORS_FILE, STATE_FILE, "applied.bin"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "append"])
def test_damage_falls_back_to_the_one_before_and_says_so(tmp_path: Path, name: str, damage: str) -> None:
    kept = store(tmp_path)
    save(kept, 1)
    newest = save(kept, 2) / name
    content = bytearray(newest.read_bytes())
    if damage == "remove":
        newest.unlink()
    else:
        content[len(content) // 2] ^= 1
        newest.write_bytes({"flip": content, "cut": content[: len(content) // 2], "append": newest.read_bytes() + b" {}"}[damage])
    found, notes = kept.latest()
    assert found is not None and found.facts["own_steps"] == 1
    assert len(notes) == 1 and "checkpoint-0000000002" in notes[0] and name in notes[0] and "using the one before" in notes[0]


def test_a_changed_fact_is_damage(tmp_path: Path) -> None:
    path = save(store(tmp_path), 1) / STATE_FILE
    path.write_text(path.read_text().replace('"own_steps": 1', '"own_steps": 2'))
    found, notes = store(tmp_path).latest()
    assert found is None and "starting anew" in notes[0]


def test_all_damaged_says_that_nothing_is_left(tmp_path: Path) -> None:
    kept = store(tmp_path)
    for steps in (1, 2):
        (save(kept, steps) / TENSORS_FILE).unlink()
    found, notes = kept.latest()
    assert found is None and len(notes) == 2 and "no earlier one is left" in notes[1]


def test_an_interrupted_save_is_not_seen_and_is_swept_away(tmp_path: Path) -> None:
    kept = store(tmp_path)
    save(kept, 1)
    half = kept.folder / ".unfinished-2-123"
    half.mkdir()
    (half / TENSORS_FILE).write_bytes(b"half")
    assert [path.name for path in kept.paths()] == ["checkpoint-0000000001"]
    save(kept, 3)
    assert not half.exists()


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store(tmp_path)
    save(kept, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 0))
    with pytest.raises(Refused) as caught:
        save(kept, 2)
    assert caught.value.code == "disk-full"
    assert "free some space" in caught.value.detail and "checkpoint-0000000001" in caught.value.detail
    assert os.listdir(kept.folder) == ["checkpoint-0000000001"]


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "disk-full"), (errno.EDQUOT, "disk-full"), (errno.EIO, "cannot-write")])
def test_a_write_that_fails_midway_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str) -> None:
    kept = store(tmp_path)
    save(kept, 1)

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint_module.os, "fsync", fail)
    with pytest.raises(Refused) as caught:
        save(kept, 2)
    monkeypatch.undo()
    assert caught.value.code == code and "\n" not in caught.value.detail
    assert os.listdir(kept.folder) == ["checkpoint-0000000001"]
    found, notes = kept.latest()
    assert found is not None and found.facts["own_steps"] == 1 and notes == []


def test_the_tensor_writers_own_complaint_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise checkpoint_module.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_module.safetensors.torch, "save_file", fail)
    with pytest.raises(Refused) as caught:
        save(store(tmp_path), 1)
    assert caught.value.code == "disk-full" and "there is none before it" in caught.value.detail


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(Refused) as caught:
        save(store(tmp_path), 1)
    assert caught.value.code == "cannot-write" and str(tmp_path / "checkpoints") in caught.value.detail


def test_facts_that_json_cannot_hold_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        store(tmp_path).save(1, {}, {}, {"loss": math.nan})
    assert store(tmp_path).latest() == (None, [])
    assert os.listdir(tmp_path / "checkpoints") == []
