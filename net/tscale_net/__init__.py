"""tscale_net: bytes between peers. Nothing here knows tensors; nothing above touches sockets, time or randomness.

What the rooms above use:

    ports.py             Transport, Clock, Rng and the events; the real clock
    errors.py            Refused: a reason code, one sentence, the fix          limits.py   every size, rate and time, with its reason
    identity.py          Ed25519 key, peer id, CURVE key, key file              words.py    friendly names
    address.py           the three forms of an address                          address_book.py   ids pinned at first contact
    own_addresses.py     where others may reach this machine
    transport.py         ZmqTransport, the real Transport                       transfer.py Transfers: blobs over any Transport
    testing.py           the network in memory, virtual time, the conformance suite

How ZmqTransport is made, from strangers to friends:

    sockets.py           socket options and ports                               guard.py    caps and cuts on TCP connections
    admission.py         who may finish the encryption handshake; bans          hello.py    the door for those who know host:port only
    listener.py          the listening socket and its routes                    dialler.py  two connections to a dialled peer
    handshake.py         signed HELLO, made and checked                         dials.py    crossing dials: which one survives
    sessions.py          strangers become links here                            link.py     one session: queues, keep-alive, farewell
    wire.py              one connection: numbered frames                        frames.py   the 32-byte header
    messages.py          one strict struct per message                          events.py   the queue before next_event
    token_bucket.py      upload limit, flood limit                              tasks.py    background tasks with an owner

Blobs: blobs.py (chunks, hashes, root), transfer_server.py, transfer_client.py, assembly.py (a blob while it is received).
Tests and simulations: memory_network.py, memory_link.py, memory_transport.py (the twin of ZmqTransport), virtual_time.py, stall.py,
conformance.py.

The way of a message: Transport.send -> link queue -> writer -> wire -> (encrypted TCP) -> route or reader -> wire -> link -> EventQueue ->
next_event.
"""
