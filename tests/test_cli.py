"The command line as a person meets it: what it understands, what it says, and its exit codes."

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import av
import pytest
from PIL import Image

from tokenflow_nb.cli import command as cli
from tokenflow_nb.cli import tools
from tokenflow_nb.cli.options import given
from tokenflow_nb.config import Reading
from tokenflow_nb.edit import edit_video


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    "Exit code, stdout and stderr of a call, made from an empty folder."
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(argv)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def options(*argv: str):
    return cli.parser().parse_args(argv)


# What it understands


def test_edit_passes_on_what_was_given_and_nothing_else():
    args = options(
        "edit", "wolf.mp4", "a gold wolf", "--size", "128x192", "--steps", "10", "--rule", "linear", "--seed", "3", "--no-resume"
    )
    assert given(args, args.settings) == dict(num_inference_steps=10, seed=3, size=(128, 192), rule="linear", resume=False)
    assert (args.model, args.device, args.published) == ("sd1.5", None, False)
    args = options("edit", "wolf.mp4", "a gold wolf")
    assert given(args, args.settings) == {}


def setting_actions(name: str = "edit") -> dict[str, argparse.Action]:
    "The options of a command that are settings, by the names that `edit_video` has for them."
    command = next(iter(cli.parser()._subparsers._group_actions)).choices[name].complete()
    return {action.dest: action for action in command._actions if action.dest in command.get_default("settings")}


def test_every_option_of_edit_exists_in_python_and_the_other_way_round():
    python = inspect.signature(edit_video).parameters
    assert set(setting_actions()) <= set(python)
    elsewhere = {"clip", "prompt", "config", "model", "callback_on_step_end", "out", "device", "progress", "overrides"}
    elsewhere |= {"lora", "vae", "tokenizer", "ip_adapter_image"}  # the first three are options that `invert` has, too
    assert set(python) - set(setting_actions()) - elsewhere == {"editor", "store"}


def test_invert_reads_a_clip_as_edit_does():
    names = {each.name for each in fields(Reading)} - {"restore_size"}
    assert set(setting_actions("invert")) == names < set(setting_actions())


@pytest.mark.parametrize("flag, value", [("--remeasure", True), ("--no-remeasure", False), ("--no-keep", False), ("--restore-size", True)])
def test_a_switch_can_be_set_both_ways(flag, value):
    "So what `--published` switches on can be switched off."
    args = options("edit", "wolf.mp4", "a gold wolf", "--published", flag)
    assert list(given(args, args.settings).values()) == [value]


def test_the_defaults_in_the_help_are_those_of_python():
    python, shown = inspect.signature(edit_video).parameters, {}
    for name, action in setting_actions().items():
        if (found := re.search(r"\(default: (.*)\)$", action.help)) and python[name].default is not None:
            shown[name] = found[1], str(python[name].default)
    assert len(shown) > 10 and all(one == other for one, other in shown.values()), shown


# What it says


@pytest.mark.parametrize("command", ["demo", "edit", "invert", "evaluate", "bench", "models", "cache"])
def test_help_of_every_command_has_no_riddles(run, command):
    code, out, err = run(command, "--help")
    assert code == 0 and err == ""
    assert f"usage: tokenflow_nb {command}" in out and "--debug" in out
    assert "None" not in out and "SUPPRESS" not in out and "%(" not in out


def test_help_lists_the_commands_with_examples(run):
    code, out, _ = run("--help")
    assert code == 0 and "examples:" in out and "exit codes:" in out
    for command in ("demo", "edit", "invert", "evaluate", "bench", "models", "cache"):
        assert f"\n    {command} " in out


def test_help_of_edit_groups_options_and_shows_defaults(run):
    _, out, _ = run("edit", "--help")
    for group in ("which frames:", "edit:", "of the method pnp:", "of the method sdedit:", "how it is run:", "examples:"):
        assert f"\n{group}\n" in out
    assert "(default: 25)" in out and "(default: sd1.5)" in out


def test_models_are_listed_without_paths_of_this_machine(run):
    code, out, _ = run("models")
    assert code == 0 and "ships with the package" in out and "stable-diffusion-v1-5/" in out
    assert str(Path(cli.__file__).parent.parent) not in out


# What it refuses, and with which code


