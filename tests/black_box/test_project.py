"""README, Makefile and packaging say what the program does."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import click
import pytest

from pplex.cli.main import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOPICS = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "pplex" / "help").glob("*.md"))
}
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# Whose options are not pplex's.
OTHER_PROGRAMS = ("pip", "python", "hf", "git", "make", "source", "export")
OTHER_PROGRAMS += ("parec", "pacat", "arecord", "aplay", "rec", "play")


def command_lines() -> list[str]:
    """The lines of README's code blocks that run pplex, joined where continued."""
    lines = "".join(BLOCKS).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.split(r" [|<>] ", line)]
    return [part for part in parts if part.startswith("pplex ")]


def parse(line: str) -> None:
    """Parse a command line as the shell and click would; run nothing."""
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = cli
    context = click.Context(cli, info_name="pplex", **cli.context_settings)
    while isinstance(command, click.Group) and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, line
        command = command.commands[name]
        context = click.Context(command, parent=context)
    try:
        command.make_context(command.name, words, parent=context)
    except click.exceptions.Exit:  # --help, --version
        pass


def options(command: click.Command = cli) -> set[str]:
    """Every long option of every command."""
    found = {"--help"}
    for parameter in command.params:
        found |= {opt for opt in parameter.opts if opt.startswith("--")}
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            found |= options(inner)
    return found


@pytest.mark.parametrize("line", command_lines())
def test_every_command_in_the_readme_parses(line):
    parse(line)


def test_the_readme_shows_every_command():
    shown = "\n".join(command_lines())
    for name, command in cli.commands.items():
        inner = command.commands if isinstance(command, click.Group) else [""]
        for words in inner:
            assert f"pplex {name} {words}".strip() in f"{shown}\n{README}"


def test_the_readme_names_no_option_that_does_not_exist():
    ours = "\n".join(
        line for line in README.splitlines() if not line.startswith(OTHER_PROGRAMS)
    )
    assert set(OPTION.findall(ours)) - options() == set()


def test_the_readme_or_a_topic_names_every_option():
    pages = "\n".join([README, *TOPICS.values()])
    assert options() - set(OPTION.findall(pages)) == set()


def test_a_topic_explains_every_key_of_the_stats():
    from pplex.respond.stats import Latency, Stats

    table = set(re.findall(r"`(\w+)`", section("Stats")))
    assert {f.name for f in (*fields(Stats), *fields(Latency))} - table == set()


def test_a_topic_explains_no_key_that_the_stats_lack():
    from pplex.respond.stats import Latency, Stats

    rows = re.findall(r"^\| (`.*?) \|", section("Stats"), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert named - {f.name for f in (*fields(Stats), *fields(Latency))} == set()


def section(title: str) -> str:
    pages = "\n".join([README, *TOPICS.values()])
    match = re.search(rf"^#+ {title}\n(.*?)(?=^#)", pages, re.MULTILINE | re.DOTALL)
    assert match, title
    return match[1]


def test_every_make_target_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(
        re.findall(r"(?<!voices )make ([a-z]+)\b", "\n".join([*BLOCKS, *inline()]))
    )
    assert {"demo", "test", "lint", "check"} <= targets
    assert named and named <= targets


def inline() -> list[str]:
    return re.findall(r"`([^`\n]+)`", README)


def test_every_link_to_a_file_in_the_readme_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_packages_hold_nothing_but_a_docstring():
    for path in (ROOT / "pplex").rglob("__init__.py"):
        if path != ROOT / "pplex" / "__init__.py":  # the library's lazy front door
            lines = path.read_text(encoding="utf-8").strip().splitlines()
            assert len(lines) == 1 and lines[0].startswith('"""'), path
