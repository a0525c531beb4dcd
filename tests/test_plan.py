"""What a batch is to do, from file names and jobs files alone."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
import soundfile

from pplex.batch.plan import OutputOptions, Selection, in_shard, make_plan, seed_for
from pplex.conversation.roles import ROLES
from pplex.errors import PplexError
from pplex.model.sampling import SamplingConfig
from pplex.respond.request import Request, Settings

SETTINGS = Settings(voice=None, text="Hello.", sampling=SamplingConfig(), seed=7)


@pytest.fixture
def tree(tmp_path):
    """Make empty files in ``tmp_path/in``."""

    def make(*names: str, root: str = "in") -> Path:
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / root

    return make


@pytest.fixture
def plan(tmp_path):
    def make(
        *inputs: Path,
        wanted: OutputOptions = OutputOptions(),  # noqa: B008
        **options,
    ) -> list[Request]:
        outdir = options.pop("outdir", tmp_path / "out")
        selection = Selection(inputs, **options)
        return make_plan(selection, outdir, wanted, SETTINGS).requests

    return make


@pytest.fixture
def jobs(tmp_path, plan):
    """Plan a jobs file of these rows."""

    def make(*rows: object, name: str = "jobs.jsonl", **options) -> list[Request]:
        path = tmp_path / name
        text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
        path.write_text(text + "\n", encoding="utf-8")
        return plan(jobs=path, **options)

    return make


def outputs(tasks: list[Request], outdir: Path) -> dict[str, str]:
    return {t.key: t.outputs.audio.relative_to(outdir).as_posix() for t in tasks}


# Files and folders


def test_the_tree_under_a_folder_is_mirrored(tree, plan, tmp_path):
    tasks = plan(tree("a.wav", "x/b.wav", "x/y/c.wav"), recursive=True)
    names = {"a.wav": "a.wav", "x/b.wav": "x/b.wav", "x/y/c.wav": "x/y/c.wav"}
    assert outputs(tasks, tmp_path / "out") == names


def test_without_recursive_only_the_folder_itself_is_read(tree, plan):
    assert [t.key for t in plan(tree("a.wav", "x/b.wav"))] == ["a.wav"]


def test_only_audio_files_are_taken_and_no_hidden_ones(tree, plan):
    folder = tree("a.WAV", "b.mp3", "c.txt", ".d.wav", ".x/e.wav")
    assert [t.key for t in plan(folder, recursive=True)] == ["a.WAV", "b.mp3"]


def test_a_pattern_picks_files_by_name_or_path(tree, plan):
    folder = tree("a/input.wav", "a/other.wav", "b/input.raw")
    keys = [t.key for t in plan(folder, recursive=True, glob="input.*")]
    assert keys == ["a/input.wav", "b/input.raw"]
    keys = [t.key for t in plan(folder, recursive=True, glob="a/*.wav")]
    assert keys == ["a/input.wav", "a/other.wav"]


def test_equal_names_of_other_formats_do_not_collide(tree, plan, tmp_path):
    tasks = plan(tree("a.wav", "a.flac", "a.mp3"), wanted=OutputOptions(tokens=True))
    files = [p for t in tasks for p in t.outputs.files().values()]
    assert len(set(files)) == 6
    assert outputs(tasks, tmp_path / "out")["a.flac"] == "a.flac.wav"


@pytest.mark.parametrize(
    "names",
    [
        ("a.flac", "a.flac.wav"),
        ("a.wav", "A.WAV"),
        ("a.wav", "a.user.wav"),
        ("\u00e9.wav", "e\u0301.wav"),  # one name on a Mac
        ("stra\u00dfe.wav", "STRASSE.wav"),
        ("\u0399\u0308\u0301.wav", "\u0390.wav"),
        ("\u212b.wav", "\u00e5.wav"),  # the sign of the unit, and the letter
        ("\u00c5/a.wav", "A\u030a/a.wav"),
        ("a\u200d.wav", "a.wav"),  # ext4's casefold sees no joiner
    ],
)
def test_what_would_still_collide_is_told_apart(tree, plan, names):
    """By every name that a file system may take it for."""
    if len(list(tree(*names, root="names").rglob("*.*"))) < 2:
        pytest.skip("they are one name here")
    tasks = plan(tree(*names), wanted=OutputOptions(layout="separate"), recursive=True)
    files = [str(p) for t in tasks for p in t.outputs.files().values()]
    for fold in (str.upper, str.lower, str.casefold, lambda name: name):
        for form in ("NFC", "NFD"):
            seen = {unicodedata.normalize(form, fold(name)) for name in files}
            assert len({name.replace("\u200d", "") for name in seen}) == 4
    keys = [t.key for t in tasks]
    assert len(set(keys)) == 2


def test_everything_that_respond_reads_is_found_in_a_folder(tree, plan):
    """Whatever libsndfile knows, under the suffix that the format goes by."""
    suffixes = {"NIST": "sph", "IRCAM": "sf", "SVX": "8svx", "WAVEX": "wav"}
    kinds = soundfile.available_formats().keys() - {"RAW", "MPC2K"}
    names = {f"{kind}.{suffixes.get(kind, kind.lower())}" for kind in kinds}
    names |= {"x.aif", "x.aifc", "x.opus", "x.oga", "x.snd", "x.bwf", "x.MP2"}
    assert {t.key for t in plan(tree(*names))} == names


def test_what_a_folder_holds_beside_recordings_is_counted(tree, tmp_path):
    folder = tree("a.wav", "b.m4a", "c.M4A", "d", ".e.m4a", "x/f.wav", ".y/g.wav")
    tree("out/a.wav", "out/manifest.jsonl")

    def left_out(**options):
        selection = Selection((folder,), **options)
        return make_plan(selection, folder / "out", OutputOptions(), SETTINGS).left_out

    flat = left_out()
    assert (flat.suffixes, flat.folders) == ({".m4a": 2, "no suffix": 1}, 1)
    files, folders = flat.sentences()
    assert (
        "3 files that are no recordings by their names (.m4a 2, no suffix 1)" in files
    )
    assert "1 folder within; --recursive" in folders
    assert left_out(recursive=True).folders == 0
    assert not left_out(glob="a.*", recursive=True).sentences()


def test_a_folder_that_cannot_be_read_is_named(tree, plan, monkeypatch):
    folder = tree("a.wav", "x/b.wav")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "x":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    selection = Selection((folder,), recursive=True)
    found = make_plan(selection, folder / "out", OutputOptions(), SETTINGS)
    assert [request.key for request in found.requests] == ["a.wav"]
    assert found.left_out.unreadable == {str(folder / "x"): "Permission denied"}
    with pytest.raises(PplexError, match="x cannot be read: Permission denied"):
        plan(folder / "x")


def test_several_folders_lie_side_by_side(tree, plan, tmp_path):
    tree("a.wav", root="calls/en")
    tree("a.wav", root="calls/de")
    tasks = plan(tmp_path / "calls/en", tmp_path / "calls/de")
    assert [t.key for t in tasks] == ["de/a.wav", "en/a.wav"]


def test_a_file_given_twice_is_one_recording(tree, plan):
    folder = tree("a.wav", "b.wav")
    assert len(plan(folder, folder / "a.wav", folder)) == 2


def test_files_are_taken_whatever_their_suffix(tree, plan):
    folder = tree("a.sound")
    assert [t.key for t in plan(folder / "a.sound")] == ["a.sound"]


def test_a_folder_without_recordings_is_refused(tree, plan):
    with pytest.raises(PplexError, match="--recursive"):
        plan(tree("x/a.wav"))


def test_results_within_the_folder_are_no_recordings_and_hide_none(tree, plan):
    folder = tree("a.wav", "out/a.wav", "out/b.wav")
    with pytest.raises(PplexError, match="holds a.wav, b.wav, which would be left out"):
        plan(folder, recursive=True, outdir=folder / "out")
    tree("out/manifest.jsonl")
    (folder.parent / "link").symlink_to(folder)
    for outdir in (folder / "out", folder.parent / "link" / "out"):
        tasks = plan(folder, recursive=True, outdir=outdir)
        assert [task.key for task in tasks] == ["a.wav"]


def test_recordings_are_never_overwritten(tree, plan):
    folder = tree("a.wav")
    with pytest.raises(PplexError, match="--output-name"):
        plan(folder, outdir=folder)


def test_a_loop_of_links_ends(tree, plan):
    folder = tree("x/a.wav")
    (folder / "x" / "again").symlink_to(folder)
    assert [t.key for t in plan(folder, recursive=True)] == ["x/a.wav"]


# Full-Duplex-Bench


def test_results_lie_beside_the_recordings_under_a_name_of_their_own(tree, plan):
    folder = tree("1/input.wav", "1/output.wav", "2/input.wav", "2/pause.json")
    wanted = OutputOptions(
        name="output.wav", transcripts=("json",), stats=True, tokens=True
    )
    tasks = plan(folder, recursive=True, outdir=folder, wanted=wanted)
    assert [t.key for t in tasks] == ["1/input.wav", "2/input.wav"]
    assert tasks[0].outputs.audio == folder / "1/output.wav"
    for task in tasks:
        for path in task.outputs.files().values():
            assert not path.name.endswith("output.json")


def test_two_recordings_under_one_name_are_refused(tree, plan):
    folder = tree("1/input.wav", "1/clean_input.wav")
    with pytest.raises(PplexError, match="--glob"):
        plan(folder, recursive=True, wanted=OutputOptions(name="output.wav"))


# Identity


def test_a_seed_follows_from_the_name_alone(tree, plan):
    folder = tree("a.wav", "b.wav", "c.wav")
    seeds = {t.key: t.settings.seed for t in plan(folder)}
    assert seeds == {name: seed_for(7, name) for name in ("a.wav", "b.wav", "c.wav")}
    assert len(set(seeds.values())) == 3
    (alone,) = plan(folder / "b.wav")
    assert alone.settings.seed == seeds["b.wav"]


def test_recordings_of_one_name_have_seeds_of_their_own(tree, plan):
    """As a shell expands calls/*/input.wav, in any order, and calls/*/."""
    names = ("a/input.wav", "b/input.wav", "c/1/input.wav")
    folder = tree(*names, "b/other.wav")
    files = [folder / name for name in (*names, "b/other.wav")]
    expected = {name: seed_for(7, name) for name in names}
    expected["b/other.wav"] = seed_for(7, "other.wav")
    for given in (files, files[::-1]):
        assert {t.key: t.settings.seed for t in plan(*given)} == expected
    folders = [folder / "a", folder / "b"]
    of_folders = {t.key: t.settings.seed for t in plan(*folders)}
    assert of_folders == {name: expected[name] for name in of_folders}
    whole = {t.key: t.settings.seed for t in plan(folder, recursive=True)}
    assert all(whole[name] == expected[name] for name in names)


def test_seeds_do_not_change_between_versions():
    assert seed_for(42424242, "calls/a.wav") == 3986472292


def test_shards_are_a_partition(tree, plan):
    keys = [f"{i}.wav" for i in range(200)]
    parts = [{k for k in keys if in_shard(k, (n, 4))} for n in range(1, 5)]
    assert sum(map(len, parts)) == 200 == len(set.union(*parts))
    assert min(map(len, parts)) > 25


# Jobs files


def test_a_row_may_settle_everything(jobs, tmp_path):
    (task,) = jobs(
        {
            "input": "in/a.wav",
            "output": "x/b.wav",
            "voice": "NATM1",
            "role": "casual",
            "seed": 3,
            "tail": 1.5,
            "speaker": "Ann",
        }
    )
    assert (task.key, task.source) == ("x/b.wav", tmp_path / "in/a.wav")
    assert task.outputs.audio == tmp_path / "out/x/b.wav"
    settings = task.settings
    assert (settings.voice, settings.text) == ("NATM1", ROLES["casual"])
    assert (settings.seed, settings.tail) == (3, 1.5)
    assert task.extra == {"speaker": "Ann"}


def test_what_a_row_leaves_open_comes_from_the_command(jobs):
    (task,) = jobs({"input": "a.wav", "voice": None})
    assert (task.settings.voice, task.settings.text) == (None, "Hello.")
    assert task.settings.seed == seed_for(7, "a.wav")


def test_csv_does_as_well(jobs):
    tasks = jobs(
        "input,prompt,tail,topic",
        'a.wav,"You are Ann, a baker.",2,bread',
        "b.wav,,,",
        name="jobs.csv",
    )
    assert [t.settings.text for t in tasks] == ["You are Ann, a baker.", "Hello."]
    assert [t.settings.tail for t in tasks] == [2.0, 0.0]
    assert tasks[0].extra == {"topic": "bread"}


def test_an_empty_prompt_is_one(jobs):
    (task,) = jobs({"input": "a.wav", "prompt": ""})
    assert task.settings.text == ""


def test_a_voice_file_lies_beside_the_jobs_file(jobs, tmp_path):
    (tmp_path / "me.wav").touch()
    (task,) = jobs({"input": "a.wav", "voice": "me.wav"})
    assert task.settings.voice == str(tmp_path / "me.wav")


def test_one_recording_in_two_voices_gives_two_outputs_in_any_order(jobs):
    rows = [{"input": "a.wav", "voice": v} for v in ("NATF0", "NATM0")]
    one, other = jobs(*rows), jobs(*reversed(rows))
    assert one == other
    assert len({t.outputs.audio for t in one}) == len({t.key for t in one}) == 2
    assert one[0].settings.seed == one[1].settings.seed


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "no object"),
        ({}, "no input"),
        ({"input": 3}, "text is expected"),
        ({"input": ""}, "text is expected"),
        ({"input": "."}, "no file name"),
        ({"input": "b.wav", "role": "king"}, "no role 'king'"),
        ({"input": "b.wav", "role": "casual", "prompt": "x"}, "exclude each other"),
        ({"input": "b.wav", "seed": -1}, "seed is -1"),
        ({"input": "b.wav", "seed": 1.5}, "seed is 1.5"),
        ({"input": "b.wav", "seed": True}, "seed is True"),
        ({"input": "b.wav", "tail": "long"}, "tail is 'long'"),
        ({"input": "b.wav", "seed": "9" * 5000}, "seed is '9999"),
        ({"input": "b.wav", "tail": float("nan")}, "line 2 is not JSON: .* float"),
        (
            '{"input": "b.wav", "x": ' + 970 * "[" + 970 * "]" + "}",
            "line 2 is not JSON",
        ),
        ('{"input": "b.wav", "input": "c.wav"}', "a key stands twice"),
        ({"input": "b.wav", "output": "../b.wav"}, "leaves the output folder"),
        ({"input": "b.wav", "output": "/b.wav"}, "leaves the output folder"),
        ({"input": "b.wav", "output": "b.mp3"}, "ends? its name in .wav"),
        ({"input": "b.wav", "prompt": "\ud800"}, "not text"),
        ({"input": "a.wav"}, "lines 1 and 2 are equal"),
    ],
)
def test_a_bad_row_is_named_before_anything_runs(jobs, row, says):
    with pytest.raises(PplexError, match=says):
        jobs({"input": "a.wav"}, row)


@pytest.mark.parametrize("other", ["X.wav", "x\u200d.wav"])
def test_two_rows_whose_outputs_may_be_one_file_are_refused(jobs, other):
    rows = [{"input": "a.wav", "output": "x.wav"}]
    for row in ({"input": "b.wav", "output": other}, {"input": other}):
        with pytest.raises(PplexError, match="are one file where capitals"):
            jobs(*rows, row)


def test_two_rows_with_one_output_are_refused(jobs):
    with pytest.raises(PplexError, match="two recordings have the output x.wav"):
        jobs(*({"input": name, "output": "x.wav"} for name in ("a.wav", "b.wav")))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("jobs.txt", "", ".jsonl or .csv"),
        ("jobs.jsonl", "", "no recordings"),
        ("jobs.csv", "input,tail\na.wav\n", "columns"),
        ("jobs.csv", "input\na.wav,b\n", "columns"),
        ("jobs.csv", "\udcff", "UTF-8"),
    ],
)
def test_a_bad_jobs_file_is_refused(plan, tmp_path, name, text, says):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PplexError, match=says):
        plan(jobs=path)


def test_a_missing_jobs_file_is_named(plan, tmp_path):
    with pytest.raises(PplexError, match="none.csv"):
        plan(jobs=tmp_path / "none.csv")
