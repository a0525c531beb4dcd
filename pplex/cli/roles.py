"""``pplex roles``: the published role prompts."""

from __future__ import annotations

import click

from pplex.cli.options import Group
from pplex.conversation.roles import DEFAULT_ROLE, ROLES
from pplex.errors import PplexError, did_you_mean


@click.group(cls=Group)
def roles() -> None:
    """List the published role prompts, or show one."""


@roles.command("list", epilog="Example: pplex roles list")
def list_roles() -> None:
    """Print the names of the roles, one a line, as --role takes them."""
    for name in ROLES:
        click.echo(f"{name} (default)" if name == DEFAULT_ROLE else name)


@roles.command("show", epilog="Example: pplex roles show service")
@click.argument("name")
def show(name: str) -> None:
    """Print the text of a role, as --prompt and --prompt-file take it."""
    if name not in ROLES:
        raise PplexError(
            f"there is no role {name!r}; known are {', '.join(ROLES)}"
            + did_you_mean(name, ROLES)
        )
    click.echo(ROLES[name])
