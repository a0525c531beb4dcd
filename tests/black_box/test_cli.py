"""The command line apart from ``respond``'s own work: help, lists, completion."""

from __future__ import annotations

import importlib.metadata
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from huggingface_hub import constants

from pplex.cli.main import cli

HEAVY = {"mlx", "numpy", "scipy", "soundfile", "soxr", "sentencepiece"}
HEAVY |= {"huggingface_hub", "pyloudnorm"}


@pytest.fixture(autouse=True)
def no_network_and_own_caches(tmp_path, monkeypatch) -> None:
    def refuse(*args, **options):
        raise AssertionError("a test went online")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PPLEX_MODEL", raising=False)


def commands(
    command: click.Command = cli, path: tuple[str, ...] = ()
) -> list[tuple[str, ...]]:
    """The words of every command and group."""
    found = [path]
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            found += commands(inner, (*path, name))
    return found


def leaves() -> list[tuple[str, ...]]:
    every = commands()
    return [c for c in every if not any(o[:-1] == c for o in every if o)]


# Help


@pytest.mark.parametrize("path", commands(), ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_a_help_page_that_fits(path, option):
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli, [*path, option])
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.startswith("Usage: ")
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("path", leaves(), ids=" ".join)
def test_every_commands_help_ends_with_an_example_that_parses(path):
    page = CliRunner().invoke(cli, [*path, "--help"]).stdout
    example = page.splitlines()[-1].strip()
    assert example.startswith(f"Example: pplex {' '.join(path)}")
    words = example.removeprefix("Example: pplex ").split()
    command, context = cli, click.Context(cli, **cli.context_settings)
    for name in path:
        command = command.commands[name]
        context = click.Context(command, parent=context)
    command.make_context(path[-1], words[len(path) :], parent=context)


def test_every_option_says_what_it_does():
    for path in leaves():
        command = cli
        for name in path:
            command = command.commands[name]
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (path, parameter.name)


def test_no_command_shows_the_help_as_a_wrong_call(run):
    result = run()
    assert result.exit_code == 2
    assert "respond" in result.stderr


def test_the_version_is_the_packages(run):
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"pplex, version {importlib.metadata.version('pplex')}\n"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )


def test_the_help_loads_neither_mlx_nor_numpy():
    done = python(
        "import sys\n"
        "from pplex.cli.main import cli\n"
        "cli(['respond', '--help'], standalone_mode=False)\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stderr.split())


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "pplex", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage: pplex ")


@pytest.mark.parametrize(
    "error",
    [
        "ModuleNotFoundError('No module named \\'mlx\\'', name='mlx')",
        "ImportError('libmlx.so: cannot open shared object file', name='core', "
        "path='/x/site-packages/mlx/core.cpython-310-x86_64-linux-gnu.so')",
    ],
    ids=["no package", "no library"],
)
def test_without_mlx_one_sentence_says_what_to_install(error, tmp_path):
    done = python(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mlx' or name.startswith('mlx.'):\n"
        f"            raise {error}\n"
        "sys.meta_path.insert(0, Missing())\n"
        "sys.platform = 'linux'\n"
        "from pplex.cli.main import cli\n"
        f"cli(['respond', 'call.wav', '-o', {str(tmp_path / 'out.wav')!r}])\n"
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: MLX cannot be loaded")
    assert done.stderr.count("\n") == 1
    assert "pplex[cpu]" in done.stderr and "pplex[cuda]" in done.stderr


def test_a_python_for_intel_is_told_on_a_mac():
    done = python(
        "import platform, sys\n"
        "sys.platform, platform.machine = 'darwin', lambda: 'x86_64'\n"
        "sys.modules['mlx'] = None\n"
        "from pplex.cli.main import cli\n"
        "cli(['doctor'])\n"
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "take one for Apple silicon (arm64)" in done.stderr
    assert done.stderr.count("\n") == 1
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    done = python(
        "import platform, setuptools, sys\n"
        "sys.platform, platform.machine = 'darwin', lambda: 'x86_64'\n" + setup
    )
    assert done.returncode == 1 and "Apple silicon" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_fault_of_another_import_is_not_taken_for_mlx(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "pplex.checkpoint.hub", None)
    result = run("models", "list")
    assert isinstance(result.exception, ImportError)


# Models and voices


BITS = ("4bit", "8bit", "bf16")


def test_models_are_listed_with_their_sizes(run):
    result = run("models", "list")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split()[:5] == ["NAME", "DISK", "DOWNLOAD", "MEMORY", "FITS"]
    blocks = result.stdout.split("\n\n")
    assert [b.split()[1] for b in blocks[1:]] == ["WHAT", "LICENCE"]
    assert max(map(len, lines)) <= 80
    kyutai = [f"{name}-{kind}" for name in ("moshika", "moshiko") for kind in BITS]
    for block in blocks:
        assert [line.split()[0] for line in block.splitlines()[1:]] == [
            *("8bit", "4bit", "bf16", "mini"),
            *kyutai,
            *("personaplex-rl", "moshika-rl"),
        ]


def test_voices_are_listed_one_a_line(run, tiny):
    result = run("voices", "list", "--model", tiny)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "NATF0\nNATM0\n"


def test_listing_voices_never_downloads_a_model(run):
    result = run("voices", "list")
    assert result.exit_code == 0
    # Those of NVIDIA's README.
    assert result.stdout.split() == [
        f"{kind}{number}"
        for kind, count in (("NATF", 4), ("NATM", 4), ("VARF", 5), ("VARM", 5))
        for number in range(count)
    ]
    assert "8bit is not on this machine" in result.stderr
    moshi = run("voices", "list", "--model", "moshika-4bit")
    assert (moshi.exit_code, moshi.stdout) == (1, "")
    other = run("voices", "list", "--model", "nvidia/personaplex-7b-v1")
    assert other.exit_code == 1
    assert "pplex models pull nvidia/personaplex-7b-v1" in other.stderr


def test_pull_prints_where_the_model_lies(run, tiny):
    result = run("models", "pull", tiny)
    assert (result.exit_code, result.stdout) == (0, f"{tiny}\n")


def test_pull_of_no_model_is_refused(run):
    result = run("models", "pull", "9bit")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "'9bit'" in result.stderr


# Completion


def completed(words: list[str], incomplete: str) -> list[tuple[str, str]]:
    completion = ShellComplete(cli, {}, "pplex", "_PPLEX_COMPLETE")
    items = completion.get_completions(words, incomplete)
    return [(item.type, item.value) for item in items]


def test_voices_of_the_local_model_complete(tiny):
    words = ["respond", "--model", str(tiny), "--voice"]
    assert completed(words, "") == [("plain", "NATF0"), ("plain", "NATM0")]
    assert completed(words, "NATM") == [("plain", "NATM0")]


def test_a_voice_that_is_no_name_completes_as_a_file(tiny):
    words = ["respond", "--model", str(tiny), "--voice"]
    assert completed(words, "me/") == [("file", "me/")]


def test_voices_of_a_model_that_is_not_here_complete_as_files():
    assert completed(["respond", "--voice"], "NAT") == [("file", "NAT")]


def test_models_complete_by_name_or_as_files():
    assert completed(["respond", "--model"], "4") == [("plain", "4bit")]
    assert completed(["voices", "list", "-m"], "my/") == [("file", "my/")]
