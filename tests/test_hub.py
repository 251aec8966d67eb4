"The hub, played by a server on this machine: what is asked for, what is said when it refuses, going on after a cut, the cache, a mirror."

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hub_server import serving
from test_model_folders import TEXT, UNET, VAE, WEIGHTS, half_files, made  # noqa: F401

_LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # what comes in is counted so: the files here are small
from tokenflow_nb.backbones.load import load_model
from tokenflow_nb.backbones.schedule import ModelError
from tokenflow_nb.measure.metrics import ClipJudge
half, *names = sys.argv[1:]
said = {}
for name in names:
    try:
        if name.startswith("judge:"):
            said[name] = repr(ClipJudge.load(name[6:]))
        else:
            model = load_model(name, device="cpu", dtype="bfloat16" if half == "half" else None)
            said[name] = f"{model!r} {model.digest}"
    except ModelError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def run(address: str, cache: Path, *names: str, half: bool = False, **own: str) -> tuple[dict[str, str], str]:
    "What loading each of these names says, in a process that takes this address for the hub; and what that showed meanwhile."
    own = dict(HF_ENDPOINT=address, HF_HOME=str(cache), HF_HUB_DISABLE_XET="1", NO_PROXY="*", no_proxy="*") | own
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING")) and "proxy" not in name.lower()}
    kind = "half" if half else "full"
    done = subprocess.run([sys.executable, "-c", _LOAD, kind, *names], env=kept | own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert all(len(words.splitlines()) == 1 for words in said.values()), said
    return said, done.stderr


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):  # noqa: F811
    "A model in two precisions, with pickles and pictures beside."
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("hub") / "m"))
    half_files(folder, keep=WEIGHTS)
    for name in ("unet/diffusion_pytorch_model.bin", "v1-5.ckpt", "README.md", "picture.png", "unet/evil.py"):
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture(scope="module")
def hub(folder):
    with serving(folder) as hub:
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def said(hub, cache):
    "What is said of each name: by this hub, then offline, then when nobody answers; one cache."
    online, shown = run(hub.address, cache, *REFUSED, "owner/m")
    offline, _ = run("", cache, "owner/m", "owner/other", HF_HUB_OFFLINE="1")
    down, _ = run("http://127.0.0.1:9", cache, "owner/m", "owner/other", "sd1.5")
    return dict(online=online, offline=offline, down=down, shown=shown)


