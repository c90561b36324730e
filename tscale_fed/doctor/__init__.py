"""`tscale-peer doctor`: what of this machine and its network would keep a peer from training, and what to do about it.

    report.py    one line of the report; text, JSON and exit code from lines
    machine.py   versions, processor or GPU, memory, disk
    network.py   ports, IPv6, MTU, congestion control, libzmq
    remote.py    clock, round trip and the address seen from outside, asked of a bootstrap peer

Each check takes what it measures as an argument, so that tests can show every verdict; the measuring functions stand beside it.
"""
