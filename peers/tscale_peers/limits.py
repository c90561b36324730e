"""Numbers of the peers room, each with its unit in the name and its reason. Append-only, grouped by file."""

from __future__ import annotations

# -- basepoint.py ------------------------------------------------------------------------------------------------------

basepoint_range = 1 << 30
"""Largest |value| in units. A weight starts near 2**18 units, so this is 4096 times the weights' size: beyond it the run has diverged.
Half of int32, so that one more step of at most 2**24 can be tried and refused without overflow."""
recent_states = 32
"""(digest, hash) pairs kept: peers that never stand still can still find a state that both have passed."""
reading_copies_bytes = 256 << 20
"""Copies of chunks that change while the state of a moment is being hashed, on the replica's device."""

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

included_entries = 256
"""Entries of contributions in one sum, 14 bytes each: as many as a record book has peers."""
packet_header_max_bytes = 256
"""A header takes about 130 bytes, without the list of a sum; a longer one is malformed."""
included_max_bytes = 14 * included_entries
"""That list, and with it the header of a sum."""

# -- codec_topk.py -----------------------------------------------------------------------------------------------------

topk_default = 64
"""Values picked of every 4096 (SparseLoCo's choice): 0.017 bytes per parameter, a seventh of one bit."""
topk_bounds = (1, 2048)
"""Picks of 4096 that a name may ask for: at half of the values one bit for every value is shorter."""
rice_max_parameter = 11
"""Rice parameters above it are never shortest for gaps below 4096."""

# -- codec_lowrank.py --------------------------------------------------------------------------------------------------

lowrank_default = 8
"""Directions: with the 64 largest of 4096 that go along, 0.03 bytes per parameter of chunks [800, 1280]."""
lowrank_bounds = (1, 128)
"""Directions that a name may ask for: the most that `tscale_kernels.delta_lowrank` adds up exactly."""
lowrank_first_iterations = 2
"""Subspace iterations before the first publication of a stream, or after the memory was lost; later ones go on from the last."""

# -- delta_log.py ------------------------------------------------------------------------------------------------------

log_segment_bytes = 64 << 20
"""A segment is dropped whole: small enough that dropping is fine-grained at the default size, large enough to keep few files open."""
log_default_bytes = 4 << 30
"""Disk that the log may take: 20 publications of 16 peers of a 100M model take 4 GB."""
log_default_retain = 20
"""Publications kept per author stream at least while the disk bound allows: a peer that was away for less catches up without a snapshot."""

# -- exchange.py -------------------------------------------------------------------------------------------------------

span_values = 1 << 24
"""Consecutive chunks that a GPU handles together: few launches, 64 MB of scratch memory. On a processor one chunk: its cache holds it."""
draft_slices = 8
"""A publication of a large model is captured at so many meetings: the buffer beside the weights is an eighth of their size."""
draft_slice_values = 1 << 24
"""At least so many values at each: smaller models at one meeting."""
packets_in_use = 4096
"""Applied packets whose uploaded tensors are held before somebody waits for the device."""
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
records_bytes_max = 48 << 10
"""Records in one message: a control body may have 64 KiB, and a record of 8 long addresses has 2.4."""
records_per_s, records_burst = 100.0, 600.0
"""Records that one neighbour may tell: a new link tells all 256 at once, then about 10 a second; each costs a signature check."""
record_old_s = 240.0
"""A record whose own date lies further back than this is old news of a peer that may be gone: honest clocks differ by 90 s at most, or they
could not link, and a record is renewed every two minutes and takes half a minute to come."""
heartbeat_s = 2.0
"""A record is renewed this often in small swarms."""
heartbeat_pairs_per_s, heartbeat_most_s = 32.0, 120.0
"""In larger ones so that this many pairs of peers are told a second, and at least so often: every 8 s among 16, every 2 minutes from 64 on.
Who is there does not depend on it, only how old is what peers state of their work."""
links_renewed_s = 2.0
"""A change of links is stated this soon: a peer that comes or goes changes several links at once."""
heartbeat_parts = 6
"""News of others is gathered for this part of a heartbeat before it is told on: it then takes about a heartbeat through any swarm."""
record_tellers = 3
"""Of a peer's neighbours, the number that tell it of a third one's new record, others than its author: each record anew by its bytes.
Who misses one by chance hears the next; news that cannot wait is told by all."""
links_renewed_parts = 32
"""Of a heartbeat, likewise, in large swarms."""
urgent_parts = 32
"""Of a heartbeat: news that cannot wait (who comes, who goes) is gathered for so long, or for `tick_s` if that is longer."""
suspect_s = 7.0
suspect_parts = 12
"""Of a heartbeat, if that is longer: what others state of a newcomer's links takes some seconds through a large swarm."""
dead_s = 15.0
"""Without any chain of links. A killed peer's links are reset at once, or fall silent for 14 s; stalls of 5 s break no link."""
dead_heartbeats = 6.0
"""Records not renewed for so long are worth nothing, whatever links are stated to their peers: links lose no message, so a missing record
is no accident."""
states_remembered = 512
"""Own (digest, hash) pairs that others' records are compared with: a record of a large swarm may be half a minute and many states old."""
records_read = 512
"""Records kept as read, for whoever is given the same bytes again: 2 MB at most."""
records_journal = 4096
"""News of peers that some neighbour was not told yet, before the neighbours' own lists are brought up to date: 32 KiB."""
links_target = 8
"""Links that a peer tries to keep: the overlay of 256 peers then has a diameter of about 3."""
dials_per_tick = 2
redial_first_s = 1.0
redial_max_s = 60.0
bootstrap_alone_redial_s = 3.0
"""A peer without any link tries the given addresses this often."""
bootstrap_redial_s = 20.0
"""Given addresses are tried again this often while no link to them stands: two groups from one bootstrap list find each other."""

