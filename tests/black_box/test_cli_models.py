"""``pplex models``: what each command prints, writes and refuses."""

from __future__ import annotations

import json

import pytest

from pplex.cli.models_convert import SizeType


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """No cache of this machine is read or written."""
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def four(tiny, tmp_path_factory):
    """The tiny model converted by the command, and what that printed."""
    from click.testing import CliRunner

    from pplex.cli.main import cli

    folder = tmp_path_factory.mktemp("four") / "m"
    arguments = ["models", "convert", str(tiny), str(folder), "--bits", "4"]
    return folder, CliRunner().invoke(cli, arguments)


def test_the_list_says_what_fits(run, monkeypatch):
    monkeypatch.setattr("pplex.engine.device.available_gb", lambda: 10.0)
    listed = json.loads(run("models", "list", "--json").stdout)
    fits = {entry["name"]: entry["fits"] for entry in listed}
    assert fits["8bit"] is False and fits["4bit"] is True
    lines = run("models", "list").stdout.splitlines()
    at = lines[0].index("FITS")
    assert [line[at : at + 4].strip() for line in lines[1:3]] == ["no", "yes"]


def test_path_prints_where_a_model_lies(run, tiny):
    result = run("models", "path", tiny)
    assert (result.exit_code, result.stdout) == (0, f"{tiny}\n")
    result = run("models", "path", "bf16")
    assert (result.exit_code, result.stdout) == (1, "")


def test_info_prints_parts_and_the_speed_to_expect(run, tiny):
    result = run("models", "info", tiny, "--bandwidth", "100")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "temporal.gating.linear_in" in result.stdout
    assert "at 100 GB/s a frame takes at least" in result.stdout
    found = json.loads(run("models", "info", tiny, "--json").stdout)
    assert found["parameters"] == 4_815_104
    assert found["lm_bytes"] == 2 * found["parameters"]


def test_convert_prints_the_folder_and_verify_passes_it(run, four):
    folder, result = four
    assert (result.exit_code, result.stdout) == (0, f"{folder}\n")
    assert "language model" in result.stderr
    checked = run("models", "verify", folder, "-q")
    assert (checked.exit_code, checked.stdout, checked.stderr) == (0, "", "")


