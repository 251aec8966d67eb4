"Films without a browser: what is sent, when, and how much of it; and the scripts of the page, by node."

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import anywidget
import numpy as np
import pytest
import traitlets
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenflow_nb.panels import films as module
from tokenflow_nb.panels.films import (
    LOSSLESS, LOSSY, PACKET, POSTER, QUALITIES, Cache, Film, Player, Strip, about, encode_film, encode_png, packets, script, static,
)
from tokenflow_nb.panels.upload import Upload
from tokenflow_nb.store import Store

HERE = Path(__file__).parent


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


def photo(frames=1, size=(360, 640), seed=0):
    "Smooth shapes with grain, which move: about as hard to compress as a photograph."
    rows, columns = np.mgrid[: size[0], : size[1]]
    generator = np.random.default_rng(seed)
    grain = generator.normal(0, 2, (*size, 3))
    waves = [128 + 60 * np.sin(columns / (9 + 7 * c) + rows / 31) + 50 * np.cos(rows / (13 + 5 * c)) for c in range(3)]
    picture = (np.stack(waves, -1) + grain).clip(0, 255).astype(np.uint8)
    return np.stack([np.roll(picture, 3 * frame, 1) for frame in range(frames)])


def pages(widget):
    "What a widget sends to its page."
    sent = []
    widget.send = lambda content, buffers=None: sent.append((content, buffers))
    return sent


def ask(widget, **content):
    "A message of the browser, and the end of its answer."
    if future := widget._heard(widget, content, []):
        future.result(30)


# ---- pictures and films


@given(
    st.integers(1, 12), st.integers(1, 12), st.sampled_from([(), (3,), (4,)]), st.integers(0, 2**32 - 1)
)
def test_png_gives_the_same_pixels_back(height, width, channels, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(encode_png(picture)))) == picture).all()
    assert (np.asarray(Image.open(io.BytesIO(encode_png(picture[::-1, ::-1])))) == picture[::-1, ::-1]).all()


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8), "picture"])
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(ValueError, match="give uint8 of shape"):
        encode_png(bad)


@pytest.mark.parametrize("size, expected", [((100, 300), (32, 96)), ((20, 30), (20, 30)), ((1000, 2), (32, 1))])
def test_films_are_made_smaller_never_larger(size, expected):
    film = encode_film(np.zeros((2, *size, 3), np.uint8), height=32)
    assert [pixels(frame).shape[:2] for frame in film] == [expected] * 2 and film.size == expected


@pytest.mark.parametrize("channels", [(), (3,), (4,)])
def test_small_films_and_transparent_ones_are_exact(channels):
    frames = np.random.default_rng(0).integers(0, 256, (5, 24, 40, *channels), np.uint8)
    film = Film(frames)
    assert film.quality is None and about(film)["lossless"]
    for frame, encoded in zip(frames, film):
        shown = pixels(encoded)
        assert (shown == (frame if channels else frame[..., None])).all()


def test_a_large_transparent_film_stays_exact():
    frames = np.random.default_rng(0).integers(0, 256, (2, 1100, 900, 4), np.uint8)
    assert Film(frames).quality is None and (pixels(Film(frames)[1]) == frames[1]).all()


def test_a_photographic_film_of_240_frames_is_sent_in_three_megabytes():
    film = Film([photo()[0]] * 240)
    assert film.quality in QUALITIES and 240 * len(film[0]) < 1.1 * LOSSY
    short = Film(photo(8))
    assert short.quality is None or short.quality >= film.quality
    assert sum(map(len, short)) <= max(LOSSLESS, 1.1 * LOSSY)


def test_making_a_film_encodes_nothing(monkeypatch, tmp_path):
    frames = np.lib.format.open_memmap(tmp_path / "frames.npy", "w+", np.uint8, (6, 128, 128, 3))
    encoded, plain = [], module.encode_webp
    monkeypatch.setattr(module, "encode_webp", lambda *picture: encoded.append(1) or plain(*picture))
    film = Film(frames)
    assert len(film) == 6 and not encoded
    assert film[3] is film[3] and film[2:4] == [film[2], film[3]] and film[-1] == film[5]
    with pytest.raises(IndexError):
        film[6]


