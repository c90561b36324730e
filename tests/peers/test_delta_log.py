"""Both logs by one suite; on disk: torn tails, damage, a full disk, retention, holding."""

import errno
import os
from pathlib import Path

import pytest

from tscale_net.errors import Refused
from tscale_peers.delta_log import DeltaLog, MemoryLog, PacketLog
from tscale_peers.packet import Key

ONE, TWO = b"1" * 40, b"2" * 40


def body(key: Key, size: int = 50) -> bytes:
    return (f"{key[0][:1].decode()}-{key[1]}-{key[2]};".encode() * size)[:size]


def fill(log: PacketLog, stream: bytes, seqs: range, chunks: int = 2) -> None:
    for seq in seqs:
        log.append_all([(body((stream, seq, chunk)), (stream, seq, chunk)) for chunk in range(chunks)])


@pytest.fixture(params=["memory", "disk"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> PacketLog:
    return (
        MemoryLog(retain_per_stream=5) if request.param == "memory" else DeltaLog(tmp_path / "log", retain_per_stream=5, segment_bytes=400)
    )


# -- the common suite ----------------------------------------------------------------------------------------------------


def test_it_gives_back_what_it_was_given_once(log: PacketLog) -> None:
    key = (ONE, 1, 0)
    assert log.append(body(key), key) is True
    assert log.append(b"other", key) is False
    log.append_all([(b"other", key), (body((ONE, 1, 1)), (ONE, 1, 1))], fsync=True)
    assert log.get(key) == body(key)
    assert log.get((ONE, 2, 0)) is None and log.get((TWO, 1, 0)) is None
    assert log.all_keys() == [key, (ONE, 1, 1)]


def test_it_lists_keys_in_order(log: PacketLog) -> None:
    for seq, chunk in [(2, 1), (1, 0), (3, 0), (1, 1), (2, 0)]:
        log.append(b"x", (ONE, seq, chunk))
    assert log.keys(ONE) == [(ONE, 1, 0), (ONE, 1, 1), (ONE, 2, 0), (ONE, 2, 1), (ONE, 3, 0)]
    assert log.keys(ONE, 2, 3, chunk=0) == [(ONE, 2, 0), (ONE, 3, 0)]
    assert log.keys(TWO) == [] and log.keys(ONE, chunk=9) == []
    assert (log.oldest(ONE), log.latest(ONE, 0), log.latest(ONE, 1), log.latest(ONE, 9)) == (1, 3, 2, 0)
    assert (log.oldest(TWO), log.latest(TWO, 0)) == (0, 0)


def test_it_keeps_at_least_the_newest_of_each_stream_and_forgets_the_rest(log: PacketLog) -> None:
    fill(log, TWO, range(1, 3))
    fill(log, ONE, range(1, 40))
    assert log.keys(ONE, 35) == [(ONE, seq, chunk) for seq in range(35, 40) for chunk in range(2)]
    assert log.oldest(ONE) > 20
    assert log.get((ONE, 1, 0)) is None
    assert all(log.get(key) == body(key) for key in log.all_keys())


def test_it_never_drops_what_is_held(log: PacketLog) -> None:
    log.hold(ONE, 3)
    fill(log, ONE, range(1, 40))
    assert log.get((ONE, 3, 1)) == body((ONE, 3, 1))
    log.hold(ONE, 39)
    fill(log, ONE, range(40, 60))
    assert log.get((ONE, 3, 1)) is None and log.get((ONE, 39, 0)) is not None


# -- on disk -------------------------------------------------------------------------------------------------------------


def test_it_survives_a_restart(tmp_path: Path) -> None:
    log = DeltaLog(tmp_path, segment_bytes=300)
    fill(log, ONE, range(1, 10))
    keys = log.all_keys()
    log.close()
    again = DeltaLog(tmp_path, segment_bytes=300)
    assert sorted(again.all_keys()) == sorted(keys) and again.notices == []
    assert all(again.get(key) == body(key) for key in keys)
    fill(again, ONE, range(10, 12))
    assert again.latest(ONE, 0) == 11


def test_a_torn_tail_is_cut_off_and_said_so_at_every_length(tmp_path: Path) -> None:
    first = DeltaLog(tmp_path / "whole")
    fill(first, ONE, range(1, 4), chunks=1)
    first.close()
    name = next((tmp_path / "whole").iterdir()).name
    whole = (tmp_path / "whole" / name).read_bytes()
    record = len(whole) // 3
    for length in range(len(whole)):
        folder = tmp_path / f"torn{length}"
        folder.mkdir()
        (folder / name).write_bytes(whole[:length])
        log = DeltaLog(folder)
        assert log.latest(ONE, 0) == length // record
        assert bool(log.notices) == bool(length % record)
        assert log.append(body((ONE, 9, 0)), (ONE, 9, 0), fsync=True)
        log.close()
        assert DeltaLog(folder).get((ONE, 9, 0)) == body((ONE, 9, 0))


def test_a_flipped_byte_in_the_newest_file_is_cut_off_with_what_follows(tmp_path: Path) -> None:
    log = DeltaLog(tmp_path)
    fill(log, ONE, range(1, 4), chunks=1)
    log.close()
    path = next(tmp_path.iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    again = DeltaLog(tmp_path)
    assert again.keys(ONE) == [(ONE, 1, 0)] and "torn" in again.notices[0]


def test_a_flipped_byte_in_an_older_file_is_found_when_it_is_read(tmp_path: Path) -> None:
    log = DeltaLog(tmp_path, segment_bytes=1)
    fill(log, ONE, range(1, 4), chunks=1)
    log.close()
    path = sorted(tmp_path.iterdir())[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    again = DeltaLog(tmp_path, segment_bytes=1)
    assert again.get((ONE, 1, 0)) is None and "damaged" in again.notices[0]
    assert again.get((ONE, 2, 0)) == body((ONE, 2, 0))


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = DeltaLog(tmp_path)
    fill(log, ONE, range(1, 3))
    real, budget = os.pwrite, [120]

    def full(file: int, data: memoryview, offset: int) -> int:
        allowed = min(len(data), budget[0])
        if allowed == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        budget[0] -= allowed
        return real(file, data[:allowed], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Refused, match="free disk space") as caught:
        fill(log, ONE, range(3, 4))
    assert caught.value.code == "log-write" and log.latest(ONE, 0) == 2
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == log.size_bytes
    monkeypatch.undo()
    fill(log, ONE, range(3, 4))
    log.close()
    assert DeltaLog(tmp_path).latest(ONE, 1) == 3


def test_a_failing_sync_is_a_failed_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = DeltaLog(tmp_path)
    fill(log, ONE, range(1, 2))

    def broken(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(Refused):
        log.append(b"x", (ONE, 2, 0), fsync=True)
    assert log.get((ONE, 2, 0)) is None


def test_the_byte_bound_drops_the_oldest_files(tmp_path: Path) -> None:
    log = DeltaLog(tmp_path, retain_per_stream=1000, max_bytes=4000)
    fill(log, ONE, range(1, 200))
    assert log.size_bytes <= 4000
    assert log.latest(ONE, 1) == 199 and log.oldest(ONE) > 150
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == log.size_bytes


def test_a_folder_that_cannot_be_used_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be written"):
        DeltaLog(tmp_path / "file")


def test_a_strange_file_in_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "deltas-old.log").write_text("")
    with pytest.raises(Refused, match=r"deltas-old\.log") as caught:
        DeltaLog(tmp_path)
    assert caught.value.code == "log-damaged"
