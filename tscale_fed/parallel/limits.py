"""Sizes and times of a group of processes, unit in the name, reason beside it."""

from __future__ import annotations

RENDEZVOUS_S = 300.0
"""How long processes wait for the others at the start: hosts are started by hand, and importing torch takes 2 to 20 s."""
DATA_WAIT_S = 24 * 3600.0
"""How long the others wait while one process of a host imports text: terabytes take hours, and a dead process is noticed by itself."""
COLLECTIVE_S = 900.0
"""A collective that takes longer is given up: rank 0 may be writing a checkpoint meanwhile, 16 GB for a model of 1.5e9 weights."""
STUCK_S = 600.0
"""A step whose numbers do not arrive for this long has lost a rank. Far above the slowest step, below COLLECTIVE_S."""
STUCK_AFTER_STOP_S = 15.0
"""The same once somebody asked for an end: whoever starts the processes asks the others when one has died."""
POLL_S = 5e-5
"""Between two looks at the GPU while it computes: below 1 % of the shortest step."""
END_S = 90.0
"""After one process has died, the others have this long to save and end, then they are killed. A large checkpoint takes a minute."""
WATCH_S = 0.1
"""How often the launcher looks at its processes."""

BUCKET_ELEMENTS = 16 * 1024 * 1024
"""Weights per part of the exchange, at least, where the model has as many: 64 MiB of gradient, from where on NVLink and networks run at
full speed."""
CHECKSUM_ELEMENTS = 1 << 24
"""Weights that are summed at a time: bounds the scratch of a checksum to a quarter of a GiB."""
