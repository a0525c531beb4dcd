"""Let mini answer recordings of people and count what it says to them.

    python humans.py FOLDER RECORDINGS... [--roles ROLE ...] [--seeds N]

FOLDER is the checkpoint. None of its questions should be asked in them: then all it may
say is its honest sentence, once and whole, after the user's turn. Every recording is
answered in every role, with seeds from 0 on. Needs pplex with its extra `score`.
"""

import argparse
import itertools
from collections import Counter
from pathlib import Path

import domain
from sizes import FRAME_RATE

import pplex
from pplex.audio.files import read_pcm
from pplex.evaluation.speech_activity import (
    VAD_RATE,
    Segment,
    common,
    make_detector,
    total_s,
)

TAIL_S = 4.0


def parse(words: list[str]) -> list[tuple[str, bool]]:
    """What was said as sentences of the domain, and whether each came to its end."""
    sentences = [text.split() for text in domain.replies()]
    said, i = [], 0
    while i < len(words):
        best: tuple[int, list[str]] = (0, [])
        for sentence in sentences:
            n = 0
            while n < len(sentence) and words[i + n : i + n + 1] == sentence[n : n + 1]:
                n += 1
            best = max(best, (n, sentence), key=lambda b: (b[0], -len(b[1])))
        n, sentence = best
        said.append((" ".join(sentence or words[i : i + 1]), n == len(sentence)))
        i += max(n, 1)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("recordings", type=Path, nargs="+")
    parser.add_argument("--roles", nargs="*", default=domain.ROLES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    model, detect = pplex.load(args.folder), make_detector("silero")
    kinds, over_s, user_s, length_s = Counter(), 0.0, 0.0, 0.0
    for role, seed in itertools.product(args.roles, range(args.seeds)):
        prompt = domain.domain()["roles"][role][-1]
        for recording, answer in zip(
            args.recordings,
            model.batch(args.recordings, prompt=prompt, tail=TAIL_S, seed=seed),
            strict=True,
        ):
            said = parse([word.text for word in answer.words])
            for text, whole in said:
                if not whole:
                    kinds["broken"] += 1
                elif text == domain.domain()["unknown"]:
                    kinds["honest"] += 1
                elif text in domain.domain()["backchannels"]:
                    kinds["backchannel"] += 1
                else:
                    kinds["other"] += 1
            user = read_pcm(recording, sample_rate=VAD_RATE).pcm
            talking = detect(user)
            replies = [
                Segment(word.start_s, max(word.end_s, word.start_s + 1 / FRAME_RATE))
                for word in answer.words
            ]
            over_s += total_s(common(talking, replies))
            user_s += total_s(talking)
            length_s += len(user) / VAD_RATE
            if args.verbose:
                print(role, recording.name, said)
    turns = sum(kinds.values())
    print(f"{len(args.recordings)} recordings, {len(args.roles)} roles: {dict(kinds)}")
    print(f"honest             {kinds['honest'] / max(1, turns):.1%} of {turns}")
    print(f"broken             {kinds['broken'] / length_s * 120:.2f} in two minutes")
    print(f"talks over         {over_s / user_s:.1%} of {user_s:.0f} s of speech")


if __name__ == "__main__":
    main()
