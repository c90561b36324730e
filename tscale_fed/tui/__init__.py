"""The status screen of a running peer (`tscale-status`).

    app.py        the Textual application: subscribes to the peer, hands each snapshot to the parts below, keys
    panels.py     the text panels (header, self, swarm, wire, loss, events) as thin widgets
    peer_table.py the table of peers: sorted and filtered rows, cells updated in place
    drawing.py    pure functions: numbers in, lines of text out (loss curve, bars)

Only this package imports textual, and only `commands/status.py` imports this package.
"""
