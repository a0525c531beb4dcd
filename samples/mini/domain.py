"""What is said: sentences, roles and dialogues, read from domain.toml."""

import random
import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import tomllib

STRANGER = "(stranger)"
ROLES = ("teacher", "bank", "restaurant", "chat")
STRANGERS = (0.16, 0.5)  # of the turns in training, and of those after a stranger's
TELLS = {"ask": 0.25, "test": 0.15}  # of the turns begin with statements
VOICE_SENTENCES = [
    "The quick brown fox jumps over the lazy dog near the river.",
    "She had a dark suit in greasy wash water all year.",
    "A rainbow is a division of white light into many beautiful colors.",
    "Please call Stella and ask her to bring these things from the store.",
    "We were away a year ago, and the boy was there before the sun.",
    "The north wind and the sun were arguing about which was the stronger.",
    "Today is a fine day to read aloud for a machine that listens.",
    "Six spoons of fresh snow peas and five thick slabs of blue cheese.",
]


@cache
def domain() -> dict:
    """The content of domain.toml."""
    return tomllib.loads((Path(__file__).parent / "domain.toml").read_text())


def slots(template: str) -> list[str]:
    """Names of the facts that a template needs."""
    return re.findall(r"{(\w+)}", template)


def fill(template: str) -> list[str]:
    """A template with every combination of its facts."""
    names = slots(template)
    choices = product(*(domain()["facts"][name] for name in names))
    return [template.format(**dict(zip(names, c, strict=True))) for c in choices]


def reply(intent: dict | None, role: str, facts: dict[str, str]) -> str:
    """The right answer of a role that knows `facts`; no intent is an unknown one."""
    unknown = domain()["unknown"]
    if intent is None:
        return unknown
    replies = intent["reply"]
    answer = replies.get(role, replies.get("all", unknown))
    if all(name in facts for name in slots(answer)):
        return answer.format(**facts)
    return intent.get("without", {}).get(role, unknown)


def subject(intent: dict | None, role: str, facts: dict[str, str]) -> str:
    """What a right answer takes: a "fact" of the prompt, "unknown" or "plain"."""
    if reply(intent, role, facts) == domain()["unknown"]:
        return "unknown"
    needed = slots(intent["reply"].get(role) or intent["reply"]["all"])
    return "fact" if needed and all(name in facts for name in needed) else "plain"


def replies() -> list[str]:
    """Everything the agent can say."""
    templates = [domain()["unknown"], *domain()["backchannels"]]
    for intent in domain()["intent"]:
        templates += intent["reply"].values()
        templates += intent.get("without", {}).values()
    return sorted({text for template in templates for text in fill(template)})


def questions(intent: dict, split: str) -> list[str]:
    """The phrasings of an intent for split "ask" or "test"."""
    if split == "test":
        indirect = [text[1:] for text in intent["ask"] if text.startswith("~")]
        carriers = domain()["test_carriers"]
        return intent["test"] + [c.format(t) for t in indirect for c in carriers]
    texts = []
    for text in intent["ask"]:
        carried = [c.format(text[1:]) for c in domain()["carriers"]]
        texts += carried if text.startswith("~") else [text]
    return texts


def user_sentences(split: str) -> list[str]:
    """Everything a user says in a split."""
    texts = domain()["long"][split] + domain()["other"][split]
    for intent in domain()["intent"]:
        texts += questions(intent, split)
    if split == "ask":
        texts = [text for text in texts if spoken_as(text) not in _tested()]
    return sorted(set(texts))


def vary(rng: random.Random, text: str) -> str:
    """Another phrasing of a sentence: words exchanged, put before or after."""
    rules = domain()["vary"]
    for _ in range(rng.choice((0, 1, 1, 2))):
        able = [r for r in rules["exchange"] if re.search(rf"\b{r[0]}\b", text)]
        if able:
            old, new = rng.choice(able)
            text = re.sub(rf"\b{old}\b", new, text, count=1)
    if rng.random() < 0.4:
        before = rng.choice(rules["before"])
        text = f"{before}{rng.choice((',', '.', ''))} {text}"
    if rng.random() < 0.25:
        text = f"{text[:-1]} {rng.choice(rules['after'])}{text[-1]}"
    text = re.sub(r"\s+", " ", text).strip()
    return text[0].upper() + text[1:]


def spoken_as(text: str) -> tuple[str, ...]:
    """The words of a sentence, to tell whether two are the same."""
    return tuple(re.findall(r"[a-z]+", text.lower()))


@cache
def _tested() -> set[tuple[str, ...]]:
    return {spoken_as(text) for text in user_sentences("test")}


@cache
def variations(text: str) -> tuple[str, ...]:
    """Variations of a trained sentence, none of them a sentence to be tested."""
    carried = any(text.startswith(c.split("{")[0]) for c in domain()["carriers"])
    rng = random.Random(text)
    made = {text} | {vary(rng, text) for _ in range(2 if carried else 16)}
    return tuple(sorted(t for t in made if spoken_as(t) not in _tested()))


