"""What the tests share: the data folder, a small model, and a way to run commands."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

# Values are exact in float32, on a CPU: that is where tests run, whatever there is.
# Those of GPUs ask for `on_gpu`.
mx.set_default_device(mx.cpu)

import reference_driver  # noqa: E402  (it looks which engines there are)

DATA = Path(__file__).parent / "data"
TINY = DATA / "tiny"


@pytest.fixture(scope="module")
def on_gpu():
    """MLX computes on its GPU; where it has none, on the CPU as if that were one."""
    if mx.is_available(mx.gpu):
        mx.set_default_device(mx.gpu)
    else:
        mx.disable_compile()  # it would call a C compiler
    yield
    mx.set_default_device(mx.cpu)
    mx.enable_compile()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of reference data."""
    return DATA


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A checkpoint folder with random weights, in NVIDIA's layout."""
    return TINY


@pytest.fixture(scope="session")
def tiny_model():
    """The loaded model of ``tiny``."""
    from pplex.checkpoint.hub import resolve
    from pplex.conversation.session import load

    return load(resolve(str(TINY), offline=True))


@pytest.fixture(params=reference_driver.ENGINES)
def each_way(request) -> str:
    """The name of each engine that this machine has."""
    return request.param


@pytest.fixture
def each_engine(each_way, small_model):
    """Each engine that this machine has, with the small model's weights."""
    return reference_driver.engine_of(each_way, small_model)


@pytest.fixture(autouse=True)
def outside_ci(monkeypatch):
    """What is printed is the same wherever the tests run."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)


@pytest.fixture
def run():
    """Run ``pplex`` with arguments; stdout and stderr apart."""
    from pplex.cli.main import cli

    def invoke(*args: object) -> Result:
        return CliRunner().invoke(cli, [str(arg) for arg in args])

    return invoke


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    """A checkpoint folder of the sizes of ``small.SMALL``."""
    from random_checkpoint import write_checkpoint
    from small import SMALL

    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(folder, SMALL, voice_frames=12)
    return folder


@pytest.fixture(scope="session")
def small_model(small_folder):
    """The loaded model of ``small_folder``."""
    from pplex.checkpoint.hub import resolve
    from pplex.conversation.session import load

    return load(resolve(str(small_folder), offline=True))
