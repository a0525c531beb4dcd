"""A batch on a Ray cluster of several nodes, one of which is lost; skipped without Ray.

pip install 'pplex[ray]'
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_batch import SETTINGS, Notes, contents, last_lines, record

from pplex.batch import cluster as ray_cluster
from pplex.batch.decoding import Size
from pplex.batch.plan import OutputOptions, Selection
from pplex.batch.prepare import Batch
from pplex.batch.run import run_batch
from pplex.errors import PplexError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform == "win32", reason="Ray's test cluster"),
]
COUNT = 24


@pytest.fixture(scope="module")
def ray():
    """Ray, without its reports to its makers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Actors find the test's pplex where it is.
        paths = [str(Path(__file__).parent.parent), *sys.path]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield pytest.importorskip("ray")


@pytest.fixture
def cluster(ray):
    """Two nodes that compute, and a head that does not."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def batch(tmp_path, tiny, data):
    for idx in range(COUNT):
        record(tmp_path / "in" / f"{idx}.wav", 24000 + 500 * idx, idx)
    voice = tmp_path / "me.wav"
    shutil.copy(data / "respond" / "voice_NATM0.wav", voice)
    return Batch(
        selection=Selection((tmp_path / "in",)),
        outdir=tmp_path / "out",
        outputs=OutputOptions(transcripts=("json",), tokens=True),
        settings=replace(SETTINGS, voice=str(voice)),
        model_name=str(tiny),
        offline=True,
        batch_size=2,
    )


def test_a_lost_machines_recordings_are_done_elsewhere(cluster, batch, tmp_path):
    run_batch(batch, Notes())
    cluster, nodes = cluster
    notes, failure = Notes(), []
    other = replace(batch, outdir=tmp_path / "other", ray=cluster.address)

    def drive() -> None:
        try:
            failure.append(run_batch(other, notes))
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=drive)
    thread.start()
    begin = time.monotonic()
    while len(notes.done) < 3 and thread.is_alive():
        assert time.monotonic() < begin + 120
        time.sleep(0.02)
    cluster.remove_node(nodes[0], allow_graceful=False)
    thread.join(timeout=180)
    (summary,) = failure
    assert not isinstance(summary, BaseException), summary
    assert (summary.done, summary.failed) == (COUNT, {})
    assert any("lost a worker" in note for note in notes.notes)
    assert contents(other.outdir) == contents(batch.outdir)
    assert len(last_lines(other.outdir)) == COUNT


def test_a_cluster_that_is_not_there_is_said(ray, batch):
    with pytest.raises(PplexError, match="no Ray cluster at 127.0.0.1:1"):
        run_batch(replace(batch, ray="127.0.0.1:1"), Notes())


def test_machines_with_another_model_do_not_work(cluster, batch, monkeypatch):
    from pplex.batch import describe

    cluster, _ = cluster
    monkeypatch.setattr(describe, "model_identity", lambda local: "another")
    with pytest.raises(PplexError, match="another one than here"):
        run_batch(replace(batch, ray=cluster.address), Notes())


class Deadly(ray_cluster.Worker):
    """A worker that one recording kills, and that cannot take another."""

    async def answer(self, task, *content):
        if task.request.key == "3.wav":
            os._exit(1)
        if task.request.key == "5.wav":
            task = replace(task, local=None)
        return await super().answer(task, *content)


def test_a_recording_that_kills_its_workers_fails_alone(
    cluster, batch, tmp_path, tiny, run, monkeypatch
):
    run_batch(batch, Notes())
    monkeypatch.setattr(ray_cluster, "Worker", Deadly)
    sampling = batch.settings.sampling
    outdir = tmp_path / "other"
    result = run(
        *("batch", tmp_path / "in", "-o", outdir, "--model", tiny, "--json"),
        *("--ray", cluster[0].address, "--transcript", "json", "--tokens"),
        *("--voice", batch.settings.voice, "--prompt", batch.settings.text),
        *("--seed", batch.settings.seed, "--batch-size", batch.batch_size),
        *("--top-k", sampling.top_k, "--text-top-k", sampling.text_top_k),
    )
    failed = json.loads(result.stdout)["failures"]  # what Ray prints is not there
    assert set(failed) == {"3.wav", "5.wav"}
    assert "lost 3 times" in failed["3.wav"]
    assert "NoneType" in failed["5.wav"]
    assert result.stderr.count("lost a worker") == 3
    known = contents(outdir)
    assert known and known.items() <= contents(batch.outdir).items()
    assert len(known) == 3 * (COUNT - 2)


class Blind(ray_cluster.Worker):
    """A worker on a machine that does not see the driver's files."""

    def _sees(self, task, known):
        return False


def test_what_a_worker_does_not_see_is_sent(cluster, batch, tmp_path, monkeypatch):
    (tmp_path / "in" / "bad.wav").write_bytes(
        (tmp_path / "in" / "0.wav").read_bytes()[:30]
    )
    notes = Notes()
    run_batch(batch, notes)
    monkeypatch.setattr(ray_cluster, "Worker", Blind)
    other = replace(batch, outdir=tmp_path / "other", ray=cluster[0].address)
    summary = run_batch(other, Notes())
    assert (summary.done, summary.failed) == (COUNT, notes.errors)
    assert contents(other.outdir) == contents(batch.outdir)
    ours, theirs = last_lines(batch.outdir), last_lines(other.outdir)
    assert all(theirs[key]["input"] == ours[key]["input"] for key in ours)
    again = run_batch(other, Notes())
    assert (again.done, again.skipped) == (0, COUNT)


class Slow(ray_cluster.Worker):
    """A worker that leaves time for others to come."""

    async def answer(self, *given):
        await asyncio.sleep(1.0)
        return await super().answer(*given)


def test_a_machine_that_joins_later_gets_work(cluster, batch, monkeypatch):
    cluster, nodes = cluster
    cluster.remove_node(nodes[0])
    monkeypatch.setattr(ray_cluster, "Worker", Slow)
    sent = []
    send = ray_cluster.Cluster._send

    def noted(self, worker, task):
        sent.append(worker.actor)
        if len(sent) == 1:
            cluster.add_node(num_cpus=1)
        send(self, worker, task)

    monkeypatch.setattr(ray_cluster.Cluster, "_send", noted)
    summary = run_batch(replace(batch, ray=cluster.address), Notes())
    assert (summary.done, len(set(sent))) == (COUNT, 2)


def test_each_worker_has_rows_for_its_share():
    size = Size(None, 100, 800, 16_000)
    assert (size.busy_rows, size.shared_by(4).busy_rows) == (160, 40)
    assert size.shared_by(1) == size


def test_each_worker_has_its_share_of_the_sound(cluster, batch, monkeypatch):
    sent = []
    send = ray_cluster.Cluster._send

    def noted(self, worker, task):
        sent.append((worker.actor, task.seconds))
        send(self, worker, task)

    monkeypatch.setattr(ray_cluster.Cluster, "_send", noted)
    summary = run_batch(replace(batch, ray=cluster[0].address), Notes())
    assert summary.done == COUNT
    one, other = {
        actor: sum(s for a, s in sent if a is actor) for actor, _ in sent
    }.values()
    assert one == pytest.approx(other, rel=0.25)
