"""Fixtures of the process tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from process_kit import Swarm


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    """Start peers in it; whatever still runs at the end of the test is killed."""
    processes = Swarm(tmp_path)
    yield processes
    processes.close()
