"""What ``pplex respond`` refuses: one sentence, the exit code, and nothing written."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from huggingface_hub import constants

from pplex.cli.main import cli

FAILED, USAGE = 1, 2
LM = "model.safetensors"
MIMI = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER = "tokenizer_spm_32k_3.model"
CONTEXT = 40  # of the tiny model


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(
        constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache"))
    )
    monkeypatch.delenv("PPLEX_MODEL", raising=False)


@pytest.fixture
def call(tmp_path, data) -> Path:
    """A good recording in the test's folder."""
    return Path(shutil.copy(data / "respond" / "user_c.wav", tmp_path / "call.wav"))


@pytest.fixture
def refuses(tmp_path, tiny) -> Callable[..., str]:
    """Run ``respond`` with arguments that it must refuse; return its message.

    The message names what ``names`` lists; the folder is as it was before.
    """

    def check(
        *args: object,
        names: tuple[object, ...] = (),
        code: int = FAILED,
        output: Path = tmp_path / "out.wav",
        model: object = tiny,
    ) -> str:
        before = listing(tmp_path)
        line = ["respond", *args, "-o", output, "--model", model]
        result = CliRunner().invoke(cli, [str(arg) for arg in line])
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == code, result.stderr
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert lines[-1].startswith("Error: ")
        assert len(lines) == 1 or code == USAGE
        assert listing(tmp_path) == before
        for name in names:
            assert str(name) in lines[-1]
        return lines[-1]

    return check


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file below a folder with its size and time, hidden ones too."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# Recordings


def test_a_missing_file_is_named(refuses, tmp_path):
    missing = tmp_path / "missing.wav"
    assert "does not exist" in refuses(missing, names=(missing,))


def test_a_folder_is_no_recording(refuses, tmp_path):
    (tmp_path / "calls").mkdir()
    assert "folder" in refuses(tmp_path / "calls", names=(tmp_path / "calls",))


def test_an_empty_name_is_not_the_current_folder(refuses):
    assert "is empty" in refuses("", code=USAGE)


def test_an_empty_file_is_refused(refuses, tmp_path):
    path = tmp_path / "empty.wav"
    path.touch()
    assert "empty" in refuses(path, names=(path,))


def test_a_wav_of_no_samples_is_refused(refuses, tmp_path):
    path = tmp_path / "nothing.wav"
    soundfile.write(path, np.zeros(0, np.float32), 24000)
    assert "no samples" in refuses(path, names=(path,))


@pytest.mark.parametrize(
    ("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")]
)
def test_a_sample_that_is_no_number_is_refused_with_its_time(
    refuses, tmp_path, value, word
):
    path = tmp_path / "odd.wav"
    pcm = np.zeros(24000, np.float32)
    pcm[12000] = value
    soundfile.write(path, pcm, 24000, subtype="FLOAT")
    assert "0.5" in refuses(path, names=(path, word))


def test_a_truncated_wav_is_refused(refuses, call):
    call.write_bytes(call.read_bytes()[:-1000])
    assert "truncated" in refuses(call, names=(call, "1000 bytes"))


def test_text_named_wav_is_refused(refuses, tmp_path):
    path = tmp_path / "notes.wav"
    path.write_text("Call the bank at nine.\n")
    assert "not an audio file" in refuses(path, names=(path,))


def test_a_channel_that_the_recording_lacks_is_refused(refuses, tmp_path):
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.zeros((2400, 2), np.float32), 24000)
    refuses(path, "--channel", 3, names=(path, "2 channels", "channel 3"))


# Outputs


def test_a_missing_output_folder_is_named(refuses, call, tmp_path):
    output = tmp_path / "no" / "out.wav"
    message = refuses(call, output=output, names=(output, output.parent))
    assert "does not exist" in message


