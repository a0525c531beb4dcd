"""Nothing leaves the machine, and nothing of a recording is written unasked."""

from __future__ import annotations

import ast
import socket
from pathlib import Path

import pytest
import soundfile
from piped import RATE, noise

ROOT = Path(__file__).parents[2]
CALLS = {"eval", "exec", "compile", "__import__"}
NEVER_IMPORTED = {"marshal", "shelve", "dill", "cloudpickle", "requests", "httpx"}
# Calls of the modules that talk to others; asking for this machine's name is not one.
ONLINE = {"urlopen", "create_connection", "create_server", "socketpair"}


class NoSocketError(Exception):
    """A socket was opened."""


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise NoSocketError

    for name in ("socket", "create_connection", "socketpair", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture
def call(tmp_path) -> Path:
    path = tmp_path / "secret name.wav"
    soundfile.write(path, noise(RATE // 2), RATE)
    return path


@pytest.mark.parametrize("offline", [(), ("--offline",)])
def test_answering_opens_no_socket(run, no_sockets, call, small_folder, offline):
    line = ("respond", call, "-o", call.with_name("o.wav"), "--prompt", "")
    result = run(*line, "--model", small_folder, *offline)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "line", [("voices", "list"), ("models", "list"), ("--help",), ("--version",)]
)
def test_looking_round_opens_no_socket(run, no_sockets, small_folder, line):
    model = ("--model", small_folder) if line[0] == "voices" else ()
    assert run(*line, *model).exit_code == 0


def test_a_model_that_is_not_here_opens_no_socket_when_offline(run, no_sockets, call):
    line = ("respond", call, "-o", call.with_name("o.wav"))
    result = run(*line, "--model", "nobody/nothing", "--offline")
    assert result.exit_code == 1


def test_the_words_are_shown_only_when_asked(run, call, small_folder):
    line = ("respond", call, "-o", call.with_name("o.wav"), "--overwrite")
    line = (*line, "--prompt", "", "--model", small_folder)
    quiet = run(*line, "--transcript", call.with_name("t.txt"))
    said = call.with_name("t.txt").read_text(encoding="utf-8").strip()
    assert quiet.exit_code == 0 and (not said or said not in quiet.stderr)
    shown = run(*line, "--transcript", call.with_name("t.txt"), "--captions")
    assert all(word in shown.stderr for word in said.split())


def modules() -> list[Path]:
    return sorted((ROOT / "pplex").rglob("*.py"))


def test_no_module_evaluates_text_or_starts_a_shell():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            assert name not in CALLS, path
            shell = [k for k in node.keywords if k.arg == "shell"]
            assert not shell, path
            owner = getattr(getattr(node.func, "value", None), "id", "")
            called = f"{owner}.{getattr(node.func, 'attr', '')}"
            assert called not in ("os.system", "os.popen", "pickle.load"), path
            assert called != "pickle.loads", path


def test_no_module_opens_sockets_of_its_own():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            tops = {name.partition(".")[0] for name in names}
            assert not tops & NEVER_IMPORTED, path
            if path.name != "judge.py":  # --judge
                assert not {"urllib.request", "http.client"} & set(names), path
            own = ("cluster.py", "judge.py")  # --ray, --judge
            if isinstance(node, ast.Attribute) and path.name not in own:
                assert node.attr not in ONLINE, path
