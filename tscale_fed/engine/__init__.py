"""The engine: training steps by hand over the 8-bit kernels, in buffers that are allocated once.

    weights (fp32, flat) -> packed codes -> forward -> loss -> backward -> gradient (fp32, flat) -> optimizer
Read in this order:
- `interface.py`    what a trainer needs of an engine; the batch of a step
- `reference.py`    the same over the autograd model
- `precision.py`    number formats, and which processor has them
- `engine.py`       `Engine`: a step, its micro-batches, what happens when memory runs out
- `build.py`        an engine from a shape and weights alone
- `scorer.py`       losses of any weights, by the forward pass alone
A micro-batch:
- `layout.py`       which buffers there are, as a function of sizes
- `memory_plan.py`  how many fragments at once, what is kept; bytes
- `buffers.py`      the buffers, and how text gets into them
- `kernel_order.py` the order of rows and columns that kernels read
- `packed.py`       weights as codes
- `forward.py`, `backward.py`  the passes
- `gradients.py`    where gradients go
- `passes.py`       both passes as CUDA graphs
- `finite.py`       where numbers overflowed first
- `update.py`       optimizer and weights on the device
Weights and momentum in host memory (CPU offload):
- `place.py`        device or host: the choice, and the engine that it asks for
- `host_engine.py`  `HostEngine`
- `host_tensors.py`, `host_parameters.py`  page-locked memory, and the weights in it
- `host_pieces.py`  what is updated at a time
- `host_gradients.py`  gradients on their way out
- `host_transfer.py`   copies beside the computation
- `host_memory.py`  the update while the backward pass goes on
- `host_passes.py`  a micro-batch in stages
- `host_pack.py`    codes from weights on the CPU, for the scorer
"""