def test_a_file_is_no_output_folder(refuses, call):
    refuses(call, output=call / "out.wav", names=(call, "not a folder"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(refuses, call, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    refuses(call, output=folder / "out.wav", names=(folder, "permission"))


def test_a_folder_is_no_output_even_with_overwrite(refuses, call, tmp_path):
    folder = tmp_path / "folder.wav"
    folder.mkdir()
    refuses(call, "--overwrite", output=folder, names=(folder, "it is a folder"))


@pytest.mark.parametrize("spelling", ["call.wav", "sub/../call.wav", "link.wav"])
def test_the_input_is_never_an_output(refuses, call, tmp_path, spelling):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.wav").symlink_to(call)
    output = tmp_path / spelling
    message = refuses(call, "--overwrite", output=output, names=(output,))
    assert "the input" in message


def test_a_link_into_a_folder_that_is_gone_is_no_output(refuses, call, tmp_path):
    link = tmp_path / "link.wav"
    link.symlink_to("gone/o.wav")
    refuses(call, output=link, names=(link, tmp_path / "gone does not exist"))


def test_another_name_of_the_inputs_file_is_no_output(refuses, call, tmp_path):
    other = tmp_path / "other.wav"
    os.link(call, other)
    refuses(call, "--overwrite", output=other, names=(other, "the input"))


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--transcript", "said.srt"),
        ("--stats", "stats.json"),
        ("--tokens", "tokens.npz"),
    ],
)
def test_no_existing_output_is_replaced_unasked(refuses, call, tmp_path, option, name):
    path = tmp_path / name
    path.write_text("precious")
    refuses(call, option, path, names=(path, "--overwrite"))


def test_an_existing_reply_is_not_replaced_unasked(refuses, call, tmp_path):
    output = tmp_path / "out.wav"
    output.write_text("precious")
    refuses(call, output=output, names=(output, "--overwrite"))


@pytest.mark.parametrize("side", ["user", "agent"])
def test_an_existing_side_is_not_replaced_unasked(refuses, call, tmp_path, side):
    path = tmp_path / f"out.{side}.wav"
    path.write_text("precious")
    refuses(call, "--layout", "separate", names=(path, "--overwrite"))


def test_two_outputs_cannot_have_one_name(refuses, call, tmp_path):
    path = tmp_path / "both.json"
    message = refuses(call, "--stats", path, "--transcript", path, names=(path,))
    assert "transcript" in message


def test_the_reply_must_be_named_wav(refuses, call, tmp_path):
    output = tmp_path / "out.aac"
    refuses(call, output=output, names=(output, ".wav"))


def test_a_transcript_of_unknown_kind_is_refused(refuses, call, tmp_path):
    path = tmp_path / "said.doc"
    refuses(call, "--transcript", path, names=(path, ".json, .srt, .vtt or .txt"))


def test_tokens_must_be_named_npz(refuses, call, tmp_path):
    path = tmp_path / "tokens.npy"
    refuses(call, "--tokens", path, names=(path, ".npz"))


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--top-k", "-1"),
        ("--text-top-k", "-1"),
        ("--temp", "-1"),
        ("--temp", "nan"),
        ("--text-temp", "-0.1"),
        ("--text-temp", "warm"),
        ("--tail", "-1"),
        ("--tail", "nan"),
        ("--tail", "inf"),
        ("--seed", "-1"),
        ("--channel", "0"),
        ("--channel", "left"),
        ("--layout", "mono"),
        ("--role", "pirate"),
    ],
)
def test_a_value_out_of_range_is_a_usage_error(refuses, call, option, value):
    refuses(call, option, value, code=USAGE, names=(option,))


@pytest.mark.parametrize(
    "options",
    [
        ("--prompt", "Be kind.", "--role", "teacher"),
        ("--prompt", "", "--prompt-file", "role.txt"),
        ("--prompt-file", "role.txt", "--role", "casual"),
    ],
)
def test_two_roles_are_a_usage_error(refuses, call, options):
    refuses(call, *options, code=USAGE, names=(options[0], options[2]))


def test_quiet_and_verbose_exclude_each_other(refuses, call):
    refuses(call, "-q", "-v", code=USAGE, names=("--quiet", "--verbose"))


def test_a_stream_without_an_output_is_a_usage_error(run):
    result = run("respond", "-")
    assert result.exit_code == USAGE
    assert "-o" in result.stderr


def test_several_recordings_are_a_batchs(call, run):
    result = run("respond", call, call)
    assert result.exit_code == USAGE
    assert "pplex batch" in result.stderr


def test_an_unknown_option_is_a_usage_error(refuses, call):
    refuses(call, "--pitch", "3", code=USAGE, names=("--pitch",))


@pytest.mark.parametrize(
    "options",
    [("--prompt", "caf\udce9"), ("--voice", "caf\udce9.wav"), ("--stats", "\udce9")],
)
def test_an_argument_that_is_not_text_is_a_usage_error(refuses, call, options):
    refuses(call, *options, code=USAGE, names=("\\udce9", "UTF-8"))


def test_a_missing_prompt_file_is_named(refuses, call, tmp_path):
    path = tmp_path / "role.txt"
    refuses(call, "--prompt-file", path, names=("--prompt-file", path))


def test_a_prompt_file_that_is_not_text_is_named(refuses, call, tmp_path):
    path = tmp_path / "role.txt"
    path.write_bytes(b"caf\xe9")
    refuses(call, "--prompt-file", path, names=(path, "UTF-8"))


