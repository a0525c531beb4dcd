"""Answer a stream of jobs with one loaded model, as many side by side as fit.

Prompts are computed once for each voice and role and their state is copied. Where
memory runs out, the batch is halved and what was under way is done again.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from pplex.audio.files import Sound
from pplex.conversation.answer import Answer
from pplex.conversation.prompts import KEPT_ROLES, open_role
from pplex.conversation.scheduler import converse_many
from pplex.conversation.script import Script
from pplex.conversation.session import Model
from pplex.conversation.state import Opening, State, read_state, state_of
from pplex.conversation.tracks import Conversation, WriteSound
from pplex.engine.base import Cost
from pplex.engine.choose import batch_size
from pplex.engine.device import is_out_of_memory
from pplex.errors import PplexError, first_line
from pplex.model.config import ModelConfig
from pplex.model.sampling import SamplingConfig
from pplex.respond.stats import ModelInfo, model_info

# About what voice and role take; published ones are shorter.
PROMPT_FRAMES = 250


@dataclass(frozen=True)
class Job:
    """What a model needs to know of a recording: ``sound``, tail included.

    With ``until_quiet`` its tail is as long as the agent speaks. ``write``, ``script``
    and ``more_takes`` are those of ``Conversation``; when the work is done again the
    first begins again, too. It goes on from where ``resume`` was saved.
    """

    key: str
    sound: Sound
    voice: str
    text: str
    seed: int
    until_quiet: bool = False
    write: WriteSound | None = None
    script: Script = ()
    resume: Path | None = None
    saves: bool = False
    more_takes: bool = False


@dataclass(frozen=True)
class Answered:
    """The answer to a job, the prompt frames before it, and what it was made with.

    ``state`` is what it goes on from, where that is wanted.
    """

    key: str
    answer: Answer
    prompt_frames: int
    info: ModelInfo
    state: State | None = None


@dataclass(frozen=True)
class Failure:
    """A job that cannot be done, and why, in a sentence.

    With ``ends_all`` no other can be done either.
    """

    key: str
    error: str
    ends_all: bool = False


@dataclass(frozen=True)
class Size:
    """How large a batch is wanted: ``rows`` or, for None, what fits.

    ``max_frames`` is the longest recording's, ``count`` how many there are, and
    ``total_frames`` what they have together. ``takes``: several are of one recording.
    """

    rows: int | None
    max_frames: int
    count: int
    total_frames: int
    takes: bool = False

    @classmethod
    def of(
        cls,
        rows: int | None,
        seconds: Sequence[float | None],
        config: ModelConfig,
        *,
        takes: bool = False,
    ) -> Size:
        """The size for recordings of so many seconds; None is one of unknown length."""
        frames = [
            config.lm.window if s is None else int(s * config.frame_rate) + 1
            for s in seconds
        ]
        return cls(rows, max(frames), len(frames), sum(frames), takes)

    def shared_by(self, workers: int) -> Size:
        """What is one's share of as many workers."""
        workers = max(1, workers)
        count = -(-self.count // workers)
        return replace(self, count=count, total_frames=-(-self.total_frames // workers))

    @property
    def busy_rows(self) -> int:
        """The most rows that are of use: more would be done before the longest is."""
        return max(1, min(self.count, -(-self.total_frames // self.max_frames)))

    def fitting(
        self, config: ModelConfig, cost: Cost, free_bytes: float | None = None
    ) -> int:
        """As many of these as ``choose.batch_size`` says and are of use."""
        rows = batch_size(
            config,
            cost,
            self.max_frames,
            free_bytes,
            prompt_frames=PROMPT_FRAMES,
            takes=self.takes,
        )
        return min(rows, self.busy_rows)


class Decoder:
    """A model that answers jobs."""

    def __init__(
        self,
        model: Model,
        sampling: SamplingConfig,
        size: Size,
        note: Callable[[str], None],
    ) -> None:
        """``note`` is told how large a batch was chosen, and why it shrinks."""
        self._model = model
        self._sampling = sampling
        self._size = size
        self._note = note
        self._openings: OrderedDict[object, Opening] = OrderedDict()
        self.batch_size = size.rows
        self.group = model.engine.codec.group
        self._chunk_frames = model.engine.codec.chunk_frames

    def run(self, jobs: Iterator[Job]) -> Iterator[Answered | Failure]:
        """Yield an answer or a failure for each job, in any order."""
        stream = _Stream(jobs)
        while not stream.ended:
            out_of_memory = None
            try:
                yield from self._converse(stream)
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e):
                    raise
                out_of_memory = first_line(e)
            # Only here has the exception let go of the arrays.
            if out_of_memory is not None:
                yield from self._shrink(stream, out_of_memory)
            yield from stream.take_failures()

    def choose_batch_size(self) -> int:
        """How many recordings are answered at a time; chosen once, from memory."""
        if self.batch_size is None:
            model = self._model
            cost, form = model.engine.cost(), model.form
            self.batch_size = self._size.fitting(model.config, cost)
            instead = f"; computed {form}; dense has other bytes" * form.lacks_memory
            self._note(f"batch size {self.batch_size}{instead}")
        return self.batch_size

    def _converse(self, stream: _Stream) -> Iterator[Answered | Failure]:
        conversations = self._conversations(stream)
        first = next(conversations, None)
        if first is None:
            return
        for one, answer in converse_many(
            self._model.engine,
            itertools.chain([first], conversations),
            self._sampling,
            batch_size=self.choose_batch_size(),
        ):
            self._note_chunks()
            job, opening = stream.under_way.pop(one.key)
            assert opening is not None
            if answer.fault:
                yield Failure(one.key, answer.fault)
            else:
                info = model_info(self._model)
                state = None
                if answer.saved is not None:
                    state = state_of(
                        self._model, answer.saved, opening, job.seed, self._sampling
                    )
                    answer = replace(answer, saved=None)
                frames = opening.prompt_frames
                yield Answered(one.key, answer, frames, info, state)
            yield from stream.take_failures()

    def _note_chunks(self) -> None:
        """Say it where the codec had too little memory for its chunks."""
        frames, before = self._model.engine.codec.chunk_frames, self._chunk_frames
        if frames < before:
            self._chunk_frames = frames
            self._note(
                f"out of memory: the codec's chunks of {before} frames become "
                f"{frames}, by which an answer's last bits may change"
            )

    def _conversations(self, stream: _Stream) -> Iterator[Conversation]:
        while (job := stream.next()) is not None:
            try:
                opening = self._opening(job)
            except PplexError as e:
                stream.fail(job, str(e))
                continue
            stream.under_way[job.key] = job, opening
            yield Conversation(
                key=job.key,
                sound=job.sound,
                start=opening.start,
                seed=job.seed,
                until_quiet=job.until_quiet,
                write=job.write,
                script=job.script,
                saves=job.saves,
                more_takes=job.more_takes,
            )

    def _opening(self, job: Job) -> Opening:
        key = job.resume or (job.voice, job.text)
        found = self._openings.get(key)
        if found is None:
            if job.resume is not None:
                found = read_state(job.resume).open(self._model)
            else:
                found = open_role(self._model, job.voice, job.text, self._note)
            self._openings[key] = found
            if len(self._openings) > KEPT_ROLES:
                self._openings.popitem(last=False)
        self._openings.move_to_end(key)
        return found

    def _shrink(self, stream: _Stream, reason: str) -> Iterator[Failure]:
        """Take back what was under way; with a single row, give that one up."""
        mx.clear_cache()
        rows = self.batch_size or 1
        if rows > 1:
            self.batch_size = rows // 2
            self._note(f"out of memory: batch size {rows} becomes {self.batch_size}")
            stream.take_back()
            return
        for job, _ in stream.under_way.values():
            yield Failure(job.key, f"the memory does not suffice for it ({reason})")
        stream.under_way.clear()


class _Stream:
    """Jobs on their way: those to come, those under way, those that failed."""

    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = jobs
        self._again: deque[Job] = deque()
        self._failures: list[Failure] = []
        self.under_way: dict[str, tuple[Job, Opening | None]] = {}
        self.ended = False

    def next(self) -> Job | None:
        job = self._again.popleft() if self._again else next(self._jobs, None)
        if job is None:
            self.ended = True
        else:
            self.under_way[job.key] = job, None
        return job

    def fail(self, job: Job, error: str) -> None:
        del self.under_way[job.key]
        self._failures.append(Failure(job.key, error))

    def take_failures(self) -> Iterator[Failure]:
        while self._failures:
            yield self._failures.pop(0)

    def take_back(self) -> None:
        self._again.extend(job for job, _ in self.under_way.values())
        self.under_way.clear()
        self.ended = not self._again and self.ended
