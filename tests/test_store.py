"What the notebooks of `nbs/store/` cannot hold: properties, killed processes, damage, a full disk."

import errno
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_nb.store import Store, StoreError, cache_home, digest, drafts, store as store_module

KEY = "trajectory-3f2a"
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


def write(store: Store, key: str = KEY, rows: int = 4, **meta) -> torch.Tensor:
    latents = torch.arange(rows * 3.0).reshape(rows, 3)
    with store.writing(key, meta) as writer:
        writer.put("latents", {"x": latents})
        writer.put_json("config", {"steps": 50})
    return latents


def run_python(code: str, *arguments: object) -> subprocess.Popen:
    command, pipe = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def canonical(value):
    "A form in which values are equal exactly when they should have one digest: 1, 1.0 and True apart, lists in order."
    if isinstance(value, dict):
        return "dict", frozenset((key, canonical(item)) for key, item in value.items())
    if isinstance(value, list):
        return "list", tuple(map(canonical, value))
    return type(value).__name__, repr(value)


@given(VALUES, VALUES)
def test_digests_are_equal_exactly_for_equal_values(one, other):
    assert (digest(one) == digest(other)) == (canonical(one) == canonical(other))


@given(st.dictionaries(st.text(), PLAIN, min_size=2))
def test_order_of_a_dict_does_not_matter(value):
    assert digest(value) == digest(dict(reversed(value.items())))


@given(st.lists(PLAIN, min_size=1, max_size=4), st.integers(0, 3))
def test_arguments_are_kept_apart(parts, at):
    at = min(at, len(parts) - 1)
    assert digest(*parts) != digest(*parts[:at], parts[at:])
    assert digest(*parts) != digest(*parts, None)


@given(st.sampled_from(["uint8", "int64", "float32", "float64"]), st.integers(0, 4), st.integers(0, 4))
def test_arrays_count_with_dtype_shape_and_content_but_not_layout(dtype, rows, columns):
    array = np.arange(rows * columns).reshape(rows, columns).astype(dtype)
    tensor = torch.from_numpy(array.copy())
    assert digest(array) == digest(np.asfortranarray(array)) == digest(array.T.copy().T)
    assert digest(tensor) == digest(tensor.T.contiguous().T)
    assert digest(array) != digest(array.astype("float16")) and digest(array) != digest(array[None])
    if array.size:
        array[-1, -1] += 1
        assert digest(array) != digest(array - np.asarray(1, dtype))


@dataclass
class Settings:
    steps: int
    scale: float


@dataclass
class OtherSettings:
    steps: int
    scale: float


def test_dataclasses_paths_and_half_precision():
    assert digest(Settings(50, 7.5)) == digest(Settings(50, 7.5)) != digest(Settings(51, 7.5))
    assert digest(Settings(50, 7.5)) != digest(OtherSettings(50, 7.5))
    assert digest(Path("a/b")) == digest(str(Path("a/b")))
    half = torch.ones(3, dtype=torch.bfloat16)
    assert digest(half) != digest(half.half()) and digest(torch.tensor(1.0)) != digest(torch.tensor([1.0]))


def test_digest_is_the_same_in_another_process():
    code = "from tokenflow_nb.store import digest; import numpy as np; print(digest({'b': 1, 'a': [np.zeros(3)]}, 'x'))"
    output, _ = run_python(code).communicate(timeout=120)
    assert output.strip() == digest({"a": [np.zeros(3)], "b": 1}, "x")


@pytest.mark.parametrize("bad", [{1, 2}, object(), {1: "a"}, 1j, np.array([object()]), Settings, lambda: 0])
def test_what_has_no_canonical_form_is_refused(bad):
    with pytest.raises(TypeError, match="digest: cannot hash"):
        digest({"a": [bad]})


def test_the_refusal_names_the_type():
    with pytest.raises(TypeError, match="set"):
        digest({1})


def test_cache_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENFLOW_HOME", str(tmp_path))
    assert cache_home() == tmp_path == Store().root
    monkeypatch.delenv("TOKENFLOW_HOME")
    assert cache_home() != tmp_path


def test_what_was_written_comes_back(tmp_path):
    store = Store(tmp_path / "made" / "on demand")
    latents = write(store, prompt="a gold star ★")
    entry = store.get(KEY)
    assert entry.meta == {"prompt": "a gold star ★"} and entry.names == ["config", "latents"] and entry.key == KEY
    assert torch.equal(entry.load("latents")["x"], latents) and entry.load_json("config") == {"steps": 50}
    assert entry.nbytes == sum(path.stat().st_size for path in entry.path.iterdir() if path.name != "manifest.json")
    assert store.get("trajectory-0000") is None


