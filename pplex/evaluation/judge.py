"""What a language model on this machine thinks of what the agent said.

The judge is whatever answers OpenAI's chat protocol, as mlx-lm's and other local
servers do. Its prompt, temperature and seed are fixed and written into the score, and
so are its reasons: a judge's score means something beside the same judge's only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from pplex.errors import PplexError, first_line

_DEFAULT_URL = "http://localhost:8080/v1"  # where mlx_lm.server listens
LOWEST, HIGHEST = 0, 5
SEED = 0
_INSTRUCTION = (
    "You grade one reply of a voice agent on the telephone. You are given the agent's "
    "instructions, what the caller said, and the agent's words. If it is given, what a "
    "good reply does counts most. 5: right, complete, keeps to the instructions, kind "
    "and brief. 4: right, with a small flaw. 3: partly right or partly beside the "
    "question. 2: mostly beside the question. 1: wrong, or against the instructions. "
    "0: nothing, or nothing that can be understood. A reply that honestly says that it "
    "does not know is right where the instructions do not have the answer. Reply with "
    'JSON alone: {"score": 0 to 5, "reason": "one sentence"}'
)
_TIMEOUT_S = 300.0
_MAX_BYTES = 1 << 20
_MAX_TOKENS = 2000  # models that think first need them


@dataclass(frozen=True)
class Question:
    """What the caller asked, what a good answer does, and which kind of test it is."""

    asked: str
    expected: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Verdict:
    """A score from 0 to 5 and its reason; None where the judge gave none."""

    score: float | None
    reason: str
    kind: str = ""


@dataclass(frozen=True)
class Judge:
    """A model behind a server of OpenAI's chat protocol."""

    model: str
    url: str = _DEFAULT_URL

    def __call__(self, role: str, question: Question, said: str) -> Verdict:
        """Grade what was ``said`` in a ``role``; PplexError if nobody answers."""
        lines = [f"Instructions of the agent: {role or '(none)'}"]
        lines += [f"The caller: {question.asked}"]
        lines += [f"A good reply: {question.expected}"] if question.expected else []
        lines += [f"The agent: {said or '(said nothing)'}"]
        content = {
            "model": self.model,
            "temperature": 0,
            "seed": SEED,
            "max_tokens": _MAX_TOKENS,
            "messages": [
                {"role": "system", "content": _INSTRUCTION},
                {"role": "user", "content": "\n".join(lines)},
            ],
        }
        try:
            answer = self._post("chat/completions", content)
            text = answer["choices"][0]["message"]["content"]
        except (LookupError, TypeError) as e:
            raise PplexError(
                f"the judge at {self.url} answers in another protocol than OpenAI's "
                f"chat completions ({first_line(e)})"
            ) from e
        score, reason = _read(str(text))
        return Verdict(score, reason, question.kind)

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        import urllib.error
        import urllib.request

        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
                return json.loads(reply.read(_MAX_BYTES))
        except (OSError, ValueError) as e:
            detail = ""
            if isinstance(e, urllib.error.HTTPError):
                detail = ": " + e.read(300).decode("utf-8", "replace").strip()
            raise PplexError(
                f"the judge at {self.url} does not answer ({first_line(e)}{detail}); "
                f"start one, such as mlx_lm.server --model {self.model}, or name "
                "another with --judge-url"
            ) from e

    def describe(self) -> dict[str, Any]:
        """Everything that decides a verdict, for the output."""
        return {
            **asdict(self),
            "instruction": _INSTRUCTION,
            "temperature": 0,
            "seed": SEED,
            "scale": [LOWEST, HIGHEST],
        }


def make_judge(model: str, url: str | None) -> Judge:
    """A judge on this machine, or on the host that ``url`` names."""
    url = url or _DEFAULT_URL
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PplexError(
            f"--judge-url {url}: give the address of a server, such as {_DEFAULT_URL}"
        )
    return Judge(model, url)


def _read(text: str) -> tuple[float | None, str]:
    """The score and reason in a model's reply: the last JSON object that has them."""
    decoder, found = json.JSONDecoder(), None
    start = text.find("{")
    while start >= 0:
        try:
            value, length = decoder.raw_decode(text[start:])
        except ValueError:
            length = 1
        else:
            if isinstance(value, dict) and "score" in value:
                found = value
        start = text.find("{", start + length)
    score = (found or {}).get("score")
    if isinstance(score, str):
        try:
            score = float(score)
        except ValueError:
            score = None
    if isinstance(score, bool) or not isinstance(score, int | float):
        return None, f"no score in the judge's reply: {text[:200]}"
    if not LOWEST <= score <= HIGHEST:
        return None, f"the judge's score is {score}, where 0 to 5 was asked for"
    return float(score), str((found or {}).get("reason", ""))
