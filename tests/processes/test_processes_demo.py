"""The demo with real peers: a tiny run, a few seconds of training, one equal model at the end. Its details: tests/fed/test_demo.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from process_kit import write_run


def test_the_demo_learns_and_ends_with_one_model(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", eval_s=1)
    homes = tmp_path / "homes"
    program = "import sys; from tscale_fed.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "demo", "--seconds", "4", "--config", str(config), "--keep", str(homes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 3 hold the same model, bit for bit" in done.stdout and "DIFFER" not in done.stdout
    assert sorted(path.name for path in homes.iterdir()) == ["peer-a", "peer-a.log", "peer-b", "peer-b.log", "seed", "seed.log"]
