"Clips of other programs: laid over the source in time and size, or refused with a reason."

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenflow_nb.clip import Clip, ClipError, write_clip
from tokenflow_nb.compare.external import external, find_result, matching_frames, read_pictures, retime, slug
from tokenflow_nb.compare.job import Job
from tokenflow_nb.edit import EditConfig

LEVELS = 30  # between the brightness of one frame and the next, so that coding does not mix them up


def clock(count: int, fps: float = 8, size: tuple[int, int] = (64, 64)) -> Clip:
    "A clip whose frames are told apart by their brightness."
    levels = (np.arange(count) * (LEVELS * 8 // max(count, 8)) + 8).astype(np.uint8)
    return Clip(np.broadcast_to(levels[:, None, None, None], (count, *size, 3)).copy(), fps=fps)


def shown(clip: Clip, made: Clip) -> list[int]:
    "Which frame of `made` each frame shows."
    distance = np.abs(clip.frames[:, 8, 8, :1].astype(int) - made.frames[None, :, 8, 8, 0].astype(int))
    return distance.argmin(1).tolist()


@pytest.fixture
def job(model):
    return Job(model, clock(8), EditConfig("a gold star"), name="A red star → gold")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (clock(8), [0, 1, 2, 3, 4, 5, 6, 7]),
        (clock(4, fps=4), [0, 0, 1, 1, 2, 2, 3, 3]),  # half the rate: every frame twice
        (clock(16, fps=16), [1, 3, 5, 7, 9, 11, 13, 15]),  # twice the rate: every other frame
        (clock(11), [0, 1, 2, 3, 4, 5, 6, 7]),  # longer at the same rate: the end is cut off
        (clock(8, size=(128, 96)), [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_a_file_of_another_timing_or_size_is_laid_over_the_source(job, tmp_path, made, expected):
    write_clip(tmp_path / "a-red-star-gold.mp4", made)
    found = external("other", tmp_path)(job)
    assert (found.frames.shape, found.fps) == (job.clip.frames.shape, job.clip.fps)
    assert shown(found, made) == expected


@given(st.integers(1, 60), st.integers(1, 60))
def test_frames_belong_to_the_nearest_in_time(count, wanted):
    chosen = matching_frames(count, wanted)
    middle = (np.arange(wanted) + 0.5) / wanted
    assert (chosen / count <= middle).all() and (middle < (chosen + 1) / count).all()


def test_a_clip_that_ends_early_is_refused_and_one_that_is_stretched_is_announced():
    with pytest.raises(ClipError, match="5 frames at 8 fps, the source 8"):
        retime(clock(5), clock(8))
    with pytest.warns(UserWarning, match="lasts 2.00 s, the source 1.00 s"):
        retime(clock(20, fps=10), clock(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retime(clock(3, fps=3), clock(8))
        retime(clock(9, fps=7.99), clock(8))


def test_pictures_in_a_folder_are_a_clip(job, tmp_path):
    made, folder = clock(12, size=(64, 128)), tmp_path / "A red star, gold"
    folder.mkdir()
    for index, frame in enumerate(made.frames):
        Image.fromarray(frame).save(folder / f"{index}.png")  # 10 sorts before 2 as text
    found = external("other", tmp_path)(job)
    assert found.frames.shape == job.clip.frames.shape
    assert shown(found, made) == matching_frames(12, 8).tolist()
    Image.new("RGB", (16, 16)).save(folder / "12.png")
    with pytest.raises(ClipError, match="12.png has"):
        read_pictures(folder)
    (folder / "12.png").write_bytes(b"nothing")
    with pytest.raises(ClipError, match="12.png is not a picture"):
        read_pictures(folder)


def test_an_empty_folder_of_frames(tmp_path):
    with pytest.raises(ClipError, match="holds no pictures"):
        read_pictures(tmp_path)


def test_a_wide_clip_is_cropped_around_its_centre(job, tmp_path):
    frames = np.zeros((8, 64, 192, 3), np.uint8)
    frames[:, :, 64:128] = 200
    write_clip(tmp_path / "a-red-star-gold.mp4", Clip(frames))
    assert np.abs(external("other", tmp_path)(job).frames[:, 4:-4, 4:-4].astype(int) - 200).max() < 12


@pytest.mark.parametrize("content", [b"", b"\x00" * 4000, b"GIF89a and no more"])
def test_a_broken_file_is_an_error_of_its_case_and_of_no_other(job, tmp_path, content):
    (tmp_path / "broken.mp4").write_bytes(content)
    write_clip(tmp_path / "a-red-star-gold.mp4", clock(8))
    method, done, failed = external("other", tmp_path), [], []
    for each in (replace(job, name="broken"), replace(job, name="missing"), job):
        try:
            done.append(method(each))
        except ClipError as error:
            failed.append(str(error))
    assert len(done) == 1 and len(failed) == 2
    assert "broken.mp4" in failed[0] and "looked for missing.mp4" in failed[1] and "a-red-star-gold.mp4" in failed[1]


def test_half_a_file_is_not_taken_for_a_whole_one(job, tmp_path):
    whole = write_clip(tmp_path / "whole.gif", Clip(np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)))
    (tmp_path / "a-red-star-gold.gif").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with warnings.catch_warnings(), pytest.raises(ClipError, match="the source 8"):
        warnings.simplefilter("ignore")
        external("other", tmp_path)(job)


def test_what_is_not_a_video_is_passed_over_and_two_videos_are_refused(tmp_path):
    for name in ("x.json", "x.txt", ".x.mp4", "X.mp4"):
        (tmp_path / name).touch()
    assert find_result(tmp_path, "x").name == "X.mp4"
    (tmp_path / "x.gif").touch()
    with pytest.raises(ClipError, match="leave one of them"):
        find_result(tmp_path, "x")


def test_settings_that_cannot_be_meant(job, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        external("other", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="name=' '"):
        external(" ", tmp_path)
    with pytest.raises(ClipError, match="name of its case"):
        external("other", tmp_path)(replace(job, name=""))
    with pytest.raises(ClipError, match="there is nothing"):
        external("other", tmp_path)(job)
    assert external("other", str(tmp_path)).name == "other"


@given(st.text(max_size=40))
def test_a_slug_is_its_own_slug_and_a_single_name(name):
    assert slug(slug(name)) == slug(name) and "/" not in slug(name)
