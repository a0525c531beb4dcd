"""Dialogues on a time line, and as the grid of tokens the language model reads."""

import math
import random
from dataclasses import dataclass, field

import domain
import torch
from codes import Agent
from prompts import prompt_ids
from sizes import EPAD, FRAME_SIZE, PAD
from torch import Tensor

SILENT_FRAMES = 6
ROOM_TO_ANSWER = 50  # after a long turn
# Frames from the end of a question to the answer: longer than pauses inside one, and
# than those of people who speak for long.
REPLY_AFTER = {
    "plain": (6, 6, 7, 8),
    "fact": (6, 6, 7, 8),
    "unknown": (8, 9, 9, 10),
    "stranger": (15, 16),
}


@dataclass
class Plan:
    """Where everything of a dialogue is, in frames from the start of the conversation.

    `user` holds (clip, sample), `agent` (text, first frame, end frame) and `turns` what
    an evaluation needs to know.
    """

    frames: int
    user: list[tuple[dict, int]] = field(default_factory=list)
    agent: list[tuple[str, int, int]] = field(default_factory=list)
    turns: list[dict] = field(default_factory=list)


class Planner:
    """Puts dialogues on a time line; the user's clips start at multiples of `step`."""

    def __init__(self, clips: list[dict], agent: Agent, step: int = 1) -> None:
        self.agent, self.step = agent, step
        self.clips: dict[str, list[dict]] = {}
        for clip in clips:
            self.clips.setdefault(clip["text"], []).append(clip)

    def place(
        self, rng: random.Random, text: str, start: float, most: float = math.inf
    ) -> tuple[dict, int, float]:
        """A clip speaking from frame `start` on: clip, first sample, end frame.

        One of at most `most` frames, where there are such.
        """
        clips = self.clips[text]
        if text == domain.STRANGER:
            clips = [c for c in clips if c["frames"] <= most] or clips
        clip = rng.choice(clips)
        sample = max(0, int(start * FRAME_SIZE) - clip["speech"][0])
        sample -= sample % self.step
        return clip, sample, (sample + clip["speech"][1]) / FRAME_SIZE

    def plan(
        self, rng: random.Random, talk: domain.Dialogue, voice: str, frames: int
    ) -> Plan:
        """Lay out as many turns as fit."""
        plan = Plan(frames)
        cursor = rng.uniform(2, 16)
        for turn in talk.turns:
            user, agent, start = [], [], cursor
            for text, answer in zip(turn.statements, turn.backchannels, strict=True):
                clip, sample, end = self.place(rng, text, cursor)
                user.append((clip, sample))
                first = math.ceil(end) + rng.choice((2, 3))
                agent.append((answer, first, first + self.length(answer, voice)))
                cursor = end + rng.uniform(10, 18)
            most = frames - cursor - ROOM_TO_ANSWER
            clip, sample, end = self.place(rng, turn.question, cursor, most)
            user.append((clip, sample))
            begin = cursor
            first = math.ceil(end) + rng.choice(REPLY_AFTER[turn.subject])
            length = self.length(turn.answer, voice)
            last = first + length
            if last + 4 > frames:
                break
            interrupted = turn.interrupted and length >= 16
            if interrupted:
                cursor = first + length * rng.uniform(0.25, 0.6)
                last = math.ceil(cursor) + rng.choice((3, 4))
                interrupted = last < first + length - 3
            if turn.resumed:
                cursor = first + length * rng.uniform(0.2, 0.9)
            elif not interrupted:
                last = first + length
                rest = (5, 25) if rng.random() < 0.85 else (25, 80)
                cursor = last + rng.uniform(*rest)
            agent.append((turn.answer, first, last))
            plan.user += user
            plan.agent += agent
            plan.turns.append(
                {
                    "question": turn.question,
                    "answer": turn.answer,
                    "subject": turn.subject,
                    "voice": clip["voice"],
                    "kind": clip["kind"],
                    "backchannels": len(turn.statements),
                    "start": start,
                    "question_start": begin,
                    "end": end,
                    "interrupted": interrupted,
                }
            )
        return plan

    def length(self, text: str, voice: str) -> int:
        return self.agent.codes[text, voice].shape[1]


class Grid:
    """Lays frames out as rows (10, time): text, agent, user semantic."""

    def __init__(self, agent: Agent, tokenizer, text_card: int, card: int) -> None:
        self.agent, self.tokenizer = agent, tokenizer
        self.text_initial, self.audio_initial = text_card, card
        self.placed: dict[tuple[str, str], list[tuple[int, int]]] = {}

    def prompt(self, voice_codes: Tensor, text: str) -> tuple[Tensor, Tensor]:
        """Frames of the prompts: text (n), agent (8, n)."""
        ids = prompt_ids(self.tokenizer, text)
        quiet = self.agent.constants.silence[:, None]
        spoken = voice_codes.shape[1]
        n = spoken + SILENT_FRAMES + len(ids) + SILENT_FRAMES
        texts = torch.full((n,), PAD)
        texts[n - SILENT_FRAMES - len(ids) : n - SILENT_FRAMES] = torch.tensor(ids)
        return texts, torch.cat([voice_codes, quiet.expand(-1, n - spoken)], 1)

    def speech(self, plan: Plan, voice: str) -> tuple[Tensor, Tensor]:
        """Frames of the conversation: text (n), agent (8, n)."""
        texts = torch.full((plan.frames,), PAD)
        agent = self.agent.constants.silence[:, None].repeat(1, plan.frames)
        for text, first, last in plan.agent:
            codes = self.agent.codes[text, voice][:, : last - first]
            agent[:, first : first + codes.shape[1]] = codes
            for frame, idx in self.pieces(text, voice):
                if first + frame < min(last, plan.frames):
                    texts[first + frame] = idx
        return texts, agent

    def pieces(self, text: str, voice: str) -> list[tuple[int, int]]:
        """Text tokens of a clip by frame: each word's pieces from its start on."""
        if (text, voice) in self.placed:
            return self.placed[text, voice]
        words: list[list[int]] = []
        for idx in self.tokenizer.encode(text):
            if self.tokenizer.id_to_piece(idx).startswith("\u2581") or not words:
                words.append([])
            words[-1].append(idx)
        placed, free = [], 0
        for ids, (time, _) in zip(words, self.agent.words[text, voice], strict=True):
            frame = max(int(time * 12.5), free)
            if frame > free:
                placed.append((frame - 1, EPAD))
            placed += [(frame + i, idx) for i, idx in enumerate(ids)]
            free = frame + len(ids)
        self.placed[text, voice] = placed
        return placed

    def rows(self, texts: Tensor, agent: Tensor, user: Tensor) -> Tensor:
        """Frames as delayed rows, with the initial ids of the first two columns."""
        n = len(texts)
        rows = torch.empty(10, n, dtype=torch.int16)
        rows[0], rows[1], rows[9] = texts, agent[0], user
        rows[2:9, 1:] = agent[1:, :-1]
        rows[1:, 0] = self.audio_initial
        rows[2:9, 1] = self.audio_initial
        rows[0, 0] = self.text_initial
        return rows
