"""The trainer and its face: model, optimizer, data, training loop, checkpoints, command line, status screen.

Map of the room (each file opens with what enters and what leaves):

    cli.py            the three programs `tscale-peer`, `tscale-status`, `tscale`; errors become sentences and exit codes here
    commands/         one command a file, heavy imports inside `run`; `peer.py` is the running peer
    config.py         a run file (configs/*.toml) as typed settings
    data/             text -> tokenizer -> token shards -> batches
    model/            shape, parameters, forward pass       optimizer/  update rule and rate schedule
    trainer.py        the local training loop and its meeting point with the swarm
    checkpoint.py     what survives a restart               evaluate.py  losses on fixed batches
    status.py         one snapshot of a running peer: what the screen, `--json` and the log line show
    control.py        the local socket that hands snapshots out and takes `stop`, `pause`, `resume`
    console.py        what `tscale-peer` prints             tui/         the status screen

It may import `tscale_peers`, `tscale_net` and `tscale_kernels`; none of them imports it.
"""

__version__ = "0.1.0"
