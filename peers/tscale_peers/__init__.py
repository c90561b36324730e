"""The swarm: tensors and peers; no models, no sockets. Pure state above, one shell below.

Map of the room, in reading order. The algebra, which works without any network:
    limits.py       every number of the room        errors.py      reason codes of this room's refusals
    layout.py       one flat vector, cut into chunks of whole rows; the power-of-two unit of each tensor
    codec.py        displacement -> payload -> integer steps: "sign" (one bit) and "exact" (uncompressed, for tests)
    packet.py       the signed delta packet: strict wire form
    applied.py      which packets a replica contains: per author stream and chunk, with a digest
    delta_log.py    the append-only, replayable log of packets on disk, and its twin in memory
    basepoint.py    the replica: B in integers, its hash, snapshot chunks
    exchange.py     where weights meet the replica: W = B + d, receive, publish, recover after a crash
What peers say to each other:
    manifest.py     what a run agrees on, and its hash     share.py    a peer's part of the swarm's work
    records.py      signed peer records                    membership.py   live, suspect, dead
    messages.py     wire messages                          gossip.py   push, have/want, anti-entropy
    joining.py      snapshot and catch-up                  peer.py     the shell: owns tasks, feeds events, executes actions
    simulation.py   virtual network and clock              testing.py  fakes and invariants

The rule that everything serves: publish q = codec(d), B += c*q, d -= leak*q; receive B += c*q with d untouched. B lives on integers, so
addition commutes exactly, and replicas with equal applied sets have equal bits.
"""
