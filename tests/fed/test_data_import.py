"""Import: what lies on the disk afterwards, and what happens when something is in the way."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tscale_fed.data import limits
from tscale_fed.data.byte_tokenizer import DOC_START, ByteTokenizer
from tscale_fed.data.gpt2 import load_gpt2
from tscale_fed.data.importer import import_text
from tscale_fed.data.manifest import DataManifest, Split, read_manifest
from tscale_fed.data.shards import HashedFile
from tscale_fed.data.tokenizer import load_tokenizer
from tscale_net.errors import Refused

BYTES = ByteTokenizer()
SMALL_SHARD_BYTES = 2000


class TickingClock:
    """One second passes at each look."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        self.seconds += 1.0
        return self.seconds

    def wall(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def write_documents(path: Path, count: int = 60, size: int = 100) -> list[bytes]:
    """A jsonl file of documents, each made of one letter pair so that it can be recognised."""
    texts = [f"{number:03d}{chr(65 + number % 26)}" * (size // 4) for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [text.encode() for text in texts]


def split_ids(directory: Path, split: Split) -> np.ndarray:
    names = sorted(directory.glob(f"{split}-*.tokens"))
    return np.concatenate([np.fromfile(name, "<u2") for name in names]) if names else np.zeros(0, "<u2")


def split_documents(directory: Path, split: Split) -> list[bytes]:
    """What stands between document starts, by the starts file."""
    ids, starts = split_ids(directory, split), np.fromfile(directory / f"{split}.starts", "<u8").astype(int)
    assert (ids[starts] == DOC_START).all()
    return [BYTES.decode(part) for part in np.split(ids, starts)[1:]]


def test_documents_are_held_out_whole_and_none_is_lost(tmp_path: Path) -> None:
    texts = write_documents(tmp_path / "a.jsonl")
    manifest = import_text([tmp_path / "a.jsonl"], BYTES, tmp_path / "out", 0.1, shard_bytes=SMALL_SHARD_BYTES)
    train, test = split_documents(tmp_path / "out", "train"), split_documents(tmp_path / "out", "test")
    assert sorted(train + test) == sorted(texts)
    assert len(test) == 6 == manifest.test.documents
    assert [text for text in texts if text in train] == train
    assert manifest.train.text_bytes == sum(map(len, train)) and manifest.train.tokens == manifest.train.text_bytes + len(train)
    assert len(manifest.train.shards) == -(-manifest.train.tokens * 2 // SMALL_SHARD_BYTES) > 3


def test_one_big_file_is_held_out_from_all_over(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number} says something of its own, and says it at some length.\n\n" for number in range(4000)]
    (tmp_path / "book.txt").write_text("".join(paragraphs))
    import_text([tmp_path / "book.txt"], BYTES, tmp_path / "out", 0.05)
    runs = split_documents(tmp_path / "out", "test")
    total = sum(map(len, paragraphs))
    assert sum(map(len, runs)) == pytest.approx(0.05 * total, rel=0.1)
    places = ["".join(paragraphs).encode().index(run) / total for run in runs]
    assert len(places) > 8 and min(places) < 0.1 and max(places) > 0.85
    # A run of training text ends where a piece was held out, nowhere else.
    assert len(split_documents(tmp_path / "out", "train")) == len(runs) + 1


def test_unigram_counts_are_those_of_the_training_part(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl")
    import_text([tmp_path / "a.jsonl"], BYTES, tmp_path / "out", 0.1)
    counts = np.fromfile(tmp_path / "out" / "unigrams.counts", "<i8")
    np.testing.assert_array_equal(counts, np.bincount(split_ids(tmp_path / "out", "train"), minlength=BYTES.vocab))


def test_test_text_does_not_depend_on_the_tokenizer(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl")
    by_bytes = import_text([tmp_path / "a.jsonl"], BYTES, tmp_path / "b", 0.1)
    by_bpe = import_text([tmp_path / "a.jsonl"], load_gpt2(), tmp_path / "g", 0.1)
    assert by_bytes.test.text_bytes == by_bpe.test.text_bytes
    assert BYTES.decode(split_ids(tmp_path / "b", "test")) == load_gpt2().decode(split_ids(tmp_path / "g", "test"))


def test_same_inputs_give_the_same_content(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write_documents(tmp_path / place / "a.jsonl")
        (tmp_path / place / "b.txt").write_text("more text\n" * 500)
        (tmp_path / place / "empty.txt").touch()
    first = import_text([tmp_path / "here"], BYTES, tmp_path / "one")
    second = import_text([tmp_path / "there"], BYTES, tmp_path / "two")
    assert first == second and first.hash == second.hash
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()
    assert str(tmp_path) not in (tmp_path / "one" / "import.json").read_text()


@settings(max_examples=25, deadline=None)
@given(block=st.integers(2, 5000), batch=st.integers(1, 5000))
def test_content_does_not_depend_on_how_it_was_read(tmp_path_factory: pytest.TempPathFactory, block: int, batch: int) -> None:
    folder = tmp_path_factory.mktemp("read")
    (folder / "a.txt").write_text("".join(f"line {number}\n\n" for number in range(2000)))
    usual = import_text([folder / "a.txt"], BYTES, folder / "usual", shard_bytes=SMALL_SHARD_BYTES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "READ_BLOCK_BYTES", block)
        patch.setattr(limits, "ENCODE_BATCH_BYTES", batch)
        assert import_text([folder / "a.txt"], BYTES, folder / "other", shard_bytes=SMALL_SHARD_BYTES) == usual


def test_an_intact_import_is_reused(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl")
    manifest = import_text([tmp_path / "a.jsonl"], BYTES, tmp_path / "out")
    shard = tmp_path / "out" / "train-00000.tokens"
    inode = shard.stat().st_ino
    assert import_text([tmp_path / "a.jsonl"], BYTES, tmp_path / "out") == manifest
    assert shard.stat().st_ino == inode


def test_a_damaged_import_is_made_again(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl")
    manifest = import_text([tmp_path / "a.jsonl"], BYTES, tmp_path / "out")
    shard = tmp_path / "out" / "train-00000.tokens"
    good = shard.read_bytes()
    shard.write_bytes(b"\0" * len(good))
    assert import_text([tmp_path / "a.jsonl"], BYTES, tmp_path / "out") == manifest
    assert shard.read_bytes() == good


@pytest.mark.parametrize("change", ["source", "held_out", "tokenizer"])
def test_another_import_replaces_its_own(tmp_path: Path, change: str) -> None:
    write_documents(tmp_path / "a.jsonl")
    before = import_text([tmp_path / "a.jsonl"], BYTES, tmp_path / "out", 0.1)
    if change == "source":  # same size, same name
        (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("000A", "000B"))
    tokenizer = load_gpt2() if change == "tokenizer" else BYTES
    after = import_text([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", 0.2 if change == "held_out" else 0.1)
    assert after.hash != before.hash
    assert read_manifest(tmp_path / "out") == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("text\n" * 1000)
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    precious = out / "thesis.doc" if kind == "folder" else out
    precious.write_text("precious")
    with pytest.raises(Refused, match="was not made by an import") as refused:
        import_text([tmp_path / "a.txt"], BYTES, out)
    assert refused.value.code == "data-exists"
    assert precious.read_text() == "precious"


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n" * 1000)
    (tmp_path / "out").mkdir()
    assert import_text([tmp_path / "a.txt"], BYTES, tmp_path / "out") == read_manifest(tmp_path / "out")


TROUBLES = [(errno.ENOSPC, "disk-full", "is full"), (errno.EROFS, "unwritable", "cannot be written")]


@pytest.mark.parametrize(("number", "code", "words"), TROUBLES)
def test_disk_trouble_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str, words: str) -> None:
    def fail(_file: HashedFile, _data: object) -> None:
        raise OSError(number, "trouble")

    (tmp_path / "a.txt").write_text("text\n" * 1000)
    monkeypatch.setattr(HashedFile, "write", fail)
    with pytest.raises(Refused) as refused:
        import_text([tmp_path / "a.txt"], BYTES, tmp_path / "out")
    assert refused.value.code == code and words in refused.value.detail
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_interrupted_import_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(_done: int, _total: int, _rate: float) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("text\n" * 1000)
    with pytest.raises(KeyboardInterrupt):
        import_text([tmp_path / "a.txt"], BYTES, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_bad_line_leaves_the_earlier_import(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl")
    manifest = import_text([tmp_path / "a.jsonl"], BYTES, tmp_path / "out")
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write("{oops\n")
    with pytest.raises(Refused, match="line 61 is not valid JSON"):
        import_text([tmp_path / "a.jsonl"], BYTES, tmp_path / "out")
    assert read_manifest(tmp_path / "out") == manifest


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(Refused, match="hold 5 bytes: too little to hold a part out"):
        import_text([tmp_path / "a.txt"], BYTES, tmp_path / "out")
    manifest = import_text([tmp_path / "a.txt"], BYTES, tmp_path / "out", 0.0)
    assert (manifest.train.tokens, manifest.test.tokens, manifest.test.shards) == (6, 0, [])


@pytest.mark.parametrize("fraction", [-0.1, 0.6, 5.0, float("nan")])
def test_absurd_held_out_fraction(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(Refused, match="must lie between 0 and 0.5"):
        import_text([tmp_path], BYTES, tmp_path / "out", fraction)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    gpt2 = load_gpt2()
    (tmp_path / "latin.txt").write_bytes("déjà vu à gogo ".encode("latin-1") * 300)
    with pytest.raises(Refused, match=r"latin.txt is not text in UTF-8: convert it"):
        import_text([tmp_path / "latin.txt"], gpt2, tmp_path / "out")
    import_text([tmp_path / "latin.txt"], BYTES, tmp_path / "out")
    (tmp_path / "one_slip.txt").write_bytes(b"a long and honest text \xff " * 3 + b"and so on and on \xef\xbf\xbd" * 500)
    import_text([tmp_path / "one_slip.txt"], gpt2, tmp_path / "slip")


def test_progress_counts_up_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BLOCK_BYTES", 1000)
    (tmp_path / "a.txt").write_text("text\n" * 1000)
    reports: list[tuple[int, int, float]] = []
    import_text([tmp_path / "a.txt"], BYTES, tmp_path / "out", progress=lambda *report: reports.append(report), clock=TickingClock())
    assert [done for done, _, _ in reports] == [1000, 2000, 3000, 4000, 5000, 5000]
    assert {total for _, total, _ in reports} == {5000}
    assert all(rate > 0 for _, _, rate in reports)


def test_tokenizer_file_is_part_of_the_data(tmp_path: Path) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"text": 0, "[UNK]": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("text\n" * 1000)
    manifest: DataManifest = import_text([tmp_path / "a.txt"], load_tokenizer(tmp_path / "words.json"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    assert "tokenizer.json" in [file.name for file in manifest.files()]
