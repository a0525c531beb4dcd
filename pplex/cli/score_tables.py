"""What ``pplex score`` prints for people: tables, words, and how it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from pplex.cli.tables import table, wrapped
from pplex.units import some

if TYPE_CHECKING:
    from pplex.evaluation.against import Against, Difference

_NAME_WIDTH = 36
_ORDER = ("worse", "better", "higher", "lower", "no difference shown", "-")


def score_table(result: dict[str, Any]) -> str:
    """Words, recordings, totals, the benchmark's figures, disagreements, the method."""
    from pplex.evaluation.metrics import METRICS, figure_of

    recordings, total = result["recordings"], result["total"]
    shown = [
        metric
        for metric in METRICS
        if metric.title and metric.table
        if not metric.of or any(row.get(metric.of) for row in recordings)
    ]
    rows = [["recording", *(metric.heading for metric in shown)]]
    for row in recordings:
        cells = [metric.text(figure_of(metric, row)) for metric in shown]
        if not row["scored"]:
            cells[0] = row["status"]
        alone = " (agent only)" if row["scored"] and not row["turns"] else ""
        rows.append([_shorten(row["name"]) + alone, *cells])
    if total["scored"]:
        cells = [metric.text(figure_of(metric, total)) for metric in shown]
        rows.append([f"all {total['scored']}", *cells])
    parts = [_in_words(total), _aligned(rows)]
    parts += [_bench_table(result.get("full_duplex_bench", {}))]
    parts += [_verdicts(recordings), _disagreements(recordings)]
    parts += ["".join(f"{line}\n" for line in result["advice"])]
    parts += [_unscored(result)]
    parts += [_method(result["method"])]
    return "\n".join(part for part in parts if part)


def _in_words(total: dict[str, Any]) -> str:
    """What matters most of all recordings together, in a sentence."""
    if not total["judged_turns"]:
        return ""
    said = (
        f"The agent answered {total['takeovers']} of the {total['judged_turns']} turns "
        "that left it time to"
    )
    if total["reply_delay_s"]:
        delay_s = total["reply_delay_s"]["median"]
        said += f", after {delay_s:.2f} s (people leave about 0.2 s)"
    times = total["agent_interruptions"]
    began = {0: "never began", 1: "began once"}.get(times, f"began {times} times")
    return wrapped(f"{said}. It {began} while the user spoke.") + "\n"


def _bench_table(totals: dict[str, Any]) -> str:
    if not totals:
        return ""
    from pplex.evaluation import full_duplex_bench as bench

    shown = [
        (name, heading)
        for _, name, heading in bench.FIGURES
        if any(name in total for total in totals.values())
    ]
    headings = ["samples", *(heading for _, heading in shown), "words from"]
    rows = [["Full-Duplex-Bench", *headings]]
    for task, total in totals.items():
        values = [total.get(name) for name, _ in shown]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        samples, sources = str(total["samples"]), ", ".join(total["words_from"])
        rows.append([task, samples, *cells, sources])
    return _aligned(rows)


def _verdicts(recordings: Sequence[dict[str, Any]]) -> str:
    """The judge's reasons, and its mean score for each kind of question."""
    judged = [(row["name"], row["verdict"]) for row in recordings if row.get("verdict")]
    if not judged:
        return ""
    kinds: dict[str, list[float]] = {}
    lines = []
    for name, verdict in judged:
        score = verdict["score"]
        shown = "no score" if score is None else f"{score:g} of 5"
        lines.append(f"  {name}: {shown}, {verdict['reason']}")
        if verdict["kind"] and score is not None:
            kinds.setdefault(verdict["kind"], []).append(score)
    text = "Judged:\n" + "\n".join(lines) + "\n"
    rows = [[kind, f"{mean(of):.1f}", str(len(of))] for kind, of in kinds.items()]
    return text + (_aligned([["kind", "mean", "n"], *rows]) if rows else "")


