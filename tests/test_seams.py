"Where the package can be extended, and what keeps it in layers: one way from clip to result, no circles, editors from outside."

import ast
import inspect
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
import torch
from kept import run_kept

import tokenflow_nb
from tokenflow_nb.backbones.base import Model
from tokenflow_nb.config import EditConfig, Execution
from tokenflow_nb.edit import Edit, edit_video, stages, starting
from tokenflow_nb.editors import Editor, PlugAndPlay, base, editors, identity, register
from tokenflow_nb.inversion import invert
from tokenflow_nb.store import Store
from tokenflow_nb.support.progress import drive
from tokenflow_nb.support.settings import setting
from tokenflow_nb.toy.world import Scene

ROOT = Path(tokenflow_nb.__file__).parent
SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)
FEW = dict(num_inference_steps=2, keyframe_interval=2, source_prompt=SCENE.caption)


# ---- layers


@cache
def trees() -> dict[str, ast.Module]:
    "The syntax tree of every module by its dotted name."
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["tokenflow_nb", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def imported(name: str) -> set[str]:
    "The modules of the package that a module imports anywhere: in functions and under TYPE_CHECKING, too."
    package = name if (ROOT / Path(*name.split(".")[1:]) / "__init__.py").is_file() else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(trees()[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            found |= {start} | {f"{start}.{alias.name}" for alias in node.names}
    return {module for module in found & set(trees()) if module != "tokenflow_nb"} - {name}


def test_modules_import_from_below_only():
    try:
        tuple(TopologicalSorter({name: imported(name) for name in trees()}).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def is_room(name: str) -> bool:
    return (ROOT / Path(*name.split(".")[1:]) / "__init__.py").is_file()


def test_the_map_in_contributing_has_every_module_below_those_that_it_imports():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The map")[2]
    rows = [f"tokenflow_nb.{name}" for name in re.findall(r"^\| `([\w.]+)` \| \w", text, re.M)]
    modules = {name for name in trees() if not is_room(name)} - {"tokenflow_nb._modidx"}
    assert len(rows) == len(set(rows)) and set(rows) == modules
    above = set()
    for name in rows:
        used = imported(name)
        used |= {other for room in used if is_room(room) and not name.startswith(f"{room}.") for other in imported(room)}
        assert {other for other in used if not is_room(other)} - {name} <= above, f"{name} imports from below its row"
        above.add(name)


def test_no_function_needs_a_scroll_and_no_line_is_long():
    "But for the list of names that nbdev writes at the head of a module."
    for name, tree in trees().items():
        if name == "tokenflow_nb._modidx":
            continue
        path = ROOT / Path(*name.split(".")[1:])
        path = path / "__init__.py" if is_room(name) or name == "tokenflow_nb" else path.with_suffix(".py")
        listed = {
            number for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
            for number in range(node.lineno, node.end_lineno + 1)
        }
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [f"{path.name}:{n}" for n, line in enumerate(lines, 1) if len(line) > 120 and n not in listed]
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        assert not [f"{path.name}:{node.name}" for node in functions if node.end_lineno - node.lineno >= 40]


def calls(tree: ast.AST, names: set[str]) -> bool:
    return any(isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in names for node in ast.walk(tree))


def test_one_function_inverts_and_then_makes_an_edit():
    "Everything else drives `stages`, or `starting`, which is its first half."
    both = {
        f"{module}.{node.name}" for module, tree in trees().items() for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and calls(node, {"invert", "inverting"}) and calls(node, {"Edit", "cls"})
    }
    assert both == {"tokenflow_nb.edit.starting"}
    makers = {module for module, tree in trees().items() if calls(tree, {"Edit"})}
    assert makers == {"tokenflow_nb.edit"}


def test_the_package_offers_its_names_without_torch():
    code = """
        import sys, tokenflow_nb
        assert not {"torch", "diffusers", "ipywidgets", "matplotlib"} & set(sys.modules), "importing the package imports them"
        names = dir(tokenflow_nb)
        for name in tokenflow_nb.__all__:
            assert name in names and getattr(tokenflow_nb, name) is getattr(tokenflow_nb, name), name
        from tokenflow_nb import EditPanel, edit_video
        from tokenflow_nb.edit import edit_video as same
        assert edit_video is same
        try: tokenflow_nb.edit_vido
        except AttributeError as error: print(error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0 and "did you mean 'edit_video'" in result.stdout, result.stderr


# ---- edit_video


@pytest.fixture(scope="module")
def clip():
    return SCENE.render(frames=4, size=64)


@pytest.fixture
def edit(model, clip, tmp_path):
    def make(prompt="a gold star on grass", config=None, source=clip, **overrides):
        options = FEW | dict(model=model, size=(64, 64), store=Store(tmp_path / "cache"), progress=False) | overrides
        return edit_video(source, prompt, config, **options)

    return make


def test_every_setting_is_in_the_signature():
    shown = inspect.signature(edit_video).parameters
    for name in [*inspect.signature(EditConfig).parameters.keys() - {"options"}, "method", "pnp_f_t", "pnp_attn_t", "strength", "block_size", "source_branch", "fps", "size"]:
        assert name in shown, name
    assert list(shown)[:3] == ["clip", "prompt", "config"] and shown["num_inference_steps"].default == 25 and shown["strength"].default == 0.7


def test_settings_may_come_whole_and_be_overridden(edit, model):
    config = EditConfig.published("a dog", **FEW | dict(inversion_steps=4))
    result = edit("a gold star on grass", config, seed=3)
    assert result.config == replace(config, prompt="a gold star on grass", seed=3) and result.config.correction == "none"
    assert edit(None, replace(config, prompt="a red star")).config.prompt == "a red star"
    assert result.frames is result.edited.frames
    with pytest.raises(ValueError, match="prompt=.*give it as config="):
        edit(config)
    with pytest.raises(ValueError, match="config=.*give an EditConfig"):
        edit(config=dict(seed=3))
    with pytest.raises(ValueError, match="option='block_sise' is unknown: did you mean 'block_size'"):
        edit(block_sise=2)


def test_a_callback_sees_each_step_and_may_replace_the_latents(edit, clip, model):
    plain, seen = edit(), []

    def look(edit, step, timestep, given):
        seen.append((step, timestep, tuple(given["latents"].shape)))

    def source(edit, step, timestep, given):
        below = [*edit.timesteps, None][step + 1]
        return dict(latents=edit.trajectory.at(below))

    assert np.array_equal(edit(callback_on_step_end=look).frames, plain.frames)
    assert [step for step, *_ in seen] == [0, 1] and seen[0][2] == (4, 4, 16, 16)
    kept = len(Store().entries())
    replaced, source_again = edit(callback_on_step_end=source), model.decode(model.encode(clip.frames)).astype(int)
    assert np.abs(replaced.frames - source_again).mean() < 1 < 4 < np.abs(plain.frames - source_again).mean()
    assert np.array_equal(edit().frames, plain.frames) and len(Store().entries()) == kept  # what a callback made is not kept
    with pytest.raises(ValueError, match=r"callback_on_step_end returned \(2, 4, 16, 16\): it must return latents of shape \(4, 4, 16, 16\)"):
        edit(callback_on_step_end=lambda edit, step, timestep, given: dict(latents=given["latents"][:2]))


@pytest.mark.parametrize("how", [dict(block_size=1), dict(block_size=3), dict(source_branch="live"), dict(block_size=32, source_branch="live")], ids=str)
def test_how_an_edit_is_run_computes_nothing_anew(edit, monkeypatch, how):
    first = edit()
    monkeypatch.setattr(Model, "predict", lambda *_, **__: pytest.fail("the network was asked"))
    assert np.array_equal(edit(**how).frames, first.frames)


def test_every_other_setting_is_another_edit(model, clip, tmp_path):
    "What decides a number is in the name under which an edit is kept."
    from tokenflow_nb.edit import edit_key

    trajectory = invert(model, clip, SCENE.caption, 2, store=Store(tmp_path), progress=False)
    plain = EditConfig("a gold star", **FEW)
    others = dict(
        prompt="a red star", negative_prompt="blue", num_inference_steps=2, guidance_scale=2.0, guidance_stop=1.0, keyframe_interval=1, rule="linear", seed=1,
        remeasure=True, max_joint_keyframes=None, pnp_f_t=0.1, pnp_attn_t=0.1, method="sdedit",
    )
    keys = {name: edit_key(Edit(model, trajectory, replace(plain, **{name: value}), clip)) for name, value in others.items()}
    assert keys.pop("num_inference_steps") == edit_key(Edit(model, trajectory, plain, clip, Execution(block_size=1)))
    assert len({*keys.values(), edit_key(Edit(model, trajectory, plain, clip))}) == len(keys) + 1


def test_a_panel_may_stop_stages_anywhere(model, clip, tmp_path):
    "Closed at any step and begun again, the result is the same to the bit."
    config, whole = EditConfig("a gold star on grass", **FEW), Store(tmp_path / "whole")
    wanted = drive(stages(model, clip, config, Execution(store=whole)))
    count = len([*stages(model, clip, config, Execution(store=Store(tmp_path / "count")))])
    for stop in range(1, count):
        execution = Execution(store=Store(tmp_path / str(stop)))
        walk = stages(model, clip, config, execution)
        for _ in range(stop):
            next(walk)
        walk.close()
        assert np.array_equal(drive(stages(model, clip, config, execution)).frames, wanted.frames), stop


# ---- an editor from outside the package


@pytest.fixture
def own_editors(monkeypatch):
    "The list of editors, as it was afterwards."
    editors()  # those of installed packages are there
    monkeypatch.setattr(base.EDITORS, "_things", dict(base.EDITORS._things))


def make_faint(name="faint", **body):
    @dataclass(frozen=True)
    class Faint(Editor):
        "Keeps a share of the source."

        share: float = setting(0.5, "share of the source that is kept after each step", 0, 1, short="faint_share")
        where: str = setting("all", "which frames", choices=("all", "even"))

        def after_step(self, step):
            share = torch.tensor([self.share if self.where == "all" or frame % 2 == 0 else 0.0 for frame in step.frames]).view(-1, 1, 1, 1)
            return (1 - share) * step.latents + share * step.source_latents

    return type("Faint", (Faint,), dict(name=name, summary="keeps a share of the source", __module__=__name__, **body))


def test_an_editor_of_ones_own_works_everywhere(edit, own_editors, model, clip, tmp_path):
    register(dataclass(frozen=True)(make_faint()))
    whole, even, none = edit(method="faint", faint_share=1.0), edit(method="faint", faint_share=1.0, where="even"), edit(method="faint", faint_share=0.0)
    source = model.decode(model.encode(clip.frames)).astype(int)
    far = lambda frames: np.abs(frames - source).mean(axis=(1, 2, 3))  # noqa: E731
    assert (far(whole.frames) < 1).all() and (far(none.frames) > 4).all() and ((far(even.frames) < 1) == [True, False] * 2).all()
    again = edit_video(clip, **whole.record()["config"], model=model, size=(64, 64), store=Store(tmp_path / "cache"), progress=False)
    assert np.array_equal(again.frames, whole.frames) and whole.record()["config"]["faint_share"] == 1.0
    with pytest.raises(ValueError, match="faint_share=2: give a fraction"):
        edit(method="faint", faint_share=2)
    with pytest.raises(ValueError, match="faint_share=0.5: it is a setting of method='faint', not of 'pnp': give that method"):
        edit(faint_share=0.5)
    walked = drive(starting(model, clip, EditConfig("a star", method="faint", faint_share=0.5, **FEW), Execution(store=Store(tmp_path / "cache"))))
    assert walked.step().fork(faint_share=0.9).editor.share == 0.9
    assert walked.preview(2).frames.shape == (2, 64, 64, 3)


def test_an_editor_whose_code_has_changed_makes_a_new_film(edit, own_editors):
    register(dataclass(frozen=True)(make_faint()))
    first = edit(method="faint", faint_share=0.5)
    register(dataclass(frozen=True)(make_faint(after_step=lambda self, step: step.source_latents)))  # the cell is run again
    second = edit(method="faint", faint_share=0.5)
    assert not np.array_equal(first.frames, second.frames)


def test_an_editor_works_in_a_panel_with_its_settings_and_help(own_editors, model, clip, tmp_path):
    from tokenflow_nb.panels.base import Worker
    from tokenflow_nb.panels.denoise import ForkBox
    from tokenflow_nb.panels.edit import EditPanel

    register(dataclass(frozen=True)(make_faint()))
    options = dict(worker=Worker(threaded=False), store=Store(tmp_path), prompt="a gold star", method="faint")
    panel = EditPanel(clip, model=model, num_inference_steps=2, keyframe_interval=2, **options)

    look = panel.steps.look
    shown = {spec["name"]: spec for spec in look.fields}
    assert look.values["faint_share"] == 0.5 and (shown["faint_share"]["least"], shown["faint_share"]["most"]) == (0, 1)
    assert shown["where"]["choices"] == [["all", "all"], ["even", "even"]] and "share of the source" in shown["faint_share"]["help"]
    assert shown["faint_share"]["label"] == "Share" and shown["faint_share"]["when"] == ["method", ["faint"]]
    assert ["faint: keeps a share of the source", "faint"] in shown["method"]["choices"]
    look.values = look.values | {"faint_share": 0.75}
    panel.state.render()
    assert panel.state.error == "" and panel.state.rendered.config.settings()["faint_share"] == 0.75
    assert "method='faint'" in panel.state.code and "faint_share=0.75" in panel.state.code
    panel.close()
    box = ForkBox(Edit(model, invert(model, clip, "", 2, store=Store(tmp_path), progress=False), EditConfig("a star", method="faint", num_inference_steps=2), clip))
    assert {"faint_share", "where", "guidance_stop"} <= set(box.fields)


PLUGIN = '''
from dataclasses import dataclass
from tokenflow_nb.editors import Editor
from tokenflow_nb.support.settings import setting

@dataclass(frozen=True)
class Doubled(Editor):
    "Makes latents larger."
    factor: float = setting(1.0, "by how much latents grow at each step", 0, 3)
    name, summary = "doubled", "makes latents larger"

    def after_step(self, step):
        return step.latents * self.factor
'''


def test_an_installed_package_brings_an_editor_to_the_command_line(tmp_path, clip):
    "By an entry point; and one that cannot be imported is warned of, and stops nothing."
    from tokenflow_nb.clip import write_clip

    (tmp_path / "doubled_editor.py").write_text(PLUGIN)
    info = tmp_path / "doubled_editor-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: doubled-editor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tokenflow_nb.editors]\ndoubled = doubled_editor:Doubled\nbroken = no_such_module:Gone\n")
    write_clip(tmp_path / "clip.mp4", clip)
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT.parent)]), TOKENFLOW_HOME=str(tmp_path / "cache"))

    def run(*arguments):
        code = f"import sys; from tokenflow_nb.cli.command import main; sys.exit(main({list(arguments)!r}))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)

    shown = run("edit", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "by how much latents grow at each step" in " ".join(shown.stdout.split()) and "doubled makes latents larger" in " ".join(shown.stdout.split())
    made = run("edit", "clip.mp4", "a gold star", "--model", "toy", "--size", "64", "--steps", "2", "--method", "doubled", "--factor", "0.5", "--quiet", "--out", "made")
    assert made.returncode == 0 and "'broken'" in made.stderr, made.stderr
    assert '"factor": 0.5' in (tmp_path / "made" / "run.json").read_text()
    wrong = run("edit", "clip.mp4", "a gold star", "--model", "toy", "--method", "doubled", "--factor", "5", "--quiet")
    assert wrong.returncode == 2 and "factor=5.0" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: register(PlugAndPlay()), "give a class"),
        (lambda: register(int), "give a class"),
        (lambda: register(Editor), "give Editor a name of its own"),
        (lambda: register(dataclass(frozen=True)(make_faint("pnp"))), "PlugAndPlay is the editor of this name: take another"),
        (lambda: register(dataclass(frozen=True)(make_faint("two words"))), "give the editor a name of letters, digits and _"),
    ],
)
def test_a_class_that_is_no_editor_is_refused(own_editors, wrong, said):
    before = dict(editors())
    with pytest.raises(ValueError, match=said):
        wrong()
    assert editors() == before


@pytest.mark.parametrize("method", ["after_step", "start"])
def test_latents_of_another_shape_name_the_editor(own_editors, model, clip, tmp_path, method):
    kind = dataclass(frozen=True)(make_faint(**{method: lambda self, step: step.source_latents[..., :-1]}))
    trajectory = invert(model, clip, SCENE.caption, 2, store=Store(tmp_path), progress=False)
    with pytest.raises(ValueError, match=rf"Faint.{method} returned \(.*\): it must return latents of shape \(.*, 4, 16, 16\)"):
        Edit(model, trajectory, EditConfig("a star", editor=kind(), **FEW), clip).step()


def test_the_identity_of_an_editor_is_settings_and_code(own_editors):
    one, other = dataclass(frozen=True)(make_faint()), dataclass(frozen=True)(make_faint(after_step=lambda self, step: step.latents + 1))
    more = dataclass(frozen=True)(make_faint(after_step=lambda self, step: step.latents + 2))
    assert identity(one()) == identity(dataclass(frozen=True)(make_faint())()) and len({identity(each()) for each in (one, other, more)}) == 3
    assert identity(one(share=0.25)) != identity(one()) and identity(PlugAndPlay()) == identity(PlugAndPlay())


def test_an_edit_kept_under_an_execution_is_found_by_another(model, clip, tmp_path):
    trajectory, config = invert(model, clip, SCENE.caption, 2, store=Store(tmp_path), progress=False), EditConfig("a star", **FEW)
    assert run_kept(Edit(model, trajectory, config, clip, keep_history=False), Store(tmp_path)) == 0
    again = Edit(model, trajectory, config, clip, Execution(block_size=1, source_branch="live"), keep_history=False)
    assert run_kept(again, Store(tmp_path)) == 2

