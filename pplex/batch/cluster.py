"""A batch on many machines: a Ray cluster of actors with a model each.

The driver reads recordings, hands them out, and writes results and manifest; actors
only compute, so the machines need no common disk. An actor gets a new recording when
one of its own is done. What a lost actor had is done again by another.
"""

from __future__ import annotations

import importlib.metadata
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pplex.batch.decoding import Answered, Failure, Job, Size
from pplex.batch.describe import Description
from pplex.batch.worker import Worker
from pplex.conversation.compute import Compute
from pplex.errors import PplexError
from pplex.model.sampling import SamplingConfig

_AHEAD = 4  # recordings an actor has beyond its batch
_MAX_STARTS = 3  # of actors on one machine that were lost
_MAX_TRIES = 3  # of a recording whose actor was lost
_CONNECT_S = 10.0
_LOOK_S = 2.0  # between looks for machines without an actor


@dataclass
class _Hand:
    """The driver's side of an actor: what it is busy with."""

    actor: Any
    node: str
    host: str
    starting: Any
    room: int = 0
    busy: dict[Any, Job] = field(default_factory=dict)


class Cluster:
    """Answers jobs on a Ray cluster: an actor a GPU or, without GPUs, a machine."""

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
            "size": asdict(size),
            "compute": compute,
        }
        self.batch_size: int | None = None
        self._hands: list[_Hand] = []
        self._starts: Counter[str] = Counter()
        self._tries: Counter[str] = Counter()
        self._voices: dict[str, Any] = {}
        self._looked = 0.0
        self._last_error = ""

    def run(self, jobs: Iterator[Job]) -> Iterator[Answered | Failure]:
        """Yield an answer or a failure for each job, in any order."""
        again: deque[Job] = deque()
        more = True
        try:
            while True:
                self._hire()
                while hand := self._freest():
                    job = again.popleft() if again else next(jobs, None)
                    if job is None:
                        more = False
                        break
                    self._send(hand, job)
                if not (more or again or any(hand.busy for hand in self._hands)):
                    return
                if not self._hands:
                    raise PplexError(
                        f"no machine of the Ray cluster can work: {self._last_error}"
                    )
                for ref, hand in self._ready():
                    yield from self._take(ref, hand, again)
        finally:
            self._dismiss()

    def _hire(self) -> None:
        """Start an actor for each GPU or machine that has none."""
        if time.monotonic() < self._looked + _LOOK_S and self._hands:
            return
        self._looked = time.monotonic()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        has_gpus = any(node["Resources"].get("GPU") for node in nodes)
        hired = Counter(hand.node for hand in self._hands)
        for node in nodes:
            resources, idx = node["Resources"], node["NodeID"]
            # A machine whose owner gave it no CPUs is not to compute.
            places = int(resources.get("CPU", 0) >= 1)
            if has_gpus:
                places = int(resources.get("GPU", 0))
            for _ in range(places - hired[idx]):
                if self._starts[idx] >= _MAX_STARTS + places - 1:
                    break
                self._starts[idx] += 1
                options = {
                    "num_cpus": 1,
                    "num_gpus": int(has_gpus),
                    "max_concurrency": 10_000,
                    "scheduling_strategy": NodeAffinitySchedulingStrategy(idx, False),
                }
                actor = self._ray.remote(Worker).options(**options).remote(self._spec)
                host = node["NodeManagerHostname"]
                self._hands.append(_Hand(actor, idx, host, actor.start.remote()))

    def _freest(self) -> _Hand | None:
        free = [hand for hand in self._hands if len(hand.busy) < hand.room]
        return min(free, key=lambda hand: len(hand.busy) / hand.room, default=None)

    def _send(self, hand: _Hand, job: Job) -> None:
        voice = None
        if job.voice not in self._model.voices:
            if job.voice not in self._voices:
                path = Path(job.voice)
                content = (path.suffix, path.read_bytes())
                self._voices[job.voice] = self._ray.put(content)
            voice = self._voices[job.voice]
        hand.busy[hand.actor.answer.remote(job, voice)] = job

    def _ready(self) -> list[tuple[Any, _Hand]]:
        """What has come in, or nothing after a while."""
        owners = {ref: hand for hand in self._hands for ref in hand.busy}
        owners |= {hand.starting: hand for hand in self._hands if not hand.room}
        refs, _ = self._ray.wait(
            list(owners), num_returns=1, timeout=_LOOK_S, fetch_local=True
        )
        more, _ = self._ray.wait(list(owners), num_returns=len(owners), timeout=0)
        return [(ref, owners[ref]) for ref in dict.fromkeys([*refs, *more])]

    def _take(
        self, ref: Any, hand: _Hand, again: deque[Job]
    ) -> Iterator[Answered | Failure]:
        if hand not in self._hands:  # lost since
            return
        try:
            value = self._ray.get(ref)
        except self._ray.exceptions.RayError as e:
            yield from self._lose(hand, e, again)
            return
        if ref == hand.starting:
            hand.room = value + _AHEAD
            self.batch_size = max(value, self.batch_size or 0)
            return
        outcome, notes = value
        del hand.busy[ref]
        for note in notes:
            self._note(f"{hand.host}: {note}")
        yield outcome

    def _lose(
        self, hand: _Hand, error: Exception, again: deque[Job]
    ) -> Iterator[Failure]:
        self._hands.remove(hand)
        self._ray.kill(hand.actor)
        reason = getattr(error, "cause", None) or error
        self._last_error = f"{hand.host}: {str(reason).strip().splitlines()[0]}"
        if hand.room:
            again_s = f"; {len(hand.busy)} recordings are done again"
            self._note(f"lost a worker on {self._last_error}{again_s}")
        else:
            self._note(f"no worker on {self._last_error}")
        for job in hand.busy.values():
            self._tries[job.key] += 1
            if self._tries[job.key] < _MAX_TRIES:
                again.append(job)
            else:
                yield Failure(
                    job.key,
                    f"its worker was lost {_MAX_TRIES} times ({self._last_error})",
                )

    def _dismiss(self) -> None:
        for hand in self._hands:
            self._ray.kill(hand.actor)
        self._hands.clear()
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
        reason = str(e).strip().splitlines()[0]
        raise PplexError(f"there is no Ray cluster at {address}: {reason}") from e
