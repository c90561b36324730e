"""Sizes of inference, unit in the name, reason beside it."""

from __future__ import annotations

prefill_tokens = 256
"""Prompt tokens that go through the model at once: products are efficient from there on."""
default_slots = 16
"""Sequences that are decoded together, unless told otherwise."""
default_new_tokens = 256
"""Tokens of an answer, unless told otherwise."""
new_tokens_max = 1 << 20
"""More than a book."""
prompt_bytes_max = 16 << 20
"""A prompt file of more is a mistake: no window reaches that far back."""
stop_strings_max = 16
stop_characters_max = 256
"""Of one stop string: text is held back while it may be the beginning of one."""
top_log_probabilities_max = 20
"""Alternatives per token that can be asked for, as in the OpenAI API 5 and later 20."""
choices_max = 128
"""Answers to one prompt."""
