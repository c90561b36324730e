"""What is given to owners, saved chunk by chunk at different moments: after a restart nothing is owed twice or forgotten."""

from __future__ import annotations

from tests.peers.core_kit import LAYOUT, header, key_of, payload_for, terms
from tscale_peers.packet import Packet
from tscale_peers.packet_log import MemoryLog
from tscale_peers.pledges import Pledges

OWNER = bytes(range(32))


def contribution(chunk: int, number: int, batches: int = 1) -> tuple[bytes, Packet]:
    payload = payload_for(chunk, seed=number)
    head = header(seq=number, chunk=chunk, owner=OWNER, batches_total=batches, version=2)
    delta = terms().codec.open(payload, LAYOUT.chunks[chunk])
    return Packet.seal(head, payload, lambda domain, message: bytes(64)), Packet(head, delta)


def given_to_all(pledges: Pledges, number: int) -> None:
    pledges.give([contribution(chunk.index, number) for chunk in LAYOUT.chunks], float(number))


def test_chunks_that_were_saved_at_different_moments_find_what_was_given_since_in_the_log() -> None:
    log, chunks = MemoryLog(), [chunk.index for chunk in LAYOUT.chunks]
    pledges = Pledges(key_of(1), log, terms())
    given_to_all(pledges, 1)
    first = [pledges.saved_chunk(chunk) for chunk in chunks[:1]]
    counts = pledges.counts
    given_to_all(pledges, 2)
    rest = [pledges.saved_chunk(chunk) for chunk in chunks[1:]]
    given_to_all(pledges, 3)
    saved = pledges.encode([*first, *rest], counts)
    pledges.checkpointed(saved)
    back = Pledges(key_of(1), log, terms(), saved)
    assert back.open_numbers(0) == [1] and all(back.open_numbers(chunk) == [1, 2] for chunk in chunks[1:])
    assert back.counts == (1, 0)
    recovered = sorted((packet.chunk, packet.seq) for packet in back.recover())
    assert recovered == sorted([(0, 2), *((chunk, 3) for chunk in chunks)])
    assert back.counts == (3, 2), "what is lost with the crash counts as published"
    assert back.next_number == 4


def test_the_log_keeps_what_any_saved_chunk_lacks() -> None:
    log = MemoryLog(retain_per_stream=1)
    pledges = Pledges(key_of(1), log, terms())
    early = pledges.saved_chunk(0)
    for number in range(1, 6):
        given_to_all(pledges, number)
        for chunk in LAYOUT.chunks:
            pledges.close(chunk.index)
    late = [pledges.saved_chunk(chunk.index) for chunk in LAYOUT.chunks[1:]]
    pledges.checkpointed(pledges.encode([early, *late], (0, 0)))
    given_to_all(pledges, 6)
    assert log.oldest(key_of(1)) == 1, "chunk 0 was saved before anything was given"
    pledges.checkpointed()
    given_to_all(pledges, 7)
    assert log.oldest(key_of(1)) == 6, "still open"
