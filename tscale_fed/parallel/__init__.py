"""One owner, many GPUs: N processes, one per GPU, that make every step together and always hold the same weights.

    each rank: own text -> gradient -> exchange -> the same gradient everywhere -> the same update
Read in this order:
- `world.py`     which process this is, from the environment that torchrun (or `launch.py`) sets
- `group.py`     the processes as torch.distributed knows them: NCCL between GPUs, gloo between processors
- `agreement.py` the same run everywhere, or one sentence; equal replicas, by a checksum
- `buckets.py`   the gradient in parts, in the order in which a backward pass finishes them
- `exact.py`, `onebit.py`  how a part is exchanged: its mean, or one bit per weight with error tails
- `passes.py`, `update.py`, `engine.py`  steps of the engine over the kernels, with the exchange beside the backward pass
- `reference.py` the same for the autograd model
- `team.py`      what the loop of `tscale train` asks of its group: shared decisions, state, evaluations
- `launch.py`    `--gpus N`: starts the processes of this host, and ends them together
- `hook.py`      the one-bit exchange for any model, as a communication hook of torch's DistributedDataParallel
"""
