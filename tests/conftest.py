"""For the whole suite: the share of lines that the tests ran, told before pytest's own last line (only under `coverage run`)."""

from __future__ import annotations

import io

import coverage
import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    measured = coverage.Coverage.current()
    if measured is None:
        return
    measured.stop()
    measured.save()
    percent = measured.report(file=io.StringIO(), skip_empty=True)
    terminalreporter.write_line(f"coverage: {percent:.0f} % of lines, child processes not counted (.venv/bin/coverage report shows files)")