# -- gossip (lead) -----------------------------------------------------------------------------------------------------

tick_s = 0.25
"""News for neighbours is gathered for so long: many packets share one announcement, and nothing runs while there is no news."""
house_s = 1.0
"""What has no event of its own is looked after this often: who is alive, whom to dial, deadlines, whether the uplink is free."""
house_large_peers, house_most = 16, 4.0
"""From so many peers on, more rarely in proportion, up to so many times: there is more to look at, and each matters less."""
share_s = 5.0
"""The share and the pace are worked out anew this often, and when somebody comes or goes: rates are averages over 30 s."""
push_fanout = 3
"""Epidemic push: 3 reach almost everybody in log3 N hops, the rest pull."""
push_max_bytes = 64 << 10
"""Larger publications are announced and pulled: pushing them would send many bytes twice."""
anti_entropy_s = 5.0
"""Mean time between comparisons with a random neighbour; a digest costs 50 bytes. With `links_target` neighbours, who do the same, twice
that."""
anti_entropy_keys = 4096
"""Packets taken up from one comparison; the next one brings the rest."""
want_timeout_s = 15.0
"""256 KiB at 1 Mbit/s takes 2 s; then another neighbour is asked."""
packets_in_flight = 32
"""Asked of one neighbour and not yet here: at most 8 MiB, about the bandwidth-delay product of 600 Mbit/s at 100 ms."""
first_packets_in_flight = 8
"""Before a neighbour has delivered anything: 2 MiB, which 1.1 Mbit/s delivers in `want_timeout_s`."""
want_tries = 4
"""Times that the only neighbour which offers a packet is asked before its offer is forgotten."""
asked_keys = 4 * packets_in_flight
"""Packets that one neighbour may have us owe: an honest one never asks for more than `packets_in_flight`, and again after a timeout."""
bulk_pending_bytes = 1 << 20
"""Packets wait in the log, not in the send queue, beyond this."""
neighbour_keys = 16384
"""Keys remembered per neighbour (about 1.5 MB)."""
wanted_per_neighbour = 8192
"""Packets that one neighbour may be the first to offer and that are not here yet (about 2 MB): two comparisons' worth."""
ranges_per_message = 256
"""Ranges in one HAVE or WANT: at most 16 KiB."""
keys_per_message = 8192
keys_told_per_tick = 4096
"""Announced to one neighbour per tick: 16000 a second, where 16 peers of a 1.5B model make 2500."""
keys_per_s = 20_000.0
keys_burst = 65_536.0
"""Keys that one neighbour may name in HAVE, WANT and MISSING: a 60-byte range names 8192 of them, at about 2 us each."""
set_bytes_max = 480 << 10
"""Largest set of packets in one message (a bulk body may have 511 KiB); a larger one is told part by part, in turn."""
sets_told_per_s, sets_told_burst = 1.0, 4.0
sets_heard_per_s, sets_heard_burst = 2.0, 8.0
"""Whole sets per neighbour: the question has 60 bytes, the answer up to 480 KiB, and 4096 streams take 0.1 s to read. Twice as many are
listened to as told, so that two honest clocks never disagree."""
verify_queue_packets = 4 * packets_in_flight
"""Packets of one neighbour that wait for their signature check: as many as it may owe, as many that it pushed, and a second copy of either,
where what was pushed is asked for before it is checked. More is a flood."""
verify_queue_bytes = 32 << 20
"""The same in bytes."""
log_retry_s = 10.0
"""Nothing is pulled for so long after the log could not be written: a full disk does not empty itself within a second."""
rate_time_constant_s = 30.0
"""Average of tokens per second: a few publications long."""
traffic_time_constant_s = 10.0
"""Average of bytes per second that people see."""
min_share = 0.01
"""Floor of phi: a joiner's rate starts at 0 and its first packets must still count."""

