"""What ``pplex batch`` says on stderr, and its summary."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pplex.cli.progress import QUIET, VERBOSE, Lines
from pplex.errors import visible
from pplex.units import counted, size

if TYPE_CHECKING:
    from pplex.batch.forecast import Forecast
    from pplex.batch.prepare import Kept
    from pplex.batch.run import Summary

_SHOWN_FAILURES = 20
_SAID_EVERY_S = 60.0  # where there is no bar, as in logs


class BatchProgress(Lines):
    """Tells on stderr how a batch gets on."""

    def __init__(self, verbosity: int) -> None:
        """``verbosity`` is as for ``Lines``."""
        super().__init__(verbosity)
        self._count = self._ended = 0
        self._said = self._audio_s = 0.0

    def note(self, message: str) -> None:
        """Say something worth a line."""
        self.say(message)

    def starting(self, count: int, audio_s: float) -> None:
        """Show a bar in seconds of audio."""
        self._show_bar(audio_s, digits=0)
        self._said = self._start
        self._count = count

    def finished(self, key: str, audio_s: float) -> None:
        """Move the bar on; with -v, name the recording."""
        self.say(f"{key}: done", VERBOSE)
        self._advance(audio_s)

    def failed(self, key: str, error: str, audio_s: float) -> None:
        """Name the recording and say why, even when quiet."""
        self.say(f"{key}: {error}", QUIET)
        self._advance(audio_s)

    def _advance(self, seconds: float) -> None:
        assert self._bar is not None
        self._ended += 1
        self._audio_s += seconds
        self._bar.update(seconds)
        now = time.perf_counter()
        counts = (
            f"{self._ended}/{self._count} recordings, "
            f"{_pace(self._audio_s, now - self._start)} s/s"
        )
        self._bar.set_postfix_str(counts, refresh=False)
        if self._bar.disable and now - self._said >= _SAID_EVERY_S:
            self._said = now
            self.say(counts)

    def stopped(self) -> None:
        """Say how far a batch came that was stopped, and how it goes on."""
        self.close()
        if self._count:
            self.say(
                f"stopped: {self._ended} of {self._count} recordings were answered or "
                f"failed, {self._count - self._ended} are left; the same command goes "
                "on from here"
            )


def _pace(audio_s: float, spent_s: float) -> str:
    """Seconds of audio a second; a clock may have stood still, or been set back."""
    return f"{audio_s / spent_s:.1f}" if spent_s > 0 else "?"


def summary(done: Summary) -> str:
    """How a batch went, in a few lines."""
    parts = [f"{done.done} done", f"{done.skipped} skipped"]
    parts.append(f"{len(done.failed)} failed")
    if done.kept:
        parts.append(f"{len(done.kept)} kept as they were")
    if done.not_run:
        parts.append(f"{done.not_run} not run")
    lines = [", ".join(parts)]
    if done.failed_before:
        lines[0] += (
            f" ({done.failed_before} of them in an earlier run; --retry-failed tries "
            "them again)"
        )
    from pplex.respond.ending import advice

    if done.replaced:
        lines.append(f"{done.replaced} had outputs before, which were replaced")
    lines += advice(done.endings)
    if done.checked:
        good = done.checked - done.checks_failed
        lines.append(f"checks: {good} of {done.checked} recordings pass")
    if done.done:
        lines.append(
            f"{done.audio_s:.1f} s of audio in {done.total_s:.1f} s, {done.load_s:.1f} "
            f"s of it loading: {_pace(done.audio_s, done.run_s)} s of audio a second "
            f"without that; batch size {done.batch_size}; "
            f"{size(1e9 * done.peak_memory_gb)}"
        )
    return "\n".join(lines)


def forecast_text(found: Forecast, every: bool) -> str:
    """What a dry run found; with ``every`` name of what is kept."""
    hours = f"{found.audio_s / 3600:.1f} h" if found.audio_s >= 3600 else ""
    seconds = hours or f"{found.audio_s:.1f} s"
    tails = ", with tails of 30 s, the most of auto" if found.auto_tails else ""
    lines = [
        f"to do:   {counted(found.todo, 'recording')}, "
        f"{seconds} of audio, the longest {found.longest_s:.1f} s{tails}",
        f"skipped: {found.skipped} (done already)",
        f"bad:     {len(found.failed)}",
    ]
    if found.replaced:
        lines.insert(1, f"replace: {found.replaced} of them have outputs already")
    lines += _first(
        [f"  {visible(key)}: {error}" for key, error in found.failed.items()]
    )
    lines += _first([f"odd:     {warning}" for warning in found.warnings])
    lines += [*found.left_out.sentences(), *kept_lines(found.kept, every)]
    lines.append(
        f"disk:    about {size(1e9 * found.output_gb)} of "
        f"{size(1e9 * found.disk_free_gb)} free"
    )
    codec = ""
    if found.codec_gb:
        codec = f"{size(1e9 * found.codec_gb)} for what its codec computes, "
    lines.append(
        f"memory:  about {size(1e9 * found.weights_gb)} for the model, "
        f"{codec}"
        f"{size(1e9 * found.row_gb)} for each of {found.batch_size} recordings at a "
        f"time and {size(1e9 * found.sound_gb)} for their sound, of "
        f"{size(1e9 * found.memory_gb)}"
    )
    if found.seconds is None:
        lines.append("time:    unknown, as this model has answered nothing here yet")
    else:
        lines.append(f"time:    about {found.seconds:.0f} s at the speed so far")
    lines += [f"problem: {problem}" for problem in found.problems()]
    return "\n".join(lines)


def kept_lines(kept: Kept, every: bool) -> list[str]:
    """What was not answered so that nothing is lost, and what to do; lines.

    Not ``every`` name is said where there are many.
    """
    lines = []
    for names, why in (
        (
            kept.other_settings,
            "answered with other settings; --overwrite answers them again, or choose "
            "another output folder",
        ),
        (
            kept.changed,
            "an output was changed by somebody since; --overwrite replaces it, and "
            "without the file it is made again",
        ),
        (
            kept.others,
            "what is there answers another recording; choose another output folder, or "
            "give --overwrite",
        ),
    ):
        if not names:
            continue
        lines.append(f"kept: {len(names)}, {why}")
        named = [f"  {visible(name)}" for name in names]
        lines += named if every else _first(named, "more, which -v names")
    return lines


def failures_before(done: Summary) -> list[str]:
    """The failures of earlier runs, as lines."""
    known = list(done.failed.items())[: done.failed_before]
    lines = [f"{visible(key)}: {error}" for key, error in known]
    return _first(lines, "more, see the manifest", "")


def _first(lines: list[str], more: str = "more", indent: str = "  ") -> list[str]:
    """The first of many lines, and how many more there are."""
    left = len(lines) - _SHOWN_FAILURES
    return lines[:_SHOWN_FAILURES] + [f"{indent}and {left} {more}"] * (left > 0)
