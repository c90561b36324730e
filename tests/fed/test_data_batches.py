"""Batches: the fragment rule, that anybody draws the same ones, and that training never sees the held-out part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tscale_fed.data import limits
from tscale_fed.data.byte_tokenizer import ByteTokenizer
from tscale_fed.data.importer import import_text
from tscale_fed.data.manifest import DataManifest, SplitRecord
from tscale_fed.data.sampling import batch_positions, spread_positions
from tscale_fed.data.sources import DEMO
from tscale_fed.data.token_data import NO_TARGET, TokenData
from tscale_net.errors import Refused

SHARD_TOKENS = 50
PEER = "12D3KooWPeer"


def make_counting_data(folder: Path) -> TokenData:
    """Bytes 0..249 over and over, short enough to stay one document, in many small shards."""
    (folder / "a.bin").write_bytes(bytes(range(250)) * 12)
    import_text([folder / "a.bin"], ByteTokenizer(), folder / "out", 0.0, shard_bytes=2 * SHARD_TOKENS)
    return TokenData.open(folder / "out")


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return make_counting_data(tmp_path_factory.mktemp("counting"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = tmp_path_factory.mktemp("demo") / "out"
    import_text([DEMO], ByteTokenizer(), folder)
    return TokenData.open(folder)


def test_fragment_rule(counting: TokenData) -> None:
    text, target = counting.batch(1, PEER, 0, fragments=40, length=130)
    assert text.shape == target.shape == (40, 130) and text.dtype == target.dtype == torch.int64
    assert (text[:, 0] == counting.fragment_start_token).all() and (target[:, 0] == NO_TARGET).all()
    assert (target[:, 1:-1] == text[:, 2:]).all()
    # Each id follows from the one before, across shard borders: nothing is skipped or doubled.
    steps = (target[:, 1:] - text[:, 1:]) % 250
    inside = (target[:, 1:] < 250) & (text[:, 1:] < 250)
    assert (steps[inside] == 1).all() and inside.float().mean() > 0.99


def test_every_position_can_be_drawn_and_read(counting: TokenData) -> None:
    length = counting.train_tokens - 3
    texts = {tuple(counting.batch(1, PEER, step, 1, length)[0][0, 1:3].tolist()) for step in range(40)}
    assert len(texts) == 3
    assert set(batch_positions(1, PEER, 0, 200, 3)) == {0, 1, 2}


def test_drawn_again_equal_and_otherwise_different(counting: TokenData) -> None:
    base = counting.batch(1, PEER, 5, 16, 32)[0]
    assert torch.equal(base, counting.batch(1, PEER, 5, 16, 32)[0])
    others = [(2, PEER, 5), (1, PEER + "x", 5), (1, PEER, 6), (11, PEER, 5), (1, "", 5), (-1, PEER, 5), (1 << 70, PEER, 5)]
    assert all(not torch.equal(base, counting.batch(*other, 16, 32)[0]) for other in others)


def test_another_process_draws_the_same(demo: TokenData) -> None:
    code = (
        "import sys; from tscale_fed.data.token_data import TokenData; from blake3 import blake3\n"
        f"text, target = TokenData.open(sys.argv[1]).batch(7, {PEER!r}, 123456, 8, 64)\n"
        "print(blake3(text.numpy().tobytes() + target.numpy().tobytes()).hexdigest())"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "12345"}
    there = subprocess.run([sys.executable, "-c", code, str(demo.directory)], env=environment, capture_output=True, text=True, check=True)
    from blake3 import blake3

    text, target = demo.batch(7, PEER, 123456, 8, 64)
    assert there.stdout.strip() == blake3(text.numpy().tobytes() + target.numpy().tobytes()).hexdigest()


def test_positions_are_pinned() -> None:
    """Peers of different versions must draw alike: these numbers may only change together with the domain string."""
    assert batch_positions(1, PEER, 2, 4, 1_000_000) == [946252, 34244, 909067, 232876]
    assert spread_positions(4, 100) == [12, 37, 62, 87]


@given(step=st.integers(0, 1 << 40), places=st.integers(1, 1 << 41), fragments=st.integers(1, 50))
def test_positions_fit(step: int, places: int, fragments: int) -> None:
    for positions in (batch_positions(0, PEER, step, fragments, places), spread_positions(fragments, places)):
        assert len(positions) == fragments and all(0 <= position < places for position in positions)


def test_positions_are_uniform_and_peers_independent() -> None:
    draws = np.array([batch_positions(3, f"peer{peer}", step, 16, 16) for peer in range(4) for step in range(250)])
    counts = np.bincount(draws.ravel(), minlength=16)
    # 16,000 draws into 16 places: 1000 each, standard deviation 31.
    assert np.abs(counts - 1000).max() < 5 * 31
    agreement = (draws[:250] == draws[250:500]).mean()
    assert abs(agreement - 1 / 16) < 5 * np.sqrt(1 / 16 * 15 / 16 / 4000)


def test_training_never_reads_held_out_text(tmp_path: Path) -> None:
    # Every document has its own number; collect the numbers seen in training and in testing.
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{number:04d}{"-" * 60}"}}\n' for number in range(200)))
    import_text([tmp_path / "a.jsonl"], ByteTokenizer(), tmp_path / "out", 0.2)
    data = TokenData.open(tmp_path / "out")
    decode = ByteTokenizer().decode

    def numbers(text: torch.Tensor) -> set[bytes]:
        return {part for part in decode(text.flatten().tolist()).split(b"-") if len(part) == 4}

    trained = set.union(*(numbers(data.batch(1, PEER, step, 8, 150)[0]) for step in range(100)))
    tested = set.union(*(numbers(text) for text, _ in data.evaluation_batches(8, 150, 10)))
    assert len(tested) >= 35 and len(trained) >= 150 and not tested & trained


def test_evaluation_batches_are_fixed_and_cover_the_part(demo: TokenData) -> None:
    first, again = demo.evaluation_batches(8, 64, 5), demo.evaluation_batches(8, 64, 5)
    assert len(first) == 5 and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    rows = torch.cat([text for text, _ in first])
    assert len(torch.unique(rows, dim=0)) == 40
    train_rows = torch.cat([text for text, _ in demo.evaluation_batches(8, 64, 5, split="train")])
    assert not torch.equal(rows, train_rows)
    assert (demo.evaluation_batches(2, 64, 1)[0][1][:, 0] == NO_TARGET).all()


@settings(max_examples=20)
@given(length=st.integers(1, 300), fragments=st.integers(1, 5))
def test_any_shape(counting: TokenData, length: int, fragments: int) -> None:
    text, target = counting.batch(0, PEER, length, fragments, length)
    assert text.shape == target.shape == (fragments, length)
    assert int(text.max()) < counting.vocab and int(target.min()) >= NO_TARGET


def test_too_little_text_for_the_fragments(counting: TokenData) -> None:
    with pytest.raises(Refused, match="has 3001 tokens, too few for a fragment of 3001: use shorter fragments or more text."):
        counting.batch(0, PEER, 0, 1, counting.train_tokens)
    with pytest.raises(Refused, match="The held-out part has 0 tokens") as refused:
        counting.evaluation_batches(1, 8, 1)
    assert refused.value.code == "small-data"


def test_a_hundred_gigabytes_open_and_are_read_everywhere(tmp_path: Path) -> None:
    """Files with holes: they have the size and take no room."""
    tokens, shard_tokens, last_id = 50_000_000_000, limits.SHARD_BYTES // 2, 77
    shards = -(-tokens // shard_tokens)
    train = SplitRecord(tokens, tokens, 0, shard_tokens, ["0" * 64] * shards, "0" * 64)
    test = SplitRecord(0, 0, 0, shard_tokens, [], "0" * 64)
    manifest = DataManifest(1, ByteTokenizer().record, train, test, "0" * 64)
    for file in manifest.files():
        with (tmp_path / file.name).open("wb") as stream:
            try:
                stream.truncate(file.size)
            except OSError as error:
                pytest.skip(f"this file system has no files with holes: {error}")
    with (tmp_path / manifest.files()[shards].name).open("r+b") as stream:
        stream.seek(-2, 2)
        stream.write(last_id.to_bytes(2, "little"))
    data = TokenData(tmp_path, manifest)
    text, target = data.batch(1, PEER, 0, 16, 128)
    assert not text[:, 1:].any() and not target[:, 1:].any()
    ids = np.empty(129, np.int64)
    data._streams["train"].read(tokens - 129, ids)
    assert ids[-1] == last_id and not ids[:-1].any()


def test_open_checks_sizes(tmp_path: Path) -> None:
    data = make_counting_data(tmp_path)
    shard = data.directory / "train-00003.tokens"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(Refused, match=r"train-00003.tokens has 98 bytes, not 100: import the text again"):
        TokenData.open(data.directory)
    shard.unlink()
    with pytest.raises(Refused, match=r"train-00003.tokens is missing"):
        TokenData.open(data.directory)
    shard.write_bytes(content)
    (data.directory / "unigrams.counts").write_bytes(b"\xff" * 258 * 8)
    with pytest.raises(Refused, match="is not 258 counts"):
        TokenData.open(data.directory)
    with pytest.raises(Refused, match="No token data in"):
        TokenData.open(tmp_path / "nowhere")


def test_counts_and_names(demo: TokenData) -> None:
    assert demo.vocab == 258 and demo.doc_start_token == 257
    assert demo.unigram_counts.dtype == np.int64 and demo.unigram_counts.sum() == demo.train_tokens
    assert demo.tokenizer().hash == demo.manifest.tokenizer.hash
    assert demo.test_tokens > 50_000 and len(demo.hash) == 64
