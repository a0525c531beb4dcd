"""A judge of what was said, behind a made server of OpenAI's protocol."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pplex.errors import PplexError
from pplex.evaluation.judge import Judge, Question, make_judge


class Server(HTTPServer):
    """Answers every chat with ``reply``, and keeps what it was asked."""

    reply = '{"score": 4, "reason": "right, but long"}'
    status = 200
    asked: list[tuple[str, dict]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body)))
        message = {"choices": [{"message": {"content": self.server.reply}}]}
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(message).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


def test_a_verdict_has_its_score_and_reason(server):
    judge = make_judge("some-model", url(server))
    verdict = judge("You work for a bank.", Question("When?", "At nine.", "x"), "Nine.")
    assert (verdict.score, verdict.reason) == (4.0, "right, but long")
    assert verdict.kind == "x"
    ((path, asked),) = server.asked
    assert path == "/v1/chat/completions"
    assert (asked["model"], asked["temperature"], asked["seed"]) == ("some-model", 0, 0)
    system, user = asked["messages"]
    assert system["content"] == judge.describe()["instruction"]
    for part in ("You work for a bank.", "When?", "At nine.", "Nine."):
        assert part in user["content"]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('<think>{"a": 1} or {"score": 1}?</think> {"score": 5, "reason": ""}', 5),
        ('```json\n{"score": "3", "reason": "so"}\n```', 3),
        ("I would say four.", None),
        ('{"score": 7, "reason": "wonderful"}', None),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ("{{{{", None),
    ],
)
def test_a_reply_without_a_score_is_none(server, reply, score):
    server.reply = reply
    assert make_judge("m", url(server))("", Question("a"), "b").score == score


def test_a_server_that_is_none_is_named(server):
    server.status = 500
    with pytest.raises(PplexError, match=f"{server.server_port}/v1 does not answer"):
        make_judge("m", url(server))("", Question("a"), "b")
    with pytest.raises(PplexError, match="mlx_lm.server --model m"):
        make_judge("m", "http://127.0.0.1:9/v1")("", Question("a"), "b")
    with pytest.raises(PplexError, match="--judge-url localhost:80: give the address"):
        make_judge("m", "localhost:80")


def test_only_this_machine_is_asked_unless_another_is_named():
    assert make_judge("m", None) == Judge("m", "http://localhost:8080/v1")


def test_a_batch_of_questions_is_judged_by_kind(tmp_path, run, tiny, server):
    from dialogues import write_dialogue

    write_dialogue(tmp_path / "a.wav", ((0.1, 0.9),), (), 1.0)
    (tmp_path / "jobs.csv").write_text(
        "input,prompt,kind,question,expected\n"
        "a.wav,You work for a bank.,context,When do you open?,Says nine.\n"
    )
    args = ("--jobs", tmp_path / "jobs.csv", "-o", tmp_path / "out", "--model", tiny)
    made = run("batch", *args, "--transcript", "json")
    assert made.exit_code == 0, made.output
    options = ("--vad", "energy", "--judge", "m", "--judge-url", url(server))
    scored = run("score", tmp_path / "out", *options, "--format", "json")
    assert scored.exit_code == 0, scored.output
    content = json.loads(scored.stdout)
    (row,) = content["recordings"]
    assert row["verdict"]["score"] == 4.0 and row["verdict"]["kind"] == "context"
    assert content["total"]["verdict"]["score"] == 4.0
    assert content["method"]["judge"]["url"] == url(server)
    user = server.asked[0][1]["messages"][1]["content"]
    assert "You work for a bank." in user and "When do you open?" in user
    table = run("score", tmp_path / "out", *options).stdout
    assert "4 of 5, right, but long" in table and "context" in table
    asked = len(server.asked)
    run("score", tmp_path / "out", "--vad", "energy")
    assert len(server.asked) == asked  # never unless asked


def test_what_the_user_asked_must_be_known(tmp_path, run, server):
    from dialogues import write_dialogue

    write_dialogue(tmp_path / "a.wav", ((1, 2),), ((2.5, 4),), 5.0)
    options = ("--vad", "energy", "--judge", "m", "--judge-url", url(server))
    scored = run("score", tmp_path, *options)
    assert "no score, what the agent said is not known" in scored.stdout
    assert server.asked == []


def test_a_score_without_a_judge_loads_nothing_that_asks_a_server(tmp_path):
    from dialogues import write_dialogue

    write_dialogue(tmp_path / "a.wav", ((1, 2),), ((2.5, 4),), 5.0)
    program = (
        "import sys\n"
        "from pplex.cli.main import cli\n"
        f"cli(['score', {str(tmp_path)!r}, '--vad', 'energy'], standalone_mode=False)\n"
        "print('urllib.request' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
