"""Manifests and files that come from strangers: strict, bounded, and nothing that they say becomes a path."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3

from tscale_fed.data import limits
from tscale_fed.data.assemble import assemble, missing_files, verify_directory
from tscale_fed.data.byte_tokenizer import ByteTokenizer
from tscale_fed.data.gpt2 import load_gpt2
from tscale_fed.data.importer import import_text
from tscale_fed.data.manifest import DataManifest, DataRecipe, read_manifest
from tscale_fed.data.serving import DataServer
from tscale_fed.data.token_data import TokenData
from tscale_net.errors import Refused


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {number} {"x" * 50}"}}\n' for number in range(50)))
    import_text([tmp_path / "a.jsonl"], ByteTokenizer(), tmp_path / "seed", 0.1, shard_bytes=2000)
    return tmp_path / "seed"


def fetch_all(made: Path, recipe: DataRecipe, folder: Path) -> dict[str, Path]:
    """As a joiner does, through the blobs that the seed serves."""
    folder.mkdir()
    server = DataServer(made, recipe)
    for file in recipe.files():
        blob = server.blob(file.blob)
        assert blob is not None and blob.size == file.size
        parts = [blob.read(offset, 700) for offset in range(0, blob.size, 700)]
        (folder / file.name).write_bytes(b"".join(parts))
    return {file.name: folder / file.name for file in recipe.files()}


def test_a_joiner_has_the_same_data(made: Path, tmp_path: Path) -> None:
    recipe = DataRecipe(read_manifest(made), served=True)
    travelled = DataRecipe.from_plain(msgspec.json.decode(msgspec.json.encode(recipe.to_plain())))
    assert travelled == recipe
    fetched = fetch_all(made, travelled, tmp_path / "fetched")
    assert assemble(tmp_path / "joiner", travelled.data, fetched) == recipe.data
    seed, joiner = TokenData.open(made), TokenData.open(tmp_path / "joiner")
    assert joiner.hash == seed.hash
    assert all((a == b).all() for a, b in zip(seed.batch(1, "p", 2, 4, 32), joiner.batch(1, "p", 2, 4, 32), strict=True))
    assert assemble(tmp_path / "joiner", travelled.data, {}) == recipe.data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "fetched", "joiner", "seed"]


def test_a_broken_off_fetch_goes_on(made: Path, tmp_path: Path) -> None:
    recipe = DataRecipe(read_manifest(made), served=True)
    fetched = fetch_all(made, recipe, tmp_path / "fetched")
    assert missing_files(tmp_path / "fetched", recipe.files()) == []
    fetched["train-00001.tokens"].unlink()
    fetched["test.starts"].write_bytes(b"half")
    assert [file.name for file in missing_files(tmp_path / "fetched", recipe.files())] == ["train-00001.tokens", "test.starts"]
    with pytest.raises(Refused, match="train-00001.tokens is missing or does not have the content"):
        assemble(tmp_path / "joiner", recipe.data, fetched)
    for file in missing_files(tmp_path / "fetched", recipe.files()):
        shutil.copy(made / file.name, tmp_path / "fetched")
    assemble(tmp_path / "joiner", recipe.data, fetched)
    assert not any((tmp_path / "fetched").iterdir())


def test_without_served_shards_only_vocabulary_files_travel(made: Path) -> None:
    recipe = DataRecipe(read_manifest(made), served=False)
    assert [file.name for file in recipe.files()] == ["unigrams.counts"]
    server = DataServer(made, recipe)
    shard = recipe.data.files()[1]
    assert server.blob(shard.blob) is None


@pytest.mark.parametrize("name", ["", "data/", "data/../manifest.json", "../seed/import.json", "manifest.json", "data/" + "0" * 64])
def test_nothing_else_is_served(made: Path, name: str) -> None:
    assert DataServer(made, DataRecipe(read_manifest(made), served=True)).blob(name) is None


def test_serving_what_is_gone_is_refused_at_once(made: Path) -> None:
    recipe = DataRecipe(read_manifest(made), served=True)
    (made / "test.starts").unlink()
    with pytest.raises(Refused, match=r"test.starts is missing or has changed"):
        DataServer(made, recipe)


def test_own_text_needs_the_runs_tokenizer(made: Path, tmp_path: Path) -> None:
    recipe = DataRecipe(read_manifest(made), served=False)
    recipe.check_own_data(recipe.data)
    (tmp_path / "b.txt").write_text("text\n" * 1000)
    import_text([tmp_path / "b.txt"], ByteTokenizer(), tmp_path / "alike")
    counts = made / recipe.data.vocabulary_files()[0].name
    alike = TokenData.open(tmp_path / "alike", unigrams=counts)
    assert (alike.unigram_counts == TokenData.open(made).unigram_counts).all() and alike.hash != recipe.data.hash
    own = import_text([tmp_path / "b.txt"], load_gpt2(), tmp_path / "own")
    with pytest.raises(Refused, match="the run uses bytes") as refused:
        recipe.check_own_data(own)
    assert refused.value.code == "wrong-tokenizer"


def put(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(plain: dict[str, Any]) -> None:
        inner: Any = plain
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "path for a hash": put("data", "train", "shards", 0, value="../" * 20 + "etc"),
    "hash with a newline": put("data", "unigrams", value="a" * 63 + "\n"),
    "short hash": put("data", "unigrams", value="ab"),
    "unknown field": put("data", "train", "name", value="../../x"),
    "unknown top field": put("path", value="/etc"),
    "negative tokens": put("data", "train", "tokens", value=-1),
    "tokens beyond the cap": put("data", "train", "tokens", value=limits.MAX_SPLIT_TOKENS + 1),
    "more shards than tokens": put("data", "train", "shards", value=["0" * 64] * 3000),
    "empty shards": put("data", "train", "shard_tokens", value=0),
    "huge vocabulary": put("data", "tokenizer", "vocab", value=1 << 30),
    "special token outside": put("data", "tokenizer", "doc_start", value=5000),
    "special tokens equal": put("data", "tokenizer", "doc_start", value=256),
    "unknown kind": put("data", "tokenizer", "kind", value="pickle"),
    "file without size": put("data", "tokenizer", "kind", value="file"),
    "huge tokenizer file": put("data", "tokenizer", "file_bytes", value=1 << 40),
    "text for a number": put("data", "train", "tokens", value="12"),
    "another version": put("data", "version", value=2),
    "more documents than tokens": put("data", "train", "documents", value=1 << 30),
    "nothing for served": put("served", value=None),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(made: Path, lie: str) -> None:
    plain = copy.deepcopy(DataRecipe(read_manifest(made), served=True).to_plain())
    LIES[lie](plain)
    with pytest.raises(Refused, match="data section is malformed") as refused:
        DataRecipe.from_plain(plain)
    assert refused.value.code == "bad-data-recipe"


@pytest.mark.parametrize("plain", [None, [], "x", 3, {}, {"data": {}, "served": True}])
def test_not_even_a_recipe(plain: object) -> None:
    with pytest.raises(Refused, match="data section is malformed"):
        DataRecipe.from_plain(plain)


def test_names_are_derived(made: Path) -> None:
    for file in read_manifest(made).files():
        assert re.fullmatch(r"(train|test)-\d{5}\.tokens|(train|test)\.starts|unigrams\.counts|tokenizer\.json", file.name)


def falsify(made: Path, name: str, content: bytes) -> DataManifest:
    """Replace a file and its hash in the manifest: what a hostile creator of a run can do."""
    (made / name).write_bytes(content)
    text = (made / "manifest.json").read_text()
    old = next(file for file in read_manifest(made).files() if file.name == name)
    (made / "manifest.json").write_text(text.replace(old.hash, blake3(content).hexdigest()))
    return read_manifest(made)


def falsified(made: Path, name: str, dtype: str, change: Callable[[np.ndarray], None]) -> DataManifest:
    values = np.fromfile(made / name, dtype)
    change(values)
    return falsify(made, name, values.tobytes())


@pytest.mark.parametrize(
    ("name", "dtype", "index", "value", "words"),
    [
        ("train-00001.tokens", "<u2", 7, 258, "token ids outside the vocabulary of 258"),
        ("test-00000.tokens", "<u2", -1, 65535, "token ids outside the vocabulary of 258"),
        ("train-00001.tokens", "<u2", 7, 1, "does not count the training tokens"),
        ("unigrams.counts", "<i8", 9, -5, "does not count the training tokens"),
        ("train.starts", "<u8", 3, 1, "does not ascend"),
        ("train.starts", "<u8", -1, 1 << 60, "behind the last token"),
        ("test.starts", "<u8", 0, 1, "start no document"),
    ],
)
def test_content_that_would_hurt_is_refused(made: Path, tmp_path: Path, name: str, dtype: str, index: int, value: int, words: str) -> None:
    def change(values: np.ndarray) -> None:
        values[index] = value

    manifest = falsified(made, name, dtype, change)
    with pytest.raises(Refused, match=words) as refused:
        verify_directory(made)
    assert refused.value.code == "bad-data"
    fetched = fetch_all(made, DataRecipe(manifest, served=True), tmp_path / "fetched")
    with pytest.raises(Refused, match=words):
        assemble(tmp_path / "joiner", manifest, fetched)
    assert not (tmp_path / "joiner").exists()


def test_a_flipped_bit_is_found(made: Path) -> None:
    content = bytearray((made / "test-00000.tokens").read_bytes())
    content[10] ^= 1
    (made / "test-00000.tokens").write_bytes(content)
    with pytest.raises(Refused, match=r"test-00000.tokens is missing or damaged"):
        verify_directory(made)


def test_assembling_leaves_other_things_alone(made: Path, tmp_path: Path) -> None:
    manifest = read_manifest(made)
    (tmp_path / "joiner").mkdir()
    (tmp_path / "joiner" / "thesis.doc").write_text("precious")
    with pytest.raises(Refused, match="holds other data"):
        assemble(tmp_path / "joiner", manifest, {})
    # Data that was assembled is not an import's own: importing over a long download is refused too.
    recipe = DataRecipe(manifest, served=True)
    assemble(tmp_path / "other", manifest, fetch_all(made, recipe, tmp_path / "fetched"))
    with pytest.raises(Refused, match="was not made by an import"):
        import_text([tmp_path / "a.jsonl"], ByteTokenizer(), tmp_path / "other")


def test_no_held_out_part_travels_as_well(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n" * 100)
    manifest = import_text([tmp_path / "a.txt"], ByteTokenizer(), tmp_path / "seed", 0.0)
    fetched = {file.name: tmp_path / "seed" / file.name for file in manifest.files() if file.size}
    assemble(tmp_path / "joiner", manifest, fetched)
    assert TokenData.open(tmp_path / "joiner").test_tokens == 0


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"version": 1}'])
def test_damaged_manifest_file(made: Path, content: bytes) -> None:
    (made / "manifest.json").write_bytes(content)
    with pytest.raises(Refused, match=r"manifest.json is damaged") as refused:
        TokenData.open(made)
    assert refused.value.code == "bad-data"


def test_missing_and_oversized_manifest(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_MANIFEST_BYTES", 10)
    with pytest.raises(Refused, match="larger than"):
        read_manifest(made)
    shutil.rmtree(made)
    with pytest.raises(Refused, match="No token data in .*: make it with") as refused:
        read_manifest(made)
    assert refused.value.code == "no-data"
