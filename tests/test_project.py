"""The project itself: packaging matches the tree, forbidden calls stay out, documents and scripts name what exists."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import tscale_fed

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = {"tscale_fed": ROOT / "tscale_fed", "tscale_net": ROOT / "net/tscale_net", "tscale_kernels": ROOT / "kernels/tscale_kernels",
         "tscale_peers": ROOT / "peers/tscale_peers"}  # fmt: skip
LONGEST_FILE_LINES = 400

# Spelt in two halves, so that this file does not find itself.
FORBIDDEN = [
    r"\bimport pic" + r"kle",
    r"\bpic" + r"kle\.",
    r"(?<!safetensors\.)torch\.lo" + r"ad\(",
    r"recv_" + r"pyobj",
    r"send_" + r"pyobj",
    r"(?<![\w.])ev" + r"al\(",
]


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts)


def test_listed_packages_are_the_tree() -> None:
    found = set()
    for name, folder in ROOMS.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(folder).parts]))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_no_folder_of_modules_without_a_map() -> None:
    for folder in ROOMS.values():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} is a package without __init__.py"


@pytest.mark.parametrize("folder", ["net", "kernels", "peers", "configs"])
def test_room_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), "a top-level package of this name would shadow another project's"


def test_forbidden_calls_stay_out() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources("tscale_fed", "net", "kernels", "peers", "tests", "scripts")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(re.search(pattern, line) for pattern in FORBIDDEN)
    ]
    assert not found, "\n".join(found)


def test_no_path_of_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    for name in (name for name in listed if name.endswith((".py", ".md", ".toml", ".sh", "Makefile"))):
        text = (ROOT / name).read_text()
        assert not re.search(r"(?<![\w.])/(wor" + r"k|roo" + r"t)/|" + re.escape(str(ROOT)), text), name


def test_every_module_says_what_it_is_and_stays_short() -> None:
    for path in sources("tscale_fed", "net", "kernels", "peers", "scripts"):
        text = path.read_text()
        assert text.lstrip().startswith('"""'), f"{path} has no docstring"
        assert text.count("\n") <= LONGEST_FILE_LINES, f"{path} is longer than {LONGEST_FILE_LINES} lines: two nouns in one file?"


def test_one_version() -> None:
    assert PROJECT["project"]["version"] == tscale_fed.__version__


def test_entry_points_exist() -> None:
    from tscale_fed import cli

    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert module == "tscale_fed.cli" and callable(getattr(cli, function))


def test_commands_of_the_table_exist() -> None:
    from tscale_fed.cli import COMMANDS

    for name in COMMANDS:
        assert (ROOT / "tscale_fed/commands" / f"{name}.py").exists(), name


@pytest.mark.parametrize("document", ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))])
def test_documents_name_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    paths = re.findall(r"`((?:configs|docs|scripts|tests|tscale_fed|net|kernels|peers)/[\w./-]+)`", text)
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_continuous_integration_runs_the_readme_s_test_command() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text() and "make test" in (ROOT / "README.md").read_text()


@pytest.fixture
def set_up() -> ModuleType:
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "scripts/set_up.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pip:
    """Stands in for pip and remembers what it was asked."""

    def __init__(
        self, module: ModuleType, monkeypatch: pytest.MonkeyPatch, *, installed: str | None = None, index_answers: bool = True
    ) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.fails: str | None = None
        monkeypatch.setattr(module, "pip", self)
        monkeypatch.setattr(module, "installed_torch", lambda: installed)
        monkeypatch.setattr(module, "answers", lambda url: index_answers)
        monkeypatch.setattr(module.sys, "platform", "linux")
        self._error = module.SetUpError

    def __call__(self, *words: str) -> None:
        self.asked.append(words)
        if self.fails in words:
            raise self._error("failed")


def test_a_gpu_user_never_gets_the_cpu_build(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(set_up, monkeypatch)
    set_up.install_torch(gpu=True)
    assert pip.asked == [("install", set_up.ANY_TORCH)]
    pip = Pip(set_up, monkeypatch, installed="2.13.0+cpu")
    set_up.install_torch(gpu=True)
    assert pip.asked == [("uninstall", "--yes", "torch"), ("install", set_up.ANY_TORCH)]


def test_without_a_gpu_the_cpu_build_is_asked_for_first(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(set_up, monkeypatch)
    set_up.install_torch(gpu=False)
    assert pip.asked == [("install", "--extra-index-url", set_up.CPU_INDEX, set_up.CPU_TORCH)]
    pip = Pip(set_up, monkeypatch, index_answers=False)
    pip.fails = set_up.CPU_TORCH
    set_up.install_torch(gpu=False)
    assert pip.asked == [("install", set_up.CPU_TORCH), ("install", set_up.ANY_TORCH)]
    pip = Pip(set_up, monkeypatch, installed="2.13.0")
    set_up.install_torch(gpu=False)
    assert pip.asked == []


def test_set_up_is_redone_when_its_sources_change(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = set_up.fingerprint(gpu=False, tests=False)
    assert before == set_up.fingerprint(gpu=False, tests=False) and len(before) == hashlib.sha256().digest_size * 2
    assert len({before, set_up.fingerprint(gpu=True, tests=False), set_up.fingerprint(gpu=False, tests=True)}) == 3


@pytest.mark.parametrize(
    ("gpu", "words", "extras"), [(False, [], "test"), (False, ["--tests"], "test,interp"), (True, ["--tests"], "test")]
)
def test_triton_comes_from_torch_where_there_is_a_gpu_and_otherwise_only_for_tests(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool, words: list[str], extras: str
) -> None:
    pip = Pip(set_up, monkeypatch, installed="2.13.0")
    monkeypatch.setattr(set_up, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(set_up, "make_environment", lambda: None)
    monkeypatch.setattr(set_up, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(set_up, "runs", lambda python: True)
    assert set_up.main(words) == 0
    assert pip.asked[-1] == ("install", "-e", f".[{extras}]")
    count = len(pip.asked)
    assert set_up.main([]) == 0 and len(pip.asked) == count, "the tests' environment is enough for the rest"


def test_an_old_python_is_refused_in_one_sentence(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(set_up, "OLDEST_PYTHON", (99, 0))
    assert set_up.main() == 1
    assert capsys.readouterr().err.startswith("set-up: Python 3.11 or newer is needed, this is 3.")


@pytest.mark.parametrize("script", ["set_up.sh", "test.sh", "check.sh", "demo.sh"])
def test_scripts_are_valid_for_any_shell(script: str) -> None:
    subprocess.run(["sh", "-n", str(ROOT / "scripts" / script)], check=True)


def test_this_interpreter_runs_the_suite_from_the_tree() -> None:
    for name, folder in ROOMS.items():
        module = sys.modules.get(name) or importlib.import_module(name)
        assert Path(module.__file__ or "").parent == folder
