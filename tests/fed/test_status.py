"""The snapshot: strict JSON, bounded histories, safe text."""

from __future__ import annotations

import json
import math

import msgspec
import pytest

from tscale_fed import status_text
from tscale_fed.limits import EVENT_CHARACTERS, LOSS_POINTS, RECENT_STATES, STATUS_EVENTS
from tscale_fed.status import EventHistory, ExchangeTime, LossHistory, PeerRow, Status, Transfer, decode, encode, finite, recent_states
from tscale_fed.tui.testing import FakePeer

REQUIRED = """run peer name role uptime_s step tokens train_loss swarm_loss basepoint_hash applied_digest recent
busy_fraction peers wire refused""".split()


def empty_status() -> Status:
    return Status(version="0", run="ab" * 32, peer="12D3KooWx", name="n", role="peer", phase="joining", uptime_s=0.0)


def test_json_has_the_promised_fields() -> None:
    shown = json.loads(encode(FakePeer(2).snapshot()))
    assert set(REQUIRED) <= set(shown)
    assert set(shown["recent"][0]) == {"applied_digest", "basepoint_hash"}
    assert {"id", "name", "path", "state", "rtt_ms", "share", "lag", "last_delta_s"} <= set(shown["peers"][0])
    assert {"up_bytes", "down_bytes", "bytes_per_param"} <= set(shown["wire"])
    assert set(REQUIRED) <= set(json.loads(encode(empty_status()))), "also before anything is known"


def test_round_trip_and_strictness() -> None:
    snapshot = FakePeer(3).snapshot()
    assert decode(encode(snapshot)) == snapshot
    with pytest.raises(msgspec.ValidationError):
        decode(encode(snapshot).replace(b'"uptime_s"', b'"uptime_x"'))
    with pytest.raises(msgspec.DecodeError):
        decode(encode(snapshot)[:-5])


def test_not_a_number_is_unknown() -> None:
    assert finite(math.nan) is None and finite(math.inf) is None and finite(None) is None and finite(1.5) == 1.5
    broken = empty_status()
    broken.train_loss = math.nan
    assert decode(encode(broken)).train_loss is None


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_loss_history_is_bounded_and_covers_the_run(count: int) -> None:
    history = LossHistory(longest=8)
    for step in range(count):
        history.add(step, float(step), None)
    steps = [point.step for point in history.points()]
    assert len(steps) <= 9 and steps == sorted(set(steps))
    if count:
        assert steps[-1] == count - 1
    if count > 16:
        assert steps[0] < count / 2, "the start of the run stays visible"


def test_rare_held_out_losses_survive_among_many_training_losses() -> None:
    history = LossHistory(longest=16)
    for step in range(1000):
        history.add(step, 1.0, float(step) if step % 100 == 0 else None)
    kept = [point.swarm for point in history.points() if point.swarm is not None]
    assert len(history.points()) <= 17 and kept == sorted(kept) and kept[-1] == 900.0 and len(kept) >= 4


def test_histories_stay_within_the_stated_limits() -> None:
    losses, events = LossHistory(), EventHistory()
    for index in range(5000):
        losses.add(index, 1.0, 1.0)
        events.add(float(index), f"event {index} " + "x" * 1000)
    assert len(losses.points()) <= LOSS_POINTS + 1
    assert len(events.lines()) == STATUS_EVENTS and events.lines()[-1].text.startswith("event 4999")
    assert all(len(event.text) <= EVENT_CHARACTERS for event in events.lines())
    pairs = [(bytes([index % 256]) * 32, bytes(32)) for index in range(100)]
    assert len(recent_states(pairs)) == RECENT_STATES and recent_states(pairs)[-1].applied_digest == "63" * 32


def test_line_is_one_line_and_says_the_essentials() -> None:
    text = status_text.line(FakePeer(5).snapshot())
    assert "\n" not in text
    for word in ("training", "step", "loss", "swarm", "tok/s", "busy 98 %", "exchange 1.3 %", "5 live", "refused 4"):
        assert word in text


def test_the_page_says_what_the_exchange_waits_for_and_leaves_out_what_does_not_matter() -> None:
    page = status_text.page(FakePeer(5).snapshot())
    assert "exchange 1.3 %" in page and "receive 0.7 % publish 0.5 % wait 0.1 %" in page and "hash" not in page
    assert status_text.causes_text(None) == "" == status_text.causes_text(ExchangeTime(0, 0, 0, 0))
    assert "exchange -" in status_text.page(empty_status())


def test_texts_of_an_empty_status() -> None:
    assert "joining" in status_text.line(empty_status())
    assert "no other peers yet" in status_text.page(empty_status())


def test_foreign_names_cannot_steer_the_terminal() -> None:
    snapshot = empty_status()
    snapshot.peers = [PeerRow(id="12D3KooWevil", name="\x1b[2J\x07evil\u202e\n[bold]", path="\x1b]0;x\x07")]
    snapshot.refused = {"\x1b[31mcode": 1}
    for text in (status_text.page(snapshot), status_text.line(snapshot)):
        assert not any(ord(letter) < 32 and letter != "\n" or letter == "\u202e" for letter in text)
    assert status_text.peer_cells(snapshot.peers[0])[0] == "[2Jevil[bold]"


def test_page_shows_peers_transfer_and_refusals() -> None:
    snapshot = FakePeer(5).snapshot()
    text = status_text.page(snapshot)
    for word in ("made-up-run", "brave-otter", "calm-heron", "bad-signature 3", "snapshot 25 %", "0.1375 B/param", "4/5 agree"):
        assert word in text


def test_transfer_of_nothing_is_complete() -> None:
    assert "100 %" in status_text.transfer_text(Transfer("empty", 0, 0, 1))