def test_a_prompt_longer_than_the_context_is_refused(refuses, call):
    message = refuses(call, "--prompt", "word " * 200, names=(CONTEXT,))
    assert "role prompt" in message


# Models


def test_an_unknown_model_is_refused_with_those_there_are(refuses, call):
    refuses(call, model="9bit", names=("'9bit'", "8bit", "4bit", "bf16", "mini"))


def test_a_model_that_is_not_here_is_refused_offline(refuses, call):
    message = refuses(call, "--offline", model="8bit", names=("--offline",))
    assert "pplex models pull 8bit" in message


@pytest.fixture
def damaged(tmp_path, tiny) -> Callable[..., Path]:
    """Make a copy of the tiny model in which one file has other content."""

    def make(name: str, change: Callable[[bytes], bytes] | None) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in tiny.iterdir():
            if path.name != name:
                (folder / path.name).symlink_to(path)
        if change is not None:
            (folder / name).write_bytes(change((tiny / name).read_bytes()))
        return folder

    return make


Tensors = dict[str, tuple[str, list[int], bytes]]


def edited(change: Callable[[Tensors], None]) -> Callable[[bytes], bytes]:
    """Apply a change of tensors to the bytes of a safetensors file."""

    def edit(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
        tensors: Tensors = {
            name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        change(tensors)
        header, end = {}, 0
        for name, (dtype, shape, raw) in tensors.items():
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [end, end + len(raw)],
            }
            end += len(raw)
        text = json.dumps(header).encode()
        body = b"".join(raw for _, _, raw in tensors.values())
        return len(text).to_bytes(8, "little") + text + body

    return edit


# A tensor of each file.
KEYS = {
    LM: "transformer.layers.1.self_attn.out_proj.weight",
    MIMI: "encoder.model.0.conv.conv.weight",
}


def one_row_less(key: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        dtype, (rows, *rest), raw = tensors[key]
        tensors[key] = (dtype, [rows - 1, *rest], raw[: len(raw) // rows * (rows - 1)])

    return change


def one_axis_more(key: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        dtype, shape, raw = tensors[key]
        tensors[key] = (dtype, [*shape, 1], raw)

    return change


def an_extra(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: ("F32", [1], bytes(4))})


@pytest.mark.parametrize("name", [LM, MIMI])
@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[:-1000],
        lambda content: content[:100],
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:8] + b"]" + content[9:],
    ],
    ids=["empty", "end missing", "header cut", "header size", "header flipped"],
)
def test_a_broken_file_of_weights_is_named(refuses, call, damaged, name, change):
    folder = damaged(name, change)
    refuses(call, model=folder, names=(folder, name, "safetensors"))


@pytest.mark.parametrize("name", [LM, MIMI])
def test_a_missing_tensor_is_named(refuses, call, damaged, name):
    folder = damaged(name, edited(lambda tensors: tensors.pop(KEYS[name])))
    refuses(call, model=folder, names=(name, KEYS[name]))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (LM, "transformer.layers.9.norm1.alpha"),
        (LM, "text_linear.bias"),
        (MIMI, "encoder.model.99.conv.conv.weight"),
    ],
)
def test_an_extra_tensor_of_the_models_parts_is_named(
    refuses, call, damaged, name, key
):
    folder = damaged(name, edited(an_extra(key)))
    refuses(call, model=folder, names=(name, key, f"pplex models verify {folder}"))


@pytest.mark.parametrize("name", [LM, MIMI])
def test_a_tensor_that_nobody_needs_is_a_warning(run, call, damaged, tmp_path, name):
    folder, out = damaged(name, edited(an_extra("surplus.weight"))), tmp_path / "o.wav"
    result = run("respond", call, "-o", out, "--model", folder)
    assert (result.exit_code, out.is_file()) == (0, True)
    warnings = [x for x in result.stderr.splitlines() if x.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"{name}: " in warnings[0] and "`surplus.weight`" in warnings[0]
    verified = run("models", "verify", folder, "-q")
    assert verified.exit_code == 0
    assert "`surplus.weight`" in verified.stdout


@pytest.mark.parametrize("name", [LM, MIMI])
@pytest.mark.parametrize("change", [one_row_less, one_axis_more])
def test_a_tensor_of_the_wrong_shape_is_named(refuses, call, damaged, name, change):
    folder = damaged(name, edited(change(KEYS[name])))
    refuses(call, model=folder, names=(name, KEYS[name]))


@pytest.mark.parametrize("name", [LM, MIMI, TOKENIZER])
def test_a_missing_part_of_the_model_is_refused(refuses, call, damaged, name):
    folder = damaged(name, None)
    refuses(call, model=folder, names=(folder,))


def test_a_tokenizer_that_is_none_is_refused(refuses, call, damaged):
    folder = damaged(TOKENIZER, lambda content: b"text")
    refuses(call, model=folder, names=(TOKENIZER,))


def config_with(**entries: object) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        config = json.loads(content)
        config["lm"].update(entries)
        return json.dumps(config).encode()

    return change


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda content: b"{", "JSON"),
        (lambda content: b"\xff\xfe", "JSON"),
        (lambda content: b"[]", "object"),
        (config_with(dim=-4), "lm.dim"),
        (config_with(dim="wide"), "lm.dim"),
        (config_with(norm="layer_norm"), "lm.norm"),
        (config_with(delays=[0, 1]), "lm.delays"),
    ],
)
def test_a_wrong_config_is_refused_with_its_key(refuses, call, damaged, change, found):
    folder = damaged("config.json", change)
    refuses(call, model=folder, names=(folder / "config.json", found))