def _disagreements(recordings: Sequence[dict[str, Any]]) -> str:
    lines = [
        f'  {row["name"]} {d["start_s"]:.2f} s: said "{d["said"]}", '
        f'heard "{d["heard"]}"'
        for row in recordings
        for d in (row["round_trip"] or {}).get("disagreements", [])
    ]
    return "Heard otherwise than said:\n" + "\n".join(lines) + "\n" if lines else ""


def _unscored(result: dict[str, Any]) -> str:
    notes = "".join(f"{note}\n" for note in result["notes"])
    lines = [
        f"  {row['name']}: {row['status']}"
        + (f" ({row['error']})" if row["error"] else "")
        for row in result["recordings"]
        if not row["scored"] or row["error"]
    ]
    if not lines:
        return notes
    total = result["total"]
    head = f"Not scored: {total['not_scored']} of {total['recordings']}"
    return notes + head + "\n" + "\n".join(lines) + "\n"


def _method(method: dict[str, Any]) -> str:
    detector, recogniser = method["voice_detector"], method["recogniser"]
    turns = method["turns"]
    said = (
        f"Method: speech by {detector['name']} ({detector['version']}); a turn holds "
        f"silences up to {turns['max_pause_s']:g} s; a backchannel is under "
        f"{turns['backchannel_s']:g} s with at most {turns['backchannel_words']} words "
        f"inside a turn; words: {method['words']}"
    )
    if method["agent_lag_s"]:
        said += f"; {method['agent_lag_s']:g} s taken off the agent's times"
    if method["user_speech"]:
        said += f"; the user's speech from {method['user_speech']}"
    if method["sound_quality"]:
        name, version = method["sound_quality"].values()
        said += f"; MOS by {name} ({version}) over the agent's speech alone"
    if method["judge"]:
        judge = method["judge"]
        said += f"; judged by {judge['model']} at {judge['url']}"
    if recogniser:
        said += f"; heard by {recogniser['name']} {recogniser['version']}"
        unknown = recogniser.get("words_not_in_dictionary")
        if unknown:
            said += f", which does not know {some(unknown, 5)}"
    return wrapped(f"{said}. --format json has all parameters.") + "\n"


def against_table(found: Against, names: tuple[str, str]) -> str:
    """The verdict in words, a line a figure, the worst first, and what to know."""
    from pplex.evaluation.against import METHOD

    rows = [["figure", "A", "B", "A - B", "95 % interval", "p", "verdict"]]
    for one in sorted(found.differences, key=lambda one: _ORDER.index(one.verdict)):
        interval = "-"
        if one.low is not None and one.high is not None:
            interval = f"{_number(one, one.low)} to {_number(one, one.high)}"
        cells = [_number(one, value) for value in (one.a, one.b, one.difference)]
        p = "-" if one.p is None else f"{one.p:.3f}"
        heading = f"{one.heading}{' %' if one.unit == '%' else ''}"
        verdict = one.verdict.removesuffix(" shown")
        rows.append([heading, *cells, interval, p, verdict])
    first, second = found.recordings
    count = f"{first} pairs" if found.paired else f"{first} and {second} recordings"
    lines = [f"A: {names[0]}", f"B: {names[1]}", count, _verdict_in_words(found)]
    lines.append(_aligned(rows))
    for side, alone in (("A", found.only_a), ("B", found.only_b)):
        if alone:
            shown = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
            lines.append(f"Only in {side}, left out: {len(alone)} ({shown})")
    lines += [wrapped(f"Warning: {warning}") for warning in found.warnings]
    return "\n".join([*lines, wrapped(f"Method: {METHOD}")]) + "\n"


def _verdict_in_words(found: Against) -> str:
    said = []
    for verdict in _ORDER[:4]:
        of = [one.heading for one in found.differences if one.verdict == verdict]
        said += [f"{verdict} in {', '.join(of)}"] if of else []
    if said:
        return wrapped(f"A is {'; '.join(said)}.") + "\n"
    tested = sum(one.verdict != "-" for one in found.differences)
    return f"No difference was shown in any of {tested} figures.\n"


def _number(one: Difference, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if one.unit == "%" else f"{value:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is to the left, the others to the right."""
    return table(rows, right=range(1, len(rows[0])))


def _shorten(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else "..." + name[3 - _NAME_WIDTH :]
