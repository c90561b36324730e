"""Sentences for a run file that is wrong: where it is wrong (file, line, section, key) and what to write instead.

Enters: the text of the file and what the validator said. Leaves: a `Refused("bad-config")` with one sentence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tscale_net.errors import Refused

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": 'a string in quotes, like "this"',
    "array": 'a list, like ["this"]',
    "object": "a section",
    "bool": "true or false",
}
"""The validator's type names in words that the writer of a TOML file knows."""


@dataclass(frozen=True)
class Place:
    """A run file, able to say on which line a key stands."""

    file: str
    text: str

    def of(self, section: str | None, key: str) -> str:
        """'FILE, line 12, [section] key'; the line is left out if the key is not spelt out in its plain form."""
        line = self._line(section, key)
        where = f"{self.file}, line {line}" if line else self.file
        return f"{where}, [{section}] {key}" if section else f"{where}, {key}"

    def _line(self, section: str | None, key: str) -> int | None:
        current: str | None = None
        for number, raw in enumerate(self.text.splitlines(), start=1):
            line = raw.strip()
            header = re.match(r"\[\s*\"?([^\]\"]+?)\"?\s*\]", line)
            if header:
                current = header[1]
                if section is None and current == key:
                    return number
            elif current == section and re.match(rf"\"?{re.escape(key)}\"?\s*=", line):
                return number
        return None


def unknown_key(place: Place, section: str | None, key: str, known: Sequence[str]) -> Refused:
    """The refusal of a section or key that does not exist, with the nearest one that does."""
    kind = "key" if section else "section"
    near = difflib.get_close_matches(key, known, n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"known {kind}s here: {', '.join(known)}"
    return Refused("bad-config", f"{place.of(section, key)}: unknown {kind}; {hint}")


def wrong_value(message: str, place: Place, choices: Callable[[str, str], Sequence[str]]) -> Refused:
    """The refusal of a value, from the validator's message ('Expected `int`, got `str` - at `$.batch.length`').

    `choices(section, key)` lists the words allowed at a key that takes one of a few.
    """
    found = re.match(r"(?P<what>.*) - at `\$\.(?P<path>[^`]*)`$", message)
    what, path = (found["what"], found["path"]) if found else (message, "")
    section, _, key = path.partition(".")
    key = re.sub(r"\[.*", "", key)
    if not key:
        return Refused("bad-config", f"{place.file}: {_in_words(what)}")
    allowed = choices(section, key)
    wanted = "must be one of " + ", ".join(f'"{word}"' for word in allowed) if allowed else _in_words(what)
    return Refused("bad-config", f"{place.of(section, key)}: {wanted}")


def _in_words(what: str) -> str:
    wrong_type = re.match(r"Expected `(?P<wanted>\w+)`, got `(?P<got>\w+)`$", what)
    if wrong_type:
        wanted, got = wrong_type["wanted"], wrong_type["got"]
        return f"must be {_WORDS.get(wanted, wanted)}, not {_WORDS.get(got, got)}"
    bound = re.match(r"Expected `\w+` (?P<bound>[<>]=? \S+)$", what)
    if bound:
        return f"must be {bound['bound']}"
    length = re.match(r"Expected `\w+` of (?P<length>length .+)$", what)
    return f"must have a {length['length']}" if length else what
