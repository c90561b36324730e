"""The status screen of a running peer (`tscale-status`).

    app.py        the Textual application: subscribes to the peer, hands each snapshot to the parts below, keys
    panels.py     the text panels (summary, loss curve, events) as thin widgets
    peer_table.py the table of peers: sorted, filtered, only visible lines drawn
    drawing.py    pure functions: numbers in, characters out (loss curve, what fits into a line)
    testing.py    a made-up peer, for tests and for work on the screen

Only this package imports textual; `commands/status.py` alone starts it.
"""
