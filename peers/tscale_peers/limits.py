"""Numbers of the peers room, each with its unit in the name and its reason. Append-only, grouped by file."""

from __future__ import annotations

# -- basepoint.py ------------------------------------------------------------------------------------------------------

basepoint_range = 1 << 30
"""Largest |value| in units. A weight starts near 2**18 units, so this is 4096 times the weights' size: beyond it the run has diverged.
Half of int32, so that one more step of at most 2**24 can be tried and refused without overflow."""
recent_states = 32
"""(digest, hash) pairs kept: peers that never stand still can still find a state that both have passed."""
hash_passes = 3
"""Times that hashing follows a replica which changes meanwhile, before it holds the lock for the rest."""

# -- applied.py --------------------------------------------------------------------------------------------------------

applied_default_streams = 4096
"""Author streams (one per home directory) that a set accepts unless the run says otherwise: 4096 of them over 1500 chunks take 50 MB."""
applied_ranges_per_chunk = 1024
"""Ranges beyond the first gap, per stream and chunk. An author that skips every other number cannot grow a set further."""
applied_seq_max = (1 << 63) - 1
"""Sequence numbers and batch counts fit a signed 64-bit integer."""
chunk_entry_max_bytes = 64 + 20 * 64
"""What one stream adds to a snapshot chunk: 57 bytes, and ranges beyond gaps at 20 bytes each. A donor with more than this on average
sends its chunk later, when the gaps have closed."""
chunk_header_max_bytes = 64
"""Fixed fields of a snapshot chunk."""

# -- packet.py ---------------------------------------------------------------------------------------------------------

packet_header_max_bytes = 256
"""A header takes about 125 bytes; a longer one is malformed."""

# -- delta_log.py ------------------------------------------------------------------------------------------------------

log_segment_bytes = 64 << 20
"""A segment is dropped whole: small enough that dropping is fine-grained at the default size, large enough to keep few files open."""
log_default_bytes = 4 << 30
"""Disk that the log may take: 20 publications of 16 peers of a 100M model take 4 GB."""
log_default_retain = 20
"""Publications kept per author stream at least while the disk bound allows: a peer that was away for less catches up without a snapshot."""

# -- exchange.py -------------------------------------------------------------------------------------------------------

grid_displacement_units = 1 << 24
"""With the displacement on the grid, |d| is held to this many units, up to which fp32 counts exactly; the rest stays in the weights."""

# -- records and membership (lead) ---------------------------------------------------------------------------------------

record_max_bytes = 4096
"""8 addresses of 256 characters and a name fit; a stranger's record is read before its signature is checked."""
record_max_name_chars = 32
record_max_addresses = 8
record_max_address_chars = 256
record_max_tokens_per_s = 1e12
"""No machine is a thousand times faster than today's largest cluster: a lie that would take all of the share."""
record_book_peers = 256
"""Full member lists are affordable up to here (about 350 B each)."""
records_per_message = 32
"""About 11 KiB on the control connection."""
heartbeat_s = 2.0
"""A record is renewed this often in small swarms."""
heartbeat_per_peer_s = 0.1
"""In large ones once per this times the number of peers: record traffic per link stays about 10 records a second."""
suspect_s = 7.0
"""Three heartbeats lost."""
dead_s = 15.0
"""A killed peer is noticed within this in small swarms; stalls of 5 s of a training process stay harmless."""
links_target = 8
"""Links that a peer tries to keep: the overlay of 256 peers then has a diameter of about 3."""
dials_per_tick = 2
redial_first_s = 1.0
redial_max_s = 60.0
bootstrap_redial_s = 20.0
"""Given addresses are tried again this often while no link to them stands: two groups from one bootstrap list find each other."""

# -- gossip (lead) -----------------------------------------------------------------------------------------------------

tick_s = 0.25
push_fanout = 3
"""Epidemic push: 3 reach almost everybody in log3 N hops, the rest pull."""
push_max_bytes = 64 << 10
"""Larger publications are announced and pulled: pushing them would send many bytes twice."""
anti_entropy_s = 5.0
"""Mean time between comparisons with a random neighbour; a digest costs 50 bytes."""
anti_entropy_keys = 4096
"""Packets taken up from one comparison; the next one brings the rest."""
want_timeout_s = 15.0
"""256 KiB at 1 Mbit/s takes 2 s; then another neighbour is asked."""
packets_in_flight = 32
"""Asked of one neighbour and not yet here: at most 8 MiB, about the bandwidth-delay product of 600 Mbit/s at 100 ms."""
bulk_pending_bytes = 1 << 20
"""Packets wait in the log, not in the send queue, beyond this."""
neighbour_keys = 16384
"""Keys remembered per neighbour (about 1.5 MB)."""
wanted_keys = 65536
ranges_per_message = 256
"""Keys or ranges in one HAVE or WANT: at most 16 KiB."""
keys_per_message = 8192
streams_max = 4096
verify_queue_packets = 512
"""Packets waiting for their signature check; more than that unasked is a flood."""
rate_time_constant_s = 30.0
"""Average of tokens per second: a few publications long."""
min_share = 0.01
"""Floor of phi: a joiner's rate starts at 0 and its first packets must still count."""

# -- meeting, joining, leaving (lead) -----------------------------------------------------------------------------------

hash_time_fraction = 0.02
"""Hashing the basepoint may take this part of the time; small models are hashed at each meeting, large ones now and then."""
inbox_bytes = 64 << 20
"""Checked packets kept in memory until the next meeting; more than that is read back from the log."""
idle_meeting_s = 1.0
"""Without a training thread the event loop applies waiting packets this often."""
uplink_busy_bytes = 4 << 20
"""Own packets still queued on the uplink: the next publication waits, its content stays in the displacement."""
chunk_fetches = 4
"""Snapshot chunks fetched at a time."""
chunk_retries = 5
chunk_reload_pause_s = 30.0
"""A chunk is not fetched again as a snapshot within this: it may be megabytes, and packets may still turn up."""
leave_max_publications = 10
leave_displacement_fraction = 0.02
"""Leaving ends when the displacement is this small beside what it was, or after leave_max_publications."""
leave_handover_s = 10.0
"""Time for the last packets to reach a neighbour."""
notices_kept = 200
chunk_retry_s = 1.0
"""Wait before the donors are asked again, times the number of the attempt."""
unheld_keys = 65536
"""Own packets that no neighbour confirmed yet, remembered for leaving."""
