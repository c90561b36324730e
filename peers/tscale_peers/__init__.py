"""The swarm: tensors and peers; no models, no sockets. Pure state above, one shell below.

Map of the room, in reading order.
The algebra, which works without any network:
    limits.py           every number of the room               errors.py      reason codes of the algebra's refusals
    layout.py           one flat vector, cut into chunks of whole rows; the power-of-two unit of each tensor
    codec.py            displacement -> payload -> integer steps, by name; codec_contract.py what every codec promises
    codec_sign.py       one bit per value                      codec_exact.py uncompressed, for tests and comparison
    codec_topk.py       the largest values alone               rice.py        its places as Rice codes
    codec_grid.py       4 or 8 bits per value
    packet.py           the signed delta packet: strict wire form
    applied.py          which packets a replica contains, with a digest; applied_wire.py its bytes, ranges.py its arithmetic
    delta_log.py        the append-only, replayable log of packets on disk; packet_log.py its interface and its twin in memory
    basepoint.py        the replica: B in integers, its hash; snapshot_chunk.py a chunk of it for newcomers, as bytes
    state_reading.py    its state read while it moves on       lane.py        a stream of its own for whoever reads a GPU's tensors
    delta_batch.py      several deltas of a chunk in one pass
    exchange.py         where weights meet the replica: W = B + d, receive, publish, recover after a crash
    displacement.py     its arithmetic: d stored or implied    outer_rule.py  its words: rule, receipt
    drafting.py         packets made of d beside training      publisher.py   from payload to signed packet in the log
What a run and its peers are:
    manifest.py         what a run agrees on, and its hash     records.py     signed peer records
    membership.py       live, suspect, dead                    share.py       a peer's part of the swarm's work
    reach.py            who is there, by stated links          record_news.py who is told of which record
How packets and newcomers travel:
    messages.py         wire messages                          gossip.py      push, have/want, anti-entropy
    intake.py           packets coming in: check, log, apply   meeting.py     where the trainer's thread meets the swarm
    inbox.py            what waits for a meeting               outgoing.py    own work on its way out of one
    meeting_time.py     what meetings cost, by cause
    joining.py          learn the run, snapshot, catch-up      donor.py       what a peer gives to newcomers
    catch_up.py         far behind: log or snapshot?           restart.py     coming back from a home
    leaving.py          graceful leave                         agreement.py   states compared with others' states
How chunks have owners, so that traffic stops growing with the swarm:
    owners.py           who owns what, by hashing              routing.py     the next step on a way over links
    spreading.py        to everybody or to owners; the plan    relay.py       contributions on their way
    summing.py          owners' work at meetings               included.py    which contributions a sum contains
    pledges.py          what an author has given               accumulator.py what an owner has received
What one neighbour may cause:
    neighbour.py        what it has, is told, is sent          wants.py       packets to fetch: of whom, until when
    allowance.py        a budget that refills with time        conduct.py     when a link carries too much nonsense
    set_parts.py        sets too large for one message         turns.py       neighbours take turns at being checked
The shell:
    peer.py             owns the tasks, feeds events, executes actions; dialler.py, herald.py and notices.py are its helpers
    pulse.py            what it does because time has passed   traffic.py     bytes up and down
    surroundings.py     what it is given                       assembly.py    puts one peer together
Whole swarms in virtual time:
    simulation.py       founds, joins, kills, restarts peers   simulated_peer.py      one of them, its machine, its home
    simulated_training.py   what stands in for training

The rule that everything serves: publish q = codec(d), B += c*q, d -= leak*q; receive B += c*q with d untouched. B lives on integers, so
addition commutes exactly, and replicas with equal applied sets have equal bits.
"""
