"""Whatever happens to the files of a cache: the right value again, or a refusal that says what to do, and nothing outside of it is touched.

Each shape of damage is a small function. It is done to plain entries and drafts, and to those of an inversion, a source record and an edit.
"""

import errno
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kept import record_for, run_kept
from tokenflow_nb.cli.command import main
from tokenflow_nb.config import EditConfig
from tokenflow_nb.edit import Edit
from tokenflow_nb.inversion import invert
from tokenflow_nb.store import Store, StoreError, drafts, entries
from tokenflow_nb.toy.world import Scene

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links, pipes and modes of Windows are others")
SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3), spin=0.02)
KEYS = ["flow-" + 32 * "a", "flow-" + 32 * "b"]


class Case(NamedTuple):
    "What a shape of damage is done to."

    folder: Path  # of an entry or a draft
    other: Path  # of another one
    outside: Path  # a folder beside the cache
    draw: random.Random

    @property
    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def notes(self) -> Path:
        "The manifest of an entry, the journal of a draft."
        return next(path for name in ("manifest.json", "journal.jsonl") if (path := self.folder / name).exists())

    def change(self, **fields):
        "Changes fields of the manifest, and of nothing else."
        self.notes.write_text(json.dumps(json.loads(self.notes.read_text()) | fields))

    def change_file(self, **fields):
        "Changes what the manifest, or each line of the journal, says of each file."
        lines = [json.loads(line) for line in self.notes.read_text().splitlines()] if self.notes.suffix == ".jsonl" else [json.loads(self.notes.read_text())]
        for files in lines[1:] or [lines[0]["files"]]:
            files |= {name: file | fields for name, file in files.items() if file}
        self.notes.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(self, text: str | bytes):
        self.notes.write_bytes(text if isinstance(text, bytes) else text.encode())


# ---- shapes of damage, to entries and drafts alike


