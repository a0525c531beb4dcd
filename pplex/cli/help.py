"""``pplex help``: the topics of ``pplex/help``, as they are."""

from __future__ import annotations

import importlib.resources
from typing import Any

import click
from click.shell_completion import CompletionItem

from pplex.cli.tables import echo_table
from pplex.errors import did_you_mean


class _Topic(click.ParamType):
    """The name of a topic."""

    name = "topic"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """Refuse what is no topic."""
        topics = _read_topics()
        if value not in topics:
            self.fail(
                f"{value!r} is no topic; there are {', '.join(topics)} (the options of "
                f"a command: pplex COMMAND --help){did_you_mean(value, topics)}"
            )
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the topics to the shell, with a line each."""
        return [
            CompletionItem(name, help=_title(text))
            for name, text in _read_topics().items()
            if name.startswith(incomplete)
        ]


@click.command("help", epilog="Example: pplex help models")
@click.argument("topic", type=_Topic(), required=False)
def help_(topic: str | None) -> None:
    """Show TOPIC of the manual; without it, list the topics.

    A topic is Markdown text. For the options of a command see its --help.
    """
    topics = _read_topics()
    if topic is not None:
        click.echo(topics[topic], nl=False)
        return
    echo_table([(name, _title(text)) for name, text in topics.items()])
    click.echo("\nTo read one: pplex help TOPIC. Options: pplex COMMAND --help.")


def _read_topics() -> dict[str, str]:
    """The text of every topic, by name."""
    folder = importlib.resources.files("pplex") / "help"
    texts = {
        file.name.removesuffix(".md"): file.read_text(encoding="utf-8")
        for file in folder.iterdir()
        if file.name.endswith(".md")
    }
    return dict(sorted(texts.items()))


def _title(text: str) -> str:
    return text.partition("\n")[0].removeprefix("# ")
