"""Sizes, rates and times of this room, unit in the name, reason beside it. Numbers without a measured reason say "guess"."""

from __future__ import annotations

# Control socket: the peer's answer to `tscale-status`.
CONTROL_PATH_BYTES = 100
"""A unix socket path holds 108 bytes on Linux and 104 on macOS, one of them a zero; longer homes use a short path elsewhere."""
CONTROL_REQUEST_BYTES = 4 * 1024
"""One request line. The longest real one is about 60 bytes."""
CONTROL_REPLY_BYTES = 4 * 1024 * 1024
"""What a client reads before it gives up. A snapshot of 256 peers is about 70 kB."""
CONTROL_CLIENTS = 8
"""Open screens and scripts at once: a person has one or two, and each costs one encoding of the snapshot per second."""
CONTROL_IDLE_S = 30.0
"""A client that connected and asks nothing for this long is closed (guess)."""
CONTROL_WRITE_S = 5.0
"""A client that takes nothing for this long is closed; its missed snapshots are dropped, not queued (guess)."""
CONTROL_COMMAND_S = 30.0
"""Longest wait for a command such as `stop` to be accepted by the peer."""
CONTROL_ANSWER_S = 5.0
"""How long a client waits for a snapshot. The event loop answers within 50 ms even while it trains."""
SUBSCRIBE_INTERVAL_S = 1.0
"""Snapshots per subscriber: one a second is what a person can read."""

# Status snapshot.
RECENT_STATES = 32
"""(applied digest, basepoint hash) pairs kept, so that peers that never stand still can be compared."""
LOSS_POINTS = 512
"""Points of the loss curve in a snapshot; older ones are thinned out, see `LossHistory`."""
STATUS_EVENTS = 100
"""Events in a snapshot: more than a tall terminal shows."""
EVENT_CHARACTERS = 240
"""Longest event text; peers can cause events, so they are cut."""

# Console.
PLAIN_STATUS_INTERVAL_S = 10.0
"""One status line per 10 s when the output is not a terminal (a log file)."""
LIVE_INTERVAL_S = 0.2
"""Redraw of the line at the bottom of a terminal, at most."""
PROGRESS_RATE_WINDOW_S = 5.0
"""A transfer's rate is the mean over this long."""

# Status screen.
RECONNECT_INTERVAL_S = 1.0
"""How often a screen whose peer is gone looks whether it is back."""
CONFIRM_S = 10.0
"""How long `y` confirms the question before it."""

# Demo.
DEMO_SECONDS = 100.0
"""Default length of the training part, so that the whole ends within 3 minutes on 2 CPU cores."""
DEMO_START_S = 60.0
"""A process of the demo that does not train by then is reported: importing torch takes 2 to 10 s, the rest about 3 s."""
DEMO_LINE_S = 5.0
"""One line of figures this often."""
DEMO_POLL_S = 0.5
"""How often the processes are looked at in between; each look also collects states to compare."""
DEMO_QUIET_S = 20.0
"""Longest wait, once all are paused, until the last deltas have reached everybody."""
DEMO_LEAVE_S = 30.0
"""A process that has not left by then is killed; leaving takes about 3 s."""
DEMO_SAFETY_S = 240.0
"""The processes leave by themselves this long after the demo should have ended it, should the demo itself be killed."""
DEMO_LAST_LINES = 8
"""Lines of a dead process's output that are shown."""

# A running peer.
CATCH_UP_S = 20.0
"""A returning peer waits at most this long for what it missed before it trains on; the rest comes while it trains."""
ALONE_S = 8.0
"""A returning peer that nobody is linked to by then trains on: others dial a seed again after a few seconds, if there are any."""
NEIGHBOURS_S = 1.0
"""How often the list of neighbours is looked at; it is written only when it has changed."""
DONOR_STATE_S = 30.0
"""Optimizer statistics are kilobytes: who does not send them by then is not asked longer."""
STATUS_INTERVAL_S = 0.5
"""How often the console's status line may change."""
LINGER_S = 1.0
"""Time for the last BYE to leave."""

# -- session_state.py --------------------------------------------------------------------------------------------------

CHECKPOINT_PART_VALUES = 1 << 22
"""Weights that a checkpoint copies between two steps: 64 MB with all that belongs to them, about 10 ms. Smaller models go at once."""
