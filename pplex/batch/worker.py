"""The actor of a Ray cluster: a model in a thread, and recordings that wait for it.

Nothing here may import MLX at the top: an actor chooses its BLAS first.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pplex.errors import PplexError

if TYPE_CHECKING:
    from pplex.batch.decoding import Answered, Decoder, Failure, Job

# A batch waits so long for another recording to join it.
_PATIENCE_S = 0.3

# A voice's file: its suffix and content.
Voice = tuple[str, bytes]


class Worker:
    """An actor; its methods are called from the driver, over the network."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """``spec`` holds plain values only, see ``Cluster``."""
        self._spec = spec
        self._jobs: queue.Queue[Job] = queue.Queue()
        self._waiting: dict[str, asyncio.Future] = {}
        self._notes: list[str] = []
        self._voices = tempfile.TemporaryDirectory(prefix="pplex-voices-")

    async def start(self) -> int:
        """Load the model; how many recordings it answers at a time."""
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[int] = self._loop.create_future()
        threading.Thread(target=self._serve, args=(started,), daemon=True).start()
        return await started

    async def answer(
        self, job: Job, voice: Voice | None
    ) -> tuple[Answered | Failure, list[str]]:
        """The answer to one recording, and what is worth a line since the last."""
        if voice is not None:
            job = replace(job, voice=self._voice_file(job.voice, voice))
        self._waiting[job.key] = future = self._loop.create_future()
        self._jobs.put(job)
        outcome = await future
        notes, self._notes = self._notes, []
        return outcome, notes

    def _voice_file(self, name: str, voice: Voice) -> str:
        from pplex.batch.identity import digest_of

        suffix, content = voice
        path = Path(self._voices.name) / f"{digest_of(name)}{suffix}"
        if not path.exists():
            path.write_bytes(content)
        return str(path)

    def _serve(self, started: asyncio.Future[int]) -> None:
        try:
            decoder = self._load()
            self._tell(started.set_result, decoder.batch_size)
            while True:
                for outcome in decoder.run(self._batch_of_jobs()):
                    key = getattr(outcome, "key", None) or outcome.result.key
                    self._tell(self._waiting.pop(key).set_result, outcome)
        except BaseException as e:  # whatever it is, those who wait must hear of it
            error = e if isinstance(e, Exception) else RuntimeError(repr(e))
            for future in [started, *self._waiting.values()]:
                self._tell(_set_exception, future, error)

    def _tell(self, call: Callable[..., object], *args: object) -> None:
        self._loop.call_soon_threadsafe(call, *args)

    def _batch_of_jobs(self) -> Iterator[Job]:
        """Recordings as they come; ends when none does, so that no row waits long."""
        yield self._jobs.get()
        while True:
            try:
                yield self._jobs.get(timeout=_PATIENCE_S)
            except queue.Empty:
                return

    def _load(self) -> Decoder:
        from pplex.backend import use_fast_blas

        use_fast_blas()
        from pplex.batch.decoding import Decoder, Size, load_for
        from pplex.batch.identity import model_identity
        from pplex.checkpoint.hub import resolve
        from pplex.model.sampling import SamplingConfig

        spec = self._spec
        version = importlib.metadata.version("pplex")
        if version != spec["pplex"]:
            raise PplexError(
                f"it has pplex {version}, this machine has {spec['pplex']}; install "
                "the same"
            )
        local = resolve(spec["model"], offline=spec["offline"], progress=False)
        if model_identity(local) != spec["identity"]:
            raise PplexError(f"its model {spec['model']} is another one than here")
        size = Size(**spec["size"])
        model, _ = load_for(local, size, spec["compute"])
        sampling = SamplingConfig(**spec["sampling"])
        decoder = Decoder(model, sampling, size, self._notes.append)
        decoder.choose_batch_size()
        return decoder


def _set_exception(future: asyncio.Future, error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
