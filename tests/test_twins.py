"""Twins of the published repositories: they are as published, and every command works.

They are pulled from a stand-in for Hugging Face that huggingface_hub talks to.
"""

from __future__ import annotations

import ctypes
import filecmp
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.file_download
import mlx.core as mx
import pytest
from fake_hub import FakeHub, fake_hub
from huggingface_hub import constants
from twins import REPOS, SIZES, VOICES, config_text, write_twin

from pplex.checkpoint.config import unknown_keys

# Read off the published files by others.
PUBLISHED_BYTES = {
    "bf16": {
        "model.safetensors": 16_742_874_000,
        "tokenizer-e351c8d8-checkpoint125.safetensors": 384_644_900,
        "tokenizer_spm_32k_3.model": 552_778,
        "voices.tgz": 6_095_521,
    },
    "8bit": {
        "config.json": 1_462,
        "temporal.safetensors": 6_988_291_888,
        "depformer.safetensors": 1_381_596_968,
        "embeddings.safetensors": 988_459_536,
        "mimi.safetensors": 384_644_900,
        "tokenizer_spm_32k_3.model": 552_778,
        "voices/NATF2.safetensors": 418_216,
        "voices/VARM0.safetensors": 352_680,
        "voices/VARM2.safetensors": 565_672,
    },
    "moshiko-bf16": {"model.safetensors": 15_375_697_208},
}
# What Hugging Face counts, and the specification.
PARAMETERS = {16: 8_371_408_896, 8: 7_687_729_152}
NOT_NEEDED = {"README.md", ".gitattributes", "dist.tgz", "voices/voices/NATF0.pt"}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    """Empty caches, of this project and of Hugging Face, and no network but ours."""
    connect = socket.socket.connect

    def connect_here(self, address):
        assert address[0] in ("127.0.0.1", "::1"), "a test went online"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """The folder of each twin, small, made when it is asked for."""
    top = tmp_path_factory.mktemp("twins")

    def folder(name: str) -> Path:
        if not (top / name).is_dir():
            write_twin(top / name, REPOS[name])
        return top / name

    return folder


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for Hugging Face; repositories are put in by the test."""
    with fake_hub() as hub:
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        yield hub


def serve(hub: FakeHub, name: str, folder: Path) -> str:
    """Let the hub have a twin; what users call it."""
    repo = REPOS[name]
    hub.repos[repo.name] = (folder, repo.revision)
    return name if name in ("8bit", "4bit", "bf16") else repo.name


def do_not_wait(monkeypatch) -> None:
    """Let huggingface_hub try again at once, with small pieces of a file."""
    at_once = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.file_download, "time", at_once)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)


def needed(folder: Path) -> set[str]:
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return files - NOT_NEEDED


def run_as_user(hub: FakeHub, cache: Path, *args: object) -> subprocess.Popen[str]:
    """Start ``pplex`` on its own, without root's power to write where it must not."""
    code = (
        "import ctypes, os, sys\n"
        "if sys.platform == 'linux': ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "-m", "pplex", *map(str, args)],
        env={
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_CACHE": str(cache),
            "XDG_CACHE_HOME": str(cache.parent / "own"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# As published.


@pytest.mark.parametrize("name", REPOS)
def test_files_of_full_size_are_as_published_and_accepted(name, tmp_path, run):
    write_twin(tmp_path, REPOS[name], SIZES["7b"], sparse=True)
    published = PUBLISHED_BYTES.get(name, {})
    assert {f: (tmp_path / f).stat().st_size for f in published} == published
    found = json.loads(run("models", "info", tmp_path, "--json").stdout)
    norms = 0
    if REPOS[name].layout == "sliced":  # has the depformer's norms once a step
        norms = 12 * 1024 * (REPOS[name].steps - 1)
    assert found["parameters"] - norms == PARAMETERS[REPOS[name].steps]
    assert found["voices"] == (list(VOICES) if REPOS[name].voices else [])


def test_twins_of_8_and_16_bits_hold_the_same_weights(twins, run, data):
    compared = run(
        *("models", "compare", twins("bf16"), twins("8bit"), "--json"),
        *(data / "respond" / "user_c.wav", "--seconds", "0.8"),
    )
    assert json.loads(compared.stdout)["mean_kl"] < 0.01


# Every command, from an empty cache, and offline afterwards.


@pytest.mark.parametrize("name", REPOS)
def test_every_command_works_through_the_hub_and_then_offline(
    name, twins, run, hub, tmp_path, monkeypatch, data
):
    folder = twins(name)
    model = serve(hub, name, folder)
    pulled = run("models", "pull", model)
    assert (pulled.exit_code, hub.asked_for()) == (0, needed(folder))
    path = Path(pulled.stdout.strip())
    assert path.name == REPOS[name].revision
    assert needed(path) == needed(folder)
    assert all(filecmp.cmp(folder / f, path / f, shallow=False) for f in needed(path))

    # Pulled again, nothing but the state of the repository is asked for.
    hub.requests.clear()
    assert run("models", "pull", model).stdout == pulled.stdout
    assert {method for method, _, _ in hub.requests} == {"GET"}
    assert not hub.asked_for()

    stats = tmp_path / "stats.json"

    def refuse(*args):
        raise AssertionError("went online")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run("models", "path", model).stdout == pulled.stdout
    listed = {e["repo"]: e for e in json.loads(run("models", "list", "--json").stdout)}
    assert listed[REPOS[name].name]["complete"]
    info = json.loads(run("models", "info", model, "--json").stdout)
    assert (info["repo"], info["revision"]) == (REPOS[name].name, path.name)
    verified = run("models", "verify", model, "-q")
    has_voices = REPOS[name].voices is not None
    assert verified.exit_code == 0
    assert verified.stdout == ""

    def respond(*voice: object) -> str:
        user, out = data / "respond" / "user_c.wav", tmp_path / "reply.wav"
        args = ("--model", model, "--offline", "--overwrite")
        result = run("respond", user, "-o", out, "--stats", stats, *args, *voice)
        assert (result.exit_code == 0) == ("Error" not in result.stderr)
        return (
            result.stderr
            if result.exit_code
            else json.loads(stats.read_text())["voice"]
        )

    wav = data / "respond" / "voice_NATM0.wav"
    if not has_voices:
        assert respond() == respond("--prompt", "") == ""
        assert "is a Moshi, which has one voice" in respond("--voice", wav)
        assert "is a Moshi, which takes no role" in respond("--role", "teacher")
        return
    assert respond("--voice", wav) == str(wav)
    published = twins("8bit") / "voices" / "VARM2.safetensors"
    assert respond("--voice", published) == str(published)
    assert (respond(), respond("--voice", "NATM1")) == ("NATF2", "NATM1")


@pytest.mark.parametrize("name", REPOS)
def test_nothing_of_a_published_config_is_unknown(name, tmp_path):
    path = tmp_path / "config.json"
    for config in SIZES.values():
        path.write_text(config_text(REPOS[name], config) or "{}")
        assert unknown_keys(path) == []


def test_what_nobody_needs_is_ignored_and_said(twins, run, hub, tmp_path, data):
    """With -v of a known repository; of others it is a warning."""
    folder = tmp_path / "8bit"
    shutil.copytree(twins("8bit"), folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"surprise": 1, "temporal": raw["temporal"] | {"novelty": {}}}
    (folder / "config.json").write_text(json.dumps(raw))
    heads = mx.load(str(folder / "embeddings.safetensors"))
    heads |= {f"extra_heads.{i}.weight": mx.ones((2, 64)) for i in range(5)}
    mx.save_safetensors(str(folder / "embeddings.safetensors"), heads)
    model = serve(hub, "8bit", folder)
    assert run("models", "pull", model).exit_code == 0
    said = [
        "config.json: keys that nothing here needs are ignored: `surprise`, "
        "`temporal.novelty`",
        "embeddings.safetensors: tensors that nothing here needs are ignored: "
        "`extra_heads.0.weight`, `extra_heads.1.weight`, `extra_heads.2.weight` and 2 "
        "more",
    ]
    user, out = data / "respond" / "user_c.wav", tmp_path / "o.wav"
    respond = ("respond", user, "-o", out, "--overwrite", "--model")
    assert not {*run(*respond, model).stderr.splitlines()} & {*said}
    assert {*run(*respond, model, "-v").stderr.splitlines()} >= {*said}
    warned = {f"warning: {line}" for line in said}
    assert {*run(*respond, folder).stderr.splitlines()} >= warned
    converted = run("models", "convert", folder, tmp_path / "4bit", "--bits", "4")
    assert {*converted.stderr.splitlines()} >= warned
    assert {*run("models", "verify", model).stdout.splitlines()} >= {
        f"note     {line}" for line in said
    }
    assert run("models", "verify", folder, "-q").stdout.splitlines() == [
        f"warning  {line}" for line in said
    ]


def test_float_types_are_taken_as_they_come(twins, run, tmp_path, data):
    """Each tensor in another type than its neighbour; what they mean is the same."""
    for name in ("bf16", "8bit"):
        folder = tmp_path / name
        shutil.copytree(twins(name), folder)
        for path in folder.glob("*.safetensors"):
            arrays = mx.load(str(path))
            for i, (key, array) in enumerate(sorted(arrays.items())):
                if array.dtype != mx.uint32:
                    # From bfloat16 and float16 alike, these lose nothing.
                    types = (array.dtype, mx.float32)
                    arrays[key] = array.astype(types[i % 2])
            mx.save_safetensors(str(path), arrays)
        user = data / "respond" / "user_c.wav"
        replies = []
        for model in (folder, twins(name)):
            out = tmp_path / f"{len(replies)}.wav"
            args = ("--greedy", "--model", model, "--overwrite")
            assert run("respond", user, "-o", out, *args).exit_code == 0
            replies.append(out.read_bytes())
        assert replies[0] == replies[1]
        assert run("models", "verify", folder, "-q").stdout == ""
        again = tmp_path / f"{name} again"
        converted = run("models", "convert", folder, again, "--bits", "8", "-q")
        assert (converted.exit_code, converted.stderr) == (0, "")


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("temporal.safetensors", "missing", "`out_norm.alpha` is missing"),
        ("temporal.safetensors", "shape", "`out_norm.alpha` has shape [1, 1, 63]"),
        ("mimi.safetensors", "missing", "`decoder.model.0.conv.conv.bias` is missing"),
        ("depformer.safetensors", "more", "`depformer_in.15.extra`"),
    ],
)
def test_what_matters_still_stops_and_says_what_to_report(
    twins, run, tmp_path, data, file, change, says
):
    folder = tmp_path / "8bit"
    shutil.copytree(twins("8bit"), folder)
    arrays = mx.load(str(folder / file))
    key = "decoder.model.0.conv.conv.bias" if "mimi" in file else "out_norm.alpha"
    if change == "missing":
        del arrays[key]
    elif change == "shape":
        arrays[key] = arrays[key][..., 1:]
    else:
        arrays["depformer_in.15.extra"] = mx.ones(1)
    mx.save_safetensors(str(folder / file), arrays)
    user, out = data / "respond" / "user_c.wav", tmp_path / "o.wav"
    result = run("respond", user, "-o", out, "--model", folder)
    assert (result.exit_code, out.exists()) == (1, False)
    assert says in result.stderr
    assert f"if {file} is as published, report it with what" in result.stderr
    assert f"`pplex models verify {folder}` prints" in result.stderr
    printed = run("models", "verify", folder).stdout
    assert says in printed
    if "mimi" not in file:
        assert f"note     {file}: {len(arrays)} tensors (" in printed


def test_a_file_in_the_names_of_moshi_mlx_is_enough(twins, run, tmp_path, data):
    """Also under a name of its own, without the files that only Hugging Face needs."""
    for file in needed(twins("moshiko-q4")):
        target = file.replace("model.q4", "moshi-q4")
        (tmp_path / target).symlink_to(twins("moshiko-q4") / file)
    result = run(
        *("respond", data / "respond" / "user_c.wav", "-o", tmp_path / "o.wav"),
        *("--model", tmp_path / "moshi-q4.safetensors"),
    )
    assert (result.exit_code, (tmp_path / "o.wav").exists()) == (0, True)


def test_the_only_other_file_of_weights_is_pulled_and_used(
    twins, run, hub, tmp_path, data
):
    folder = tmp_path / "fine-tune"
    shutil.copytree(twins("bf16"), folder)
    (folder / "model.safetensors").rename(folder / "my-weights.safetensors")
    hub.repos["some-one/fine-tune"] = (folder, 40 * "f")
    assert run("models", "pull", "some-one/fine-tune").exit_code == 0
    assert "my-weights.safetensors" in hub.asked_for()
    user, out = data / "respond" / "user_c.wav", tmp_path / "o.wav"
    replied = run("respond", user, "-o", out, "--model", "some-one/fine-tune")
    assert (replied.exit_code, replied.stderr.count("warning")) == (0, 0)


@pytest.mark.parametrize("content", ["other names", "no header"])
def test_weights_of_another_kind_are_refused_before_they_are_downloaded(
    twins, run, hub, tmp_path, caches, content
):
    folder = tmp_path / "other"
    shutil.copytree(twins("bf16"), folder)
    path = folder / "model.safetensors"
    path.write_bytes(bytes(200_000))
    if content == "other names":
        mx.save_safetensors(str(path), {"lm_head.weight": mx.ones((300, 300))})
    hub.repos["some-one/other"] = (folder, 40 * "e")
    result = run("models", "pull", "some-one/other")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "model.safetensors" in result.stderr
    kind = "not a PersonaPlex or Moshi language model"
    says = kind if content == "other names" else "no safetensors file"
    assert says in result.stderr
    assert not list(caches.rglob("*.safetensors"))


def test_a_gated_repository_wants_a_token(twins, run, hub, monkeypatch):
    model = serve(hub, "bf16", twins("bf16"))
    hub.gated.add(REPOS["bf16"].name)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/no/such/token")
    result = run("models", "pull", model)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "accept the licence at https://huggingface.co/nvidia/" in result.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    assert run("models", "pull", model).exit_code == 0


# Downloads that end early, and caches that cannot be written.


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    twins, run, hub, monkeypatch
):
    do_not_wait(monkeypatch)
    model = serve(hub, "4bit", twins("4bit"))
    hub.cut, hub.cuts = "embeddings.safetensors", 1
    hub.go_on.set()
    pulled = run("models", "pull", model)
    path = Path(pulled.stdout.strip())
    assert pulled.exit_code == 0
    assert [start for _, _, start in hub.requests if start]
    assert filecmp.cmp(twins("4bit") / hub.cut, path / hub.cut, shallow=False)


