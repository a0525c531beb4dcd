"""The program: ``pplex``, or ``python -m pplex``."""

import signal


def main() -> None:
    """Run the command line; Ctrl-C before it is loaded ends the program at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pplex.cli.main import cli

    cli(prog_name="pplex")


if __name__ == "__main__":
    main()
