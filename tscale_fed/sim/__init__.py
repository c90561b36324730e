"""`tscale-peer sim`: a whole swarm in virtual time, with the classes that run on real links.

    scenario.py    what is simulated: sizes, links, mishaps; checked
    objective.py   what peers learn: a noisy bowl without a model, or a small transformer on real text
    mishaps.py     kills, replacements, a partition, as tasks of the virtual loop
    simulate.py    one scenario from start to end
    outcome.py     what came of it: figures, and a sample now and then
    report.py      the table and the JSON
    curves.py      loss against time, bytes, tokens: CSV and a chart of characters; figure.py: the same as PNG

The swarm itself (peers, homes, network, clock) is tscale_peers.simulation.
"""