def test_a_network_that_goes_away_leaves_what_is_whole(twins, run, hub, monkeypatch):
    do_not_wait(monkeypatch)
    model = serve(hub, "4bit", twins("4bit"))
    hub.cut, hub.cuts = "embeddings.safetensors", 1000
    hub.go_on.set()
    result = run("models", "pull", model)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: Hugging Face cannot be reached to download" in result.stderr
    assert "not all of it" in run("models", "info", model).stderr
    first = hub.asked_for()
    hub.cuts = 0
    hub.requests.clear()
    assert run("models", "pull", model).exit_code == 0
    assert "temporal.safetensors" in first - hub.asked_for()
    assert hub.asked_for() | first == needed(twins("4bit"))
    assert run("models", "verify", model, "-q").exit_code == 0


def test_ctrl_c_ends_a_download_at_once_and_the_next_goes_on(twins, hub, caches):
    model = serve(hub, "4bit", twins("4bit"))
    hub.cut, hub.cuts = "embeddings.safetensors", 1
    process = run_as_user(hub, caches, "models", "pull", model)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    assert not list(caches.rglob("*.incomplete"))
    hub.requests.clear()
    process = run_as_user(hub, caches, "models", "pull", model)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, needed(Path(stdout.strip()))) == (
        0,
        needed(twins("4bit")),
    )
    assert "temporal.safetensors" not in hub.asked_for()
    assert hub.cut in hub.asked_for()  # not brought to its end by the first


