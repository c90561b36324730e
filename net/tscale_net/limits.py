"""Every size, rate and time of this room, with its unit in the name and the reason beside it.

"Measured" means on libzmq 4.3.5 over loopback or an emulated link; "guess" says so.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024 * 1024

# --- wire sizes -------------------------------------------------------------------------------------------------------------
HEADER_BYTES = 32
MESSAGE_BYTES = 512 * KIB
"""ZMQ_MAXMSGSIZE. Without a limit (the default) a stranger without a key can have 1 GiB allocated by announcing it (measured)."""
BULK_BODY_BYTES = MESSAGE_BYTES - KIB
"""Largest body on the bulk channel; the rest of the message size is left for encryption overhead (33 bytes) with room to spare."""
CONTROL_BODY_BYTES = 64 * KIB
"""Largest body on the control channel: 26 ms on a 20 Mbit/s link, so that a ping behind it stays useful."""
HELLO_BYTES = 4 * KIB
"""A signed HELLO is about 300 bytes plus up to 8 addresses of 256."""
NAME_CHARACTERS = 64
REASON_CHARACTERS = 400
ADDRESSES_READ = 1024
"""Addresses kept as read: peers are dialled again and again, and a multiaddr takes half a millisecond to read."""
ADDRESS_CHARACTERS = 256
ADDRESSES_PER_PEER = 8

# --- protocol ---------------------------------------------------------------------------------------------------------------
PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
RUN_BYTES = 32
NONCE_BYTES = 16
CLOCK_WINDOW_S = 90.0
"""Clocks of home machines with NTP are within a second; 90 s forgives a machine without, and bounds how long nonces are remembered."""
NONCES_PER_KEY = 64
"""Remembered per identity, so that a flood by one identity cannot push out the nonces of another; 64 HELLOs in 180 s are never honest."""
NONCE_KEYS = 4096

# --- ports ------------------------------------------------------------------------------------------------------------------
DEFAULT_PORT = 7700
"""Links; the hello door is always the next port."""
PORT_PAIRS_TRIED = 200
"""How many pairs after the default are tried when any port will do."""

# --- sockets ----------------------------------------------------------------------------------------------------------------
CONTROL_HIGH_WATER_MESSAGES = 256
BULK_HIGH_WATER_MESSAGES = 16
"""High-water marks count messages: 16 x 256 KiB = 4 MiB per direction and peer."""
ROUTER_HIGH_WATER_MESSAGES = 16
"""One listening socket carries both channels, so the smaller bound holds."""
HANDSHAKE_MS = 5000
"""Silent connections are held this long (default 30 s)."""
HEARTBEAT_MS = 5000
HEARTBEAT_TIMEOUT_MS = 20000
"""Answered by libzmq's own thread: says that the process exists, not that it works. Chunks keep it from firing on slow links."""
CONNECT_TIMEOUT_MS = 5000
RETRANSMIT_LIMIT_MS = 30000
CONTROL_SEND_BUFFER_BYTES = 256 * KIB
LISTEN_BACKLOG = 128
CONTEXT_SOCKETS = 4096
"""ZMQ_MAX_SOCKETS: the default of 1023 is 250 dialled peers (two sockets and two monitors each)."""
LIBZMQ_MIN = (4, 3, 5)
"""Older versions had an overflow on encrypted listeners that needed no key (fixed in 4.3.2); 4.3.5 is what was tested."""
CONGESTION_CONTROL = b"bbr"
"""TCP congestion control asked for where the system allows it: 4 -> 78 Mbit/s at 100 ms and 1 % loss (measured), else the default stays."""

# --- link times -------------------------------------------------------------------------------------------------------------
RESOLVE_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 6.0
"""TCP and CURVE handshake: three round trips; covers one lost SYN (1 s) and a second (3 s)."""
PROBE_TIMEOUT_S = 3.0
"""A second, plain connection attempt that only finds the words for a failure."""
HELLO_TIMEOUT_S = 5.0
"""From connection to HELLO, and from HELLO to its answer."""
DUPLICATE_WAIT_S = 5.0
"""How long a dial that lost against the other side's dial waits for that one."""
PING_INTERVAL_S = 3.0
KEEP_ALIVE_TICK_S = 1.0
SILENCE_S = 14.0
"""A session without any frame for so long is down: a vanished host is seen within 15 s, a 5 s stall of a trainer is forgiven."""
TICK_CREDIT_S = 2.0
"""A tick never counts more silence than this: when this process itself stalled, it doubts itself first."""
RTT_WEIGHT = 0.125
"""EWMA weight of a new round-trip sample, as TCP does it (RFC 6298)."""
FAREWELL_S = 3.0
"""How long the bulk channel of a peer that said BYE on the control channel may still deliver."""
FLUSH_S = 0.5
"""How long a BYE may take to leave before the connection is cut."""
ROUTER_RETRY_S = 0.004
"""A full pipe of a listening socket cannot be waited for in libzmq; it is tried again. 16 messages of 256 KiB per 4 ms are 1 GB/s."""

