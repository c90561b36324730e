"""One command a file: `add_parser(subparsers)` describes it, `run(args) -> int` does it and returns the exit code.

`tscale` finds a command through the table in `tscale_fed/cli.py` and imports only the file that was asked for. Everything heavy
(torch, zmq, textual) is imported inside `run`, so that `--help` answers at once. `peer_arguments.py` holds the flags of
`tscale-peer`, `peer.py` runs it.
"""