@cache
def others() -> list[str]:
    """Unknown questions put together from parts, some of the many."""
    parts = domain()["other_parts"]
    texts = [f"{a} {b}?" for a, b in product(parts["start"], parts["end"])][::2]
    return [text for text in texts if spoken_as(text) not in _tested()]


@cache
def statements(split: str) -> list[str]:
    """What a user tells in a long turn."""
    texts = list(domain()["long"][split])
    if split == "ask":
        texts += [f"{' '.join(p)}." for p in product(*domain()["long_parts"].values())]
    return texts


@dataclass(frozen=True)
class Turn:
    """What the user says and the agent answers.

    `subject` is "fact" where the answer needs one of the role prompt, "unknown",
    "stranger" (long speech in which nothing is asked) or "plain". `statements` come
    before the question, the agent says `backchannels` after them. An `interrupted`
    answer is cut by the user's next turn, but not that to a stranger who has only made
    a long pause and `resumed`.
    """

    question: str
    answer: str
    subject: str
    statements: tuple[str, ...] = ()
    backchannels: tuple[str, ...] = ()
    interrupted: bool = False
    resumed: bool = False


@dataclass(frozen=True)
class Dialogue:
    """A role, the prompt that sets it, and turns."""

    role: str
    prompt: str
    turns: tuple[Turn, ...]


def dialogue(rng: random.Random, split: str, turns: int) -> Dialogue:
    """Make up a dialogue."""
    role = rng.choice(ROLES)
    template = rng.choice(domain()["roles"][role])
    facts = {name: rng.choice(domain()["facts"][name]) for name in slots(template)}
    spoken = []
    for i in range(turns):
        follows = bool(spoken) and spoken[-1].question == STRANGER
        if split == "ask" and rng.random() < STRANGERS[follows]:
            if follows and rng.random() < 0.8:
                spoken[-1] = replace(spoken[-1], resumed=True)
            spoken.append(Turn(STRANGER, domain()["unknown"], "stranger"))
            continue
        greets = i == 0 and turns > 1 and rng.random() < 0.4
        intent = domain()["intent"][0] if greets else _intent(rng, role)
        question = _question(rng, intent, split)
        told: tuple[str, ...] = ()
        if rng.random() < TELLS[split]:
            told = tuple(rng.sample(statements(split), rng.randint(1, 3)))
        spoken.append(
            Turn(
                question,
                reply(intent, role, facts),
                subject(intent, role, facts),
                told,
                _backchannels(rng, role, split, len(told)),
                i + 1 < turns and rng.random() < 0.2,
            )
        )
    return Dialogue(role, template.format(**facts), tuple(spoken))


def _backchannels(
    rng: random.Random, role: str, split: str, count: int
) -> tuple[str, ...]:
    """What an agent says between statements.

    In training each has its turn: a model that did not know which would share what is
    likely among four, and silence would win.
    """
    texts = domain()["backchannels"]
    if split == "test":
        return tuple(rng.choice(texts) for _ in range(count))
    first = ROLES.index(role)
    return tuple(texts[(first + i) % len(texts)] for i in range(count))


def _question(rng: random.Random, intent: dict | None, split: str) -> str:
    """A phrasing of an intent; in training mostly varied."""
    if split == "test":
        pool = domain()["other"]["test"] if intent is None else questions(intent, split)
        return rng.choice(pool)
    if intent is None:
        return rng.choice(domain()["other"]["ask"] if rng.random() < 0.4 else others())
    text = ""
    while not text or spoken_as(text) in _tested():
        text = rng.choice(intent["ask"])
        if text.startswith("~"):
            text = rng.choice(domain()["carriers"]).format(text[1:])
    return text if rng.random() < 0.4 else rng.choice(variations(text))


@cache
def _known(role: str) -> tuple[list[dict], list[dict]]:
    """Intents a role has an answer for, and those whose answer needs a fact."""
    known = [i for i in domain()["intent"] if role in i["reply"] or "all" in i["reply"]]
    return known, [i for i in known if slots(i["reply"].get(role) or i["reply"]["all"])]


def _intent(rng: random.Random, role: str) -> dict | None:
    """An intent for a role, mostly one it has an answer for; None is unknown."""
    draw = rng.random()
    intents = domain()["intent"]
    if draw < 0.08:
        return None
    if draw < 0.18:
        return rng.choice(intents)
    known, with_facts = _known(role)
    return rng.choice(with_facts if draw < 0.42 else known)


def families() -> list[list[tuple[str, int]]]:
    """Replies with a fact, one list for each template, and the index of the fact."""
    found = []
    for intent in domain()["intent"]:
        for template in intent["reply"].values():
            if slots(template):
                index = [w.startswith("{") for w in template.split()].index(True)
                found.append([(text, index) for text in fill(template)])
    return [family for i, family in enumerate(found) if family not in found[:i]]
