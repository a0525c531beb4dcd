"""Names of models to local files, with a stand-in for Hugging Face."""

import errno
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import are_progress_bars_disabled

from pplex.checkpoint import download, hub
from pplex.checkpoint.folder import IncompleteError, needed_files
from pplex.checkpoint.hub import KNOWN_MODELS, list_models, resolve
from pplex.errors import PplexError

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHER_SHA = "f" * 40

SPLIT = {
    "config.json": 10,
    "temporal.safetensors": 400,
    "depformer.safetensors": 300,
    "embeddings.safetensors": 200,
    "mimi.safetensors": 100,
    "tokenizer_spm_32k_3.model": 20,
    "voices/NATF2.safetensors": 5,
    "voices/NATM0.safetensors": 5,
}
SPLIT_EXTRAS = {".gitattributes": 1, "README.md": 9, "demo/out.wav": 999}

NVIDIA = {
    "config.json": 10,
    "model.safetensors": 16_000,
    "tokenizer-e351c8d8-checkpoint125.safetensors": 385,
    "tokenizer_spm_32k_3.model": 20,
    "voices.tgz": 8,
}
NVIDIA_EXTRAS = {"dist.tgz": 9_999, "README.md": 9, "assets/a.safetensors": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache, and a machine without a network."""

    def refuse(*args, **options):
        raise AssertionError("a test went online")

    folder = tmp_path / "hf-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return folder


class FakeHub:
    """What the tests need of Hugging Face: one repository, and ways to fail."""

    def __init__(self, cache: Path, repo: str, files: dict[str, int]) -> None:
        self.cache, self.repo, self.files = cache, repo, files
        self.listing_error: Exception | None = None
        self.download_error: Exception | None = None
        self.skip: set[str] = set()
        self.clients = 0
        self.patterns: list[str] = []
        self.bars_disabled: bool | None = None

    def client(self):
        self.clients += 1
        return types.SimpleNamespace(
            model_info=self.model_info,
            parse_safetensors_file_metadata=self.parse_safetensors_file_metadata,
        )

    def parse_safetensors_file_metadata(self, repo, file, *, revision):
        assert (repo, revision) == (self.repo, SHA)
        marks = "layers.0.self_attn.in_proj_weight", "text_emb.weight"
        names = [prefix + mark for prefix in ("", "transformer.") for mark in marks]
        return types.SimpleNamespace(tensors=dict.fromkeys(names))

    def model_info(self, repo, revision=None, files_metadata=False):
        assert (repo, files_metadata) == (self.repo, True)
        if self.listing_error:
            raise self.listing_error
        siblings = [
            types.SimpleNamespace(rfilename=name, size=size)
            for name, size in self.files.items()
        ]
        return types.SimpleNamespace(sha=SHA, siblings=siblings)

    def hf_hub_download(self, repo, file, *, revision):
        assert revision == SHA
        if self.files[file] > 10_000_000:
            self.bars_disabled = are_progress_bars_disabled()
        if self.download_error:
            raise self.download_error

    def snapshot_download(self, repo, *, revision=None, allow_patterns=None):
        self.patterns = allow_patterns
        wanted = {n: s for n, s in self.files.items() if n in allow_patterns}
        names = set(wanted) - self.skip
        return str(fill_cache(self.cache, repo, names, revision or "main"))


def fill_cache(cache: Path, repo: str, names, ref: str = "main", sha: str = SHA):
    """Make a snapshot as huggingface_hub leaves it."""
    base = cache / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs" / ref).write_text(sha)
    snapshot = base / "snapshots" / sha
    snapshot.mkdir(parents=True, exist_ok=True)
    (base / "blobs").mkdir(exist_ok=True)
    for name in names:
        blob = base / "blobs" / name.replace("/", "-")
        blob.write_bytes(b"12345")
        (snapshot / name).parent.mkdir(exist_ok=True, parents=True)
        if not (snapshot / name).exists():
            (snapshot / name).symlink_to(blob)
    return snapshot


def make_folder(folder: Path, names) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def online(cache, monkeypatch):
    """Make a function that puts one repository online."""

    def serve(repo: str, files: dict[str, int]) -> FakeHub:
        fake = FakeHub(cache, repo, files)
        monkeypatch.setattr(huggingface_hub, "HfApi", fake.client)
        for name in ("hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
        return fake

    return serve


def http_error(kind: type[Exception], status: int) -> Exception:
    """An error as huggingface_hub raises it, whatever its HTTP library."""
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} from the server")
    error.response = types.SimpleNamespace(status_code=status)
    return error


def refusal(name: str, **options) -> str:
    with pytest.raises(PplexError) as info:
        resolve(name, **{"offline": False, **options})
    assert "\n" not in str(info.value)
    return str(info.value)


# Which files.


def test_the_split_layout_is_taken_whole_and_nothing_else():
    assert set(needed_files({**SPLIT, **SPLIT_EXTRAS})) == set(SPLIT)


def test_nvidias_layout_is_taken_without_the_web_client():
    assert set(needed_files({**NVIDIA, **NVIDIA_EXTRAS})) == set(NVIDIA)


@pytest.mark.parametrize(
    ("weights", "taken"),
    [
        (["model.safetensors", "model.q4.safetensors"], "model.q4.safetensors"),
        (["model.q4.safetensors", "model.q8.safetensors"], "model.q8.safetensors"),
        (["model.q4.safetensors"], "model.q4.safetensors"),
        (["finetune.safetensors"], "finetune.safetensors"),
    ],
)
def test_one_file_of_weights_is_taken(weights, taken):
    rest = [name for name in NVIDIA if name != "model.safetensors"]
    assert set(needed_files(rest + weights)) == {taken, *rest}


@pytest.mark.parametrize("name", list(SPLIT)[1:6])
def test_a_missing_part_is_named(name):
    with pytest.raises(IncompleteError, match=name.split(".")[0].split("_3")[0][:9]):
        needed_files([n for n in SPLIT if n != name])


@pytest.mark.parametrize(
    "names", [[], ["README.md"], ["a.safetensors", "b.safetensors"]]
)
def test_what_is_no_model_is_refused(names):
    with pytest.raises(IncompleteError, match="weights"):
        needed_files([*names, "mimi.safetensors", "tokenizer_spm_32k_3.model"])


# Local names.


def test_a_folder_and_a_file_are_used_where_they_are(tmp_path):
    folder = make_folder(tmp_path / "model", NVIDIA)
    found = resolve(str(folder), offline=True)
    assert (found.path, found.repo, found.revision) == (folder, None, None)
    file = folder / "model.safetensors"
    assert resolve(str(file), offline=True).path == file


def test_an_alias_wins_over_a_folder_unless_written_as_a_path(tmp_path, monkeypatch):
    make_folder(tmp_path / "8bit", SPLIT)
    make_folder(tmp_path / "plain", SPLIT)
    monkeypatch.chdir(tmp_path)
    assert resolve("./8bit", offline=True).repo is None
    assert resolve("plain", offline=True).repo is None
    assert "aufklarer/PersonaPlex-7B-MLX-8bit" in refusal("8bit", offline=True)


def test_an_existing_path_wins_over_a_repository(tmp_path, monkeypatch):
    make_folder(tmp_path / "owner" / "name", SPLIT)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name", offline=True).path == Path("owner/name")


def test_an_incomplete_folder_says_what_is_missing(tmp_path):
    folder = make_folder(tmp_path / "m", [n for n in SPLIT if "depformer" not in n])
    message = refusal(str(folder))
    assert str(folder) in message
    assert "depformer.safetensors" in message


@pytest.mark.parametrize(
    "name",
    ["unknown", "./none", "/no/where", "a/b/c", "", "~/no", "gone/model.safetensors"],
)
def test_names_that_are_nothing_are_refused_with_the_aliases(name):
    message = refusal(name)
    assert all(alias in message for alias in KNOWN_MODELS)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    assert ".safetensors" in refusal(str(tmp_path / "a.gguf"))


def test_the_built_in_model_is_found_or_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_built_in_folder", lambda name: tmp_path / name)
    assert "not part of this installation" in refusal("mini")
    make_folder(tmp_path / "mini", SPLIT)
    assert resolve("mini", offline=True).path == tmp_path / "mini"
    entry = next(e for e in list_models() if e.name == "mini")
    assert (entry.complete, entry.size_bytes) == (True, len(SPLIT))


# Downloads.


@pytest.mark.parametrize(
    ("name", "repo", "files", "extras"),
    [
        ("8bit", "aufklarer/PersonaPlex-7B-MLX-8bit", SPLIT, SPLIT_EXTRAS),
        ("4bit", "aufklarer/PersonaPlex-7B-MLX-4bit", SPLIT, SPLIT_EXTRAS),
        ("bf16", "nvidia/personaplex-7b-v1", NVIDIA, NVIDIA_EXTRAS),
        ("some-one/fine.tune", "some-one/fine.tune", NVIDIA, NVIDIA_EXTRAS),
    ],
)
def test_a_download_brings_exactly_the_needed_files(online, name, repo, files, extras):
    fake = online(repo, {**files, **extras})
    found = resolve(name, offline=False)
    assert set(fake.patterns) == set(files)
    assert (found.name, found.repo, found.revision) == (name, repo, SHA)
    assert (found.path / "config.json").is_file()
    assert resolve(name, offline=True) == found


def test_a_revision_can_be_named_in_two_ways(online):
    online("o/n", SPLIT)
    assert resolve("o/n@v1.0", offline=False).revision == SHA
    assert resolve("o/n", revision="v1.0", offline=True).revision == SHA
    assert "disagree" in refusal("o/n@v1.0", revision="v2")
    assert "@v3" in refusal("o/n@v3", offline=True)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bars_are_shown_or_not_and_left_as_they_were(online, progress):
    before = are_progress_bars_disabled()
    fake = online("o/n", {**SPLIT, "temporal.safetensors": 20_000_000})
    resolve("o/n", offline=False, progress=progress)
    assert fake.bars_disabled == (before or not progress)
    assert are_progress_bars_disabled() == before


def test_offline_makes_no_client_and_downloads_nothing(online, cache):
    fake = online("o/n", SPLIT)
    message = refusal("o/n", offline=True)
    assert "pplex models pull o/n" in message
    assert "nothing is downloaded" in message
    fill_cache(cache, "o/n", SPLIT)
    assert resolve("o/n", offline=True).revision == SHA
    assert (fake.clients, fake.patterns) == (0, [])


def test_an_incomplete_cache_is_not_used_offline(cache):
    fill_cache(cache, "o/n", [n for n in SPLIT if n != "mimi.safetensors"])
    assert "not all of it" in refusal("o/n", offline=True)


@pytest.mark.parametrize("lost", ["mimi.safetensors", "temporal.safetensors"])
def test_a_dead_link_in_the_cache_counts_as_missing(cache, lost):
    snapshot = fill_cache(cache, "o/n", SPLIT)
    (snapshot / lost).resolve().unlink()
    assert "not all of it" in refusal("o/n", offline=True)


@pytest.mark.parametrize("where", ["listing_error", "download_error"])
@pytest.mark.parametrize(
    ("kind", "status", "reasons"),
    [
        (errors.GatedRepoError, 403, ["https://huggingface.co/o/n", "hf auth login"]),
        (errors.RepositoryNotFoundError, 404, ["no repository o/n"]),
        (errors.RevisionNotFoundError, 404, ["no revision 'v9'"]),
        (errors.HfHubHTTPError, 503, ["o/n@v9", "503", "try again later"]),
        (errors.HfHubHTTPError, 401, ["o/n@v9", "401", "run `hf auth login` again"]),
        (errors.HfHubHTTPError, 403, ["o/n@v9", "403", "another token"]),
    ],
)
def test_what_the_server_refuses_is_one_sentence(online, where, kind, status, reasons):
    fake = online("o/n", SPLIT)
    setattr(fake, where, http_error(kind, status))
    message = refusal("o/n@v9")
    assert all(reason in message for reason in reasons)


def connection_failures() -> list[Exception]:
    failures: list[Exception] = [
        ConnectionError("no route"),
        errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"),
        errors.LocalEntryNotFoundError("cannot find it"),
    ]
    for library, name in (("httpx2", "ConnectError"), ("httpx", "ConnectError")):
        try:
            failures.append(getattr(__import__(library), name)("no route"))
        except ImportError:
            continue
    return failures


@pytest.mark.parametrize("failure", connection_failures(), ids=lambda e: repr(type(e)))
def test_without_a_network_the_built_in_model_is_recommended(online, failure):
    fake = online("o/n", SPLIT)
    fake.listing_error = failure
    message = refusal("o/n")
    assert "cannot be reached" in message
    assert "--model mini" in message


@pytest.mark.parametrize(
    "failure",
    [
        json.JSONDecodeError("Expecting value", "<html>", 0),
        AttributeError("'list' object has no attribute 'get'"),
        KeyError("id"),
        TypeError("int + str"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_page_to_log_in_to_is_not_the_hub(online, failure):
    """What a hotel's network answers in its place, with status 200."""
    fake = online("o/n", SPLIT)
    fake.listing_error = failure
    message = refusal("o/n")
    assert "instead of Hugging Face" in message and "log in" in message


def test_without_a_network_a_complete_cache_is_used(online, cache):
    fake = online("o/n", SPLIT)
    fake.listing_error = ConnectionError("no route")
    fill_cache(cache, "o/n", SPLIT)
    assert resolve("o/n", offline=False).revision == SHA


def test_a_download_that_is_not_whole_is_refused(online):
    fake = online("o/n", SPLIT)
    fake.skip = {"embeddings.safetensors"}
    assert "resume" in refusal("o/n")


def test_a_repository_without_a_model_is_refused(online):
    online("o/n", {"README.md": 5})
    assert "o/n cannot be used" in refusal("o/n")


def test_a_full_disk_is_known_before_the_first_byte(online, cache, monkeypatch):
    fake = online("o/n", {**SPLIT, "temporal.safetensors": 7_000_000_000})
    usage = types.SimpleNamespace(free=5_000_000_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    message = refusal("o/n")
    assert "7.0 GB" in message
    assert "5.0 GB free" in message
    assert fake.patterns == []
    fill_cache(cache, "o/n", ["temporal.safetensors"])
    assert resolve("o/n", offline=False).revision == SHA


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Data processing error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_is_one_sentence(online, cache, failure):
    fake = online("o/n", SPLIT)
    fake.download_error = failure
    message = refusal("o/n")
    assert "disk is full" in message
    assert str(cache) in message


@pytest.mark.parametrize(
    "failure", [OSError(errno.EACCES, "no rights"), RuntimeError("?")]
)
def test_other_failures_say_what_could_not_be_had(online, failure):
    fake = online("o/n", SPLIT)
    fake.download_error = failure
    assert "o/n cannot be downloaded" in refusal("o/n")


def test_names_that_hugging_face_forbids_are_refused(cache):
    assert "owner/name" in refusal("o/-n--x-", offline=True)


# The list.


def test_the_list_without_a_cache_has_the_known_models():
    entries = list_models()
    assert (
        [e.name for e in entries]
        == list(KNOWN_MODELS)
        == [
            *("8bit", "4bit", "bf16", "mini"),
            *("moshika-4bit", "moshika-8bit", "moshika-bf16"),
            *("moshiko-4bit", "moshiko-8bit", "moshiko-bf16"),
            *("personaplex-rl", "moshika-rl"),
        ]
    )
    assert all(e.path is None and not e.complete for e in entries if e.name != "mini")
    assert all(e.description and e.memory_gb for e in entries)


def test_the_list_shows_what_is_on_disk(cache, online):
    fake = online("o/n", SPLIT)
    half = [n for n in SPLIT if n != "mimi.safetensors"]
    fill_cache(cache, "aufklarer/PersonaPlex-7B-MLX-4bit", half)
    fill_cache(cache, "o/n", SPLIT, ref="old", sha=OTHER_SHA)
    newest = fill_cache(cache, "o/n2", SPLIT)
    fill_cache(cache, "bert/base", ["config.json", "model.safetensors"])
    entries = {e.name: e for e in list_models()}
    assert list(entries) == [*KNOWN_MODELS, "o/n", "o/n2"]
    assert not entries["4bit"].complete
    assert entries["4bit"].revision == SHA
    assert entries["o/n"].revision == OTHER_SHA
    assert entries["o/n2"].complete
    assert entries["o/n2"].path.samefile(newest)
    assert entries["o/n2"].size_bytes == 5 * len(SPLIT)
    assert fake.clients == 0


def test_a_variable_that_is_no_number_is_one_sentence():
    env = os.environ | {"HF_HUB_ETAG_TIMEOUT": "soon"}
    command = [sys.executable, "-m", "pplex", "models", "pull", "8bit"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "'soon'" in done.stderr and "correct or unset it" in done.stderr


def test_importing_the_module_loads_no_hugging_face_client():
    check = (
        "import sys, pplex.checkpoint.hub as h; h.KNOWN_MODELS; "
        "bad = {'huggingface_hub', 'mlx', 'numpy'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", check], cwd=root, check=True)


# Licences.


def test_each_known_model_has_the_licence_of_its_page():
    licences = {entry.name: entry.licence for entry in list_models()}
    assert licences["bf16"] == "NVIDIA Open Model License"
    assert licences["mini"] == "MIT"
    for name in ("8bit", "4bit"):
        assert licences[name] == "CC BY-NC 4.0, the base NVIDIA Open Model License"
        assert "for commercial use pull bf16" in KNOWN_MODELS[name].terms
    assert KNOWN_MODELS["bf16"].terms == licences["bf16"]
    assert licences["moshika-4bit"] == licences["moshiko-bf16"] == "CC-BY 4.0"
    assert licences["moshika-rl"] == "CC BY-NC 4.0"
    assert licences["personaplex-rl"] == "CC BY-NC 4.0 and NVIDIA Open Model License"


def test_a_download_says_the_licence_before_it_begins(cache, online, capsys):
    online(KNOWN_MODELS["4bit"].repo, SPLIT)
    resolve("4bit", offline=False)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "licence" in x]
    assert line.startswith(f"{KNOWN_MODELS['4bit'].repo}: licence CC BY-NC 4.0")
    assert "pplex models convert" in line
    fill_cache(cache, KNOWN_MODELS["4bit"].repo, SPLIT)
    resolve("4bit", offline=False)
    assert "licence" not in capsys.readouterr().err
