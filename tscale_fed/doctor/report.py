"""One line of the report, and the whole of it as text or JSON.

Enters: lines of the checks. Leaves: text or JSON; the exit code is 1 if any line says fail. A warning never fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Verdict = Literal["ok", "warn", "fail"]


class Line(msgspec.Struct, frozen=True):
    """What was looked at, how it stands, and what to do if it is not well."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""
    """Empty where nothing has to be done."""


def text_of(lines: Sequence[Line]) -> str:
    """One line each, and the fix below it."""
    width = max((len(line.check) for line in lines), default=0)
    rows = []
    for line in lines:
        rows.append(f"{line.verdict:4}  {line.check:{width}}  {line.found}")
        if line.fix:
            rows.append(f"{'':4}  {'':{width}}  -> {line.fix}")
    return "\n".join(rows)


def json_of(lines: Sequence[Line]) -> str:
    """{"ok": bool, "checks": [{"check", "verdict", "found", "fix"}]}"""
    return msgspec.json.encode({"ok": exit_code(lines) == 0, "checks": list(lines)}).decode()


def exit_code(lines: Sequence[Line]) -> int:
    """1 if a check failed."""
    return int(any(line.verdict == "fail" for line in lines))
