"Optical flow: what is known exactly, RAFT where it can be imported, and what happens to clips that have none."

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_nb.clip import Clip, ClipError
from tokenflow_nb.measure.flow import Flow, estimate_flow, visible_by_flow, warp
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

shifts = st.integers(-5, 5)


@given(shifts, shifts, st.integers(0, 99))
def test_warping_by_whole_pixels_moves_pixels_and_nothing_else(right, down, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (1, 14, 18, 3))
    flow = np.broadcast_to(np.array([right, down], np.float32), (1, 14, 18, 2))
    rows, columns = np.clip(np.arange(14) + down, 0, 13), np.clip(np.arange(18) + right, 0, 17)
    assert (warp(picture, flow)[0] == picture[0][rows][:, columns]).all()


@given(shifts.filter(bool), st.integers(6, 12), st.integers(6, 12))
def test_occlusion_is_what_a_moving_square_lands_on(step, left, top):
    "A square jumps over a still ground: hidden is what it covers in the second frame and did not cover in the first."
    before, after = np.zeros((30, 30), bool), np.zeros((30, 30), bool)
    before[top : top + 8, left : left + 8] = after[top : top + 8, left + step : left + step + 8] = True
    forward, back = (np.where(mask[None, ..., None], [way, 0.0], 0.0) for mask, way in ((before, step), (after, -step)))
    assert (visible_by_flow(forward, back, boundaries=False)[0] == ~(after & ~before)).all()
    assert (visible_by_flow(back, forward, boundaries=False)[0] == ~(before & ~after)).all()


def test_what_leaves_the_picture_is_hidden():
    flow = np.broadcast_to(np.array([3.0, -2.0]), (1, 20, 20, 2))
    seen = visible_by_flow(flow, -flow)[0]
    assert seen[2:, :17].all() and not seen[:2].any() and not seen[:, 17:].any()


def test_estimated_occlusion_finds_what_a_toy_object_hides():
    scene = Scene(velocity=(4.0, 0.0), pan=(-1.0, 0.0), background="grass", material="red")
    truth = scene.truth(4)
    found = visible_by_flow(truth.forward_flow, truth.backward_flow)
    assert not (found & ~truth.forward_visible).mean() > 0.01
    assert (found & truth.forward_visible).sum() > 0.95 * truth.forward_visible.sum()


def test_dis_of_a_panned_picture_is_the_pan(tmp_path):
    wide = Scene(background="grass", radius=1, centre=(-20, -20)).render(1, size=128).frames[0]
    frames = np.stack([wide[:, 2 * t : 2 * t + 96] for t in range(4)])
    flow = estimate_flow(frames, store=Store(tmp_path))
    assert np.abs(flow.forward_flow[:, 8:-8, 8:-8] - [-2, 0]).mean() < 0.1
    assert np.abs(flow.backward_flow[:, 8:-8, 8:-8] - [2, 0]).mean() < 0.1


def test_kept_flow_belongs_to_its_clip_and_estimator(tmp_path):
    class Nothing:
        choices, calls = dict(flow="nothing moves"), 0

        def __call__(self, first, second):
            self.calls += 1
            return np.zeros((*first.shape[:3], 2), np.float32)

    store, nothing, clip = Store(tmp_path), Nothing(), Scene.random(1).render(3, size=32)
    first = estimate_flow(clip, nothing, store)
    again = estimate_flow(Clip(clip.frames.copy(), fps=2), nothing, store)
    assert nothing.calls == 2 and repr(first) == repr(again)  # both directions, once
    estimate_flow(clip[1:], nothing, store)
    assert nothing.calls == 4
    assert estimate_flow(clip, "dis", store).choices["flow"] == "DIS" and len(store.entries()) == 3


@pytest.mark.parametrize(
    ("clip", "estimator", "words"),
    [
        (np.zeros((1, 16, 16, 3), np.uint8), "dis", "at least two"),
        (np.zeros((3, 16, 16, 3), np.uint8), "farneback", "flow='farneback' is unknown: Valid: dis, raft"),
        (np.zeros((3, 8, 16, 3), np.uint8), "dis", "at least 12×12"),
        (np.full((3, 16, 16, 3), np.nan), "dis", "NaN"),
    ],
)
def test_what_has_no_flow_says_why(clip, estimator, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        estimate_flow(clip, estimator, Store(tmp_path))
    assert not Store(tmp_path).entries()


def test_exact_flow_is_the_truth():
    truth = Scene.random(2).truth(5, size=64)
    flow = Flow.exact(truth)
    assert flow.forward_flow is truth.forward_flow and flow.shape == (5, 64, 64) and flow.choices["flow"] == "exact"


# In a process of its own: torchvision may be built for another torch, which breaks whoever imports it first. On a CPU
# where only the build for CUDA can be had, RAFT runs all the same once torchvision's operators are declared.
RAFT = """
import importlib.util, sys
if importlib.util.find_spec("torchvision") is None:
    print("torchvision is not installed"); sys.exit(77)
import torch
try:
    from torchvision.models import optical_flow
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]: del sys.modules[name]
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        from torchvision.models import optical_flow
    except Exception as error:
        print(f"torchvision cannot be imported here: {error}"); sys.exit(77)
import numpy as np
from tokenflow_nb.measure.flow import Flow, RaftFlow, estimate_flow
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene
torch.manual_seed(0)
raft = RaftFlow(optical_flow.raft_small(weights=None), "random")
clip = Scene.random(0).render(3, size=100)
flow = estimate_flow(clip, raft, Store(sys.argv[1]))
assert flow.forward_flow.shape == (2, 100, 100, 2) and np.isfinite(flow.forward_flow).all()
assert flow.forward_flow.std() > 0 and not np.array_equal(flow.forward_flow, flow.backward_flow)
assert flow.choices["weights"] == "random" and flow.choices["flow"] == "RAFT"
print("ran")
"""


def test_raft_runs_on_random_weights(tmp_path):
    done = subprocess.run([sys.executable, "-c", RAFT, str(tmp_path)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"RAFT comes with torchvision: {done.stdout.strip()}")
    assert done.returncode == 0 and done.stdout.endswith("ran\n"), done.stdout + done.stderr


def test_without_torchvision_raft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"tokenflow_nb\[raft\]"):
        estimate_flow(np.zeros((2, 16, 16, 3), np.uint8), "raft")


def test_no_module_imports_torchvision_or_torchmetrics_by_itself():
    program = "import sys, tokenflow_nb.measure.flow; sys.exit(bool({'torchvision', 'torchmetrics'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_truth_of_another_size_is_refused():
    from tokenflow_nb.measure.metrics import warp_error

    with pytest.raises(ValueError, match="do not belong together"):
        warp_error(np.zeros((4, 32, 32, 3), np.uint8), Scene.random(0).truth(4, size=64))
    with pytest.raises(ClipError, match="NaN"):
        warp_error(np.full((4, 64, 64, 3), np.nan), Scene.random(0).truth(4, size=64))
