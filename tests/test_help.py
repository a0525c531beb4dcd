"""README and the topics of ``pplex help`` say what the program does, and lead on."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from black_box.test_project import OPTION, OTHER_PROGRAMS, options, parse
from click.shell_completion import ShellComplete

from pplex.cli.main import cli
from pplex.respond.stats import Latency, Stats

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TOPICS = {path.stem: path for path in sorted((ROOT / "pplex" / "help").iterdir())}
TEXTS = {path: path.read_text("utf-8") for path in [README, *TOPICS.values()]}
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.stem)
each_topic = pytest.mark.parametrize("topic", TOPICS)


def blocks(text: str) -> str:
    """What stands in code blocks."""
    return "".join(BLOCK.findall(text))


def inline(text: str) -> list[str]:
    """What stands in code spans, of the text outside blocks."""
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


def command_lines() -> list[str]:
    """The lines of all code blocks that run pplex, joined where continued."""
    lines = "".join(map(blocks, TEXTS.values())).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.split(r" [|<>] ", line)]
    return sorted({part for part in parts if part.startswith("pplex ")})


def section(topic: str, title: str) -> str:
    text = TEXTS[TOPICS[topic]] + "\n#"
    match = re.search(rf"^#+ {title}\n(.*?)(?=^#)", text, re.MULTILINE | re.DOTALL)
    assert match, title
    return match[1]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("line", command_lines())
def test_every_command_in_a_block_parses(line):
    parse(line)


@each_page
def test_a_page_names_no_option_that_does_not_exist(page):
    parts = [part for line in TEXTS[page].splitlines() for part in line.split(" | ")]
    ours = "\n".join(part for part in parts if not part.startswith(OTHER_PROGRAMS))
    assert set(OPTION.findall(ours)) - options() == set()


def test_the_table_of_the_stats_has_every_key_and_no_other():
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", section("files", "Stats"), re.MULTILINE)
    keys = [name for key, _ in rows for name in re.findall(r"`(\w+)`", key)]
    (parts,) = (meaning for key, meaning in rows if key == "`step_ms`")
    assert sorted(keys) == sorted(field.name for field in fields(Stats))
    assert re.findall(r"`(\w+)`", parts) == [field.name for field in fields(Latency)]


@each_page
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)", TEXTS[page]):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists() and path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(TEXTS[path]), target


def test_the_readme_links_to_every_topic():
    for topic in TOPICS:
        assert f"](pplex/help/{topic}.md)" in TEXTS[README]


@each_page
def test_every_make_target_of_a_page_exists(page):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    code = "\n".join([blocks(TEXTS[page]), *inline(TEXTS[page])])
    assert set(re.findall(r"(?<!voices )\bmake ([a-z]+)\b", code)) <= targets


def test_the_readme_is_short():
    assert README.stat().st_size <= 11 * 1024


def test_no_page_names_a_folder_of_some_machine():
    for text in TEXTS.values():
        assert not re.search(r"/(home|Users|root|tmp|work)/", text)


def test_the_list_has_a_line_for_every_file_of_the_folder(run):
    result = run("help")
    assert result.exit_code == 0 and not result.stderr
    shown = dict(line.split("  ", 1) for line in result.stdout.splitlines()[:-2])
    titles = {name: TEXTS[path].partition("\n")[0] for name, path in TOPICS.items()}
    assert {name: f"# {title.strip()}" for name, title in shown.items()} == titles


@each_topic
def test_a_topic_is_shown_as_it_is(topic, run):
    result = run("help", topic)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == TEXTS[TOPICS[topic]]


@each_topic
def test_a_topic_begins_with_its_title_and_ends_with_one_newline(topic):
    assert TOPICS[topic].suffix == ".md"
    text = TEXTS[TOPICS[topic]]
    assert re.match(r"# \S.*\n\n", text) and text.endswith("\n")
    assert len(text.partition("\n")[0]) <= 66  # a line of the list has 80


def test_an_unknown_topic_is_refused_with_the_list(run):
    result = run("help", "nothing")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'nothing' is no topic; there are " + ", ".join(TOPICS) in result.stderr


def test_the_shell_completes_topics():
    complete = ShellComplete(cli, {}, "pplex", "_PPLEX_COMPLETE")
    found = complete.get_completions(["help"], "ex")
    assert [item.value for item in found] == ["exactness", "exit-codes"]


def test_the_rooms_of_the_table_are_those_of_the_code():
    rows = re.findall(r"^\| (`.*?) \|", section("developing", "Rooms"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    there = {
        path.stem
        for path in (ROOT / "pplex").iterdir()
        if path.is_dir() or path.suffix == ".py"
    }
    assert sorted(named) == sorted(n for n in there if not n.startswith("__"))
    for name in inline(TEXTS[TOPICS["developing"]]):
        if re.fullmatch(r"\w+(/\w+)+(\.py)?", name):
            assert (ROOT / name).exists() or (ROOT / "pplex" / name).exists(), name


def test_no_example_of_the_readme_writes_what_another_wrote():
    """Typed in turn they all work: nothing is overwritten unasked."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", TEXTS[README], re.MULTILINE | re.DOTALL)
    written = re.findall(
        r"(?:-o|--transcript|--stats|save\(|>) ?\"?([\w.]+\.\w+|replies)",
        "".join(blocks),
    )
    unnamed = re.findall(r"pplex respond (\w+)\.wav(?! -o)", "".join(blocks))
    written += [f"{name}.reply.wav" for name in unnamed]
    assert "reply.wav" in written and len(written) > 8
    assert sorted(written) == sorted(set(written))
