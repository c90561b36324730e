"""Every program with what users get wrong: one clear sentence on stderr, an exit code other than 0, nothing half-written."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from process_kit import ANY_PORT, LOOPBACK, PeerProcess, Swarm, free_port, write_run
from refusal_kit import Case, Outcome, check, run_all

from tscale_fed.assembly import prepare_data
from tscale_fed.config import load_config
from tscale_fed.data.importer import import_text
from tscale_fed.data.tokenizer import load_tokenizer
from tscale_fed.home import Home, make_private
from tscale_fed.home_run import remember_manifest
from tscale_fed.new_run import create_run
from tscale_net.address import parse
from tscale_net.address_book import AddressBook
from tscale_net.identity import Identity

STRANGER = Identity.from_seed(b"\x07" * 32)

ALONE = """config-missing config-garbage config-folder config-unknown-key config-bad-value config-no-text config-needs-seed
config-and-bootstrap home-is-a-file home-below-a-file home-open-to-others identity-garbage manifest-garbage no-run no-gpu listen-garbage
listen-foreign-address bootstrap-garbage bootstrap-unreachable bootstrap-unreachable-with-id disk-full-seed status-no-peer
train-config-missing data-source-missing data-folder-missing conform-file-missing""".split()
BESIDE_A_SEED = """port-in-use door-in-use bootstrap-wrong-id bootstrap-changed-id home-in-use other-config other-swarm-settings other-run
data-dir-missing data-dir-wrong-tokenizer disk-full-joiner""".split()


# -- nobody else runs ------------------------------------------------------------------------------------------------------


def alone(folder: Path) -> dict[str, Case]:
    def home(name: str) -> Path:
        return folder / f"home-{name}"

    def seed(name: str, config: Path, *says: str, untouched: bool = True, **options: int) -> Case:
        command = ["tscale-peer", "--role", "seed", "--config", str(config), "--listen", ANY_PORT]
        return Case(command, says, home(name), 1, untouched, **options)

    def peer(name: str, *flags: str, says: tuple[str, ...], code: int = 1, untouched: bool = False) -> Case:
        return Case(["tscale-peer", *flags], says, home(name), code, untouched)

    good = write_run(folder / "run")
    text = good.read_text()
    garbage, unknown, bad = folder / "garbage.toml", folder / "unknown.toml", folder / "bad.toml"
    garbage.write_bytes(b"\x00\xff\xfe garbage")
    unknown.write_text(text.replace("fragments = 2", "fragment = 2", 1))
    bad.write_text(text.replace("rate = 0.01", 'rate = "fast"'))
    no_text = write_run(folder / "empty")
    (folder / "empty" / "text.txt").unlink()
    home("file").write_text("not a folder")
    home("open").mkdir(mode=0o755)
    (home("open") / "something").write_text("x")
    for name, file in (("identity", "identity"), ("manifest", "manifest")):
        make_private(home(name))
        (home(name) / file).write_bytes(b"garbage")
        (home(name) / file).chmod(0o600)
    closed = f"{LOOPBACK}:{free_port()}"
    return {
        "config-missing": seed("a", folder / "nowhere.toml", "nowhere.toml: no such file", "configs/"),
        "config-garbage": seed("b", garbage, "garbage.toml", "TOML"),
        "config-folder": seed("c", folder, "is a folder"),
        "config-unknown-key": seed("d", unknown, "fragment", "fragments"),
        "config-bad-value": seed("e", bad, "[optimizer]", "rate"),
        "config-no-text": seed("f", no_text, "text.txt", untouched=False),
        "config-needs-seed": peer("g", "--config", str(good), says=("--role seed",), code=2, untouched=True),
        "config-and-bootstrap": seed("h", good, "--bootstrap", "--config", untouched=False),
        "home-is-a-file": peer("file", "--bootstrap", closed, says=("is not a directory", "--home")),
        "home-below-a-file": Case(["tscale-peer", "--bootstrap", closed], ("--home",), home("file") / "below"),
        "home-open-to-others": peer("open", "--bootstrap", closed, says=("other users may enter", "chmod 700")),
        "identity-garbage": peer("identity", "--bootstrap", closed, says=("identity",)),
        "manifest-garbage": Case(["tscale-peer", "--bootstrap", closed], ("is damaged", "--home"), None),
        "no-run": peer("i", "--listen", ANY_PORT, says=("no run yet", "--bootstrap", "--role seed --config")),
        "no-gpu": peer("j", "--device", "cuda", "--bootstrap", closed, says=("--device cuda", "leave --device out")),
        "listen-garbage": peer("k", "--listen", "nonsense", says=("HOST:PORT",), code=2, untouched=True),
        "listen-foreign-address": peer("l", "--listen", "192.0.2.1:7700", "--bootstrap", closed, says=("192.0.2.1", "0.0.0.0")),
        "bootstrap-garbage": peer("m", "--bootstrap", "/ip4/nonsense", says=("/ip4/nonsense",)),
        "bootstrap-unreachable": peer("n", "--bootstrap", closed, says=(closed, "connection refused", "Check that the peer runs")),
        "bootstrap-unreachable-with-id": peer("o", "--bootstrap", f"{STRANGER.peer_id}@{closed}", says=(closed, "connection refused")),
        "disk-full-seed": seed("p", good, "is full", "free some space", untouched=False, file_bytes=100_000),
        "status-no-peer": Case(["tscale-status", "--json"], ("no peer runs",), home("q"), 1, True),
        "train-config-missing": Case(["tscale", "train", f"{folder}/nowhere.toml"], ("nowhere.toml: no such file",), home("r"), 1, True),
        "data-source-missing": Case(["tscale", "data", "import", f"{folder}/nowhere.txt", "--out", f"{folder}/data"], ("nowhere.txt",)),
        "data-folder-missing": Case(["tscale", "data", "info", str(folder / "nowhere")], ("nowhere",)),
        "conform-file-missing": Case(["tscale", "model", "conform", str(folder / "nowhere.npz")], ("nowhere.npz",)),
    }


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Case], dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("refusals")
    cases = alone(folder)
    cases["config-and-bootstrap"] = _with(cases["config-and-bootstrap"], "--bootstrap", f"{LOOPBACK}:{free_port()}")
    cases["manifest-garbage"] = _with(cases["manifest-garbage"], "--home", str(folder / "home-manifest"))
    return cases, run_all(cases)


def _with(case: Case, *flags: str) -> Case:
    return Case([*case.command, *flags], case.says, case.home, case.code, case.untouched, case.file_bytes)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ALONE)
def test_refusals_of_a_peer_alone(lonely: tuple[dict[str, Case], dict[str, Outcome]], name: str) -> None:
    cases, outcomes = lonely
    assert sorted(cases) == sorted(ALONE)
    if name == "no-gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    check(cases[name], outcomes[name])


# -- beside a running seed -------------------------------------------------------------------------------------------------


def beside(seed: PeerProcess, folder: Path, config: Path) -> dict[str, Case]:
    address = parse(seed.address)
    host_port = f"{LOOPBACK}:{address.port}"

    def join(name: str, *flags: str, says: tuple[str, ...], bootstrap: str = host_port, file_bytes: int | None = None) -> Case:
        command = ["tscale-peer", "--bootstrap", bootstrap, "--listen", ANY_PORT, *flags]
        return Case(command, says, folder / f"home-{name}", file_bytes=file_bytes)

    def create(name: str, run_file: Path, port: int, *says: str) -> Case:
        return Case(["tscale-peer", "--role", "seed", "--config", str(run_file), "--listen", f"{LOOPBACK}:{port}"], says, folder / name)

    make_private(folder / "home-changed")
    AddressBook(Home(folder / "home-changed").known_peers).pin(host_port, STRANGER.peer_id, 1.0)
    other_config = write_run(folder / "other", seed=99)
    _make_home(folder / "home-other-run", other_config)
    for name in ("home-other-config", "home-other-swarm"):
        shutil.copytree(folder / "home-other-run", folder / name)
        (folder / name).chmod(0o700)
    wrong_tokens = folder / "wrong-tokens"
    import_text([config.parent / "text.txt"], load_tokenizer("gpt2"), wrong_tokens)
    return {
        "port-in-use": create("home-port", config, address.port, str(address.port), "--listen"),
        "door-in-use": create("home-door", config, address.port - 1, str(address.port), "--listen"),
        "bootstrap-wrong-id": join("id", says=(STRANGER.peer_id[-6:],), bootstrap=f"{STRANGER.peer_id}@{host_port}"),
        "bootstrap-changed-id": join("changed", says=("at first contact it was", "known_peers")),
        "home-in-use": Case(["tscale-peer", "--bootstrap", host_port], ("another peer (process", "tscale-status", "--home"), seed.home),
        "other-config": create("home-other-config", config, free_port(), "[run] seed", "use another --home"),
        "other-swarm-settings": create(
            "home-other-swarm", _changed(other_config, "publish_every_steps = 3", "publish_every_steps = 4"), free_port(),
            "[swarm] publish_every_steps", "use another --home",
        ),
        "other-run": join("other-run", says=("belongs to run", "--home")),
        "data-dir-missing": join("data", "--data-dir", str(folder / "nowhere"), says=("--data-dir", "no such folder")),
        "data-dir-wrong-tokenizer": join("tokens", "--data-dir", str(wrong_tokens), says=("tokenizer", "import your text again")),
        "disk-full-joiner": join("full", says=("cannot be written", "make room"), file_bytes=100_000),
    }  # fmt: skip


def _make_home(path: Path, config: Path) -> None:
    """A home that holds the run of `config`."""
    make_private(path)
    home = Home(path)
    settings = load_config(config)
    manifest, _ = create_run(settings, prepare_data(settings.data, home.data), STRANGER.public_key, 1.0)
    remember_manifest(home, manifest)


def _changed(config: Path, before: str, after: str) -> Path:
    path = config.with_name("changed.toml")
    assert before in config.read_text()
    path.write_text(config.read_text().replace(before, after))
    return path


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Case], dict[str, Outcome]]]:
    folder = tmp_path_factory.mktemp("beside")
    swarm = Swarm(folder)
    config = write_run(folder / "run")
    try:
        seed = swarm.seed(config, free_port())
        seed.training()
        seed.command("pause")  # it answers all the same, and leaves the processor to the others
        cases = beside(seed, folder, config)
        outcomes = run_all(cases)
        assert seed.process.poll() is None, seed.text()
        yield cases, outcomes
    finally:
        swarm.close()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", BESIDE_A_SEED)
def test_refusals_beside_a_running_seed(crowded: tuple[dict[str, Case], dict[str, Outcome]], name: str) -> None:
    cases, outcomes = crowded
    assert sorted(cases) == sorted(BESIDE_A_SEED)
    check(cases[name], outcomes[name])


@pytest.mark.timeout(120)
def test_a_disk_that_fills_up_while_training(swarm: Swarm, tmp_path: Path) -> None:
    """The delta log cannot grow any more: training goes on and says so; at its end the checkpoint cannot be written either."""
    config = str(write_run(tmp_path / "run"))
    case = Case(
        ["tscale-peer", "--role", "seed", "--config", config, "--listen", ANY_PORT, "--threads", "1", "--seconds", "6"],
        ("checkpoint not written", "is full", "free some space"),
        tmp_path / "home",
        file_bytes=700_000,
    )
    outcome = run_all({"full": case})["full"]
    check(case, outcome)
    assert "the delta log" in outcome.shown and "free disk space" in outcome.shown


def test_the_sockets_of_these_tests_are_free_ones() -> None:
    """Guards the kit: a port pair that is handed out can be bound."""
    port = free_port()
    for number in (port, port + 1):
        with socket.socket() as one:
            one.bind((LOOPBACK, number))