# -- meeting, joining, leaving (lead) -----------------------------------------------------------------------------------

receive_time_fraction = 0.01
"""Applying packets may take this part of the time: at each meeting for small models, for large ones now and then, many at once, which costs
less. Before a publication, and while not training, at once."""
hash_time_fraction = 0.02
"""Hashing the basepoint may take this part of the time; small models are hashed at each meeting, large ones now and then."""
inbox_bytes = 64 << 20
"""Checked packets kept in memory until the next meeting; more than that is read back from the log."""
idle_meeting_s = 1.0
"""Without a training thread the event loop applies waiting packets this often."""
unheld_publications = 2
"""Own publications that no neighbour holds yet; beyond it the next one waits and its content stays in the displacement, where it costs no
bytes. One is always on its way, and a second covers the time of a receipt."""
uplink_patience_s = 60.0
"""Then it publishes all the same: the neighbours may be hostile, or not want it."""
refused_retry_s = 30.0
"""A packet that the replica refused (its range depends on what else has come) is tried again this often."""
batches_per_publication = 16
"""A stream counts for at most this many times the run's publishing interval per packet: room for uplinks that allow a sixteenth of the
publications, while nobody ends everybody's rate schedule with one false number."""
count_max = (1 << 53) - 1
"""Largest count in a record or shown: exact in JSON, and 256 of them add up within 64 bits."""
catch_up_least_bytes = 64 << 20
"""Missing packets of fewer bytes are pulled, whatever chunks would cost: that takes a minute at 10 Mbit/s, and every one is checked."""
catch_up_patience_s = 10.0
"""Packets of a chunk that a snapshot would replace for fewer bytes are not asked for so long, or until two neighbours were compared."""
catch_up_forgotten_s = 60.0
"""What neighbours were far ahead with is old news after this."""
catch_up_again_s = 300.0
"""A chunk is replaced for its price this often at most; what it still lacks comes from logs."""
chunk_fetches = 4
"""Snapshot chunks fetched at a time."""
snapshot_witnesses = 2
"""Neighbours without work of their own in the basepoint that must agree before a running peer takes a snapshot chunk on their word."""
chunk_retries = 5
chunk_reload_pause_s = 30.0
"""A chunk is not fetched again as a snapshot within this: it may be megabytes, and packets may still turn up."""
chunk_reload_pause_max_s = 1920.0
"""The pause doubles up to here while fetching brings nothing."""
leave_max_publications = 10
leave_displacement_fraction = 0.02
"""Leaving ends when the displacement is this small beside what it was, or after leave_max_publications."""
leave_handover_s = 10.0
"""Leaving gives up when no further packet was confirmed for so long."""
notices_kept = 200
refusal_notice_s = 60.0
"""The same refusal of the same peer is shown this often; the counters count all."""
refusals_remembered = 256
strikes = 64.0
strikes_forgiven_per_s = 1.0
"""Malformed or forged messages of one neighbour: an honest program sends none, so a link that carries so many is cut."""
strike_ban_s = 600.0
link_event_turns = 1000
"""Turns of the event loop that a link's own event may take to be read after the dial returned."""
chunk_retry_s = 1.0
"""Wait before the donors are asked again, times the number of the attempt."""
unheld_keys = 65536
"""Own packets that no neighbour confirmed yet, remembered for leaving."""

# -- chunk owners ------------------------------------------------------------------------------------------------------

owner_settled_s = 10.0
"""A peer owns chunks once its program has been running for so long: who only looks in shall not move any."""
owner_load = 1.25
"""An owner has at most this many times the fair number of chunks. Less moves more chunks when a peer comes or goes (guess)."""

# -- cadence and bandwidth ---------------------------------------------------------------------------------------------