@pytest.mark.parametrize("bad", [np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4, 2), np.uint8), [np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)]])
def test_what_is_no_film_is_refused(bad):
    with pytest.raises(ValueError, match="give uint8 of shape|of one shape"):
        Film(bad)
    player = Player()
    with pytest.raises(traitlets.TraitError, match="films"):
        player.films = [bad]


def test_the_same_encoded_pictures_have_the_same_id_and_others_another():
    one, other = encode_png(np.zeros((4, 4), np.uint8)), encode_png(np.ones((4, 4), np.uint8))
    assert Film([one, other]).id == Film([one, other]).id != Film([other, one]).id
    frames = np.zeros((2, 4, 4), np.uint8)
    assert Film(frames).id != Film(frames).id and Film(frames).id.isalnum()


def test_many_threads_get_the_same_bytes():
    film, found = Film(photo(6, (64, 96))), []
    threads = [threading.Thread(target=lambda: found.append(list(film))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 8 and all(each == found[0] for each in found)


def test_a_poster_is_small_whatever_the_film():
    noise = np.random.default_rng(0).integers(0, 256, (3, 720, 1280, 3), dtype=np.uint8)
    for film in (Film(noise), Film([encode_png(frame) for frame in noise[:1]])):
        told = about(film)
        assert len(told["poster"]) <= POSTER and not told["exact"] and (told["width"], told["height"]) == (1280, 720)


@given(st.lists(st.integers(1, 2 * PACKET), max_size=30), st.lists(st.integers(-3, 40), max_size=60))
def test_packets_have_every_wanted_frame_once_and_in_order(sizes, wanted):
    class Sized:
        def __len__(self):
            return len(sizes)

        def __getitem__(self, frame):
            return bytes(sizes[frame])

    sent = list(packets(Sized(), wanted))
    assert [frame for numbers, _ in sent for frame in numbers] == [frame for frame in wanted if 0 <= frame < len(sizes)]
    assert all(list(map(len, pictures)) == [sizes[frame] for frame in numbers] for numbers, pictures in sent)
    assert all(sum(map(len, pictures[:-1])) < PACKET for _, pictures in sent)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=60))
def test_the_cache_is_bounded_and_keeps_the_last(requests):
    cache, made = Cache(max_bytes=100), {}
    for name, size in requests:
        size = made.setdefault(name, size)
        assert cache.get(name, lambda: bytes(size)) == bytes(size)
        assert cache.nbytes == sum(made[kept] for kept in made if kept in cache) <= 100
        assert name in cache
    cache.clear()
    assert len(cache) == cache.nbytes == 0



# ---- the widgets


@pytest.mark.parametrize("widget", [Strip, Player, Upload])
def test_widgets_are_only_traits_and_a_script(widget):
    made = widget()
    assert isinstance(made, anywidget.AnyWidget)
    state = made.get_state()
    assert "export default" in state["_esm"] and "import {" not in state["_esm"] and "--tfnb-accent" in state["_css"]
    own = set(widget.class_own_traits())
    assert all(made.traits()[name].help for name in own - {"_esm", "_css"} if not name.startswith("_"))
    assert set(state) >= {"layout", "_model_module"}  # no trait has a name that ipywidgets needs


def test_a_saved_notebook_holds_posters_only():
    noise = np.random.default_rng(0).integers(0, 256, (2, 360, 640, 3), dtype=np.uint8)
    player = Player(films=[Film([noise[0]] * 240), Film([noise[1]] * 240)])
    sent = sum(len(each["poster"]) for each in player.get_state()["_shown"])
    assert sent <= 2 * POSTER and "films" not in player.get_state()


def test_frames_are_answered_with_what_was_asked():
    film, other = Film(photo(6, (64, 96))), Film(photo(6, (64, 96), 1))
    player = Player(films=[film, other])
    sent = pages(player)
    ask(player, want=[4, 0], film=other.id)
    assert sent == [(dict(film=other.id, frames=[4, 0]), [other[4], other[0]])]
    for wrong in (dict(want=[99, -1, "0", None, 1.5], film=film.id), dict(want=[1], film="../etc"), dict(hello=1)):
        ask(player, **wrong)
    assert len(sent) == 1


