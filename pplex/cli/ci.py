"""What continuous integration reads: JUnit files, and annotations of GitHub Actions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pplex.files import put, put_new, write_text

if TYPE_CHECKING:
    from pplex.respond.stats import Outcome

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def annotate(title: str, message: str, file: Path | None = None) -> None:
    """Show a failure on the page of a run of GitHub Actions; nothing elsewhere."""
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return
    about = {"title": title} if file is None else {"file": str(file), "title": title}
    properties = ",".join(
        f"{key}={_escape(value).replace(':', '%3A').replace(',', '%2C')}"
        for key, value in about.items()
    )
    line = f"::error {properties}::{_escape(message)}"
    click.echo(line, err=True)


def annotate_checks(audio: Path, outcomes: Sequence[Outcome]) -> None:
    """``annotate`` with the checks of an output that failed."""
    for outcome in outcomes:
        if not outcome.passed:
            annotate(f"pplex check: {outcome.check}", outcome.detail, audio)


def write_junit(
    path: Path, checked: Mapping[Path, Sequence[Outcome]], overwrite: bool
) -> None:
    """Write the checks of outputs as a JUnit file, a test case each."""
    from xml.etree import ElementTree

    every = [(audio, one) for audio, outcomes in checked.items() for one in outcomes]
    failures = sum(not outcome.passed for _, outcome in every)
    counts = {"tests": f"{len(every)}", "failures": f"{failures}", "errors": "0"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(
        suites, "testsuite", {"name": "pplex check", **counts}
    )
    for audio, outcome in every:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_xml(str(audio)), name=outcome.check
        )
        if outcome.passed:
            ElementTree.SubElement(case, "system-out").text = _xml(outcome.detail)
        else:
            ElementTree.SubElement(case, "failure", message=_xml(outcome.detail))
    ElementTree.indent(suites)
    text = ElementTree.tostring(suites, encoding="unicode")
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    write_text(path, f"{head}{text}\n", place=put if overwrite else put_new)


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _xml(text: str) -> str:
    return _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text)
