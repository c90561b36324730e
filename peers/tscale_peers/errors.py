"""Why the algebra of this room refuses something: short stable codes, each with its sentence. Counters and screens use the codes.

The exception itself is `tscale_net.errors.Refused(code, detail)`, the same in all rooms; `detail` says what and where, this table says
what it means and what to do.
"""

from __future__ import annotations

from tscale_net.errors import Refused

REASONS: dict[str, str] = {
    # manifest, records, gossip
    "bad-manifest": "A run manifest that cannot be read or holds what no run can have; ask another peer, or update the older program.",
    "bad-record": "A peer's word about itself that cannot be read or is out of range.",
    "bad-message": "A gossip message that cannot be read or exceeds its limits; the sender runs other software.",
    "unknown-kind": "A message of a kind that this program does not know; update the older side.",
    "flood": "A peer sends more packets than anybody asked it for.",
    "equivocation": "An author signed two different packets with one number; the first one counts.",
    "hash-mismatch": "A peer has the same deltas but other bits: one of the two replicas is wrong.",
    "no-run": "The peer that was asked has not joined a run itself yet.",
    "no-snapshot": "No linked peer could give a chunk of the snapshot; check the link or give another --bootstrap.",
    # layout, packets, replica
    "bad-layout": "The list of tensors cannot be cut into chunks; the run manifest is wrong.",
    "packet-truncated": "A packet ends before its parts do; the sender's program or disk is faulty.",
    "packet-oversized": "A packet is longer than its chunk and codec allow; the sender runs other software.",
    "packet-malformed": "A packet's header cannot be read, or is not in canonical form; the sender runs other software.",
    "packet-version": "A packet of another packet format; update the older side.",
    "wrong-run": "A packet of another run; its sender has mixed up two runs.",
    "packet-codec": "A packet made with another codec than the run's; the sender runs another manifest.",
    "packet-chunk": "A packet for a chunk that the run does not have.",
    "packet-seq": "A packet number or batch count outside its range.",
    "packet-coefficient": "A coefficient that is not positive or above the run's limit; the author asks for more than its share.",
    "packet-scale": "A row scale that is not in canonical form or above the largest step: the author's program is faulty or hostile.",
    "packet-payload": "A payload that is not in its one spelling; the author's program is faulty or hostile.",
    "bad-signature": "The signature does not match the author's key: the packet was changed on its way, or is a forgery.",
    "bad-included": "A sum whose list of contributions cannot be read or is not in canonical form; the sender runs other software.",
    "wrong-owner": "A contribution came to a peer that it is not addressed to and that knows no way to its owner.",
    "contribution-known": "A contribution that is summed already: it was sent twice.",
    "owner-busy": "More contributions of one author, or in all, than one sum can list; the author takes back what no packet lists.",
    "too-many-hops": "A contribution went round in circles: the links that peers state are false or old.",
    "relay-full": "More is to be passed on to a neighbour than its link carries; the author takes back what does not arrive.",
    "out-of-range": "A packet would take the basepoint out of its integer range; the author's training has diverged. May be offered again.",
    "too-many-streams": "More author streams than the run allows.",
    "too-many-gaps": "An author skips too many packet numbers; its older packets must come first.",
    "bad-applied-set": "An applied set that cannot be read or is not in canonical form.",
    "bad-chunk": "A snapshot chunk that cannot be read or does not fit the run; another donor is asked.",
    "bad-checkpoint": "A checkpoint does not fit this run.",
    "log-write": "The delta log cannot be written; own work is not published until it can.",
    "log-damaged": "The delta log on disk is not what this program wrote.",
    "not-finite": "The local weights hold NaN or infinite values; local training has diverged. Lower the rate or restore a checkpoint.",
}


def refuse(code: str, detail: str) -> Refused:
    """A refusal with a code of this room's table (KeyError for an unknown one, so that the table stays complete)."""
    REASONS[code]
    return Refused(code, detail)
