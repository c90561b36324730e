"""Decoding token by token gives what one forward pass gives; sampling, text pieces, batches; opening what training has left."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_run import make_data

from tscale_fed.cli import main
from tscale_fed.data.byte_tokenizer import ByteTokenizer
from tscale_fed.data.tokenizer import load_tokenizer
from tscale_fed.inference.batch import Batch, Piece
from tscale_fed.inference.decoder import Decoder
from tscale_fed.inference.generate import answer_all
from tscale_fed.inference.opened import open_model
from tscale_fed.inference.sampling import Draws, sample
from tscale_fed.inference.settings import Settings
from tscale_fed.inference.text import Piecer
from tscale_fed.inference.weights import DecodingWeights, Format, prepare_weights
from tscale_fed.model.forward import Model
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape
from tscale_net.errors import Refused

SHAPE = ModelShape.parse("e128h2d14w24", 258, 4)
"""Layers of width 1, 64 and 24; the byte tokenizer's vocabulary."""
CPU = torch.device("cpu")
DOC_START = 257


def flat_weights(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(SHAPE.trained_parameters, generator=generator), torch.randn(SHAPE.vocab, generator=generator)


FLAT, BIAS2 = flat_weights()
MODEL = Model(SHAPE, Parameters(SHAPE).load(FLAT), BIAS2)


def prepared(kind: Format = "float32") -> DecodingWeights:
    return prepare_weights(SHAPE, FLAT, BIAS2 * math.log(2.0), CPU, kind)


def some_text(seed: int, tokens: int) -> torch.Tensor:
    """With a document start here and there."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(256, (tokens,), generator=generator)
    return torch.where(torch.rand(tokens, generator=generator) < 0.02, DOC_START, text)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 90), min_size=1, max_size=4), slot=st.integers(0, 2))
def test_any_parts_give_the_logits_of_one_forward_pass(seed: int, cuts: list[int], slot: int) -> None:
    text = some_text(seed, sum(cuts) + 3)
    decoder = Decoder(prepared(), 3, DOC_START)
    parts = torch.split(text, [*cuts, 1, 1, 1])
    found = torch.cat([decoder.prefill(slot, part, every=True) for part in parts])
    torch.testing.assert_close(found, MODEL.logits(text[None], doc_start_token=DOC_START)[0], atol=2e-5, rtol=1e-5)


def test_sequences_that_come_and_go_do_not_touch_each_other() -> None:
    texts = [some_text(seed, 120) for seed in range(3)]
    wanted = [MODEL.logits(text[None], doc_start_token=DOC_START)[0] for text in texts]
    decoder = Decoder(prepared(), 3, DOC_START)
    for slot, (text, length) in enumerate(zip(texts, (100, 40, 70), strict=True)):
        decoder.prefill(slot, text[:length])
    found = decoder.step(torch.stack([texts[0][100], texts[1][40], texts[2][70]]))
    for row, want in zip(found, (wanted[0][100], wanted[1][40], wanted[2][70]), strict=True):
        torch.testing.assert_close(row, want, atol=2e-5, rtol=1e-5)
    decoder.cache.move(2, 0)
    found = decoder.step(torch.stack([texts[2][71], texts[1][41]]))
    torch.testing.assert_close(found, torch.stack([wanted[2][71], wanted[1][41]]), atol=2e-5, rtol=1e-5)
    decoder.prefill(2, texts[0][:30])  # the freed slot starts from nothing
    torch.testing.assert_close(decoder.prefill(2, texts[0][30:31])[0], wanted[0][30], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "limit"), [("bfloat16", 0.01), ("int8", 0.025)])
def test_narrow_weights_are_close(kind: Format, limit: float) -> None:
    text = some_text(5, 90)
    want = MODEL.logits(text[None], doc_start_token=DOC_START)[0]
    found = Decoder(prepared(kind), 1, DOC_START).prefill(0, text, every=True)
    assert (found - want).norm() < limit * want.norm()


# -- sampling ----------------------------------------------------------------------------------------------------------


def draws(seed: int = 0, **options: object) -> Draws:
    return Draws(Settings(**options), random.Random(seed))  # type: ignore[arg-type]


def test_tokens_come_as_often_as_their_probability() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.0, 0.2]]))
    each = draws()
    counts = Counter(int(sample(logits.clone(), [each])) for _ in range(4000))
    assert counts[2] == 0
    for token, part in ((0, 0.5), (1, 0.3), (3, 0.2)):
        assert abs(counts[token] / 4000 - part) < 5 * math.sqrt(part * (1 - part) / 4000)


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"temperature": 0.0}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.45}, {0}),
        ({"min_p": 0.5}, {0, 1}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_what_is_cut_off_never_comes(options: dict[str, object], possible: set[int]) -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.12, 0.08]]))
    each = draws(**options)
    assert {int(sample(logits.clone(), [each])) for _ in range(300)} == possible


def test_neighbours_do_not_change_what_is_drawn() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    alone = [int(sample(logits[:1].clone(), [each])) for each in [draws(7, top_k=20)] for _ in range(20)]
    mixed = [draws(7, top_k=20), draws(8, temperature=0.0), draws(9)]
    assert [int(sample(logits.clone(), mixed)[0]) for _ in range(20)] == alone


def test_penalties_lower_what_has_been_said() -> None:
    each = draws(temperature=0.0, frequency_penalty=1.0, presence_penalty=0.5)
    each.note(1)
    each.note(1)
    assert int(sample(torch.tensor([[1.0, 3.0, 0.0]]), [each])) == 0, "3 - 0.5 - 2 is below 1"
    repeated = Draws(Settings(temperature=0.0, repetition_penalty=4.0), random.Random(0), prompt=frozenset({1}))
    assert int(sample(torch.tensor([[1.0, 3.0, 0.0]]), [repeated])) == 0


def test_settings_that_cannot_be_are_named() -> None:
    for name, options in (("top_p", {"top_p": 0.0}), ("temperature", {"temperature": math.nan}), ("stop", {"stop": ("",)})):
        with pytest.raises(Refused, match=name):
            Settings(**options)  # type: ignore[arg-type]


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@settings(max_examples=25, deadline=None)
@given(text=st.text(max_size=40))
def test_pieces_join_to_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    piecer = Piecer(tokenizer, ())
    assert "".join([piecer.feed(token) for token in tokenizer.encode(text).tolist()]) + piecer.finish() == text


TOKENIZERS = {"bytes": ByteTokenizer(), "gpt2": load_tokenizer("gpt2")}


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab\n", max_size=30), stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_is_shown(text: str, stop: list[str]) -> None:
    piecer, shown = Piecer(TOKENIZERS["bytes"], stop), ""
    for byte in text.encode():
        shown += piecer.feed(byte)
        if piecer.stopped:
            break
    shown += piecer.finish()
    found = [(at + len(each), at) for each in stop if (at := text.find(each)) >= 0]
    # The one that is whole first ends the answer; of several that end there, the longest.
    assert piecer.stopped == bool(found)
    assert shown == (text[: min(found)[1]] if found else text)


def test_a_broken_character_waits_for_its_rest() -> None:
    piecer = Piecer(TOKENIZERS["bytes"], ())
    first, second = "é".encode()
    assert piecer.feed(first) == ""
    assert piecer.feed(second) == "é"
    piecer.feed(first)
    assert piecer.finish() == "\ufffd"


# -- batches -----------------------------------------------------------------------------------------------------------


def answers(slots: int, prompts: list[list[int]], options: list[Settings]) -> list[list[Piece]]:
    batch = Batch(Decoder(prepared(), slots, DOC_START), TOKENIZERS["bytes"], random.Random(0))
    found: list[list[Piece]] = [[] for _ in prompts]
    answer_all(batch, prompts, options, lambda number, piece: found[number].append(piece))
    return found


def test_an_answer_is_the_same_alone_and_among_others() -> None:
    prompts = [some_text(seed, 20 + 300 * (seed == 2)).tolist() for seed in range(5)]
    options = [Settings(new_tokens=5 + 4 * n, seed=n, temperature=0.9, top_k=40 * (n % 2), ignore_end=True) for n in range(5)]
    alone = [answers(1, [prompt], [each])[0] for prompt, each in zip(prompts, options, strict=True)]
    together = answers(3, prompts, options)
    assert ["".join(p.text for p in pieces) for pieces in together] == ["".join(p.text for p in pieces) for pieces in alone]
    assert [pieces[-1].made for pieces in together] == [5, 9, 13, 17, 21]
    assert all(pieces[-1].finish == "length" for pieces in together)


def test_log_probabilities_are_those_of_the_model() -> None:
    prompt = some_text(3, 30).tolist()
    pieces = answers(1, [prompt], [Settings(new_tokens=1, temperature=0.0, log_probabilities=3)])[0]
    (report,) = [report for piece in pieces for report in piece.reports]
    want = torch.log_softmax(MODEL.logits(torch.tensor([prompt]), doc_start_token=DOC_START)[0, -1], 0)
    assert report.log_probability == pytest.approx(float(want[report.token]), abs=1e-4)
    assert [token for token, _ in report.alternatives] == want.topk(3).indices.tolist()


def test_a_cancelled_answer_frees_its_slot() -> None:
    batch = Batch(Decoder(prepared(), 1, DOC_START), TOKENIZERS["bytes"], random.Random(0))
    pieces: list[Piece] = []
    first = batch.add([256, 1], Settings(new_tokens=1000, ignore_end=True), lambda piece: None)
    batch.add([256, 2], Settings(new_tokens=2, ignore_end=True), pieces.append)
    for _ in range(4):
        batch.step()
    assert batch.counts == (1, 1) and not pieces
    batch.cancel(first)
    while batch.busy:
        batch.step()
    assert pieces[-1].finish == "length" and first.made < 10


# -- what training has left --------------------------------------------------------------------------------------------

RUN = """
[run]
name = "small"
[model]
dims = "e128h1d2w16"
[data]
sources = ["{source}"]
tokenizer = "bytes"
held_out = 0.2
[batch]
fragments = 2
length = 16
[eval]
batches = 1
fragments = 2
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make_data(folder)
    (folder / "run.toml").write_text(RUN.format(source=folder / "text.txt"))
    assert main(["train", str(folder / "run.toml"), "--device", "cpu", "--home", str(folder / "home"), "--steps", "3"]) == 0
    return folder / "home"


def test_a_trained_model_goes_on_with_a_text(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "the peer of", "--tokens", "12", "--seed", "5", "--ignore-end", "--device", "cpu"]
    texts = []
    for place in (home, home / "alone" / "small", next((home / "alone" / "small" / "checkpoints").iterdir())):
        assert main(["generate", str(place), *words]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1 and len(texts[0]) > 1


def test_the_opened_model_is_the_trained_one(home: Path) -> None:
    opened = open_model(home)
    assert opened.step == 3 and opened.window == 1 and opened.tokenizer.name == "bytes"
    text = torch.tensor([[256, *b"the swarm of"]])
    want = Model(opened.shape, Parameters(opened.shape).load(opened.flat), opened.bias / math.log(2.0)).logits(text)[0]
    weights = prepare_weights(opened.shape, opened.flat, opened.bias, CPU, "float32")
    torch.testing.assert_close(Decoder(weights, 1, 257).prefill(0, text[0], every=True), want, atol=2e-5, rtol=1e-5)


def test_what_is_no_model_is_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = next((home / "alone" / "small" / "checkpoints").iterdir())
    cut = tmp_path / "checkpoints" / checkpoint.name
    cut.mkdir(parents=True)
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    (tmp_path / "data").symlink_to(home / "alone" / "small" / "data")
    for place, words in ((tmp_path / "nothing", "no such"), (tmp_path / "data", "holds no checkpoint"), (cut, "cut off")):
        assert main(["generate", str(place), "--prompt", "x"]) == 1
        assert words in capsys.readouterr().err
    assert main(["generate", str(home), "--prompt", "x", "--top-p", "0"]) == 1
    assert "top_p" in capsys.readouterr().err