def test_a_key_that_nobody_knows_is_a_warning(run, call, damaged, tmp_path):
    folder, out = damaged("config.json", config_with(wings=2)), tmp_path / "o.wav"
    result = run("respond", call, "-o", out, "--model", folder)
    assert (result.exit_code, out.is_file()) == (0, True)
    warnings = [x for x in result.stderr.splitlines() if x.startswith("warning: ")]
    assert len(warnings) == 1
    assert "config.json: " in warnings[0] and "`lm.wings`" in warnings[0]


def test_weights_of_other_sizes_than_the_config_are_refused(refuses, call, damaged):
    folder = damaged("config.json", config_with(num_layers=2))
    refuses(call, model=folder, names=(LM, "transformer.layers.2"))


# Voices


def test_an_unknown_voice_is_refused_with_those_there_are(refuses, call):
    refuses(call, "--voice", "NATX9", names=("'NATX9'", "NATF0, NATM0"))


def write_voice(path: Path, width: int) -> Path:
    """A voice as the safetensors folders have it."""
    from pplex.checkpoint.voices import write_voice_file

    write_voice_file(path, np.zeros((3, width), np.float32), np.zeros((17, 4)))
    return path


def test_a_voice_of_another_model_size_is_refused(refuses, call, tmp_path):
    path = write_voice(tmp_path / "wide.safetensors", width=4096)
    refuses(call, "--voice", path, names=("'wide'", 4096, 64))


def test_a_voice_whose_pickle_would_run_code_is_refused(refuses, call, tmp_path):
    class Harm:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/harm",))

    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"embeddings": Harm()}, 2))
    refuses(call, "--voice", path, names=(path, f"{os.system.__module__}.system"))
    assert not (tmp_path / "harm").exists()


def test_a_voice_recording_that_is_too_short_is_refused(refuses, call, tmp_path):
    path = tmp_path / "short.wav"
    soundfile.write(path, np.full(1200, 0.1, np.float32), 24000)
    refuses(call, "--voice", path, names=(path, "too short"))


def test_voices_that_would_be_unpacked_elsewhere_are_refused(
    refuses, call, damaged, tmp_path
):
    def leading_out(content: bytes) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            member = tarfile.TarInfo("voices/../../NATF0.pt")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"harm"))
        return file.getvalue()

    folder = damaged("voices.tgz", leading_out)
    refuses(call, model=folder, names=(folder / "voices.tgz", "../../NATF0.pt"))


def test_a_model_without_voices_asks_for_one(refuses, call, damaged):
    refuses(call, model=damaged("voices.tgz", None), names=("--voice",))


# As a program


def pplex(*args: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pplex", *map(str, args)],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_the_program_ends_with_1_after_a_failure(tmp_path, tiny):
    done = pplex("respond", "no.wav", "-o", "out.wav", "--model", tiny, folder=tmp_path)
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr == "Error: no.wav does not exist; check the name\n"
    assert listing(tmp_path) == {}


def test_the_program_ends_with_2_after_a_wrong_call(tmp_path):
    done = pplex("respond", folder=tmp_path)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == {}


def test_the_program_ends_with_0_when_it_is_done(tmp_path, tiny):
    with wave.open(str(tmp_path / "call.wav"), "wb") as file:
        file.setparams((1, 2, 24000, 100, "NONE", "not compressed"))
        file.writeframes(bytes(200))
    done = pplex(
        "respond", "call.wav", "-o", "out.wav", "--model", tiny, folder=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert {path.name for path in listing(tmp_path)} == {"call.wav", "out.wav"}
