"""The optimizer of TScale: normalise the gradient by its running RMS, then momentum; steps of absolute size.

- `rule.py`      settings, state and one step: gradient buffer in, weights updated in place
- `kernel_step.py`  the same step by kernels, on CUDA
- `schedule.py`  the learning rate: from the swarm's batches (warm-up, tail) and a peer's own steps since it joined
"""