def test_a_new_model_has_no_name_by_which_another_is_meant(
    run, four, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("mini", "auto"):
        result = run("models", "convert", four[0], name, "--bits", 16)
        assert result.exit_code == 2 and f"write ./{name}" in result.stderr
    result = run("models", "convert", four[0], "./mini", "--bits", 8)
    assert result.stdout == f"{tmp_path / 'mini'}\n"


def test_a_fault_ends_verify_with_1_and_is_printed(run, four, tmp_path):
    import shutil

    shutil.copytree(four[0], tmp_path / "m")
    (tmp_path / "m" / "voices" / "NATF0.safetensors").unlink()
    result = run("models", "verify", tmp_path / "m", "--json")
    assert result.exit_code == 1
    levels = [finding["level"] for finding in json.loads(result.stdout)]
    assert "fault" in levels
    assert "fault" in result.stderr


def test_published_numbers_apply_to_the_7b_only(run, four):
    result = run("models", "verify", four[0], "--numbers")
    assert result.exit_code == 0
    assert "do not apply" in result.stdout


def test_a_record_is_written_once_and_compared(run, data, tmp_path):
    record, user = tmp_path / "r.json", data / "respond" / "user_c.wav"
    result = run("models", "verify", "mini", "--input", user, "--record", record, "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    content = json.loads(record.read_text())
    assert content["name"] == "mini" and len(content["run"]["text"]) == 13
    assert str(data.parent.parent) not in record.read_text()
    again = run("models", "verify", "mini", "--record", record)
    assert again.exit_code == 1 and "exists already" in again.stderr
    assert json.loads(record.read_text()) == content
    same = json.loads(
        run("models", "verify", "mini", "--against", record, "--json").stdout
    )
    levels = {f["what"]: f["level"] for f in same}
    for what in ("first step", "silent step", "given tokens", "voices of both"):
        assert levels[what] == "ok"
    content["silence"]["moments"][1][1] *= 1.1
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    result = run("models", "verify", record, "--against", other)
    assert result.exit_code == 1
    assert "silent step: deviations of layers differ by at most 0.09" in result.stdout
    assert "ok       first step" in result.stdout


def test_what_cannot_be_recorded_or_compared_is_refused(run, tiny, tmp_path):
    (tmp_path / "no.json").write_text("{}")
    for arguments, code, says in (
        (("--input", "user.wav"), 2, "--numbers"),
        (("--numbers", "--input", tmp_path / "user.wav"), 1, "user.wav"),
        (("--against", tmp_path / "no.json"), 1, "no.json is no record"),
        (("--against", tmp_path / "missing.json"), 1, "missing.json"),
        (("--record", tmp_path / "nowhere" / "r.json"), 1, "nowhere"),
    ):
        result = run("models", "verify", tiny, *arguments)
        assert result.exit_code == code
        assert says in result.stderr and "Traceback" not in result.stderr


def test_a_model_at_fault_is_not_recorded(run, four, tmp_path):
    import shutil

    shutil.copytree(four[0], tmp_path / "m")
    (tmp_path / "m" / "voices" / "NATF0.safetensors").unlink()
    result = run("models", "verify", tmp_path / "m", "--record", tmp_path / "r.json")
    assert result.exit_code == 1 and "nothing is recorded" in result.stderr
    result = run("models", "verify", tmp_path / "m", "--numbers")
    assert result.exit_code == 1 and "numbers: not looked at" in result.stdout
    assert not (tmp_path / "r.json").exists()


def test_mixed_takes_no_more_than_it_may(run, tiny, tmp_path):
    result = run(
        *("models", "convert", tiny, tmp_path / "m", "--bits", "4"),
        *("--recipe", "mixed", "--max-size", "6MB", "--refine", "-q"),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(run("models", "info", tmp_path / "m", "--json").stdout)
    assert 5e6 < found["lm_bytes"] <= 6e6
    card = (tmp_path / "m" / "README.md").read_text()
    assert "--recipe mixed --max-size 6000000 --refine" in card


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--bits", "5"], 2, "--bits"),
        (["--bits", "4", "--max-size", "5GB"], 2, "--recipe mixed"),
        (["--bits", "4", "--recipe", "mixed", "--max-size", "much"], 2, "'much'"),
        (["--bits", "4", "--recipe", "mixed", "--max-size", 400 * "9"], 2, "a size"),
        (
            ["--bits", "4", "--recipe", "mixed", "--max-size", "1"],
            1,
            "--max-size 1 B cannot be met: the least that this recipe makes is ",
        ),
        (["--bits", "4", "--recipe", "no.json"], 1, "--recipe no.json"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(
    run, tiny, tmp_path, arguments, code, says
):
    result = run("models", "convert", tiny, tmp_path / "m", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr
    assert not (tmp_path / "m").exists()


def test_sizes_are_read_in_their_units():
    for text, size in (("5.3GB", 5_300_000_000), ("700 mb", 700_000_000), ("12", 12)):
        assert SizeType().convert(text, None, None) == size


def test_compare_prints_a_table_json_and_a_plot(run, tiny, four, tmp_path, data):
    wav = data / "respond" / "user_c.wav"
    result = run(
        *("models", "compare", tiny, four[0], wav, "--seconds", "0.8"),
        *("--plot", tmp_path / "kl.svg"),
    )
    assert result.exit_code == 0
    assert "agent 8" in result.stdout
    assert (tmp_path / "kl.svg").read_text().startswith("<svg")
    result = run(
        *("models", "compare", tiny, four[0], "--seconds", "0.8", "--json"),
        *("--prompt", ""),
    )
    assert json.loads(result.stdout)["mean_kl"] > 0


def test_keys_and_values_at_8_bits_say_almost_the_same(run, data):
    wav = data / "respond" / "user_c.wav"
    found = []
    line = "models", "compare", "mini", "mini", wav, "--seconds", 2
    for options in (), ("--kv-bits", 8):
        result = run(*line, "--json", *options)
        found.append(json.loads(result.stdout))
    same, kept = found
    assert same["mean_kl"] == 0 < kept["mean_kl"] < 1e-4
    assert min(stream["top1"] for stream in kept["streams"]) > 0.99


def test_sensitivity_writes_what_mixed_reads(run, tiny, tmp_path):
    path = tmp_path / "parts.json"
    result = run("models", "sensitivity", tiny, "-o", path, "--seconds", "0.4")
    assert result.exit_code == 0
    assert json.loads(path.read_text())["parts"]["emb"] > 0
    result = run(
        *("models", "convert", tiny, tmp_path / "m", "--bits", "4"),
        *("--recipe", "mixed", "--sensitivity", path),
    )
    assert result.exit_code == 0


def test_only_downloads_are_removed(run, tiny):
    for name, says in ((tiny, "delete it yourself"), ("8bit", "not on this machine")):
        result = run("models", "remove", name, "--yes")
        assert (result.exit_code, result.stdout) == (1, "")
        assert says in result.stderr
    assert tiny.is_dir()


@pytest.mark.parametrize("name", ["mini", "8bit", "nobody/nothing"])
def test_what_cannot_be_removed_is_refused_unasked(run, name):
    result = run("models", "remove", name)
    assert result.exit_code == 1 and "Delete" not in result.stderr


def test_a_download_is_removed(run, tmp_path):
    repo = tmp_path / "hf" / "models--nvidia--personaplex-7b-v1"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "blobs" / "b").write_text("x" * 100)
    (snapshot / "config.json").symlink_to(repo / "blobs" / "b")
    result = run("models", "remove", "bf16")  # removing asks first
    assert result.exit_code == 1
    assert "Delete bf16" in result.stderr and repo.exists()
    result = run("models", "remove", "bf16", "--yes")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "bf16 is removed" in result.stderr
    assert not repo.exists()
