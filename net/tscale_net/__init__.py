"""tscale_net: bytes between peers. Nothing here knows tensors; nothing above touches sockets, time or randomness.

The map, from the outside in:

    ports.py             what the rooms above see: Transport, Clock, Rng, and the events
    errors.py            Refused: a reason code, one sentence, the fix          limits.py   every size, rate and time
    identity.py          Ed25519 key, peer id, CURVE key, key file              words.py    friendly names
    address.py           the three forms of an address                          address_book.py   ids pinned at first contact

    transport.py         ZmqTransport: wires the parts below into a Transport
    listener.py          the listening socket: routes, first messages           dialler.py  two sockets to a dialled peer
    link.py              one session: queues, writers, keep-alive               handshake.py      signed HELLO, made and checked
    frames.py            32-byte header                                         messages.py one strict struct per message
    admission.py         who may finish the encryption handshake; bans          guard.py    caps and cuts on TCP connections
    sockets.py           socket options, ports                                  hello.py    the door for those who know host:port only
    events.py            bounded event queue                                    token_bucket.py, tasks.py

    transfer.py          blobs: pull with credit, hash check, several sources   blobs.py, transfer_server.py, transfer_client.py

    testing.py           for tests: memory_network.py, memory_transport.py (the twin of ZmqTransport), virtual_time.py, conformance.py

A frame's way: Transport.send -> link queue -> writer -> socket -> (encrypted TCP) -> route or reader -> frames.decode -> EventQueue ->
next_event.
"""
