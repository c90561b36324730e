"""A joiner with text of its own: it trains on that, with the run's tokenizer and output bias, and serves no text that is not the run's."""

from __future__ import annotations

from pathlib import Path

import pytest
from log_oracle import rebuilt
from process_kit import Swarm, agreed_state, free_port, made_up_text, write_run

from tscale_fed.data.importer import import_text
from tscale_fed.data.manifest import UNIGRAMS_FILE
from tscale_fed.data.tokenizer import load_tokenizer


@pytest.mark.timeout(240)
def test_a_joiner_with_its_own_text(swarm: Swarm, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (tmp_path / "own.txt").write_text(made_up_text(60_000).upper())
    import_text([tmp_path / "own.txt"], load_tokenizer("bytes"), own)
    config = write_run(tmp_path / "run")
    seed = swarm.seed(config, free_port())
    seed.training()
    ann = swarm.join("ann", seed.address, "--data-dir", str(own))
    ann.until(lambda s: s.wire.deltas_sent > 0 and s.wire.deltas_applied > 0, "exchange")
    seed.until(lambda s: s.wire.deltas_applied > 0, "a delta learned from other text")
    state = agreed_state([seed, ann])
    assert rebuilt(seed.home, tmp_path / "copy") == state

    (counts,) = ann.home.rglob(UNIGRAMS_FILE)
    (of_the_run,) = seed.home.rglob(UNIGRAMS_FILE)
    assert counts.read_bytes() == of_the_run.read_bytes() != (own / UNIGRAMS_FILE).read_bytes()
    assert not list(ann.home.rglob("*.tokens")), "no text is fetched beside own text"
