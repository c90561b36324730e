"""Every size of the data room, with its unit in the name and the reason beside it."""

from __future__ import annotations

MIB = 1024 * 1024

# Import: memory stays bounded by these whatever the sources hold.
READ_BLOCK_BYTES = MIB
"""One read from a source file: large enough that system calls do not count, small enough to stay in the cache."""
PIECES_PER_IMPORT = 256
"""A long document is cut into pieces of about 1/256 of the sources, so that a held-out part of a few percent is several pieces from
all over the text and not one passage."""
MIN_PIECE_BYTES = 1024
"""Below a paragraph or two a held-out piece would be shorter than one evaluation fragment."""
MAX_PIECE_BYTES = 256 * 1024
"""About 64 k tokens: many fragments of any usual length, while a batch of pieces still fits in memory."""
WHOLE_PIECES = 4
"""A document up to this many pieces long stays whole, so sources of 64 or more like-sized documents are held out by whole documents."""
MAX_LINE_BYTES = 64 * MIB
"""One jsonl line. The longest books are 10 MB; a longer line is a file that is not jsonl."""
ENCODE_BATCH_BYTES = 2 * MIB
"""Text handed to the tokenizer at once: enough pieces for all cores, some 60 MB of temporary objects in `tokenizers`."""
PROGRESS_INTERVAL_S = 0.2
"""The progress callback is not called more often than this."""
MAX_REPLACED_FRACTION = 0.01
"""Bytes that are not UTF-8 are replaced and counted; a file with more of them than this is not text in UTF-8 at all."""
MAX_HELD_OUT = 0.5
"""More than half held out is a slip of the decimal point."""

# Shards on disk.
SHARD_BYTES = 256 * MIB
"""100 GB are 400 files: few maps and a manifest of 30 kB, while one file is still a reasonable unit to fetch and check."""
NARROW_VOCAB = 1 << 16
"""Up to this vocabulary ids are stored in 2 bytes, above in 4."""

# What a manifest from the network may claim. Checked before anything is allocated.
MAX_VOCAB = 1 << 20
"""The largest vocabularies in use are 260 k."""
MAX_SHARDS = 16384
"""4 TB at SHARD_BYTES."""
MAX_SPLIT_TOKENS = 1 << 41
"""4 TB at two bytes."""
MAX_TOKENIZER_BYTES = 64 * MIB
"""The largest tokenizer.json in use are 35 MB."""
MAX_MANIFEST_BYTES = 8 * MIB
"""A manifest.json of MAX_SHARDS shards takes about 2 MB."""
VERIFY_BLOCK_TOKENS = 4 * MIB
"""Tokens checked at once when a shard is verified."""