@pytest.mark.parametrize(
    "argv, says",
    [
        ((), "the following arguments are required: COMMAND"),
        (("edti",), "edti"),
        (("edit", "a.mp4"), "PROMPT"),
        (("edit", "a.mp4", "gold", "--size", "12y"), "'12y' is not a size: write 128 (square) or 128x192"),
        (("edit", "a.mp4", "gold", "--size", "0x8"), "'0x8' is not a size"),
        (("edit", "a.mp4", "gold", "--steps", "many"), "--steps"),
        (("edit", "a.mp4", "gold", "--method", "pnq"), "'pnp', 'sdedit'"),
        (("edit", "a.mp4", "gold", "--colour", "red"), "--colour"),
        (("evaluate", "--suite", "moon"), "'toy', 'davis'"),
        (("evaluate", "--suite", "toy", "--external", "gen1"), "write NAME=FOLDER"),
        (("cache",), "list | prune | clear"),
        (("cache", "prune"), "--max-size"),
        (("cache", "prune", "--max-size", "lots"), "'lots' is not an amount"),
    ],
)
def test_usage_errors_have_code_2_and_name_the_argument(run, argv, says):
    code, out, err = run(*argv)
    assert code == 2 and out == "" and says in err


def failure(outcome, exit_code: int = 2) -> str:
    "The one line that a failed call may print."
    code, out, err = outcome
    assert code == exit_code and out == "" and err.startswith("tokenflow_nb: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", [("edit", "nowhere.mp4", "a gold wolf"), ("invert", "nowhere.mp4")])
def test_a_clip_that_is_not_there(run, command, tmp_path):
    said = failure(run(*command))
    assert "'nowhere.mp4'" in said and str(tmp_path) in said


def test_a_file_that_is_no_video(run, tmp_path):
    (tmp_path / "notes.mp4").write_text("no video at all")
    assert "notes.mp4" in failure(run("edit", "notes.mp4", "gold", "--model", "toy"))
    assert not (tmp_path / "notes-edited").exists()


def test_out_that_is_a_file(run, clip_file, tmp_path):
    (tmp_path / "taken").touch()
    assert "--out='taken' is a file" in failure(run("edit", str(clip_file), "gold", "--out", "taken"))
    assert "--out='taken' is a file" in failure(run("demo", "--out", "taken"))


