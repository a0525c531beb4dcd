"""Messages and progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from pplex.cli.ci import annotate_checks
from pplex.errors import visible
from pplex.units import counted

if TYPE_CHECKING:
    from pplex.audio.files import Recording
    from pplex.audio.streams import StreamFormat
    from pplex.checkpoint.hub import LocalModel
    from pplex.respond.stats import Outcome

QUIET = -1
VERBOSE = 1

_MOST_LINES = 10  # of what was said that a summary repeats


def is_terminal() -> bool:
    """Whether somebody sees what goes to stderr."""
    return sys.stderr.isatty()


class Lines:
    """Lines on stderr, and a bar that they do not tear; to be closed in the end."""

    def __init__(self, verbosity: int) -> None:
        """``verbosity`` is -1 for quiet, 0, or 1 for verbose."""
        self._verbosity = verbosity
        self._bar: tqdm | None = None
        self._start = 0.0
        self._waits = False
        self.all_passed = True
        self.shows_bars = verbosity > QUIET

    def close(self) -> None:
        """Take the bar away, and leave the terminal as it was."""
        self._wait_no_more()
        if self._bar is not None:
            self._bar.close()

    def waiting(self, model_name: str) -> None:
        """Say on a terminal that a model is loaded, until there is more to say."""
        if self._verbosity == 0 and is_terminal():
            click.echo(f"loading {model_name} ...", nl=False, err=True)
            self._waits = True

    def _wait_no_more(self) -> None:
        if self._waits:
            click.echo("\r\x1b[K", nl=False, err=True)
            self._waits = False

    def _show_bar(
        self, duration_s: float | None, digits: int, hidden: bool = False
    ) -> None:
        """Show a bar in seconds of audio; one of unknown length only counts them."""
        self._wait_no_more()
        self._start = time.perf_counter()
        bar = f"{{n:.{digits}f}} s of audio [{{elapsed}}{{postfix}}]"
        if duration_s is not None:
            bar = (
                f"{{percentage:3.0f}}% |{{bar}}| {{n:.{digits}f}}/{{total:.{digits}f}} "
                "s of audio [{elapsed}<{remaining}{postfix}]"
            )
        self._bar = tqdm(
            total=None if duration_s is None else round(duration_s, 2),
            # Quiet: none. Otherwise None, which shows a bar on terminals only.
            disable=True if hidden or self._verbosity == QUIET else None,
            bar_format=bar,
            leave=False,
        )

    def say(self, message: str, verbosity: int = 0) -> None:
        """Print a line, at this verbosity or above."""
        if self._verbosity < verbosity:
            return
        self._wait_no_more()
        if self._bar is not None:
            self._bar.clear()
        click.echo(visible(message), err=True)

    def loading(self, local: LocalModel) -> None:
        """Say what is being loaded."""
        revision = f", revision {local.revision}" if local.revision else ""
        self.say(f"loading {local.name} ({local.path}{revision})", VERBOSE)
        self.ignoring(local)

    def ignoring(self, local: LocalModel) -> None:
        """Say what of a model is passed over: a warning, if it is not a known one."""
        from pplex.checkpoint.describe import ignored

        for what, text in ignored(local.folder):
            if local.is_known:
                self.say(f"{what}: {text}", VERBOSE)
            else:
                self.say(f"warning: {what}: {text}")

    def checked(
        self, outcomes: Sequence[Outcome], audio: Path, key: str | None = None
    ) -> None:
        """Say how the checks of an output went; what failed even when quiet.

        ``key`` is the recording's name, where there are many.
        """
        for outcome in outcomes:
            verdict = "ok  " if outcome.passed else "FAIL"
            name = outcome.check if key is None else f"{key}: {outcome.check}"
            usual = 0 if key is None else VERBOSE
            level = usual if outcome.passed else QUIET
            self.say(f"{verdict} {name}: {outcome.detail}", level)
            self.all_passed &= outcome.passed
        annotate_checks(audio, outcomes)

    def computing(self, how: str) -> None:
        """Say in what form the weights compute, and why."""
        self.say(f"compute {how}", VERBOSE)


class Progress(Lines):
    """Tells on stderr how ``respond`` gets on."""

    def __init__(
        self, verbosity: int, channel_chosen: bool, captions: bool = False
    ) -> None:
        """``captions``: the agent's words are shown, and no bar; so with verbose."""
        super().__init__(verbosity)
        self._captions = captions or verbosity >= VERBOSE
        self._channel_chosen = channel_chosen
        self.words = ""

    def reading(self, recording: Recording) -> None:
        """Say which channel is the user's, where there is a choice."""
        channels = recording.source_channels
        self._say_channels(channels)
        self.say(
            f"{recording.format} {recording.subtype}, {recording.source_rate} Hz, "
            f"{counted(channels, 'channel')}, {recording.source_frames} samples",
            VERBOSE,
        )

    def warn(self, message: str) -> None:
        """Say what is odd about the sound."""
        self.say(message)

    def listening(self, stream: StreamFormat) -> None:
        """Say what the stream is, and which channel is the user's."""
        channels = stream.channels
        self._say_channels(channels)
        self.say(
            f"a stream of {stream.encoding}, {stream.rate} Hz, "
            f"{counted(channels, 'channel')}",
            VERBOSE,
        )

    def _say_channels(self, channels: int) -> None:
        if channels > 1 and not self._channel_chosen:
            self.say(
                f"{channels} channels: channel 1 is taken as the user, "
                "--channel picks another"
            )

    def expecting(self, real_time_factor: float) -> None:
        """Say how long it will take, where that is longer than the sound."""
        from pplex.bench.estimate import minute_in_words

        slow = real_time_factor > 1
        self.say(
            f"this machine takes {minute_in_words(real_time_factor)}",
            0 if slow else VERBOSE,
        )

    def answering(self, duration_s: float | None) -> None:
        """Show a bar in seconds of audio, with the real-time factor so far."""
        self._show_bar(duration_s, digits=1, hidden=self._captions)

    def said(self, text: str) -> None:
        """Show the agent's words, and keep the first of them."""
        if self.words.count("\n") <= _MOST_LINES:
            self.words += text
        if self._captions and text:
            click.echo(text, err=True, nl=False)

    def said_lines(self) -> list[str]:
        """What the agent said, for a summary at a terminal; nothing if it was shown.

        A log keeps words only where they were asked for.
        """
        lines = self.words.strip().splitlines()
        if self._captions or not lines or not is_terminal():
            return []
        more = [] if len(lines) <= _MOST_LINES else ["..."]
        return ["the agent said:", *lines[:_MOST_LINES], *more]

    def advance(self, seconds: float) -> None:
        """Move the bar on."""
        assert self._bar is not None
        self._bar.update(seconds)
        spent = time.perf_counter() - self._start
        if self._bar.n:
            self._bar.set_postfix_str(f"RTF {spent / self._bar.n:.2f}", refresh=False)