def can_be_denied() -> bool:
    """Whether files can be kept from a process of ours, which root may override."""
    if sys.platform == "linux" and os.geteuid() == 0:
        return ctypes.CDLL(None).prctl(23, 8, 0, 0, 0) == 1  # may drop capabilities
    return os.geteuid() != 0


@pytest.mark.skipif(not can_be_denied(), reason="everything may be written here")
def test_a_cache_that_is_only_read_is_enough(twins, run, hub, caches, data):
    model = serve(hub, "8bit", twins("8bit"))
    path = run("models", "pull", model).stdout
    folders = [caches, *(p for p in caches.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        user, out = data / "respond" / "user_c.wav", caches.parent / "o.wav"
        for args, stdout in (
            (("models", "pull", model), path),
            (("respond", user, "-o", out, "-m", model, "--offline", "-q"), ""),
        ):
            process = run_as_user(hub, caches, *args)
            printed, stderr = process.communicate(timeout=60)
            assert (process.returncode, printed) == (0, stdout), stderr
        # What cannot be brought or deleted is said in a sentence.
        serve(hub, "4bit", twins("4bit"))
        for args, said in (
            (("pull", "4bit"), f"Error: {REPOS['4bit'].name} cannot be downloaded"),
            (("remove", model, "--yes"), f"Error: {REPOS['8bit'].name} cannot be rem"),
        ):
            process = run_as_user(hub, caches, "models", *args)
            printed, stderr = process.communicate(timeout=60)
            assert (process.returncode, printed) == (1, "")
            assert said in stderr and "Traceback" not in stderr
        assert run("models", "verify", model, "-q").exit_code == 0
    finally:
        for folder in folders:
            folder.chmod(0o755)
