"""A batch on many machines: a Ray cluster of workers with a model each.

The driver reads recordings, hands them out, and writes results and manifest; workers
only compute, so the machines need no common disk. A worker gets a new recording when
one of its own is done. Ray starts a worker that was lost again while its machine is
there. What it was busy with is done by whoever is free: Ray's own retries of a task
would wait for the same worker, whose machine may be gone.

Nothing here may import MLX at the top: a worker is told its GPU first.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import queue
import re
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pplex.audio.files import Samples
from pplex.checkpoint.unpack import MAX_VOICE_BYTES
from pplex.errors import PplexError, first_line
from pplex.files import read_regular, reading

if TYPE_CHECKING:
    from pplex.batch.decoding import Answered, Decoder, Failure, Job, Size
    from pplex.batch.describe import Description
    from pplex.engine.choose import Compute
    from pplex.model.sampling import SamplingConfig

_AHEAD = 4  # recordings a worker has beyond its batch, and those its codec is given
_MAX_TRIES = 3  # of a recording whose worker was lost
_MAX_RESTARTS = 3  # of a worker on its machine
_CONNECT_S = 10.0
_RESTART_S = 0.2  # between looks whether Ray has started a worker again
_TOGETHER_S = 2.0  # that a worker which is ready waits for those that start beside it
_LOOK_S = 2.0  # between looks for machines without a worker
# A batch waits so long for another recording to join it.
_PATIENCE_S = 0.3
_LAST_WORDS_S = 1.0  # from a worker's fault to its end: the driver hears of it

# A voice's file: its suffix and content.
Voice = tuple[str, bytes]


@dataclass
class _Remote:
    """A worker as the driver sees it.

    ``room`` is how many recordings it may have, 0 while it starts; ``busy`` are those
    it has.
    """

    actor: Any
    host: str
    starting: Any
    room: int = 0
    busy: dict[Any, Job] = field(default_factory=dict)


class Cluster:
    """Answers jobs on a Ray cluster: a worker a GPU or, without GPUs, a machine."""

    def __init__(
        self,
        address: str,
        offline: bool,
        model: Description,
        sampling: SamplingConfig,
        size: Size,
        compute: Compute,
        note: Callable[[str], None],
    ) -> None:
        """``address`` is one of Ray's, or ``"local"`` for a cluster of this machine."""
        self._ray = _import_ray()
        self._own_cluster = not self._ray.is_initialized()
        if self._own_cluster:
            _connect(self._ray, address)
        self._model = model
        self._size = size
        self._note = note
        name = model.local.name
        if model.local.repo is not None:
            name = f"{model.local.repo}@{model.local.revision}"
        elif Path(name).expanduser().exists():
            name = str(model.local.path.absolute())
        self._spec = {
            "model": name,
            "identity": model.identity,
            "offline": offline,
            "pplex": importlib.metadata.version("pplex"),
            "sampling": asdict(sampling),
            "compute": compute,
        }
        self.batch_size: int | None = None
        self._workers: list[_Remote] = []
        self._hired: Counter[str] = Counter()
        self._tries: Counter[str] = Counter()
        self._again: deque[Job] = deque()
        # Lost twice: these have a worker to themselves when the others are done, so
        # that none fails for the one beside it.
        self._doubtful: deque[Job] = deque()
        self._voices: dict[str, Any] = {}
        self._looked = self._ready_at = 0.0
        self._last_error = ""

    def run(self, jobs: Iterator[Job]) -> Iterator[Answered | Failure]:
        """Yield an answer or a failure for each job, in any order."""
        more = True
        try:
            while True:
                self._start_workers()
                while worker := self._freest():
                    job = self._again.popleft() if self._again else next(jobs, None)
                    if job is None:
                        if more:  # nobody need wait for another
                            for each in self._workers:
                                each.actor.no_more.remote()
                        more = False
                        break
                    self._send(worker, job)
                for worker in self._workers:
                    if self._doubtful and worker.room and not worker.busy:
                        self._send(worker, self._doubtful.popleft())
                left = more or self._again or self._doubtful
                if not left and not any(worker.busy for worker in self._workers):
                    return
                if not self._workers:
                    raise PplexError(
                        f"no machine of the Ray cluster can work: {self._last_error}"
                    )
                for ref, worker in self._ready():
                    yield from self._take(ref, worker)
        finally:
            self._shut_down()

    def _start_workers(self) -> None:
        """Start a worker for each GPU or machine that never had one."""
        if time.monotonic() < self._looked + _LOOK_S and self._workers:
            return
        self._looked = time.monotonic()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        has_gpus = any(node["Resources"].get("GPU") for node in nodes)
        places = {
            node["NodeID"]: int(node["Resources"].get("GPU", 0))
            if has_gpus
            # A machine whose owner gave it no CPUs is not to compute.
            else int(node["Resources"].get("CPU", 0) >= 1)
            for node in nodes
        }
        share = self._size.shared_by(sum(places.values()))
        spec = self._spec | {"size": asdict(share)}
        for node in nodes:
            idx = node["NodeID"]
            for _ in range(places[idx] - self._hired[idx]):
                self._hired[idx] += 1
                options = {
                    "num_cpus": 1,
                    "num_gpus": int(has_gpus),
                    "max_concurrency": 10_000,
                    "max_restarts": _MAX_RESTARTS,
                    "scheduling_strategy": NodeAffinitySchedulingStrategy(idx, False),
                }
                actor = self._ray.remote(Worker).options(**options).remote(spec)
                host = node["NodeManagerHostname"]
                self._workers.append(_Remote(actor, host, actor.start.remote()))

    def _freest(self) -> _Remote | None:
        # The longest come first: they are to be shared out.
        if self._are_starting():
            return None
        last_try = _MAX_TRIES - 1
        free = [
            worker
            for worker in self._workers
            if len(worker.busy) < worker.room
            and all(self._tries[job.key] < last_try for job in worker.busy.values())
        ]
        return min(free, key=lambda w: len(w.busy) / w.room, default=None)

    def _are_starting(self) -> bool:
        """Whether the first worker is ready and others will be in a moment."""
        ready = [worker for worker in self._workers if worker.room]
        if ready and not self._ready_at:
            self._ready_at = time.monotonic()
        others = len(ready) < len(self._workers)
        return others and time.monotonic() < self._ready_at + _TOGETHER_S

    def _send(self, worker: _Remote, job: Job) -> None:
        voice = None
        if job.voice and job.voice not in self._model.voices:
            if job.voice not in self._voices:
                path = Path(job.voice)
                with reading(f"voice {path}", "cannot be read"):
                    content = path.suffix, read_regular(path, MAX_VOICE_BYTES)
                self._voices[job.voice] = self._ray.put(content)
            voice = self._voices[job.voice]
        # The machine may not have the file, nor the folder of the results.
        sent = replace(job, sound=Samples(job.sound.pcm), write=None)
        worker.busy[worker.actor.answer.remote(sent, voice)] = job

    def _ready(self) -> list[tuple[Any, _Remote]]:
        """What has come in, or nothing after a while."""
        owners = {ref: worker for worker in self._workers for ref in worker.busy}
        owners |= {w.starting: w for w in self._workers if not w.room}
        refs, _ = self._ray.wait(
            list(owners), num_returns=1, timeout=_LOOK_S, fetch_local=True
        )
        more, _ = self._ray.wait(list(owners), num_returns=len(owners), timeout=0)
        return [(ref, owners[ref]) for ref in dict.fromkeys([*refs, *more])]

    def _take(self, ref: Any, worker: _Remote) -> Iterator[Answered | Failure]:
        is_start = ref == worker.starting
        if not is_start and ref not in worker.busy:  # lost since
            return
        try:
            value = self._ray.get(ref)
        except self._ray.exceptions.RayError as e:
            if is_start and isinstance(e, self._ray.exceptions.ActorUnavailableError):
                time.sleep(_RESTART_S)
                worker.starting = worker.actor.start.remote()
                return
            reason = getattr(e, "cause", None) or e
            self._last_error = f"{worker.host}: {first_line(reason)}"
            if is_start:
                self._note(f"no worker on {self._last_error}")
                self._workers.remove(worker)
                self._ray.kill(worker.actor)
            else:
                yield from self._lose(worker)
            return
        if is_start:
            rows, ahead = value
            worker.room = rows + ahead
            self.batch_size = max(rows, self.batch_size or 0)
            return
        outcome, notes = value
        del worker.busy[ref]
        for note in notes:
            self._note(f"{worker.host}: {note}")
        yield outcome

    def _lose(self, worker: _Remote) -> Iterator[Failure]:
        """Take back what a lost worker had, and wait until Ray has started it again."""
        from pplex.batch.decoding import Failure

        lost = list(worker.busy.values())
        worker.busy.clear()
        worker.room, worker.starting = 0, worker.actor.start.remote()
        count = f"{len(lost)} recordings are done again"
        self._note(f"lost a worker on {self._last_error}; {count}")
        for job in lost:
            self._tries[job.key] += 1
            if self._tries[job.key] < _MAX_TRIES - 1:
                self._again.append(job)
            elif self._tries[job.key] < _MAX_TRIES:
                self._doubtful.append(job)
            else:
                yield Failure(
                    job.key,
                    f"its worker was lost {_MAX_TRIES} times ({self._last_error})",
                )

    def _shut_down(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers.clear()
        if self._own_cluster:
            self._ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as e:
        raise PplexError(
            "--ray needs Ray, which is not installed: pip install 'pplex[ray]'"
        ) from e
    return ray


def _connect(ray: Any, address: str) -> None:
    try:
        if host := re.fullmatch(r"(?:ray://)?([^/]+):(\d+)/?", address):
            # Ray itself would try for minutes.
            socket.create_connection((host[1], int(host[2])), _CONNECT_S).close()
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level="error",
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        reason = first_line(e)
        raise PplexError(f"there is no Ray cluster at {address}: {reason}") from e


class Worker:
    """An actor; its methods are called from the driver, over the network."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """``spec`` holds plain values only, see ``Cluster``."""
        self._spec = spec
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._waiting: dict[str, asyncio.Future] = {}
        self._notes: list[str] = []
        self._voices = tempfile.TemporaryDirectory(prefix="pplex-voices-")
        self._is_ending = False

    async def start(self) -> tuple[int, int]:
        """Load the model; how many recordings it answers at a time, and wants ahead."""
        if self._is_ending:  # Ray asks again where it starts the next one
            await asyncio.Event().wait()
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[tuple[int, int]] = self._loop.create_future()
        threading.Thread(target=self._serve, daemon=True).start()
        return await self._started

    async def no_more(self) -> None:
        """Nothing will come that is worth waiting for."""
        self._jobs.put(None)

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
        from pplex.batch.plan import digest_of

        suffix, content = voice
        path = Path(self._voices.name) / f"{digest_of(name)}{suffix}"
        if not path.exists():
            path.write_bytes(content)
        return str(path)

    def _serve(self) -> None:
        try:
            decoder = self._load()
            self._tell(self._started.set_result, (decoder.batch_size, self._ahead))
            while True:
                for outcome in decoder.run(self._batch_of_jobs()):
                    self._tell(self._waiting.pop(outcome.key).set_result, outcome)
        except BaseException as e:  # whatever it is, those who wait must hear of it
            error = e if isinstance(e, Exception) else RuntimeError(repr(e))
            self._tell(self._fail, error)

    def _fail(self, error: Exception) -> None:
        """Tell those who wait; a worker that had begun ends, for Ray to start anew."""
        if self._started.done():
            self._is_ending = True
            self._loop.call_later(_LAST_WORDS_S, os._exit, 1)
        else:
            self._started.set_exception(error)
        for future in self._waiting.values():
            future.set_exception(error)

    def _tell(self, call: Callable[..., object], *args: object) -> None:
        self._loop.call_soon_threadsafe(call, *args)

    def _batch_of_jobs(self) -> Iterator[Job]:
        """Recordings as they come; ends when none does, so that no row waits long."""
        while (job := self._jobs.get()) is None:
            pass
        while job is not None or not self._jobs.empty():
            if job is not None:
                yield job
            try:
                job = self._jobs.get(timeout=_PATIENCE_S)
            except queue.Empty:
                return

    def _load(self) -> Decoder:
        from pplex.batch.decoding import Decoder, Size
        from pplex.batch.describe import model_identity
        from pplex.checkpoint.hub import resolve
        from pplex.conversation.session import load
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
        model = load(local, compute=spec["compute"], many=True)
        sampling = SamplingConfig(**spec["sampling"])
        decoder = Decoder(model, sampling, size, self._notes.append)
        decoder.choose_batch_size()
        group = model.engine.codec.group
        # As many wait while others are coded.
        self._ahead = _AHEAD + (2 * group if group > 1 else 0)
        return decoder