def test_a_film_that_is_gone_is_not_answered_and_one_that_stays_keeps_its_id():
    stays, goes = Film(photo(3, (64, 96))), Film(photo(3, (64, 96), 1))
    strip = Strip(rows=[stays, goes])
    sent, before = pages(strip), strip._shown[0]["id"]
    strip.rows = [stays]
    ask(strip, want=[1], film=goes.id)
    assert sent == [] and [each["id"] for each in strip._shown] == [before]


def test_frames_that_cannot_be_read_are_said():
    class Torn:
        def __len__(self):
            return 2

        def __getitem__(self, frame):
            if frame:
                raise OSError("the disk is gone")
            return np.zeros((300, 300, 3), np.uint8)

        def __iter__(self):
            return iter([self[0]])

    film = Film(Torn())
    film.quality = 80
    player = Player(films=[film])
    sent = pages(player)
    ask(player, want=[1], film=film.id)
    assert sent == [(dict(film=film.id, failed="OSError: the disk is gone"), None)]


def test_films_may_be_assigned_from_a_thread_while_the_browser_asks():
    player, errors = Player(), []
    sent = pages(player)

    def assign():
        try:
            for seed in range(5):
                player.films = [photo(2, (32, 48), seed)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=assign) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        for each in player._shown:
            ask(player, want=[0, 1], film=each["id"])
    for thread in threads:
        thread.join(60)
    assert not errors and all(set(content) == {"film", "frames"} for content, _ in sent)


def test_a_click_is_a_plain_value():
    strip, places = Strip(), []
    strip.observe(lambda change: places.append(change.new), "picked")
    strip.set_state({"picked": dict(row=0, frame=3, x=0.5, y=0.25)})  # as the browser sends it
    assert places == [dict(row=0, frame=3, x=0.5, y=0.25)]


def test_a_key_answers_a_question_once_and_only_its_own():
    player, told = Player(letters=["a", "b"], question=1), []
    player.on_key(told.append)
    for content in (
        dict(pressed="x", question=1), dict(pressed="a", question=0), dict(pressed="a", question=1), dict(pressed="b", question=1),
    ):
        ask(player, **content)
    player.question = 2
    ask(player, pressed="b", question=2)
    assert told == ["a", "b"]


# ---- the page


def test_scripts_have_what_they_import_in_front_once():
    for path in map(static, ("player.js", "strip.js", "upload.js")):
        text = script(path.name)
        assert "import {" not in text and text.count("\nexport ") == 1 and text.count("const clamp = ") == 1
        names = [line.split()[1] for line in text.splitlines() if line.startswith("function ")]
        assert len(names) == len(set(names)), f"{path.name}: two functions of one name in one text"


def test_the_scripts_by_node():
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node: `apt-get install nodejs`")
    version = int(subprocess.run([node, "--version"], capture_output=True, text=True).stdout.lstrip("v").partition(".")[0])
    if version < 20:
        pytest.skip(f"needs node 20 or newer, this is {version}")
    tests = sorted(map(str, (HERE / "js").glob("*.test.mjs")))
    done = subprocess.run([node, "--test", *tests], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_every_script_is_a_module_that_node_can_read(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node: `apt-get install nodejs`")
    for path in static("").glob("*.js"):
        (tmp_path / "whole.mjs").write_text(script(path.name), encoding="utf-8")
        done = subprocess.run([node, "--check", tmp_path / "whole.mjs"], capture_output=True, text=True)
        assert done.returncode == 0, f"{path.name}: {done.stderr}"


# ---- uploads


@pytest.fixture
def upload(tmp_path):
    widget = Upload(Store(tmp_path))
    yield widget
    widget.close()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".writing")]


def send(upload, kind, *buffers, id="1", **content):
    upload._heard(upload, dict(upload=kind, id=id, **content), list(buffers))


