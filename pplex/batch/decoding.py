"""Answer a stream of jobs with one loaded model, as many side by side as fit.

Prompts are computed once for each voice and role and their state is copied. Where
memory runs out, the batch is halved and what was under way is done again.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pplex.checkpoint.hub import LocalModel
from pplex.conversation.compute import Choice, Compute, load_as
from pplex.conversation.many import Item, Result, auto_batch_size, converse_many
from pplex.conversation.prompt import Prefilled, prefill
from pplex.conversation.session import Model, make_role
from pplex.errors import PplexError
from pplex.model.sampling import SamplingConfig
from pplex.respond.stats import ModelInfo, model_info

# Prefilled states that are kept; each is tens of MB for the 7B models.
KEPT_ROLES = 4
# About what voice and role take; published ones are shorter.
PROMPT_FRAMES = 250


@dataclass(frozen=True)
class Job:
    """What a model needs to know of a recording: ``pcm`` (samples,), tail included."""

    key: str
    pcm: np.ndarray
    voice: str
    text: str
    seed: int


@dataclass(frozen=True)
class Answered:
    """A job's result, the prompt frames before it, and what it was made with."""

    result: Result
    prompt_frames: int
    info: ModelInfo


@dataclass(frozen=True)
class Failure:
    """A job that cannot be done, and why, in a sentence."""

    key: str
    error: str


@dataclass(frozen=True)
class Size:
    """How large a batch is wanted: ``rows`` or, for None, what fits.

    ``max_frames`` is the longest recording's, ``count`` how many there are, and
    ``total_frames`` what they have together.
    """

    rows: int | None
    max_frames: int
    count: int
    total_frames: int

    @property
    def many(self) -> bool:
        """Whether several recordings will be answered at a time."""
        return self.count > 1 and self.rows != 1

    @property
    def busy_rows(self) -> int:
        """The most rows that are of use: more would be done before the longest is."""
        return max(1, min(self.count, -(-self.total_frames // self.max_frames)))


def load_for(
    local: LocalModel, size: Size, wanted: Compute = "auto"
) -> tuple[Model, Choice]:
    """Load a model to answer many recordings at a time, and how it computes."""
    return load_as(local, wanted, many=size.many)


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
        self._roles: OrderedDict[tuple[str, str], Prefilled] = OrderedDict()
        self.batch_size = size.rows

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
                out_of_memory = str(e).strip().splitlines()[0]
            # Only here has the exception let go of the arrays.
            if out_of_memory is not None:
                yield from self._shrink(stream, out_of_memory)
            yield from stream.take_failures()

    def choose_batch_size(self) -> int:
        """How many recordings are answered at a time; chosen once, from memory."""
        if self.batch_size is None:
            frames = self._size.max_frames + PROMPT_FRAMES
            rows = auto_batch_size(self._model, frames, self._size.busy_rows)
            self.batch_size = max(1, rows)
            self._note(f"batch size {self.batch_size}")
        return self.batch_size

    def _converse(self, stream: _Stream) -> Iterator[Answered | Failure]:
        items = self._items(stream)
        first = next(items, None)
        if first is None:
            return
        batch_size = self.choose_batch_size()
        for result in converse_many(
            self._model,
            itertools.chain([first], items),
            self._sampling,
            batch_size=batch_size,
        ):
            _, prompt_frames = stream.under_way.pop(str(result.key))
            yield Answered(result, prompt_frames, model_info(self._model))
            yield from stream.take_failures()

    def _items(self, stream: _Stream) -> Iterator[Item]:
        while (job := stream.next()) is not None:
            try:
                prefilled = self._prefilled(job.voice, job.text)
            except PplexError as e:
                stream.fail(job, str(e))
                continue
            stream.under_way[job.key] = job, prefilled.prompt.num_frames
            yield Item(job.key, job.pcm, prefilled, job.seed)

    def _prefilled(self, voice: str, text: str) -> Prefilled:
        found = self._roles.get((voice, text))
        if found is None:
            role = make_role(self._model, voice, text)
            found = prefill(self._model.lm, role.prompt)
            self._roles[voice, text] = found
            if len(self._roles) > KEPT_ROLES:
                self._roles.popitem(last=False)
        self._roles.move_to_end((voice, text))
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
        self.under_way: dict[str, tuple[Job, int]] = {}
        self.ended = False

    def next(self) -> Job | None:
        job = self._again.popleft() if self._again else next(self._jobs, None)
        if job is None:
            self.ended = True
        else:
            self.under_way[job.key] = job, 0
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether MLX, on any of its backends, or Python could not get memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in text
        for sign in (
            "out of memory",
            "outofmemory",
            "unable to allocate",
            "malloc",
            "bad_alloc",
            "cudaerrormemoryallocation",
            "insufficient memory",
            "maximum allowed buffer size",
        )
    )
