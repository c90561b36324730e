"""The trainer and its face: model, optimizer, data, training loop, checkpoints, command line, status screen.

Map of the room (each file opens with what enters and what leaves):

  what a person meets
    cli.py            the three programs `tscale-peer`, `tscale-status`, `tscale`; errors become sentences and exit codes here
    commands/         one command a file, heavy imports inside `run`; `peer.py` is the running peer
    console.py        what `tscale-peer` prints
    status.py         one snapshot of a running peer, for screen, `--json` and log line; status_text.py makes text of it
    control.py        the local socket that hands snapshots out and takes `stop`, `pause`, `resume`; control_client.py is its other end
    tui/              the status screen          demo.py   a seed and two peers on this machine          bench/   measurements
  a running peer
    ground.py         home, identity, links: what it stands on          home.py   the directory and its lock
    find_run.py       the run: its own, a new one (new_run.py), or one learned from the swarm; its text: run_data.py
    session_parts.py  everything else built anew or restored; peer_session.py lives with it, returning.py comes back with it
  training
    config.py         a run file (configs/*.toml) as typed settings; assembly.py makes model, data and trainer of them
    data/             text -> tokenizer -> token shards -> batches
    model/            shape, parameters, forward pass          optimizer/   update rule and rate schedule
    trainer.py        the local training loop; training_thread.py runs it beside the event loop, lone_run.py without a swarm
    checkpoint.py     what survives a restart          evaluate.py   losses on fixed batches
    conform.py        comparison with the original's golden files
    limits.py         the room's numbers

It may import `tscale_peers`, `tscale_net` and `tscale_kernels`; none of them imports it.
"""

__version__ = "0.1.0"