def a_bit_flipped(case):
    path = case.draw.choice([*case.parts, case.notes])
    content = bytearray(path.read_bytes())
    content[case.draw.randrange(len(content) // 2)] ^= 1 << case.draw.randrange(8)
    path.write_bytes(content)


def a_part_truncated(case):
    path = case.draw.choice(case.parts)
    path.write_bytes(path.read_bytes()[: case.draw.randrange(path.stat().st_size)])


def a_part_missing(case):
    case.draw.choice(case.parts).unlink()


def a_part_of_another(case):
    path = case.draw.choice(case.parts)
    path.write_bytes(b"0" * path.stat().st_size)


def a_part_too_many(case):
    (case.folder / "more.safetensors").write_bytes(case.parts[0].read_bytes())


def a_folder_too_many(case):
    (case.folder / "more.json").mkdir()


def a_folder_for_a_part(case):
    path = case.parts[0]
    path.unlink()
    path.mkdir()


def a_pipe_for_the_notes(case):
    path = case.notes
    path.unlink()
    os.mkfifo(path)


def a_pipe_for_a_part(case):
    path = case.parts[-1]
    path.unlink()
    os.mkfifo(path)


def a_link_for_a_part(case):
    path = case.draw.choice(case.parts)
    shutil.copy(path, case.outside / "part")
    path.unlink()
    path.symlink_to(case.outside / "part")


def a_broken_link_for_a_part(case):
    case.parts[0].unlink()
    (case.folder / "broken.safetensors").symlink_to(case.outside / "nothing")


def a_link_for_the_notes(case):
    path = case.notes
    shutil.copy(path, case.outside / "notes")
    path.unlink()
    path.symlink_to(case.outside / "notes")


def a_link_to_a_folder_in_it(case):
    case.parts[0].unlink()
    (case.folder / "more").symlink_to(case.outside)


def a_folder_for_the_notes(case):
    path = case.notes
    path.unlink()
    path.mkdir()


def a_file_for_the_folder(case):
    shutil.rmtree(case.folder)
    case.folder.write_text("a file")


def an_empty_folder(case):
    shutil.rmtree(case.folder)
    case.folder.mkdir()


def swapped(case):
    between = case.folder.with_name("between")
    os.rename(case.folder, between)
    os.rename(case.other, case.folder)
    os.rename(between, case.other)


def copied_over(case):
    shutil.rmtree(case.folder)
    shutil.copytree(case.other, case.folder)


def empty_notes(case):
    case.write("")


def notes_cut(case):
    text = case.notes.read_bytes()
    case.write(text[: case.draw.randrange(1, len(text) - 1)])


def notes_nested_deep(case):
    case.write(case.draw.choice(["[", '{"files":']) * 200_000 + "\n")


def notes_not_utf_8(case):
    case.write(case.notes.read_bytes().replace(b"flow", b"fl\xffw").replace(b"tokenflow_nb", b"\xff") + b"\xfe\xff\n")


def notes_in_utf_16(case):
    case.write(case.notes.read_text().encode("utf-16"))


def notes_with_a_byte_order_mark(case):
    case.write(b"\xef\xbb\xbf" + case.notes.read_bytes())


def notes_full_of_nul(case):
    case.write(b"\0" * len(case.notes.read_bytes()) + b"\n")


def notes_are_a_list(case):
    case.write("[]\n")


def notes_are_a_number(case):
    case.write("5\n")


def a_checksum_of_another_type(case):
    case.change_file(sha256=case.draw.choice([5, None, [], {}, 64 * "g", 63 * "0", ["0"] * 64]))


def a_size_that_is_none(case):
    case.change_file(bytes=case.draw.choice([-1, 1e999, True, None, "5", 10**400, [], {}, 0.5]))


BOTH = [
    a_bit_flipped, a_part_truncated, a_part_missing, a_part_of_another, a_part_too_many, a_folder_too_many, a_folder_for_a_part, a_pipe_for_the_notes,
    a_pipe_for_a_part, a_link_for_a_part, a_broken_link_for_a_part, a_link_for_the_notes, a_link_to_a_folder_in_it, a_folder_for_the_notes,
    a_file_for_the_folder, an_empty_folder, swapped, copied_over, empty_notes, notes_cut, notes_nested_deep, notes_not_utf_8, notes_in_utf_16,
    notes_with_a_byte_order_mark, notes_full_of_nul, notes_are_a_list, notes_are_a_number, a_checksum_of_another_type, a_size_that_is_none,
]  # fmt: skip

# ---- to entries


def files_are_a_list(case):
    case.change(files=[])


def no_files(case):
    case.change(files={})


def a_file_that_names_a_path(case):
    case.change(files={case.draw.choice(["../../outside/film.mp4", "/etc/passwd", "..", "a\0.json", ".x.json"]): {"bytes": 1, "sha256": 64 * "0"}})


def another_format(case):
    case.change(format=case.draw.choice([0, 1, 3, -1, "2", None, [], 2.5, 10**30]))


def the_key_of_another(case):
    case.change(key=case.other.name)


def another_meta(case):
    meta = json.loads(case.notes.read_text())["meta"]
    case.change(meta=case.draw.choice([{}, meta | {"timesteps": [1, 2]}, meta | {"frames": 10**9}, meta | {"part_frames": 1}, [], None, 5]))


def made_in_the_far_future(case):
    case.change(created=case.draw.choice([1e300, -1, "now", 10**30, None, float("nan"), float("inf")]))


def a_name_that_is_there_twice(case):
    case.write(case.notes.read_text().replace('"format"', '"meta": {}, "format"', 1))


def no_checksum_of_its_own(case):
    manifest = json.loads(case.notes.read_text())
    case.write(json.dumps({name: value for name, value in manifest.items() if name != case.draw.choice(["checksum", "store", "key", "meta"])}))


def one_field_too_many(case):
    case.change(more=1)


ENTRIES = [
    files_are_a_list, no_files, a_file_that_names_a_path, another_format, the_key_of_another, another_meta, made_in_the_far_future,
    a_name_that_is_there_twice, no_checksum_of_its_own, one_field_too_many,
]  # fmt: skip

# ---- to drafts


def a_line_that_is_no_note(case):
    with case.notes.open("a") as journal:
        journal.write(case.draw.choice(["5", "[]", "null", '"x"', "{]", "NaN", "[" * 200_000, '{"a": 1}', '{"x.json": {}}', "9" * 5000]) + "\n")


def a_line_that_names_a_path(case):
    path = case.draw.choice(["../../outside/film.mp4", str(case.outside / "film.mp4"), "..", ".", "/", "a/b.json", "a\\b.json", "", ".hidden.json"])
    with case.notes.open("a") as journal:
        journal.write(json.dumps({path: case.draw.choice([None, {"bytes": 3, "sha256": 64 * "0"}])}) + "\n")


def a_journal_of_another_format(case):
    case.write(case.notes.read_text().replace('"format": 2', f'"format": {case.draw.choice(["1", "3", "null", "[]", "true"])}', 1))


def a_journal_of_another_key(case):
    shutil.copy(case.other / "journal.jsonl", case.notes)


def a_journal_without_its_first_line(case):
    case.write("".join(case.notes.read_text().splitlines(keepends=True)[1:]))


def no_journal(case):
    case.notes.unlink()


DRAFTS = [
    a_line_that_is_no_note, a_line_that_names_a_path, a_journal_of_another_format, a_journal_of_another_key, a_journal_without_its_first_line, no_journal,
]  # fmt: skip

# ---- what is refused


def a_link_for_the_folder(case):
    shutil.copytree(case.folder, case.outside / "taken")
    shutil.rmtree(case.folder)
    case.folder.symlink_to(case.outside / "taken")


def a_link_to_ones_own_films(case):
    shutil.rmtree(case.folder)
    case.folder.symlink_to(case.outside)


def a_broken_link_for_the_folder(case):
    shutil.rmtree(case.folder)
    case.folder.symlink_to(case.outside / "nowhere")


REFUSED = [a_link_for_the_folder, a_link_to_ones_own_films, a_broken_link_for_the_folder]
CASES = [(shape, "entry") for shape in BOTH + ENTRIES + REFUSED] + [(shape, "draft") for shape in BOTH + DRAFTS + REFUSED]
IDS = [f"{kind}: {shape.__name__.replace('_', ' ')}" for shape, kind in CASES]
PLAIN_SEEDS = 3  # of each case, beside one of the real thing

# ---- what is damaged


class User(NamedTuple):
    "Something that keeps its result in a store."

    ask: Callable[[Store], list[torch.Tensor]]  # the result, made if it is not there
    keys: list[str]  # two of its keys; the first is that of `ask`


def ask_plain(store: Store, key: str = KEYS[0]) -> list[torch.Tensor]:
    "Two parts of an entry, put into a draft unless they are there."
    with store.drafting(key, dict(kind="flow", timesteps=[1, 21, 41], frames=4, part_frames=2)) as draft:
        for number in () if draft.finished else range(2):
            if f"part-{number}" not in draft:
                draft.put(f"part-{number}", {"x": torch.arange(12.0).reshape(3, 4) + KEYS.index(key) + 10 * number})
    entry = store.get(key)
    return [*(entry.tensor(f"part-{number}", "x") for number in range(2)), torch.tensor(entry.meta["timesteps"])]


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    "A cache that has everything, one in which all is begun, those that use it, and what they get."
    torch.set_num_threads(1)
    clip = SCENE.render(frames=4, size=64)
    whole, begun = (tmp_path_factory.mktemp("made") / name for name in ("whole", "begun"))

    def trajectory(store, prompt=SCENE.caption):
        return invert(model, clip, prompt, 2, store=store, progress=False)

    def edit(store, prompt="a gold star on grass", **config):
        config = EditConfig(prompt, source_prompt=SCENE.caption, num_inference_steps=2, keyframe_interval=2, **config)
        return Edit(model, trajectory(store), config, clip, keep_history=False)

    def ask_trajectory(store):
        found = trajectory(store)
        return [found.at(timestep) for timestep in [None, *found.timesteps]]

    def ask_record(store):
        asked = edit(store)
        record = record_for(asked, store)
        return [tensor for step in asked.timesteps for _, layer in sorted(record.at(step, [0, 1, 2, 3]).items()) for tensor in layer]

    def ask_edit(store):
        asked = edit(store)
        asked.denoiser.record = record_for(asked, store)
        run_kept(asked, store)
        return [asked.latents]

    def everything(store):
        ask_plain(store), ask_plain(store, KEYS[1])
        ask_edit(store)
        trajectory(store, prompt="another"), record_for(edit(store, seed=1), store), run_kept(edit(store, "a red star"), store)

    everything(Store(whole))
    shutil.copytree(whole, begun)
    for path in begun.glob("*-*"):  # each entry as the draft that it was
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").unlink()
        lines = [{"format": 2, "key": path.name}, {}, *({name: file} for name, file in sorted(manifest["files"].items()))]
        (path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        path.rename(begun / f".draft-{path.name}")
    users = dict(plain=User(ask_plain, KEYS))
    for kind, ask in dict(trajectory=ask_trajectory, source=ask_record, edit=ask_edit).items():
        used = [entry.key for entry in Store(whole).entries() if entry.meta["kind"] == kind]
        read, get = [], Store.get
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "get", lambda self, key, *rest, **options: (read.append(key), get(self, key, *rest, **options))[1])
            ask(Store(whole))
        own = next(key for key in read if key in used)
        users[kind] = User(ask, [own, next(key for key in used if key != own)])
    wanted = {name: user.ask(Store(whole)) for name, user in users.items()}
    return SimpleNamespace(whole=whole, begun=begun, users=users, wanted=wanted)


def snapshot(folder: Path) -> dict:
    "Names, kinds, modes, times and contents of all that is in a folder."
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (about.st_mode, about.st_mtime_ns, path.read_bytes() if path.is_file() else None)
    return found


def use_the_listing(store: Store):
    "All that shows a store. None of it stops at damage."
    repr(store), store._repr_html_(), store.entries(), store.drafts(), store.others()
    store.prune(10**12)


def try_case(made, tmp_path: Path, shape, kind: str, name: str, seed: int):
    "Damages one entry or draft and asks for it again."
    root, outside, user = tmp_path / "cache", tmp_path / "outside", made.users[name]
    shutil.copytree(made.whole, root, symlinks=True)
    outside.mkdir()
    (outside / "film.mp4").write_bytes(b"abc")
    if kind == "draft":
        for key in user.keys:
            shutil.rmtree(root / key)
            shutil.copytree(made.begun / f".draft-{key}", root / f".draft-{key}")
    foreign = root / "edit-1 (copy)", root / "site-1", root / ".draft-x (copy)"
    for path in foreign:
        path.mkdir()
        (path / "manifest.json").write_text('{"name": "a web page"}')
    (root / "loop").symlink_to(root)
    folder, other = (root / (key if kind == "entry" else f".draft-{key}") for key in user.keys)
    shape(Case(folder, other, outside, random.Random(seed)))
    before = snapshot(outside)
    store = Store(root)
    use_the_listing(store)
    assert not {"edit-1 (copy)", "site-1", "loop"} & {entry.key for entry in store.entries()}
    if shape in REFUSED:
        with pytest.raises(StoreError, match="is a link") as caught:
            user.ask(store)
        assert str(folder) in str(caught.value) and folder.is_symlink()
        store.clear()
        assert folder.is_symlink() and snapshot(outside) == before
        exec(re.search(r"os\.unlink\(.*\)", str(caught.value))[0])  # what the message says
    result = user.ask(store)
    assert len(result) == len(made.wanted[name]) and all(map(torch.equal, result, made.wanted[name]))
    assert snapshot(outside) == before and all((path / "manifest.json").is_file() for path in foreign)
    use_the_listing(store)
    store.clear()
    assert sorted(os.listdir(root)) == sorted([".draft-x (copy)", ".locks", "edit-1 (copy)", "loop", "site-1"]) and snapshot(outside) == before


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("shape, kind", CASES, ids=IDS)
def test_damage_gives_the_right_value_again(made, tmp_path, shape, kind):
    for seed in range(PLAIN_SEEDS):
        try_case(made, tmp_path / f"plain-{seed}", shape, kind, "plain", seed)
    number = CASES.index((shape, kind))
    name = ["trajectory", "source", "edit"][number % 3]
    try_case(made, tmp_path / name, shape, kind, name, number)


def test_there_are_many_shapes_and_cases():
    assert len({shape for shape, _ in CASES}) >= 40 and len(CASES) * (PLAIN_SEEDS + 1) >= 300


# ---- any value anywhere

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text() | st.sampled_from(["..", "../x.json", "a.json", "flow-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("a.json"), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["store", "format", "key", "created", "meta", "files", "checksum", "more"]
FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "Copies of a cache with one entry, or with its draft."
    root = tmp_path_factory.mktemp("fuzz")
    ask_plain(Store(root / "entry"))
    with suppress(KeyboardInterrupt), Store(root / "draft").drafting(KEYS[0]) as draft:
        draft.put("part-0", {"x": torch.arange(12.0).reshape(3, 4)})
        raise KeyboardInterrupt

    def copy(kind):
        shutil.rmtree(root / "copy", ignore_errors=True)
        shutil.copytree(root / kind, root / "copy")
        return Store(root / "copy")

    return copy


def check_plain(store: Store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        use_the_listing(store)
        first, second, _ = ask_plain(store)
        assert first[0, 1] == 1 and second[0, 1] == 11
        store.clear()
    assert os.listdir(store.root) == [".locks"]


@FUZZ
@given(field=st.sampled_from(FIELDS), value=JSON, sealed=st.booleans())
def test_any_value_in_any_field_of_a_manifest(plain, field, value, sealed):
    store = plain("entry")
    path = store.root / KEYS[0] / "manifest.json"
    manifest = json.loads(path.read_text()) | {field: value}
    with suppress(ValueError):
        manifest |= dict(checksum=entries._sum(manifest)) if sealed and field not in ("checksum", "meta") else {}
    path.write_text(json.dumps(manifest))
    check_plain(store)


@FUZZ
@given(text=JSON.map(lambda value: json.dumps(value).encode()) | st.binary())
def test_any_text_for_a_manifest(plain, text):
    store = plain("entry")
    (store.root / KEYS[0] / "manifest.json").write_bytes(text)
    check_plain(store)


@FUZZ
@given(lines=st.lists(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(), min_size=1, max_size=3), whole=st.booleans())
@example(lines=[b'{"part-0.safetensors": {"bytes": 5}}'], whole=True)
@example(lines=[b'{"part-0.safetensors": null}', b'{"part-1.safetensors": {"bytes": 1e999, "sha256": ""}}'], whole=True)
def test_any_lines_in_a_journal(plain, lines, whole):
    store = plain("draft")
    path = store.root / f".draft-{KEYS[0]}" / "journal.jsonl"
    path.write_bytes((path.read_bytes() if whole else b"") + b"\n".join(lines) + b"\n")
    check_plain(store)


@FUZZ
@given(
    name=st.sampled_from(["step-0000", "step-0001", "step-0002", "step-0003", "step-00001", "step-2", "step-x", "step-9999", "frames-000000"]),
    shape=st.sampled_from([(4, 4, 8, 8), (4, 4, 8, 9), (3, 4, 8, 8), (), (0,)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64]),
    fill=st.sampled_from([1.0, float("nan"), float("inf")]),
    tensor=st.sampled_from(["latents", "x"]),
)
def test_any_checkpoint_that_does_not_fit_the_edit_begins_it_anew(tmp_path, name, shape, dtype, fill, tensor):
    from tokenflow_nb.edit import _Checkpoints

    edit = SimpleNamespace(latents=torch.zeros(4, 4, 8, 8), index=0, first=0, timesteps=[501, 1])
    store = Store(tmp_path / "cache")
    with store.drafting("edit-1") as draft:
        content = torch.full(shape, fill if dtype.is_floating_point else 1, dtype=dtype)
        draft.put(name, {tensor: content})
        whole = (name, shape, dtype, tensor) in [(f"step-000{step}", (4, 4, 8, 8), torch.float32, "latents") for step in (1, 2)] and fill == 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _Checkpoints(draft).restore(edit)
        assert (edit.index, edit.latents.max().item(), len(caught)) == ((int(name[5:]), 1.0, 0) if whole else (0, 0.0, 1))
        assert (name in draft) == whole
    store.clear()


@pytest.mark.parametrize("name, latents", [("step-0007", None), ("step-0001", torch.zeros(1, 4, 8, 8)), ("step-0001", torch.full((4, 4, 8, 8), torch.nan))])
def test_an_edit_with_a_checkpoint_of_something_else_begins_anew(made, tmp_path, name, latents):
    store, user = Store(tmp_path / "cache"), made.users["edit"]
    shutil.copytree(made.whole, store.root)
    whole = store.get(user.keys[0])
    latents = whole.tensor("step-0002", "latents") if latents is None else latents
    store.remove(user.keys[0])
    with suppress(KeyboardInterrupt), store.drafting(user.keys[0]) as draft:
        draft.put(name, {"latents": latents})
        raise KeyboardInterrupt
    with pytest.warns(UserWarning, match="a checkpoint of the edit is damaged"):
        assert torch.equal(user.ask(store)[0], made.wanted["edit"][0])


# ---- a cache that can only be read


def make_read_only(monkeypatch, root: Path):
    "What a file system says that is mounted to be read only. Modes would not do: root may write anyway."

    def within(path) -> bool:
        return not isinstance(path, int) and os.path.abspath(path).startswith(str(root))

    def refusing(call, writes=lambda *args: True):
        def refuse(path, *args, **options):
            if within(path) and writes(*args, *options.values()):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return call(path, *args, **options)

        return refuse

    for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "utime", "chmod"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(os, "open", refusing(os.open, lambda flags, *_: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
    monkeypatch.setattr("io.open", refusing(open, lambda mode="r", *_: set(mode) & set("wax+")))


def test_a_cache_that_can_only_be_read_serves_what_it_has(made, tmp_path, monkeypatch):
    root = tmp_path / "cache"
    shutil.copytree(made.whole, root)
    with monkeypatch.context() as patch:
        make_read_only(patch, root)
        store = Store(root)
        for name, user in made.users.items():
            assert all(map(torch.equal, user.ask(store), made.wanted[name])), name
        use_the_listing(store)
        for need in (lambda: ask_plain(store, "flow-" + 32 * "c"), lambda: store.writing("flow-1").__enter__(), lambda: store.remove(KEYS[0])):
            with pytest.raises((StoreError, ValueError), match="Read-only file system.*Set TOKENFLOW_HOME to a folder that you may write to"):
                need()
        with pytest.warns(UserWarning, match="Read-only file system"):
            assert store.clear() == []
        patch.setenv("TOKENFLOW_HOME", str(tmp_path / "mine"))  # what the message says
        assert torch.equal(ask_plain(Store())[0], made.wanted["plain"][0])
    assert len(Store(root).entries()) == len(Store(made.whole).entries())


# ---- what is in the way, and what is not ours


@pytest.mark.parametrize("name", [".locks", ".locks/" + KEYS[0] + ".lock"])
def test_locks_are_not_taken_through_links(tmp_path, name):
    store, outside = Store(tmp_path / "cache"), tmp_path / "outside"
    (store.root / name).parent.mkdir(parents=True)
    outside.mkdir()
    (outside / "film.mp4").write_bytes(b"abc")
    (store.root / name).symlink_to(outside if name == ".locks" else outside / "film.mp4")
    before = snapshot(outside)
    with pytest.raises(StoreError, match="is a link") as caught:
        ask_plain(store)
    assert snapshot(outside) == before
    exec(re.search(r"os\.unlink\(.*\)", str(caught.value))[0])
    assert len(ask_plain(store)) == 3 and snapshot(outside) == before


@pytest.mark.parametrize("name, folder", [(".locks", False), (".locks/" + KEYS[0] + ".lock", True)])
def test_a_file_for_the_folder_of_locks_or_a_folder_for_a_lock_is_damage(tmp_path, name, folder):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if folder else path.write_text("a file")
    with pytest.warns(UserWarning, match="is damaged .* in its place"):
        assert len(ask_plain(Store(tmp_path))) == 3


def test_a_root_that_is_a_link_is_fine_and_one_lock_is_one_lock_however_it_is_spelled(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    with Store(tmp_path / "cache").drafting(KEYS[0]) as paused:
        paused.put("part-0", {"x": torch.zeros(3)})
        for root in (tmp_path / "cache", tmp_path / "disk", tmp_path / "disk" / ".." / "cache"):
            assert len(ask_plain(Store(root))) == 3  # it waits for nobody
    assert len(Store(tmp_path / "disk").entries()) == 1 and not drafts._OURS


def test_foreign_things_are_neither_listed_nor_removed(tmp_path):
    store, names = Store(tmp_path), ["edit-1 (copy)", "notes", ".draft-edit-1 (copy)", ".writing-by-hand", ".hidden", "site-1"]
    ask_plain(store)
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text('{"name": "a web page"}')
    shutil.copytree(tmp_path / KEYS[0], tmp_path / "backup")
    (tmp_path / "LICENSE").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / KEYS[0])
    (tmp_path / ("edit-" + 32 * "e")).symlink_to(tmp_path / "notes")
    (tmp_path / ".writing-host-123-01234567").symlink_to(tmp_path / "notes")
    left = {*names, "backup", "LICENSE", "link", "edit-" + 32 * "e", ".writing-host-123-01234567"}
    assert [entry.key for entry in store.entries()] == KEYS[:1] and store.others() == []
    assert store.clear() == KEYS[:1] and set(os.listdir(tmp_path)) == left | {".locks"}
    assert all((tmp_path / name / "manifest.json").is_file() for name in [*names, "backup"])


def test_damage_is_listed_counted_and_cleared(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path)
    ask_plain(store), ask_plain(store, KEYS[1])
    size = store.get(KEYS[1]).nbytes
    (tmp_path / KEYS[0] / "manifest.json").write_text("")
    dead = tmp_path / f".writing-{drafts._machine()}-01234567" / "work"
    dead.mkdir(parents=True)
    (dead / "film.mp4").write_bytes(5000 * b"0")
    states = {name: (state, count) for name, state, count in store.others()}
    assert states[KEYS[0]] == ("damaged or out of date", size) and states[dead.parent.name][1] == 5000
    assert [entry.key for entry in store.entries()] == KEYS[1:] and "5.2 kB unfinished or left behind" in repr(store), repr(store)
    monkeypatch.setenv("TOKENFLOW_HOME", str(tmp_path))
    assert main(["cache", "list"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in (*KEYS, "damaged or out of date", dead.parent.name, "5.2 kB unfinished or left behind"))
    assert store.prune(size) == KEYS[:1] and not dead.exists()  # damage goes first
    assert store.clear() == KEYS[1:] and os.listdir(tmp_path) == [".locks"]


def test_what_was_written_for_another_kind_of_disk_is_found_by_older_rules_after_a_day(tmp_path):
    older, fresh = tmp_path / ".writing-host-999999999-01234567", tmp_path / ".writing-elsewhere-01234567"
    for path in (older, fresh):
        (path / "work").mkdir(parents=True)
    store = Store(tmp_path)
    ask_plain(store)
    assert older.exists() and fresh.exists(), "another machine's locks may not be seen here"
    for path in (older / "work", older):
        os.utime(path, (1, 1))
    with store.writing("flow-1"):
        pass
    assert not older.exists() and fresh.exists()


def test_an_upload_is_an_entry(tmp_path):
    store = Store(tmp_path)
    path = store.keep("../../Ferien ★ 2024.MOV", b"film")
    assert path.parent.parent == tmp_path and path.read_bytes() == b"film" and path.suffix == ".mov"
    [entry] = store.entries()
    assert entry.meta == {"kind": "upload", "name": "../../Ferien ★ 2024.MOV"} and entry.nbytes == 4
    path.write_bytes(b"FILM")
    with pytest.warns(UserWarning, match="will be recomputed"):
        assert store.keep("../../Ferien ★ 2024.MOV", b"film").read_bytes() == b"film"
    assert store.clear() == [entry.key] and not path.exists()


def test_what_utf_8_cannot_say_is_kept_nevertheless(tmp_path):
    store = Store(tmp_path)
    with store.writing("flow-1", {"prompt": "\ud83d alone"}) as writer:
        writer.put_json("note", "\udcff")
    entry = store.get("flow-1")
    assert entry.meta["prompt"] == "\ud83d alone" and entry.load_json("note") == "\udcff"
    store._repr_html_().encode()


def test_a_kill_just_before_the_name_is_given_costs_no_part(tmp_path, monkeypatch):
    "The journal is there until the entry is."
    store, parts = Store(tmp_path), []
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: os._exit(7))
        if not (child := os.fork()):
            ask_plain(store)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    put = drafts.Draft.put
    monkeypatch.setattr(drafts.Draft, "put", lambda self, *part: (parts.append(part), put(self, *part)))
    assert len(ask_plain(store)) == 3 and parts == []