# --- queues -----------------------------------------------------------------------------------------------------------------
CONTROL_QUEUE_MESSAGES = 512
CONTROL_QUEUE_BYTES = 4 * MIB
BULK_QUEUE_BYTES = 8 * MIB
"""About two thirds of a second at 100 Mbit/s; more only makes old data older."""
UNREAD_BYTES = 32 * MIB
UNREAD_FRAMES = 16_384
"""Frames that nobody has read yet; beyond either bound no socket is read, so TCP slows the senders down."""
REFUSALS_QUEUED = 256
"""Unread refusal events; the counters go on counting beyond it."""
READS_PER_TURN = 32
"""Messages handled before the event loop gets its turn."""

# --- guards -----------------------------------------------------------------------------------------------------------------
CONNECTIONS_TOTAL = 256
"""Accepted TCP connections; a link has two."""
CONNECTIONS_PER_IP = 32
"""16 peers behind one router (guess). Loopback is exempt."""
CONNECTIONS_PER_NETWORK = 64
"""Of one IPv4 /24 or IPv6 /64 (guess): a university room of 32 peers. Who owns a /64 has 2^64 addresses, so a cap per IP alone is none."""
UNDELIVERED_BYTES = 12 * MIB
"""Received by TCP but not delivered as whole messages: an unfinished multi-part message may grow without bound inside libzmq otherwise.
An honest connection holds at most its high-water mark (16 x 512 KiB) plus buffers."""
UNDELIVERED_LEAK_BYTES_S = 1 * KIB
"""Heartbeats and framing are received but never delivered; this much per second is forgiven."""
GUARD_TICK_S = 0.1
CONTROL_FRAMES_PER_S = 500.0
CONTROL_FRAMES_BURST = 2000.0
"""Per peer (guess): gossip of 64 peers stays below a tenth of it."""
STRIKES = 10
"""Malformed frames before a peer is banned."""
STRIKE_BAN_S = 600.0
BANS = 4096
ADMISSIONS_PENDING = 256

# --- upload limit -----------------------------------------------------------------------------------------------------------
UPLOAD_BURST_S = 0.25

# --- hello door -------------------------------------------------------------------------------------------------------------
DOOR_REQUEST_BYTES = 1 * KIB
DOOR_REPLY_BYTES = 4 * KIB
DOOR_TIMEOUT_S = 3.0
DOOR_REQUESTS_PER_S = 5.0
DOOR_OPEN = 64
DOOR_TRACKED_IPS = 4096

# --- transfers --------------------------------------------------------------------------------------------------------------
CHUNK_BYTES = 256 * KIB
"""392 MB/s over an encrypted link at 4 ms loop lag; 1 MiB gains 20 % and doubles the lag (measured)."""
BLOB_BYTES = 64 * 1024 * MIB
BLOB_NAME_CHARACTERS = 200
HASHES_PER_PAGE = 4096
"""128 KiB of hashes per message."""
WINDOW_START_CHUNKS = 4
STRAY_CHUNKS = 64
"""Chunks nobody asked for that a source may send in one transfer: what can be under way when a slow transfer is opened anew."""
WINDOW_MIN_CHUNKS = 2
WINDOW_MAX_CHUNKS = 32
"""8 MiB in flight from one source: 80 MB/s at 100 ms."""
WINDOW_SLOW_S = 1.5
"""A chunk that takes longer from request to arrival shrinks the window: queues on slow links stay near this long."""
AHEAD_CHUNKS = 128
"""Chunks are written in order; at most this many (32 MiB) wait in memory for an earlier one."""
SERVED_PER_PEER = 4
SERVED_TOTAL = 64
SERVED_IDLE_S = 60.0
"""A blob that nobody asked about for so long is closed."""
SERVE_PENDING_BYTES = 2 * MIB
"""Chunks are read from the source only while less than this waits in the link's bulk queue."""
SERVE_RETRY_S = 0.01
OPEN_TIMEOUT_S = 30.0
"""A source may have to build a snapshot and hash it before it answers."""
CHUNK_TIMEOUT_S = 30.0
"""A source that owes chunks and sends none for so long is dropped: one chunk in 30 s is 70 kbit/s."""
RELINK_WAIT_S = 20.0
"""How long a transfer waits for a lost link to come back before it gives up on that source."""
RELINK_POLL_S = 0.25
LINK_CHECK_S = 1.0
"""How often a waiting transfer looks whether its link still stands."""
RELINK_TRIES = 3
"""Lost links in a row without one new chunk before a source is given up."""
STEAL_AFTER_S = 5.0
"""A chunk asked for so long ago may be asked from another source as well, when nothing else is left to ask for."""
SOURCES_AT_ONCE = 6
