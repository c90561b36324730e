"""Numerics: every operation as a plain-torch reference, a Triton kernel and one `run` that picks between them. Knows nothing else.

Map of the room, in reading order:
    limits.py         the numbers of the room: code widths, the largest step, block sizes
    dispatch.py       which backend runs an operation ("ref" or "triton"), and why
    flat_blocks.py    blocks of a flat buffer, and sums of squares that are the same on every machine
    pack_weights.py   fp32 weights of a whole model to codes, transposed codes and units (pack_plan.py: its tables)
    embedding.py      labels to the start state and its codes; the gradient of the embedding
    attention.py      attention and the combiner's input; attention_width1.py: the same for layers that see one token
    kv_product.py     backward of the combiner's input; attention_backward.py, attention_backward_width1.py: of attention
    head_gradient.py  the last step of all of these: normalise, rotation, maxima for the quantiser
    head.py           final layer, loss and their gradients without stored logits
    optimizer_step.py second moments, momentum and weights in one pass (update_plan.py: its tables)
    host_update.py    the same update, and codes, for weights in host memory (host_native.py builds host_update.c)
    place_codes.py    codes that the host made, put in kernel order on the device
    delta_onebit.py   one-bit deltas: encode a displacement, add a decoded delta to an integer basepoint, on an exact grid
    delta_int8.py, delta_int4.py   the same with 8 and with 4 bits (delta_blocks.py: blocks and steps of both)
    delta_topk.py, delta_lowrank.py  the same with the k largest values, with factors of low rank
    testing.py        error measure, shapes that break kernels, bit-exact comparison

Every operation file has the same order: formula, reference, Triton kernel, `run` functions. The reference defines the semantics.
Nothing is imported here, so `import tscale_kernels` costs nothing.
"""
