"""Run files: what is read, and the sentence for everything that can be wrong in one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tscale_fed.config import DEMO_SOURCE, Recipe, RunConfig, load_config, parse_config
from tscale_fed.data import sources
from tscale_net.errors import Refused

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def refusal(text: str) -> str:
    with pytest.raises(Refused) as caught:
        parse_config(text, "run.toml")
    assert caught.value.code == "bad-config"
    sentence = caught.value.detail
    assert "\n" not in sentence
    return sentence


def test_an_empty_file_gives_the_defaults() -> None:
    assert parse_config("") == RunConfig()


def test_values_are_read_and_whole_numbers_serve_as_numbers() -> None:
    config = parse_config('[model]\ndims = "e256h2d8w256"\n[optimizer]\ntail = 5\n[batch]\nfragments = 4\naccumulate = 2\n')
    assert config.model.dims == "e256h2d8w256"
    assert config.optimizer.tail == 5.0
    assert (config.batch.fragments, config.batch.accumulate) == (4, 2)


def test_sources_and_tokenizer_files_are_relative_to_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[data]\nsources = ["text/a.txt", "builtin:demo", "/abs/b.txt"]\ntokenizer = "tok/tokenizer.json"\n')
    data = load_config(tmp_path / "run.toml").data
    assert data.sources == (str(tmp_path / "text/a.txt"), "builtin:demo", "/abs/b.txt")
    assert data.tokenizer == str(tmp_path / "tok/tokenizer.json")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[modle]\n", ["run.toml, line 1, modle", "unknown section", '"model"']),
        ("[model]\n\ndimms = 'e128'\n", ["run.toml, line 3, [model] dimms", "unknown key", '"dims"']),
        ("[batch]\nxyz = 1\n", ["[batch] xyz", "known keys here: fragments, length, accumulate"]),
        ("[batch]\nlength = 'long'\n", ["line 2, [batch] length", "must be a whole number, not a string"]),
        ("[batch]\nlength = 1\n", ["[batch] length", "must be >= 2"]),
        ("[model]\ntoken_drop = 1.5\n", ["[model] token_drop", "must be < 1.0"]),
        ("[model]\ndims = 5\n", ["[model] dims", "a string in quotes"]),
        ("[swarm]\ncodec = 'sing'\n", ["[swarm] codec", "'sing' is not known here", "sign"]),
        ("[swarm.codec_for]\n\nfinal = 'sing'\n", ["line 3, [swarm.codec_for] final", "'sing' is not known here"]),
        ("[swarm.codec_for]\nhead = 'exact'\n", ["line 2, [swarm.codec_for] head", "embedding"]),
        ("[swarm.codec_for]\nfinal = 3\n", ["[swarm] codec_for", "a string in quotes"]),
        ("[data]\nsources = 'a.txt'\n", ["[data] sources", "must be a list"]),
        ("[data]\nsources = []\n", ["[data] sources", "length >= 1"]),
        ("[data]\nsources = [1]\n", ["[data] sources", "a string in quotes"]),
        ("batch = 3\n", ["line 1, batch", "write [batch]"]),
        ("[batch\n", ["not valid TOML"]),
        ("[swarm]\nown_leak = 'one'\n", ["own_leak and momentum_keep belong together"]),
        ("[optimizer]\ntail = 0.5\n", ["[optimizer] tail", "at least 1"]),
        ("[optimizer]\nrate = nan\n", ["[optimizer] rate"]),
        ("[optimizer]\nrate = inf\n", ["[optimizer] rate"]),
    ],
)
def test_the_sentence_names_the_place_and_the_fix(text: str, parts: list[str]) -> None:
    sentence = refusal(text)
    for part in parts:
        assert part in sentence


def test_a_key_of_another_section_is_not_mistaken_for_the_line() -> None:
    assert "line 4, [batch] length" in refusal("[model]\n# length = 3\n[batch]\nlength = 'x'\n")


@pytest.mark.parametrize("make", ["missing", "folder", "binary"])
def test_unreadable_files_are_named(tmp_path: Path, make: str) -> None:
    path = tmp_path / "run.toml"
    if make == "folder":
        path.mkdir()
    if make == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="run.toml") as caught:
        load_config(path)
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_ready_made_runs_are_valid(path: Path) -> None:
    load_config(path)


def test_the_demo_run_trains_on_the_text_that_ships_with_the_package() -> None:
    assert DEMO_SOURCE == sources.DEMO
    assert "demo-cpu" in {path.stem for path in CONFIGS}


def test_the_recipe_survives_the_manifest() -> None:
    recipe = parse_config('[model]\ndims = "e256h2d8w256"\n[run]\nseed = 7\n').recipe()
    wire = msgspec.json.decode(msgspec.json.encode({**recipe.to_manifest(), "data": {"files": []}}))
    assert Recipe.from_manifest(wire) == recipe


@pytest.mark.parametrize("change", [{"seed": -1}, {"seed": "x"}, {"model": {"dims": 3}}, {"surprise": 1}, {"batch": {"fragments": 0}}])
def test_a_recipe_from_a_stranger_is_checked(change: dict) -> None:
    with pytest.raises(Refused) as caught:
        Recipe.from_manifest({**RunConfig().recipe().to_manifest(), **change})
    assert caught.value.code == "bad-manifest"


def test_sections_are_immutable() -> None:
    with pytest.raises(AttributeError):
        RunConfig().batch.length = 3  # type: ignore[misc]