capacity_measure_s = 10.0
"""A peer that was behind for so long without a break measures what its link carries: several round trips and deadlines of any link."""
capacity_rise_s = 60.0
"""While a peer is not behind its estimate rises by a factor e in this time: within minutes it is tried whether the link carries more."""
capacity_forgotten = 8.0
"""An estimate that has risen to so many times what was measured says nothing any more."""
link_part = 0.6
"""Part of a link that packets may take: the rest is for announcements, repetition, snapshots for newcomers, and for people."""
thin_share = 0.1
"""Peers that do together at most this part of the work are not waited for."""
behind_publications = 1.0
"""Publications of all live peers that are known and not here: more than that and this peer is behind."""
exchange_time_fraction = 0.1
"""Part of the time that publishing and receiving may cost a trainer: beyond it the next publication waits. Short intervals are worth it: at
8 peers, a delta every step costs 0.1 % of loss against synchronous training, one every five steps 4.1 % (`tscale bench rules`)."""
pace_interval_max_s = 600.0
"""No link, and no lie about one, makes a peer wait longer than this between publications."""
own_sends = 2.0
"""Times that an own publication leaves this peer: a second neighbour asks for it before the first has told others."""

# -- running average ---------------------------------------------------------------------------------------------------

average_window_s = 3600.0
"""Time of one mean: TScale's published models are means over a few hours' basepoints."""
average_cuts = 8
"""Basepoints in it: more would hardly differ, as a basepoint of minutes ago is nearly the present one."""
average_ahead_packets = 4096
"""Packets dated after the next cut, which only clocks that are ahead make: more of them spoil the mean of that window, and only that."""

# -- pledges.py, accumulator.py ----------------------------------------------------------------------------------------

pledges_open = 4
"""Contributions to one chunk that no sum lists yet; beyond it the next one waits, and its content stays in the displacement."""
pledges_remembered = 64
"""Contributions to one chunk that were taken back and may still be listed: more than the log keeps of them."""
pledge_patience_s = 30.0
"""A contribution is taken back when no sum has listed it for so long, and"""
pledge_intervals = 5.0
"""not for so many of the author's intervals: an owner gathers for up to two, and its sum has to come back. Meanwhile it costs nothing."""
sum_patience_s = 10.0
"""A sum goes out when its oldest contribution has waited for so long, and for two intervals of those who contribute."""
waiting_per_author = 8
"""Contributions of one author in one sum: twice as many as an honest one has open."""
known_ranges = 64
"""Gaps in the numbers of one author's contributions to one chunk, which come of changing owners."""
known_authors = 1024
"""Authors remembered per chunk: four times as many as a record book has peers."""
spacing_weight = 0.1
"""Weight of the newest in the average time between two contributions."""

# -- summing.py --------------------------------------------------------------------------------------------------------

sum_batches_factor = 16
"""A sum counts for as many batches as so many packets: one interval of 256 peers."""
sum_lag = 10
"""Sums of one chunk may be so many numbers behind those of another: half of what logs keep."""
refusals_kept = 64

# -- spreading.py, relay.py --------------------------------------------------------------------------------------------

owners_from_peers = 8
"""Peers that may own chunks from which "auto" gives work to owners: 8 peers receive 1.75 payloads per interval then instead of 7, and their
loss is 1 to 2 % above that of flooding (`tscale bench spread`); below, there is little to save."""
owners_slack_peers = 2
"""Work goes to everybody again when so many fewer are left."""
owners_payloads = 3.0
"""Payloads that a peer receives per interval with owners: one of sums, one of contributions, one passed on (`tscale bench spread`)."""
owners_look_s = 20.0
"""Owners are looked at again at least this often, and whenever somebody comes or goes or links change."""
node_bytes = 8
"""Of a public key, to name its peer among links."""
record_max_links = 32
"""Links that a peer states: the other end states them too, so a seed need not name them all."""
contribution_hops = 8
"""Links that a contribution may pass: twice what 256 peers need."""
contributions_per_s, contributions_burst = 500.0, 8192.0
"""Contributions that one neighbour may send, own and passed on: 1500 chunks of a 1.5B model three times a minute, and all at once."""
contributions_queued = 1024
contributions_queued_bytes = 32 << 20
"""Contributions of one neighbour that wait for their check; more is dropped, and taken back by their authors."""
relay_flush_s = 0.05
"""While contributions wait for a link, it is looked at so often: 20 MB/s at `bulk_pending_bytes` each."""
relay_queue_bytes = 32 << 20
"""Contributions of others that wait for one link: 2.5 s at 100 Mbit/s."""
