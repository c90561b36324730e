"""The engine: training steps by hand over the 8-bit kernels, in buffers that are allocated once.

    weights (fp32, flat) -> packed codes -> forward -> loss -> backward -> gradient (fp32, flat) -> optimizer
Read in this order:
- `interface.py`    what a trainer needs of an engine; the batch of a step
- `precision.py`    number formats, and which processor has them
- `build.py`        an engine from a shape and weights alone
"""