@given(st.binary(min_size=1, max_size=5000), st.integers(1, 999))
def test_a_file_arrives_as_it_was(tmp_path_factory, content, part):
    upload = Upload(Store(tmp_path_factory.mktemp("uploads")))
    sent, seen = pages(upload), []
    upload.observe(lambda change: seen.append(change.new), "fraction")
    send(upload, "begin", name="wölfe & <b>.mp4", size=len(content), type="video/mp4")
    for at in range(0, len(content), part):
        send(upload, "part", memoryview(content[at : at + part]), at=at)
    assert Path(upload.path).read_bytes() == content and upload.error == "" and upload.fraction == 1
    assert seen == sorted(seen) and [message["upload"] for message, _ in sent][-1] == "done"
    upload.close()


def test_names_from_the_browser_are_never_paths(upload, tmp_path):
    for number, name in enumerate(("../../etc/passwd.mp4", "/etc/x.mp4", "C:\\evil\\..\\x.mp4", "..mp4", "~/.mp4", "a" * 400 + ".mp4", "\u202e4pm.mp4")):
        send(upload, "begin", id=str(number), name=name, size=1, type="video/mp4")
        send(upload, "part", b"x", id=str(number), at=0)
        path = Path(upload.path)
        assert path.parent.parent == tmp_path and path.name.isascii() and len(path.name) < 100, name


@pytest.mark.parametrize("content, why", [
    (dict(name="notes.pdf", size=5, type="application/pdf"), "is no film: choose a film"),
    (dict(name="film.mp4", size=0, type="video/mp4"), "is empty"),
    (dict(name="film.mp4", size=10**18, type="video/mp4"), "1000000.0 TB.* left: free space"),
    (dict(name="drawing.svg", size=5, type="image/svg+xml"), "is no film"),
])
def test_what_cannot_be_taken_is_refused_before_the_first_part(upload, content, why):
    sent = pages(upload)
    send(upload, "begin", **content)
    assert re.search(why, upload.error) and sent == [(dict(upload="refused", id="1"), None)] and upload.path == ""
    send(upload, "part", b"hello", at=0)  # one that was under way already
    assert len(sent) == 1


def test_a_second_upload_replaces_the_first_and_late_parts_are_dropped(upload):
    send(upload, "begin", name="one.mp4", size=4, type="video/mp4")
    send(upload, "part", b"ab", at=0)
    send(upload, "begin", id="2", name="two.mp4", size=2, type="video/mp4")
    send(upload, "part", b"cd", at=2)
    assert upload.path == "" and upload.fraction == 0
    send(upload, "part", b"xy", id="2", at=0)
    assert Path(upload.path).name == "two.mp4"


@pytest.mark.parametrize("wrong", [dict(at=1), dict(at=0, more=b"too much")])
def test_a_part_that_is_lost_or_too_large_ends_the_upload(upload, wrong):
    send(upload, "begin", name="one.mp4", size=4, type="video/mp4")
    send(upload, "part", wrong.pop("more", b"ab"), **wrong)
    assert "upload it again" in upload.error and upload.path == "" and upload.fraction == 0


def test_an_upload_that_is_cancelled_or_closed_leaves_nothing(upload, tmp_path):
    send(upload, "begin", name="one.mp4", size=4, type="video/mp4")
    send(upload, "part", b"ab", at=0)
    send(upload, "cancel")
    assert list(tmp_path.iterdir()) == [] and upload.fraction == 0
    send(upload, "begin", name="one.mp4", size=4, type="video/mp4")
    upload.close()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_middle_of_an_upload_leaves_what_the_next_process_removes(tmp_path):
    program = """
import os, sys
from tokenflow_nb.store import Store
file = Store(sys.argv[1]).receiving("one.mp4", 4)
file.write(b"ab")
os.kill(os.getpid(), 9)
"""
    environment = os.environ | dict(PYTHONPATH=str(HERE.parent))
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment)
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    store = Store(tmp_path)
    assert store.entries() == []
    with store.receiving("two.mp4", 1) as file:
        file.write(b"x")
        file.finish()
    assert [path.name for path in tmp_path.iterdir()] == [store.entries()[0].key]


def test_a_large_upload_is_never_in_memory(tmp_path):
    part = bytes(1 << 20)
    tracemalloc.start()
    with Store(tmp_path).receiving("large.mp4", 64 << 20) as file:
        for _ in range(64):
            file.write(part)
        path = file.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size == 64 << 20 and peak < 16 << 20
