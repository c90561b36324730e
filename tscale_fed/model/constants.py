"""Numbers that define the TScale architecture: changing one makes another model, so none of them is a setting.

They are those of the original implementation, so that its weights mean the same here.
"""

GROUP_CHANNELS = 128
"""Channels that are normalised together. The state, every head and the feed-forward layer are cut in such groups."""

HEAD_CHANNELS = 128
"""Channels of a head's query, key, gate and value; equal to GROUP_CHANNELS so that a head is one group."""

ROTARY_BLOCK_CHANNELS = 64
"""Rotary pairs are (k, k + 32) inside blocks of 64 channels."""

ROTARY_THETA = 500_000.0
"""Base of the rotary frequencies: pair i turns by theta^(-2i/128) radians per token."""

DOT_PRODUCT_SCALE = 0.5
"""Attention logit (natural) = 0.5 * query.key / sqrt(128). Queries have unit RMS, keys are not normalised."""

COMBINER_REPLICAS = 4
"""Products gate[z XOR r] * attention[z], r = 0..3, that the combiner matrix reads for every channel z."""

LOCAL_WIDTH = 64
"""Width in tokens of every second attention layer after the first ones."""

LOCAL_SLOPE = 0.5
"""Alibi slope of the local layers in base-2 units per token: a weight halves every 2 tokens."""

SINGLE_LAYER_SLOPE = 0.1
"""Alibi slope of the one layer of a model of depth 1 (a size used for profiling only)."""

PREVIOUS_WIDTH = 1
"""Width of the first attention layers: only the previous token."""

GROUPS_PER_PREVIOUS = 6
"""One in 6 pairs of layers (at least one pair) attends to the previous token only."""

UNIGRAM_OFFSET = 0.5
"""Added to a token's count before the logarithm of the fixed output bias, so that unseen tokens stay finite."""

INIT_RMS = 0.5
"""Standard deviation of start weights (the embedding has 1; combiner, feed-forward down and noise rows start at zero)."""

DEFAULT_NOISE_ROWS = 32
"""Embedding rows that training adds and subtracts at random, in the published models."""
