"""The TScale language model in plain torch: the reference that kernels are checked against, on any device.

    text, target -> labels -> embedding -> layers (attention, feed-forward) -> normalise -> final layer -> summed loss
Read in this order:
- `constants.py`   the numbers that define the architecture
- `shape.py`       a dims string such as `e256h2d36w256` -> sizes, layers, the list of matrices, parameter count
- `parameters.py`  one flat buffer of weights and one of gradients, with a named view per matrix
- `init.py`        start weights from a seed
- `labels.py`      tokens -> signed embedding rows (token drop, noise rows)
- `normalise.py`   RMS normalisation of groups of 128 channels
- `rotary.py`      rotary position embedding
- `attention.py`   attention to the strict past with a zero sink: widths 1, local, full
- `combiner.py`    gate and attention result -> the vector that the combiner matrix reads
- `layer.py`       one layer: attention step and feed-forward step
- `loss.py`        final layer and summed cross-entropy without a full logit array
- `rounding.py`    emulation of stored precisions (int8 weights, half embedding, packed gradients)
- `forward.py`     `Model`, which wires these together

Shape letters used in comments: B fragments, T tokens of a fragment, E state width, H heads, A = 128 H, F feed-forward width, V vocabulary.
"""
