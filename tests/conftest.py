"What every test stands on: a cache of its own, fixed seeds, and one rule for tests that need more than a laptop."

import os
import random
import re

import hypothesis
import numpy as np
import pytest
import torch

from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.store import Store

# No deadline: these machines differ tenfold in speed, and a test here never asserts a time.
hypothesis.settings.register_profile("tokenflow_nb", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("tokenflow_nb")

SWITCHES = {  # marker -> environment variable, what a skipped test says
    "slow": ("TOKENFLOW_TEST_SLOW", "takes minutes: `pytest -m slow` or TOKENFLOW_TEST_SLOW=1 runs it"),
    "hub": ("TOKENFLOW_TEST_HUB", "downloads models: `HF_HUB_OFFLINE=0 pytest -m hub` or TOKENFLOW_TEST_HUB=1 runs it"),
}


def pytest_collection_modifyitems(config, items):
    asked = set(re.findall(r"\w+", config.option.markexpr))
    for item in items:
        for marker, (variable, reason) in SWITCHES.items():
            if item.get_closest_marker(marker) and marker not in asked and not os.environ.get(variable):
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: `pytest -m gpu` on a machine that has one"))


@pytest.fixture(scope="session", autouse=True)
def _no_user_cache(tmp_path_factory):
    "Nothing that a test stores is seen by the user, and nothing that the user stored decides a test."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENFLOW_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model():
    "The toy model, anew for each file: tests hang hooks into it."
    return load_model("toy", device="cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "A store for the tests of one file."
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache folder for this test alone."
    folder = tmp_path / "cache"
    monkeypatch.setenv("TOKENFLOW_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _same_every_time():
    "Seeds, and a number of threads: sums over threads round differently when their number differs."
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    "A real video file: 9 frames of 48×64 (height×width) at 12 fps, a bright square that moves to the right."
    from tokenflow_nb.clip import Clip, write_clip

    frames = np.full((9, 48, 64, 3), (30, 90, 40), np.uint8)
    for index, frame in enumerate(frames):
        frame[16:32, 4 * index + 4 : 4 * index + 20] = (230, 200, 40)
    path = tmp_path_factory.mktemp("clip") / "square.mp4"
    write_clip(path, Clip(frames, 12.0))
    return path
