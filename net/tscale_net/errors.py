"""One exception for everything that is turned away, with a short stable code and one sentence for people.

Enters: a reason code and what happened. Leaves: `Refused`, whose `code` is counted by machines and whose `detail` is shown as it is.
Rule: every refusal names what was wrong, where, and what to do about it. `REASONS` is the list of this room's codes; the rooms above add
their own codes beside their own checks and raise the same class.
"""

from __future__ import annotations

REASONS: dict[str, str] = {
    # identity and addresses
    "bad-address": "An address could not be read. Use /ip4/A/tcp/P/p2p/ID, ID@host:port or host:port.",
    "bad-peer-id": "A peer id is not the base58 form of an Ed25519 key. Copy it again from the seed's join line.",
    "bad-key": "A public key is not a safe Ed25519 key, so no encrypted link can be built on it.",
    "identity-file": "The identity file cannot be used. Fix its permissions (chmod 600) or move it away to get a new identity.",
    "known-peers-file": "The known_peers file cannot be used. Fix or delete the line that is named.",
    "changed-id": "The peer at this address has another identity than at first contact, as if somebody else answered.",
    "needs-id": "The address carries no peer id and no hello door can be asked.",
    # start-up
    "port-taken": "Another program listens on the port. Stop it or choose another port with --listen.",
    "cannot-listen": "The listen address does not belong to this machine, or binding it is not allowed.",
    "old-libzmq": "The installed libzmq is too old to be exposed to the internet. Install pyzmq 26 or newer.",
    "closed": "The transport was closed.",
    # dialling
    "unreachable": "No connection could be made. Check host, port, firewall and that the peer runs.",
    "no-answer": "Something accepted the connection but did not complete the handshake in time.",
    "wrong-key": "The peer at this address does not own the key of the peer id that was dialled.",
    "not-admitted": "The peer does not admit this identity: it is banned there, or not on its list.",
    "self": "A peer cannot dial itself.",
    "duplicate-dial": "Both sides dialled at the same moment; the other connection is kept.",
    # HELLO
    "bad-hello": "The first message is not a well-formed HELLO.",
    "no-hello": "A message arrived before HELLO.",
    "version": "The two programs have no protocol version in common. Update the older one.",
    "not-for-me": "The HELLO was made for another peer.",
    "clock-skew": "The clocks differ by more than the window. Set the clock (NTP).",
    "key-mismatch": "The peer id stated does not belong to the key that encrypted the connection.",
    "wrong-peer": "Another peer answered than the one that was dialled.",
    "bad-signature": "The signature does not fit the message and the key.",
    "replay": "This HELLO was seen before.",
    "wrong-run": "The peer belongs to another run.",
    "banned": "The peer is banned here for a while.",
    "bad-session": "The bulk connection names a session that does not exist.",
    # frames
    "bad-frame": "A message is not two parts with a valid header.",
    "truncated": "A message body is shorter or longer than its header says.",
    "too-large": "A message is larger than its channel allows.",
    "unknown-kind": "A message kind is not known here.",
    "bad-sequence": "Messages of one connection did not arrive in order; something was lost or injected.",
    "bad-message": "A message body is not well-formed.",
    "too-fast": "A peer sends control messages faster than the limit; the excess is dropped.",
    "undelivered": "A connection holds too many bytes of one unfinished message and is cut.",
    "too-many": "Too many connections at once.",
    # transfers
    "no-source": "No peer could deliver the blob.",
    "not-here": "The asked peer does not have this blob.",
    "busy": "The asked peer serves too many transfers at once. Try later or elsewhere.",
    "corrupt-chunk": "A chunk does not have the hash that was announced.",
    "wrong-hash": "The complete content does not have the expected hash.",
    "blob-failed": "The asked peer could not read the blob.",
}
"""Code -> what it means in general and what to do; the `detail` of a Refused names the case at hand."""


class Refused(Exception):
    """Something was turned away for a reason that can be stated.

    Attributes:
        code: short stable id, such as "bad-signature"; for counters, tests and scripts.
        detail: one sentence for people that names the place and the fix.
    """

    def __init__(self, code: str, detail: str | None = None) -> None:
        self.code = code
        self.detail = detail if detail is not None else REASONS.get(code, code)
        super().__init__(code, self.detail)

    def __str__(self) -> str:
        return self.detail