def test_an_unknown_model_gets_the_nearest_name(run, clip_file, tmp_path):
    assert "'toy'" in failure(run("edit", str(clip_file), "gold", "--model", "toi"))
    assert "'sd1.5'" in failure(run("invert", str(clip_file), "--model", "sd15"))
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    "argv, says",
    [
        ((), "toy or davis"),
        (("--suite", "davis"), "--davis-folder DIR"),
        (("--suite", "davis", "--davis-folder", "nowhere"), "nowhere"),
        (("--suite", "toy", "--methods", "vae,tokenflo"), "methods: 'tokenflo' is unknown; did you mean 'tokenflow'? there are vae, "),
        (("--suite", "toy", "--metrics", "warp"), "metrics='warp' is unknown: there are warp_error, "),
        (("--suite", "toy", "--external", "vae=clips"), "'vae' is the name of a built-in method"),
        (("--suite", "toy", "--scenes", "0"), "n=0"),
    ],
)
def test_evaluate_names_what_is_valid_before_anything_is_loaded(run, monkeypatch, tmp_path, argv, says):
    from tokenflow_nb.compare import suite

    monkeypatch.setattr(suite, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert says in failure(run("evaluate", *argv, "--processes", "1"))
    assert list(tmp_path.iterdir()) == []


def test_evaluate_lists_methods_and_metrics(run):
    code, out, _ = run("evaluate", "--list")
    assert code == 0 and {"vae", "per_frame", "tokenflow", "warp_error", "clip_gain"} <= set(out.split())


def test_evaluate_makes_every_method_unless_some_are_named(run, cache, monkeypatch):
    from tokenflow_nb.compare import suite
    from tokenflow_nb.compare import METHODS

    def stop(cases, methods, *_, **__):
        assert list(methods) == list(METHODS) and all(callable(method) for method in methods.values())
        raise ValueError("all are there")

    monkeypatch.setattr(suite, "run_suite", stop)
    assert "all are there" in failure_of(run("evaluate", "--suite", "toy", "--scenes", "1"))


def test_evaluate_writes_page_table_and_cards_and_goes_on(run, cache, tmp_path):
    argv = ["evaluate", "--suite", "toy", "--scenes", "1", "--prompts", "1", "--frames", "2", "--steps", "2", "--processes", "1"]
    code, out, err = run(*argv, "--methods", "vae", "--metrics", "warp_error,clip_gain")
    assert code == 0 and "1 edit: 1 case × 1 method. This takes about" in out, err
    assert {"report.html", "report.csv", "cards.json"} <= {path.name for path in (tmp_path / "report").iterdir()}
    code, out, _ = run(*argv, "--methods", "vae", "--metrics", "warp_error,clip_gain")
    assert code == 0 and "Nothing is left to do." in out
    assert "num_inference_steps: 2 there, 3 asked for" in failure_of(run(*argv, "--methods", "vae", "--steps", "3"))


def failure_of(outcome) -> str:
    "The sentence of a call that failed on its way."
    code, _, err = outcome
    assert code == 2
    return err.splitlines()[-1]


def test_debug_lets_the_error_through(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        cli.main(["edit", str(tmp_path / "nowhere.mp4"), "gold", "--debug"])


def test_an_error_without_a_sentence_of_its_own_says_its_type(run, monkeypatch):
    def broken():
        raise KeyError("weights")

    monkeypatch.setattr(tools, "run_models", lambda args: broken())
    assert "KeyError: 'weights' (--debug shows where)" in failure(run("models"), 1)


def test_ctrl_c_is_no_failure_but_has_its_code(run, monkeypatch):
    def stopped(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tools, "run_models", stopped)
    code, out, err = run("models")
    assert code == 130 and out == "" and err.strip() == "tokenflow_nb: stopped"


def test_the_console_script_returns_the_code():
    script = Path(sys.executable).with_name("tokenflow_nb")
    command = (
        [str(script)]
        if script.exists()
        else [sys.executable, "-c", "import sys; from tokenflow_nb.cli.command import main; sys.exit(main())"]
    )
    done = subprocess.run(
        [*command, "edit", "nowhere.mp4", "gold"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr


# The cache


def test_cache_lists_prunes_and_clears(run, cache):
    from tokenflow_nb.store import Store

    for name in ("trajectory-old", "trajectory-new"):
        with Store().writing(name) as writer:
            writer.put_json("note", "x" * 2000)
    os.utime(cache / "trajectory-old", (1, 1))
    code, out, _ = run("cache", "list")
    assert code == 0 and "trajectory-old" in out and "trajectory-new" in out and str(cache) in out
    code, out, _ = run("cache", "prune", "--max-size", "3kB")
    assert code == 0 and "removed 1 entries" in out and [entry.key for entry in Store().entries()] == ["trajectory-new"]
    assert run("cache", "clear")[0] == 0 and Store().entries() == []
    assert run("cache", "clear")[0] == 0  # nothing to remove is no error


# The work itself


def frames_of(path: Path) -> tuple[int, tuple[int, int]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return sum(1 for _ in container.decode(stream)), (stream.width, stream.height)


def test_demo_writes_its_four_files_and_three_lines_of_figures(run, cache, tmp_path):
    code, out, _ = run("demo", "--out", "result", "--steps", "2", "--quiet")
    assert code == 0
    folder = tmp_path / "result"
    assert {path.name for path in folder.iterdir()} == {"edited.mp4", "before_after.mp4", "sheet.png", "run.json"}
    assert frames_of(folder / "edited.mp4") == (24, (128, 128))
    assert frames_of(folder / "before_after.mp4") == (24, (256, 128))
    assert Image.open(folder / "sheet.png").height >= 256
    assert "a gold star on grass" in json.dumps(json.loads((folder / "run.json").read_text()))
    lines = out.strip().splitlines()
    assert len(lines) == 7 and all(line.startswith("wrote ") for line in lines[:4])
    assert [line.split()[0] for line in lines[4:]] == ["object", "background", "consistency"]


def test_edit_of_a_file(run, cache, clip_file, tmp_path):
    code, out, _ = run(
        "edit",
        str(clip_file),
        "a gold square on grass",
        "--model",
        "toy",
        "--steps",
        "2",
        "--size",
        "64",
        "--max-frames",
        "3",
        "--quiet",
    )
    assert code == 0 and "edited.mp4" in out
    assert {path.name for path in (tmp_path / "square-edited").iterdir()} == {"edited.mp4", "run.json"}
    assert frames_of(tmp_path / "square-edited" / "edited.mp4")[0] == 3


def test_invert_says_whether_it_is_good_enough(run, cache, clip_file):
    from tokenflow_nb.store import Store

    code, out, _ = run(
        "invert",
        str(clip_file),
        "a yellow square on grass",
        "--model",
        "toy",
        "--steps",
        "3",
        "--size",
        "64",
        "--quiet",
    )
    assert code == 0 and " dB" in out
    assert len(Store().entries()) == 1
