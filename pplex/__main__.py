"""``python -m pplex``."""

from pplex.cli.main import cli

if __name__ == "__main__":
    cli(prog_name="pplex")
