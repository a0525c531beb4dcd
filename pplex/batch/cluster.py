"""A batch on many machines: a Ray cluster of workers with a model each.

The driver hands out names; workers read the recordings and write the outputs, which the
driver then gives their names, as it keeps the manifest. A worker that does not see the
driver's files is sent what is in them, and sends back what is to be in the outputs. Ray
starts a worker that was lost again while its machine is there. What it was busy with is
done by whoever is free: Ray's own retries of a task would wait for the same worker,
whose machine may be gone.

Nothing here may import MLX at the top: a worker is told its GPU first.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import os
import queue
import re
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pplex.batch.plan import digest_of
from pplex.checkpoint.unpack import MAX_VOICE_BYTES
from pplex.errors import PplexError, first_line
from pplex.files import hidden_beside, open_regular, read_regular, reading
from pplex.respond.lock import is_held_by

if TYPE_CHECKING:
    from pplex.batch.answering import Answering, Result
    from pplex.batch.decoding import Size
    from pplex.batch.describe import Description
    from pplex.batch.prepare import Batch
    from pplex.batch.records import Task, Written

    _Answer = tuple[Result, dict[str, bytes], list[str]]

_MAX_TRIES = 3  # of a recording whose worker was lost
_MAX_RESTARTS = 3  # of a worker on its machine
_CONNECT_S = 10.0
_RESTART_S = 0.2  # between looks whether Ray has started a worker again
_LOOK_S = 2.0  # between looks for machines without a worker
_TOGETHER_S = 2.0  # that a worker which is ready waits for those that start beside it
# A batch waits so long for another recording to join it.
_PATIENCE_S = 0.3
_LAST_WORDS_S = 1.0  # from a worker's fault to its end: the driver hears of it

# A file's name and what is in it.
Content = tuple[str, bytes]


@dataclass
class _Remote:
    """A worker as the driver sees it.

    It answers ``rows`` recordings at a time, and may have ``room``, 0 while it starts;
    ``busy`` are those it has, of ``busy_s`` seconds, and ``given_s`` those it ever had.
    """

    actor: Any
    host: str
    starting: Any
    is_new: bool = True
    sees_files: bool = True
    rows: int = 0
    room: int = 0
    busy: dict[Any, Task] = field(default_factory=dict)
    busy_s: float = 0.0
    given_s: float = 0.0
    wants_word: bool = False  # that no more will come
    is_testing: bool = False  # a recording that may be what lost other workers


class Cluster:
    """Answers recordings on a Ray cluster: a worker a GPU or, without, a machine."""

    def __init__(
        self,
        batch: Batch,
        model: Description,
        size: Size,
        note: Callable[[str], None],
    ) -> None:
        """Wait for the first workers; ``batch.ray`` is an address or ``"local"``."""
        assert batch.ray is not None
        self._ray = _import_ray()
        self._own_cluster = not self._ray.is_initialized()
        if self._own_cluster:
            _connect(self._ray, batch.ray)
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
            "called": model.local.name,
            "identity": model.identity,
            "offline": batch.offline,
            "pplex": importlib.metadata.version("pplex"),
            "sampling": asdict(batch.settings.sampling),
            "form": {"compute": batch.compute, "kv_bits": batch.kv_bits},
            "folder": os.getcwd(),
            "driver": (os.getpid(), socket.gethostname()),
        }
        self.batch_size: int | None = None
        self._total_s = size.total_frames / model.config.frame_rate
        self._workers: list[_Remote] = []
        self._hired: Counter[str] = Counter()
        self._tries: Counter[str] = Counter()
        self._todo: deque[Task] = deque()
        # Lost twice: these have a worker to themselves when the others are done, so
        # that none fails for the one beside it.
        self._doubtful: deque[Task] = deque()
        self._voices: dict[str, Any] = {}
        self._looked = 0.0
        self._last_error = ""
        self._done: Callable[[Result], None] = lambda result: None
        try:
            while not any(worker.room for worker in self._workers):
                self._go_on()
            # Dealt out in turn, long and short recordings fill everybody's rows.
            end = time.monotonic() + _TOGETHER_S
            while self._are_new and time.monotonic() < end:
                self._go_on()
        except BaseException:
            self._shut_down()
            raise

    @property
    def rows(self) -> int:
        """How many are answered at a time by the workers there are."""
        return sum(worker.rows for worker in self._workers)

    def run(self, tasks: Iterator[Task], done: Callable[[Result], None]) -> None:
        """Answer ``tasks``; ``done`` is told of each, in any order."""
        self._done = done
        self._todo.extend(tasks)
        try:
            while True:
                while self._todo and (worker := self._freest()):
                    self._send(worker, self._todo.popleft())
                for worker in self._workers:
                    if self._doubtful and worker.room and not worker.busy:
                        worker.is_testing = True
                        self._send(worker, self._doubtful.popleft())
                    if worker.wants_word and (worker.is_testing or not self._todo):
                        worker.wants_word = False
                        worker.actor.no_more.remote()
                busy = any(worker.busy for worker in self._workers)
                if not (busy or self._todo or self._doubtful):
                    return
                self._go_on()
        finally:
            self._shut_down()

    def _go_on(self) -> None:
        """Start workers where there is none, and take what has come in."""
        self._start_workers()
        if not self._workers:
            raise PplexError(
                f"no machine of the Ray cluster can work: {self._last_error}"
            )
        for ref, worker in self._ready():
            self._take(ref, worker)

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

    @property
    def _are_new(self) -> bool:
        return any(worker.is_new for worker in self._workers)

    def _freest(self) -> _Remote | None:
        """Who has least to do and may have more.

        While others start for the first time, nobody gets more than a fair share.
        """
        share_s = float("inf")
        if self._are_new:
            share_s = self._total_s / len(self._workers) - self._todo[0].seconds
        free = [
            worker
            for worker in self._workers
            if len(worker.busy) < worker.room
            and not worker.is_testing
            and (worker.given_s <= share_s or not worker.busy)
        ]
        return min(free, key=lambda w: w.busy_s / w.rows, default=None)

    def _send(self, worker: _Remote, task: Task) -> None:
        voice, content = task.request.settings.voice, None
        try:
            if voice and voice not in self._model.voices:
                if voice not in self._voices:
                    path = Path(voice)
                    with reading(f"voice {path}", "cannot be read"):
                        file = voice, read_regular(path, MAX_VOICE_BYTES)
                    self._voices[voice] = self._ray.put(file)
                content = self._voices[voice]
            source, sound = task.request.source, None
            with reading(source, "cannot be read"):
                status = source.stat()
                if not worker.sees_files:
                    with open_regular(source) as recording:
                        sound = recording.read()
        except PplexError as e:
            self._fail(task, str(e))
            return
        known = status.st_size, status.st_mtime_ns
        worker.busy[worker.actor.answer.remote(task, known, sound, content)] = task
        worker.busy_s += task.seconds
        worker.given_s += task.seconds
        worker.wants_word = True

    def _fail(self, task: Task, error: str, *, ends_all: bool = False) -> None:
        from pplex.batch.decoding import Failure

        self._done(Failure(task.request.key, error, ends_all))

    def _ready(self) -> list[tuple[Any, _Remote]]:
        """What has come in, or nothing after a while."""
        owners = {ref: worker for worker in self._workers for ref in worker.busy}
        owners |= {w.starting: w for w in self._workers if not w.room}
        refs, _ = self._ray.wait(
            list(owners), num_returns=1, timeout=_LOOK_S, fetch_local=True
        )
        more, _ = self._ray.wait(list(owners), num_returns=len(owners), timeout=0)
        return [(ref, owners[ref]) for ref in dict.fromkeys([*refs, *more])]

    def _take(self, ref: Any, worker: _Remote) -> None:
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
                self._lose(worker)
            return
        if is_start:
            worker.rows, ahead = value
            worker.room = worker.rows + ahead
            worker.is_new = False
            self.batch_size = max(worker.rows, self.batch_size or 0)
            return
        task = worker.busy.pop(ref)
        worker.busy_s -= task.seconds
        worker.is_testing = worker.is_testing and bool(worker.busy)
        if value is None:
            worker.sees_files = False
            self._send(worker, task)
            return
        result, contents, notes = value
        for note in notes:
            self._note(f"{worker.host}: {note}")
        try:
            self._done(_unpacked(task, result, contents) if contents else result)
        except OSError as e:
            path = task.request.outputs.audio
            self._fail(task, f"cannot write {path}: {e.strerror or e}", ends_all=True)

    def _lose(self, worker: _Remote) -> None:
        """Take back what a lost worker had, and wait until Ray has started it again."""
        lost = list(worker.busy.values())
        worker.busy.clear()
        worker.busy_s, worker.is_testing = 0.0, False
        worker.room, worker.starting = 0, worker.actor.start.remote()
        count = f"{len(lost)} recordings are done again"
        self._note(f"lost a worker on {self._last_error}; {count}")
        for task in reversed(lost):
            key = task.request.key
            self._tries[key] += 1
            if self._tries[key] < _MAX_TRIES - 1:
                self._todo.appendleft(task)
            elif self._tries[key] < _MAX_TRIES:
                self._doubtful.append(task)
            else:
                why = f"its worker was lost {_MAX_TRIES} times ({self._last_error})"
                self._fail(task, why)

    def _shut_down(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers.clear()
        if self._own_cluster:
            self._ray.shutdown()


def _unpacked(task: Task, written: Written, contents: dict[str, bytes]) -> Written:
    """Write down the outputs that a worker has sent, by what they are."""
    drafts = {}
    for what, content in contents.items():
        path = task.request.outputs.files()[what]
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = hidden_beside(path)
        hidden.write_bytes(content)
        drafts[what] = replace(written.drafts[what], hidden=hidden)
    return replace(written, drafts=drafts)


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
        self._tasks: queue.Queue[Task | None] = queue.Queue()
        self._waiting: dict[str, asyncio.Future] = {}
        self._notes: list[str] = []
        self._sees_outputs: bool | None = None
        self._is_ending = False
        with suppress(OSError):  # another machine may not have it
            os.chdir(spec["folder"])

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
        self._tasks.put(None)

    async def answer(self, task: Task, *given: Any) -> _Answer | None:
        """As ``_answer``; what goes wrong there is the recording's failure."""
        from pplex.batch.decoding import Failure

        try:
            return await self._answer(task, *given)
        except Exception as e:
            if self._is_ending:  # the driver is to take all back
                raise
            error = f"{socket.gethostname()} cannot answer it: {first_line(e)}"
            return Failure(task.request.key, error), {}, []

    async def _answer(
        self,
        task: Task,
        known: tuple[int, int],
        sound: bytes | None,
        voice: Content | None,
    ) -> _Answer | None:
        """The answer to a recording of ``known`` size and time of change.

        With what is in its outputs where its ``sound`` was sent, and what is worth a
        line since the last. None if it was not and the driver's files are not seen.
        """
        if sound is None and not self._sees(task, known):
            return None
        if voice is not None:
            settings = replace(task.local.settings, voice=self._voice_file(*voice))
            task = replace(task, local=replace(task.local, settings=settings))
        if sound is not None:
            folder = self._scratch / digest_of(task.request.key)
            task = _moved(task, folder)
            task.local.source.write_bytes(sound)
            os.utime(task.local.source, ns=(known[1], known[1]))
        key = task.request.key
        self._waiting[key] = future = self._loop.create_future()
        self._tasks.put(task)
        result = await future
        contents = {}
        if sound is not None:
            for what, draft in getattr(result, "drafts", {}).items():
                contents[what] = draft.hidden.read_bytes()
            shutil.rmtree(folder)
        notes, self._notes = self._notes, []
        return result, contents, notes

    @functools.cached_property
    def _scratch(self) -> Path:
        """A folder for what the driver sends."""
        return Path(tempfile.mkdtemp(prefix="pplex-worker-"))

    def _voice_file(self, name: str, content: bytes) -> str:
        path = self._scratch / f"{digest_of(name)}{Path(name).suffix}"
        if not path.exists():
            path.write_bytes(content)
        return str(path)

    def _sees(self, task: Task, known: tuple[int, int]) -> bool:
        """Whether the recording and the folder of the results are the driver's."""
        if self._sees_outputs is None:
            self._sees_outputs = is_held_by(task.outdir, *self._spec["driver"])
        try:
            status = task.request.source.stat()
        except OSError:
            return False
        return self._sees_outputs and known == (status.st_size, status.st_mtime_ns)

    def _serve(self) -> None:
        try:
            answering = self._load()
            rows = answering.batch_size
            self._tell(self._started.set_result, (rows, answering.ahead))
            while True:
                answering.run(self._batch_of_tasks(), self._answered)
        except BaseException as e:  # whatever it is, those who wait must hear of it
            error = e if isinstance(e, Exception) else RuntimeError(repr(e))
            self._tell(self._fail, error)

    def _answered(self, result: Result) -> None:
        self._tell(self._waiting.pop(result.key).set_result, result)

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

    def _batch_of_tasks(self) -> Iterator[Task]:
        """Recordings as they come; ends when none does, so that no row waits long."""
        while (task := self._tasks.get()) is None:
            pass
        while task is not None or not self._tasks.empty():
            if task is not None:
                yield task
            try:
                task = self._tasks.get(timeout=_PATIENCE_S)
            except queue.Empty:
                return

    def _load(self) -> Answering:
        from pplex.batch.answering import Answering
        from pplex.batch.decoding import Decoder, Size
        from pplex.batch.describe import describe
        from pplex.checkpoint.hashes import model_identity
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
        model = load(local, **spec["form"], many=True)
        sampling = SamplingConfig(**spec["sampling"])
        note = self._notes.append
        decoder = Decoder(model, sampling, size, note)
        return Answering(describe(replace(local, name=spec["called"])), decoder, note)


def _moved(task: Task, folder: Path) -> Task:
    """``task`` with its recording and its outputs in a new folder."""
    outdir, given = folder / "outputs", task.request.outputs
    outdir.mkdir(parents=True)

    def there(path: Path) -> Path:
        return outdir / os.path.relpath(path, task.outdir)

    outputs = replace(
        given,
        audio=there(given.audio),
        transcripts=tuple(map(there, given.transcripts)),
        stats=given.stats and there(given.stats),
        tokens=given.tokens and there(given.tokens),
    )
    local = replace(task.local, source=folder / "sound", outputs=outputs)
    return replace(task, local=local, outdir=outdir)