def test_rows_are_read_like_slices_and_the_rest_is_not_read(tmp_path):
    store = Store(tmp_path)
    latents = write(store, rows=6)
    entry = store.get(KEY)
    for rows in (slice(2, 4), slice(None), slice(-2, None), slice(0, 6, 2), slice(4, 2), slice(1, 99)):
        assert torch.equal(entry.tensor("latents", "x", rows), latents[rows]), rows
    with pytest.raises(ValueError, match="rows"):
        entry.tensor("latents", "x", slice(None, None, -1))
    with pytest.raises(KeyError, match="no tensor 'y'.*x"):
        entry.tensor("latents", "y")
    with pytest.raises(KeyError, match="no safetensors part 'latent'"):
        entry.load("latent")


@pytest.mark.parametrize("key", ["", "..", "../up", "a/b", "a\\b", "/abs", ".hidden", "a b", "a" * 200, "a\n", None])
def test_keys_that_cannot_be_folders_are_refused_everywhere(tmp_path, key):
    store = Store(tmp_path)
    for use in (store.get, store.remove, lambda key: store.writing(key).__enter__()):
        with pytest.raises(StoreError, match="cannot name a file"):
            use(key)
    assert list(tmp_path.iterdir()) == []


def test_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError), Store(tmp_path).writing(KEY, {"device": torch.device("cpu")}):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["manifest", "latents", "a/b"])
def test_a_part_cannot_overwrite_another(tmp_path, part):
    store = Store(tmp_path)
    with pytest.raises(StoreError), store.writing(KEY) as writer:
        writer.put_json("latents", 1)
        writer.put_json(part, 2)
    assert store.get(KEY) is None


def test_an_exception_leaves_what_was_there(tmp_path):
    store = Store(tmp_path)
    write(store, note="first")
    with pytest.raises(KeyboardInterrupt), store.writing(KEY) as writer:
        writer.put("latents", {"x": torch.zeros(3)})
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == [KEY] and store.get(KEY).meta == {"note": "first"}


@pytest.mark.parametrize("name", ["latents.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_noticed_removed_and_said(tmp_path, name, damage):
    store = Store(tmp_path)
    write(store)
    path = tmp_path / KEY / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[0] ^= 0xFF
        path.write_bytes(content if damage == "flip" else content[:-3])
    with pytest.warns(UserWarning, match=f"{KEY} is damaged .*will be recomputed"):
        assert store.get(KEY) is None
    assert os.listdir(tmp_path) == []
    write(store)
    assert store.get(KEY) is not None


@settings(max_examples=20)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path_factory, position, bit):
    root = tmp_path_factory.mktemp("store")
    store = Store(root)
    write(store)
    path = root / KEY / "latents.safetensors"
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="another checksum"):
        assert store.get(KEY) is None


def test_without_verification_only_sizes_are_compared(tmp_path):
    store = Store(tmp_path)
    write(store)
    path = tmp_path / KEY / "latents.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert store.get(KEY, verify=False) is not None
    path.write_bytes(content[:-1])
    with pytest.warns(UserWarning, match="another size"):
        assert store.get(KEY, verify=False) is None


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_process_killed_while_writing_leaves_nothing_visible_and_is_cleaned_up_after(tmp_path):
    process = run_python(
        """
        import sys, time, torch
        from tokenflow_nb.store import Store
        with Store(sys.argv[1]).writing("trajectory-dead") as writer:
            writer.put("latents", {"x": torch.zeros(1000)})
            print("writing", flush=True)
            time.sleep(600)
        """,
        tmp_path,
    )
    assert process.stdout.readline().strip() == "writing"
    store = Store(tmp_path)
    [scratch] = tmp_path.iterdir()
    write(store, "trajectory-alive")
    assert scratch.exists(), "the folder of a living process stays"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert store.get("trajectory-dead") is None and [entry.key for entry in store.entries()] == ["trajectory-alive"]
    assert scratch.exists()
    write(store, "trajectory-next")
    assert sorted(os.listdir(tmp_path)) == ["trajectory-alive", "trajectory-next"]


def test_two_processes_that_write_the_same_key_both_succeed_and_leave_one_entry(tmp_path):
    code = """
        import sys, torch
        from tokenflow_nb.store import Store
        with Store(sys.argv[1]).writing("trajectory-3f2a", {"by": sys.argv[2]}) as writer:
            writer.put("latents", {"x": torch.full((1000,), float(sys.argv[2]))})
            print("ready", flush=True)
            sys.stdin.readline()
    """
    both = [run_python(code, tmp_path, number) for number in (1, 2)]
    assert [process.stdout.readline().strip() for process in both] == ["ready", "ready"]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert os.listdir(tmp_path) == [KEY]
    entry = Store(tmp_path).get(KEY)
    assert entry.load("latents")["x"].unique().item() == float(entry.meta["by"])


def test_who_finishes_second_drops_theirs(tmp_path):
    store = Store(tmp_path)
    with store.writing(KEY, {"by": "second"}) as writer:
        write(store, by="first")
        writer.put_json("config", {})
    assert os.listdir(tmp_path) == [KEY] and store.get(KEY).meta == {"by": "first"}