REFUSED = {
    "gated/m": "terms of use.*Access to model gated/m is restricted.*ask for access.*accept them at .*/gated/m, then log in",
    "login/m": "Access to model login/m is restricted. Please log in.*hf auth login.*HF_TOKEN",
    "private/m": "no public model.*check its spelling.*private, log in",
    "nobody/m": "no folder and no public model of the hub has this name",
    "down/m": "hub at http://127.0.0.1:[0-9]+ answered 503.*try again later.*no whole copy in",
    "forbidden/m": "hub refused with 403.*log in",
    "busy/m": "answered 429.*try again later",
    "broken/m": "could not be downloaded.*check network and disk",
    "judge:login/m": "^checkpoint='login/m' could not be loaded.*Please log in",
    "..a/b": "no alias and no folder",
    "a..b/c--d": "no id of the hub|could not|no folder and no public",
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_of_the_hub_has_its_own_remedy(said, name):
    assert re.search(REFUSED[name], said["online"][name]), said["online"][name]


def test_what_the_hub_has_is_loaded_and_serves_without_it(said):
    loaded = {said[when]["owner/m"] for when in ("online", "offline", "down")}
    assert len(loaded) == 1 and loaded.pop().startswith("StableDiffusion(name='owner/m'")


def needed(half: bool) -> set[str]:
    "The files that the model is made of: one variant of the weights, and small files of its parts."
    weights = {str(Path(name).with_suffix(".fp16.safetensors")) if half else name for name in WEIGHTS}
    configs = {f"{part}/config.json" for part in ("unet", "vae", "text_encoder")} | {"model_index.json", "scheduler/scheduler_config.json"}
    return weights | configs


@pytest.mark.parametrize("half", [False, True])
def test_only_the_needed_files_are_asked_for_each_once(hub, tmp_path, half):
    hub.asked.clear()
    said, _ = run(hub.address, tmp_path, "owner/m", half=half)
    assert said["owner/m"].startswith("StableDiffusion("), said
    counts = Counter(name for name, _ in hub.given())
    assert set(counts) - {name for name in counts if name.startswith("tokenizer/")} == needed(half) and set(counts.values()) == {1}
    assert {Path(name).suffix for name in counts} <= {".json", ".txt", ".safetensors"}
    assert {each.file for each in hub.asked} <= {*counts, ""}  # nor are the headers of others


def test_a_download_shows_how_far_it_is_and_who_wants_no_bars_sees_none(said, hub, tmp_path):
    assert re.search(r"100%.*\|", said["shown"]) and "Loading weights" not in said["shown"], said["shown"]
    _, silent = run(hub.address, tmp_path, "owner/m", HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert "%" not in silent, silent


def test_no_hub_and_no_copy(said):
    assert re.search("HF_HUB_OFFLINE.*no whole copy in.*model='toy'", said["offline"]["owner/other"])
    assert re.search("could not be downloaded from http://127.0.0.1:9.*check network.*no whole copy in .*model='toy'", said["down"]["owner/other"])
    assert "runwayml/stable-diffusion-v1-5: " in said["down"]["sd1.5"] and "stable-diffusion-v1-5/stable-diffusion-v1-5: " in said["down"]["sd1.5"]


# ---- interruptions


def test_a_file_that_was_cut_goes_on_where_it_ended(folder, said, tmp_path):
    with serving(folder) as hub:
        hub.cuts[UNET] = 2
        found, _ = run(hub.address, tmp_path, "owner/m")
        ranges = [asked for name, asked in hub.given() if name == UNET]
    size = (folder / UNET).stat().st_size
    starts = [int(asked.removeprefix("bytes=").removesuffix("-") or 0) for asked in ranges]
    assert len(starts) == 3 and starts[0] == 0 and size // 3 < starts[1] <= size // 2 < starts[2] < size, (size, ranges)
    assert found["owner/m"] == said["online"]["owner/m"]  # with the digest of its weights


def test_a_second_try_asks_only_for_what_is_missing(folder, said, tmp_path):
    with serving(folder) as hub:
        hub.failing = {UNET}
        broken, _ = run(hub.address, tmp_path, "owner/m")
        first, hub.failing = {name for name, _ in hub.given()}, set()
        assert {VAE, TEXT} & first  # several at a time: at least one other was finished
        finished = {str(path.relative_to(path.parents[1])) for path in tmp_path.rglob("snapshots/*/*/*") if path.exists()}
        hub.asked.clear()
        offline, _ = run("", tmp_path, "owner/m", HF_HUB_OFFLINE="1")
        again, _ = run(hub.address, tmp_path, "owner/m")
        asked = {name for name, _ in hub.given()}
    assert re.search("answered 500.*try again later.*of that copy: ", broken["owner/m"]), broken
    assert re.search("HF_HUB_OFFLINE.*of that copy: ", offline["owner/m"]), offline
    assert UNET in asked and not asked & finished and finished & first
    assert again["owner/m"] == said["online"]["owner/m"]


# ---- mirrors


def test_a_mirror_is_asked_and_named_and_a_copy_of_the_hub_serves_it(folder, said, tmp_path, cache):
    with serving(folder, prefix="/mirror") as mirror:
        fresh, _ = run(mirror.address, tmp_path, "owner/m", "gated/m", "down/m")
        assert {name for name, _ in mirror.given()} >= needed(False) and all(each.path.startswith("/mirror/") for each in mirror.asked)
        assert f"accept them at {mirror.address}/gated/m" in fresh["gated/m"] and f"hub at {mirror.address} answered 503" in fresh["down/m"]
        mirror.asked.clear()
        known, _ = run(mirror.address, cache, "owner/m")
        assert mirror.asked and not mirror.given()
    assert fresh["owner/m"] == known["owner/m"] == said["online"]["owner/m"]
