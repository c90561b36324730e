"""Conformance: the original's golden file, files of a second implementation, changed files that must fail, broken files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden_cases import print_golden

from tscale_fed.conform import ONE_STEP_LIMIT, PREDICTION_LIMIT, check, report_lines
from tscale_fed.golden import BadGoldenFile, drop_config, read_golden

Arrays = dict[str, np.ndarray]
GOLDEN = Path(__file__).parent.parent / "golden" / "forward_and_step.npz"
SMALL = "e128h1d1w8"


def saved(tmp_path: Path, arrays: Arrays) -> Path:
    path = tmp_path / "golden.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def original() -> Arrays:
    with np.load(GOLDEN) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(scope="module")
def small() -> Arrays:
    return print_golden(SMALL, steps=1, config="drop0.8ch1lr0.02slow2reg50")


def with_meta(arrays: Arrays, **changes: object) -> Arrays:
    return arrays | {"meta": np.array(json.dumps(json.loads(str(arrays["meta"])) | changes))}


def test_equal_to_the_originals_reference() -> None:
    outcome = check(read_golden(GOLDEN))
    assert outcome.prediction_error <= PREDICTION_LIMIT
    for matrix in outcome.matrices:
        assert matrix.packed <= ONE_STEP_LIMIT, matrix
        assert matrix.unpacked <= 1e-2, matrix
    assert outcome.passed and len(outcome.matrices) == 30
    assert list(report_lines(outcome))[-1] == "conforms"


@pytest.mark.parametrize(
    ("dims", "steps", "config", "late", "tail"),
    [
        ("e256h2d4relu2w16", 1, "drop0.8ch1lr0.02slow2reg50", False, 0.0),
        ("e128h3d2relu3w8", 1, "drop0.8lr0.02slow2reg50", False, 0.0),
        ("e128h1d4w8", 3, "drop0.8ch1lr0.02slow2reg50tail5", False, 5.0),
        ("e128h1d4w8", 3, "drop0.8ch1lr0.02slow2reg50tail5", True, 5.0),
    ],
)
def test_equal_to_a_second_implementation(tmp_path: Path, dims: str, steps: int, config: str, late: bool, tail: float) -> None:
    outcome = check(read_golden(saved(tmp_path, print_golden(dims, steps=steps, config=config, late=late, tail=tail, max_iters=4))))
    assert outcome.passed, list(report_lines(outcome))
    assert outcome.embedding_seen == ("after the last step" if late else "at once")
    text = "\n".join(report_lines(outcome))
    assert ("reported only" in text) == (steps > 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {"text": np.flip(a["text"], 1).copy()},
        lambda a: a | {"target": np.roll(a["target"], 1, 1)},
        lambda a: a | {"train_sign": -a["train_sign"]},
        lambda a: a | {"bias": a["bias"] * 1.01},
        lambda a: a | {"pred": a["pred"] + 5e-5},
        lambda a: a | {"pred": np.full_like(a["pred"], np.nan)},
        lambda a: a | {"after/layers.0.key": a["after/layers.0.query"]},
        lambda a: a | {"after/layers.0.key": a["after/layers.0.key"] * 1.0003},
        lambda a: a | {"after/final": a["init/final"]},
        lambda a: with_meta(a, drop_config="drop0.8ch1lr0.02slow2"),
        lambda a: with_meta(a, drop_config="drop0.8ch1lr0.0201slow2reg50"),
        lambda a: with_meta(a, doc_start_token=None),
    ],
)
def test_a_changed_file_does_not_conform(tmp_path: Path, small: Arrays, change: Callable[[Arrays], Arrays]) -> None:
    assert check(read_golden(saved(tmp_path, small))).passed
    outcome = check(read_golden(saved(tmp_path, change(small))))
    assert not outcome.passed
    assert "does NOT conform" in list(report_lines(outcome))[-1]


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {name: a[name].reshape(-1) for name in ("text", "target", "pred", "bias")},
        lambda a: a | {name: np.stack([a[name]]) for name in ("text", "target", "pred")},
        lambda a: a | {"train_label": a["train_label"][0], "train_sign": a["train_sign"].astype(np.float64)},
        lambda a: a | {"text": a["text"].astype(np.uint16), "meta": np.frombuffer(str(a["meta"]).encode(), np.uint8)},
        lambda a: with_meta(a, max_iters=1, channels="ignored"),
    ],
)
def test_other_forms_of_the_same_contents_are_taken(tmp_path: Path, small: Arrays, change: Callable[[Arrays], Arrays]) -> None:
    assert check(read_golden(saved(tmp_path, change(small)))).passed


def test_each_step_may_have_its_own_batch(tmp_path: Path) -> None:
    arrays = print_golden(SMALL, steps=2, config="drop0.8ch1lr0.02slow2reg50")
    arrays |= {name: np.stack([arrays[name]] * 2) for name in ("text", "target")}
    assert check(read_golden(saved(tmp_path, arrays))).passed
    arrays["pred"] = np.stack([arrays["pred"]] * 2)
    assert check(read_golden(saved(tmp_path, arrays))).passed


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "text"}, "'text' is missing"),
        (lambda a: {k: v for k, v in a.items() if k != "after/final"}, "'after/final' is missing"),
        (lambda a: a | {"init/final": a["init/final"][:-1]}, "init/final"),
        (lambda a: a | {"init/layers.9.key": a["init/final"]}, "layers.9.key"),
        (lambda a: a | {"init/embedding": a["init/embedding"][1:]}, "embedding has"),
        (lambda a: a | {"init/final": a["init/final"] * np.nan}, "not finite"),
        (lambda a: a | {"train_label": a["train_label"] + 1000}, "'train_label' holds"),
        (lambda a: a | {"train_label": a["train_label"][:, :-1]}, "whole fragments"),
        (lambda a: a | {"train_sign": a["train_sign"][..., :-1]}, "'train_sign' is"),
        (lambda a: a | {"text": a["text"] * 1.0}, "whole numbers"),
        (lambda a: a | {"pred": a["pred"][..., :-1]}, "'pred' is"),
        (lambda a: a | {"bias": np.array(["x"] * 19)}, "'bias' is"),
        (lambda a: a | {"meta": np.array("{")}, "'meta' is not JSON"),
        (lambda a: a | {"meta": np.array("[1]")}, "not a JSON object"),
        (lambda a: a | {"meta": np.array('{"steps": 1}')}, "'meta' lacks"),
        (lambda a: with_meta(a, steps=0), "steps = 0"),
        (lambda a: with_meta(a, steps=3), "whole fragments"),
        (lambda a: with_meta(a, model_dims="e128tt3"), "'tt'"),
        (lambda a: with_meta(a, drop_config="drop0.9ch0.9"), "channel drop"),
        (lambda a: with_meta(a, drop_config="speed3"), "'speed3'"),
        (lambda a: with_meta(a, drop_config="lr0"), "rate"),
        (lambda a: with_meta(a, drop_config="reg0"), "reg0"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(
    tmp_path: Path, small: Arrays, change: Callable[[Arrays], Arrays], word: str
) -> None:
    path = saved(tmp_path, change(small))
    with pytest.raises(BadGoldenFile) as refused:
        read_golden(path)
    assert word in refused.value.detail and str(path) in refused.value.detail and "\n" not in refused.value.detail


@pytest.mark.parametrize("content", ["text", "cut", "pickle", "array", "empty"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str, small: Arrays) -> None:
    path = tmp_path / "file.npz"
    if content == "text":
        path.write_text("hello, this is no archive")
    elif content == "cut":
        path.write_bytes(saved(tmp_path, small).read_bytes()[:5000])
    elif content == "pickle":
        with path.open("wb") as file:
            np.savez(file, text=np.array([{"a": 1}], dtype=object))
    elif content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.touch()
    with pytest.raises(BadGoldenFile):
        read_golden(path)


def test_a_missing_file_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        read_golden(Path("no-such-file.npz"))


def test_drop_config_letters() -> None:
    settings = drop_config("drop0.9ch1lr0.02slow2reg200tail5")
    assert (settings.rate, settings.warmup_batches, settings.l2, settings.tail) == (0.02, 2, 1 / 200, 5.0)
    assert drop_config("drop1ch1") == drop_config("") and drop_config("").warmup_batches == 1000
