"""Data: from text to the batches that a peer trains on. This docstring is the map of the room; import from the file you need.

    text files, folders, jsonl                                  sources.py   pieces of text, in a fixed order
      -> tokenizer                                              tokenizer.py `load_tokenizer`; byte_tokenizer.py, gpt2.py, huggingface.py
      -> held-out split by document                             held_out.py
      -> token shards on disk, with a manifest                  importer.py `import_text`; shards.py, manifest.py
      -> fragments drawn by (run seed, peer id, step)           token_data.py `TokenData`; sampling.py

Between peers: manifest.py `DataRecipe` is what a run says about its data, serving.py hands files to others, assemble.py checks what came
from others and puts a data directory together. limits.py holds every size of the room. text/ is the public-domain demo text.

Ids. A tokenizer knows `base_vocab` tokens. The model's vocabulary adds one *fragment-start* token (id `base_vocab`), which replaces the
first token of every training fragment, and, if the tokenizer has no document-start token of its own, one *document-start* token after it.
"""