@pytest.mark.parametrize("module, step", [(drafts, "save_file"), (drafts, "sync"), (store_module, "_publish")])
def test_a_full_disk_is_explained_and_costs_nothing(tmp_path, monkeypatch, module, step):
    store = Store(tmp_path)
    write(store, "trajectory-old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(StoreError) as caught:
        write(store)
    message = str(caught.value)
    assert all(word in message for word in (str(tmp_path), "free", "prune", "TOKENFLOW_HOME", "full"))
    assert os.listdir(tmp_path) == ["trajectory-old"] and store.get("trajectory-old") is not None


def no_flock(monkeypatch):
    "A file system that cannot lock, as newer versions of filelock meet it: they lock by a file that exists."
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "no locks here")))


def no_lock(monkeypatch):
    "The same, as older versions meet it."
    monkeypatch.setattr(drafts.FileLock, "acquire", Mock(side_effect=NotImplementedError("use SoftFileLock")))  # what filelock raises then


@pytest.mark.skipif(os.name == "nt", reason="locks of Windows are others")
@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("without, kept", [(no_flock, 0), (no_lock, 1)])
def test_where_nobody_can_lock_work_is_done_and_drafts_that_may_be_at_work_stay(tmp_path, monkeypatch, without, kept):
    without(monkeypatch)
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.drafting("other-1") as draft:
        draft.put("part", {"x": torch.ones(3)})
        raise KeyboardInterrupt
    with store.drafting(KEY) as draft:
        draft.put("part", {"x": torch.ones(3)})
    assert torch.equal(store.get(KEY).tensor("part", "x"), torch.ones(3))
    store.prune(0)
    assert store.get(KEY) is None and len(store.drafts()) == kept


@pytest.mark.skipif(os.name == "nt", reason="no RLIMIT_FSIZE")
def test_a_real_limit_on_file_size_is_explained(tmp_path):
    write(Store(tmp_path), "trajectory-old")
    process = run_python(
        """
        import resource, signal, sys, torch
        from tokenflow_nb.store import Store, StoreError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with Store(sys.argv[1]).writing("trajectory-big") as writer:
                writer.put("latents", {"x": torch.zeros(100_000)})
        except StoreError as error:
            print(error)
        """,
        tmp_path,
    )
    output, errors = process.communicate(timeout=120)
    assert "TOKENFLOW_HOME" in output and str(tmp_path) in output, errors
    assert os.listdir(tmp_path) == ["trajectory-old"] and Store(tmp_path).get("trajectory-old") is not None


def test_a_root_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="TOKENFLOW_HOME"), Store(tmp_path / "file" / "cache").writing(KEY):
        pytest.fail("the block must not run")


def test_an_error_of_the_caller_is_not_taken_for_one_of_the_disk(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, Store(tmp_path).writing(KEY):
        raise FileNotFoundError("clip.mp4")
    assert not isinstance(caught.value, StoreError)


def test_pruning_goes_by_last_use(tmp_path):
    store = Store(tmp_path)
    for age, key in enumerate(("a-1", "b-2", "c-3", "d-4")):
        write(store, key)
        os.utime(tmp_path / key / "manifest.json", (age, age))
    store.get("b-2")
    each = store.get("a-1").nbytes
    assert [entry.key for entry in store.entries()] == ["a-1", "b-2", "d-4", "c-3"]
    assert store.prune(10 * each) == []
    assert store.prune(2 * each) == ["c-3", "d-4"]
    assert store.prune(2 * each - 1) == ["b-2"]
    assert store.clear() == ["a-1"] and store.entries() == [] and store.clear() == []
    with pytest.raises(ValueError, match="max_bytes=-1"):
        store.prune(-1)


def test_folders_that_are_not_entries_are_left_alone(tmp_path):
    (tmp_path / "site-1").mkdir()
    (tmp_path / "site-1" / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "notes").mkdir()
    (tmp_path / "a.txt").write_text("text")
    store = Store(tmp_path)
    write(store)
    assert [entry.key for entry in store.entries()] == [KEY]
    assert store.clear() == [KEY] and sorted(os.listdir(tmp_path)) == ["a.txt", "notes", "site-1"]


def test_removing(tmp_path):
    store = Store(tmp_path)
    write(store)
    assert store.remove(KEY) is True and store.remove(KEY) is False and os.listdir(tmp_path) == []


def test_listing_escapes_what_it_shows(tmp_path):
    store = Store(tmp_path)
    assert "0 entries" in repr(store) and "\n" not in repr(store)
    write(store, prompt="<script>alert(1)</script>")
    assert "1 entry ·" in repr(store)
    html = store._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and KEY in html


def test_nothing_is_pickled(tmp_path):
    store = Store(tmp_path)
    write(store)
    assert {path.suffix for path in (tmp_path / KEY).iterdir()} == {".json", ".safetensors"}


def test_an_entry_that_is_cleared_as_soon_as_it_is_made_is_said_so(tmp_path):
    store = Store(tmp_path)
    with store.writing("made-1") as writer:
        writer.put_json("part", 1)
    assert store.made("made-1").load_json("part") == 1
    store.clear()
    with pytest.raises(StoreError, match="was removed from .* by another process: start again"):
        store.made("made-1")
