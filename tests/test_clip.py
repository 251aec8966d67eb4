"What `nbs/01_clip.ipynb` cannot hold: files of many kinds, made here with ffmpeg, and every row of bad input."

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_nb.clip import (
    Clip, ClipError, Fit, as_clip, contact_sheet, fit_clip, read_clip, restore_clip, side_by_side, write_clip
)

BEEP = "aevalsrc='if(between(t,1,1.2),0.8*sin(2*PI*880*t),0)':s=44100"


def ffmpeg(*arguments: object) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def make(path: Path, *options: object, size="64x48", rate="10", seconds=2, sound=None) -> Path:
    inputs = ["-f", "lavfi", "-i", f"testsrc2=s={size}:r={rate}:d={seconds}"]
    inputs += ["-f", "lavfi", "-i", f"{sound}:d={seconds}"] if sound else []
    ffmpeg(*inputs, "-pix_fmt", "yuv420p", *options, path)
    return path


def samples(path: Path) -> np.ndarray:
    "The sound of a file, one channel of floats at 8000 a second."
    return np.frombuffer(ffmpeg("-i", path, "-vn", "-f", "f32le", "-ac", 1, "-ar", 8000, "-"), np.float32)


def moving(count=6, height=48, width=64, fps=8.0) -> Clip:
    "A bright square that moves one step a frame over a slope: every frame can be told from every other."
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 1] = np.linspace(40, 160, width).astype(np.uint8)
    for index, frame in enumerate(frames):
        left = index * (width - 8) // max(1, count - 1)
        frame[height // 4:height // 2, left:left + 8] = (220, 210, 200)
    return Clip(frames, fps)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("videos") / "video.mp4", "-movflags", "+faststart", sound=BEEP)


# the clip itself


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 4))
def test_slices_keep_the_time_of_every_frame(count, first, last, step):
    clip = Clip(np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3), fps=6.0, start=2.0)
    expected = list(range(count))[first:last:step]
    if not expected:
        with pytest.raises(ClipError, match="no frames"):
            clip[first:last:step]
        return
    part = clip[first:last:step]
    times = [part.start + index / part.fps for index in range(len(part))]
    assert part.frames[:, 0, 0, 0].tolist() == expected
    assert np.allclose(times, [2.0 + index / 6 for index in expected])


def test_a_clip_is_one_line_and_cannot_be_changed():
    clip = moving(24)
    assert repr(clip) == "Clip(24 frames · 48×64 · 8 fps · 3.0 s)" and repr(clip[:1]).startswith("Clip(1 frame · ")
    assert "29.97 fps" in repr(Clip(clip.frames, 30000 / 1001))
    with pytest.raises(ValueError, match="read-only"):
        clip.frames[0] = 0
    with pytest.raises(IndexError):
        clip[24]
    assert clip[-1] is not None and clip == clip and len({clip, clip}) == 1
    with pytest.raises(ClipError, match="forward"):
        clip[::-1]


def test_a_notebook_shows_a_player():
    assert "<video" in moving(3, 31, 33)._repr_html_()


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), "8", None, True])
def test_a_rate_that_is_none_is_refused(fps):
    with pytest.raises(ClipError, match="fps"):
        Clip(moving().frames, fps)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((8, 8, 3), np.uint8), r"one picture.*array\[None\]"),
        (np.zeros((8, 8)), "2 axes.*four"),
        (np.zeros((1, 2, 8, 8, 3)), "5 axes"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"transparency.*\[\.\.\., :3\].*background"),
        (np.zeros((2, 8, 8, 1)), "1 channel.*repeat"),
        (np.zeros((2, 8, 8, 2)), "2 channels where 3"),
        (np.zeros((2, 3, 8, 8)), "8 channels.*transpose"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
        (np.zeros((2, 0, 8, 3), np.uint8), "no pixels"),
        (np.full((2, 8, 8, 3), 2.5), r"from 2\.5 to 2\.5.*\[0, 1\].*/ 255"),
        (np.linspace(-1, 1, 384).reshape(2, 8, 8, 3), r"from -1 to 1.*\(array \+ 1\) / 2"),
        (np.full((2, 8, 8, 3), 1.0001), r"from 1\.0001.*clip\(0, 1\)"),
        (np.full((2, 8, 8, 3), -9.0), r"from -9.*clip\(0, 1\)"),
        (np.where(np.arange(384).reshape(2, 8, 8, 3) < 5, np.nan, 0.5), "5 values that are NaN"),
        (np.full((2, 8, 8, 3), np.inf), "infinite"),
        (np.zeros((2, 8, 8, 3), np.int64), "dtype int64.*uint8"),
        (np.zeros((2, 8, 8, 3), bool), "dtype bool"),
        (np.zeros((2, 8, 8, 3), object), "dtype object"),
        (None, "0 axes"),
    ],
)
def test_bad_arrays_are_refused_with_the_way_out(array, words):
    with pytest.raises(ClipError, match=words):
        as_clip(array)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_floats_become_clips(dtype):
    tensor = torch.rand(2, 8, 8, 3).to(dtype).requires_grad_()
    clip = as_clip(tensor, fps=12)
    assert clip.fps == 12.0 and np.abs(clip.frames - tensor.detach().float().numpy() * 255).max() <= 0.501
    assert np.array_equal(as_clip(torch.from_numpy(clip.frames.copy())).frames, clip.frames)


def test_a_clip_is_taken_as_it_is_and_reading_options_are_for_files(video):
    clip = moving()
    assert as_clip(clip) is clip and as_clip(str(video), max_frames=2).frames.shape == (2, 48, 64, 3)
    with pytest.raises(ClipError, match="max_frames.*file"):
        as_clip(clip, max_frames=2)


# sizes


@settings(deadline=None)
@given(st.integers(8, 70), st.integers(8, 70), st.integers(1, 70), st.integers(1, 70))
def test_fitting_covers_crops_evenly_and_keeps_the_aspect(height, width, to_height, to_width):
    clip = fit_clip(Clip(np.zeros((1, height, width, 3), np.uint8)), (to_height, to_width), multiple=1)
    fit = clip.fit
    top, left, *size = fit.crop
    assert clip.size == fit.size == tuple(size) == (to_height, to_width)
    assert all(scaled >= wanted for scaled, wanted in zip(fit.scaled_size, fit.size))
    assert fit.scaled_size[0] == to_height or fit.scaled_size[1] == to_width
    assert abs(2 * top + to_height - fit.scaled_size[0]) <= 1 and abs(2 * left + to_width - fit.scaled_size[1]) <= 1
    scale = max(to_height / height, to_width / width)
    assert abs(fit.scaled_size[0] - height * scale) <= 0.5001 and abs(fit.scaled_size[1] - width * scale) <= 0.5001


@given(st.integers(8, 300), st.integers(1, 4).map(lambda power: 2**power))
def test_the_nearest_multiple_is_taken(side, multiple):
    side = max(side, multiple)
    height, width = fit_clip(Clip(np.zeros((1, side, side, 3), np.uint8)), multiple=multiple).size
    assert height == width and height % multiple == 0 and abs(height - side) <= multiple / 2


def test_the_middle_is_kept_and_nothing_is_squashed():
    frames = np.zeros((1, 40, 80, 3), np.uint8)
    frames[:, 10:30, 30:50] = 255
    fitted = fit_clip(Clip(frames), (24, 24))
    inside = np.argwhere(fitted[0][..., 0] > 127)
    assert np.abs(inside.min(0) - 6).max() <= 1 and np.abs(inside.max(0) - 17).max() <= 1
    assert str(fitted.fit) == "40×80 → 24×48, cropped to 24×24" and fitted.fit.scale == pytest.approx(0.6)


def test_shrinking_is_antialiased():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    inside = fit_clip(Clip(stripes), (16, 16))[0][:, 2:-2].astype(int)
    assert np.abs(inside - 127).max() <= 8


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (64, 7)])
def test_tiny_clips_are_refused_with_a_remedy(shape):
    with pytest.raises(ClipError, match=f"{shape[0]}×{shape[1]} pixels.*at least 8.*larger"):
        fit_clip(Clip(np.zeros((2, *shape, 3), np.uint8)), (64, 64))


@pytest.mark.parametrize("size", [64, (64,), (64, 64, 3), (64, 0), (-8, 8), (64.0, 64.0), "64x64", (True, True)])
def test_a_size_that_is_none_is_refused_before_reading(size, video):
    with pytest.raises(ClipError, match="size="):
        read_clip(video, size=size)
    with pytest.raises(ClipError, match="size="):
        fit_clip(moving(), size)


@settings(deadline=None, max_examples=30)
@given(st.integers(16, 60), st.integers(16, 60), st.sampled_from([(32, 32), (16, 48), (64, 64)]))
def test_restoring_gives_the_size_back_and_touches_only_what_was_kept(height, width, size):
    source = moving(2, height, width)
    fitted = fit_clip(source, size)
    restored = restore_clip(fitted, fitted.fit, source)
    assert restored.size == source.size and restored.fit is None and restored.fps == source.fps
    assert difference(restored.frames, source.frames) < 12
    marked = restore_clip(Clip(np.full_like(fitted.frames, 255)), fitted.fit, source)
    changed = (marked.frames != source.frames).any(axis=(0, 3))
    kept = restore_clip(fitted, fitted.fit)
    assert changed.any(axis=1).sum() == kept.size[0] and changed.any(axis=0).sum() == kept.size[1]


def test_restoring_refuses_what_does_not_belong_together():
    fitted = fit_clip(moving(4), (32, 32))
    with pytest.raises(ClipError, match="cannot be undone"):
        restore_clip(moving(4), fitted.fit)
    with pytest.raises(ClipError, match="at least 4"):
        restore_clip(fitted, fitted.fit, moving(3))
    with pytest.raises(ClipError, match="source="):
        restore_clip(fitted, fitted.fit, fitted)


# reading


def test_the_rate_the_length_and_the_frames_of_a_file(video):
    clip = read_clip(video)
    assert (len(clip), clip.size, clip.fps, clip.start, clip.source) == (20, (48, 64), 10.0, 0.0, str(video))
    for span in ({"start": 1.5}, {"stop": 0.5}, {"start": 0.5, "stop": 1.0}):
        assert len(read_clip(video, **span)) == 5
    assert len(read_clip(video, max_frames=3)) == 3 and len(read_clip(video, stop=99)) == 20
    assert len(read_clip(video, stop=0.001)) == 1


@pytest.mark.parametrize("rate", ["24000/1001", "30", "25/3"])
def test_reading_from_any_frame_on_begins_with_that_frame(tmp_path, rate):
    path = make(tmp_path / "video.mp4", rate=rate, seconds=1)
    whole = read_clip(path)
    for index, within in ((1, 0), (2, 0), (5, 0.6), (7, 0.9)):  # at the beginning of a frame, and while it is shown
        part = read_clip(path, start=(index + within) / whole.fps, max_frames=2)
        assert np.array_equal(part.frames, whole.frames[index:index + 2]), (index, within)
        assert part.start == pytest.approx(index / whole.fps, abs=1e-4)


def test_another_rate_keeps_the_duration(video):
    for fps in (5, 8, 12.5, 30):
        clip = read_clip(video, fps=fps)
        assert clip.fps == fps and abs(clip.duration - 2.0) <= 0.5 / fps
    whole, half = read_clip(video), read_clip(video, fps=5)
    for index, frame in enumerate(half.frames):
        assert min(difference(frame, whole[2 * index]), difference(frame, whole[2 * index + 1])) < 1


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_a_rotated_phone_clip_is_upright(tmp_path, video, turn):
    path = tmp_path / "phone.mp4"
    ffmpeg("-display_rotation", turn, "-i", video, "-c", "copy", path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_clip(path)
    upright = np.rot90(read_clip(video).frames, turn // 90, axes=(1, 2))
    assert clip.size == upright.shape[1:3] and difference(clip.frames, upright) < 3


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = make(tmp_path / "wide.mp4", "-vf", "setsar=2")
    assert read_clip(path).size == (48, 128)


def test_a_variable_rate_becomes_constant_and_everything_happens_when_it_did(tmp_path):
    # two seconds: a black second at 5 fps, then a white one at 20 fps
    ffmpeg(
        "-f", "lavfi", "-i", "color=black:s=32x32:r=5:d=1", "-f", "lavfi", "-i", "color=white:s=32x32:r=20:d=1",
        "-filter_complex", "[0]settb=1/1000[a];[1]settb=1/1000[b];[a][b]concat=n=2,settb=1/1000",
        "-fps_mode", "vfr", "-enc_time_base", "1/1000", "-pix_fmt", "yuv420p", tmp_path / "variable.mp4",
    )
    for fps in (None, 10, 20):
        clip = read_clip(tmp_path / "variable.mp4", fps=fps)
        bright = clip.frames.mean(axis=(1, 2, 3)) > 127
        assert abs(clip.duration - 2.0) <= 0.2 + 1 / clip.fps, fps
        assert abs(bright.argmax() / clip.fps - 1.0) <= 1 / clip.fps, fps


def test_a_picture_that_begins_after_the_sound_stays_with_it(tmp_path, video):
    path = tmp_path / "late.mkv"
    ffmpeg("-itsoffset", 0.5, "-i", video, "-i", video, "-map", "0:v", "-map", "1:a", "-c", "copy", path)
    clip = read_clip(path)
    assert clip.start == pytest.approx(0.5, abs=0.03) and len(clip) == 20
    written = write_clip(tmp_path / "again.mp4", clip, audio_from=path)
    assert np.abs(np.abs(samples(written)).argmax() / 8000 - (1.1 - clip.start)) < 0.15


def test_one_frame_and_odd_sizes(tmp_path):
    one = read_clip(make(tmp_path / "one.mp4", "-frames:v", 1))
    assert len(one) == 1 and one.fps == 10.0
    odd = read_clip(make(tmp_path / "odd.mkv", "-vf", "crop=33:47:0:0:exact=1", "-pix_fmt", "yuv444p"))
    assert odd.size == (47, 33) and len(odd) == 20


def test_resizing_while_reading_is_the_same_as_after(video):
    reading, after = read_clip(video, size=(32, 32)), fit_clip(read_clip(video), (32, 32))
    assert np.array_equal(reading.frames, after.frames)
    assert reading.fit == after.fit == Fit((48, 64), (32, 43), (0, 5, 32, 32))


# files that are not what they should be


@pytest.mark.parametrize(
    "options, words",
    [
        ({"start": -1}, "start=-1"), ({"start": "a"}, "start='a'"), ({"start": float("nan")}, "start=nan"),
        ({"stop": 0}, "stop=0.*start=0"), ({"start": 1, "stop": 0.5}, r"stop=0\.5"),
        ({"fps": 0}, "fps=0"), ({"fps": -8}, "fps=-8"), ({"fps": float("inf")}, "fps=inf"),
        ({"max_frames": 0}, "max_frames=0"), ({"max_frames": 1.5}, r"max_frames=1\.5"),
    ],
)
def test_bad_arguments_are_named_before_the_file_is_looked_at(options, words):
    with pytest.raises(ClipError, match=words):
        read_clip("no such file.mp4", **options)


def test_no_such_file_a_folder_and_a_start_beyond_the_end(tmp_path, video):
    with pytest.raises(ClipError, match=r"no such file.*video\.mov.*there is video\.mp4"):
        read_clip(video.with_suffix(".mov"))
    with pytest.raises(ClipError, match="is a folder"):
        read_clip(tmp_path)
    with pytest.raises(ClipError, match=r"start=2.*lasts 2 s"):
        read_clip(video, start=2)


NOISE = np.random.default_rng(0).bytes(3000)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\0" * 5000, NOISE], ids=["empty", "text", "zeros", "noise"])
def test_a_file_that_is_not_a_video(tmp_path, content):
    path = tmp_path / "not.mp4"
    path.write_bytes(content)
    with pytest.raises(ClipError, match=r"not\.mp4 is not a video"):
        read_clip(path)


def test_a_download_that_broke_off_before_its_index(tmp_path):
    whole = make(tmp_path / "whole.mp4", sound=BEEP).read_bytes()
    path = tmp_path / "part.mp4"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ClipError, match="broke off"):
        read_clip(path)


def test_sound_without_picture_even_with_a_cover(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.mp4")
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64", "-frames:v", 1, tmp_path / "cover.png")
    ffmpeg("-i", tmp_path / "sound.mp4", "-i", tmp_path / "cover.png", "-map", 0, "-map", 1, "-c:v", "copy",
           "-disposition:v", "attached_pic", tmp_path / "song.m4a")
    with pytest.raises(ClipError, match="sound but no picture"):
        read_clip(tmp_path / "sound.mp4")
    with pytest.raises(ClipError, match="no frame"):
        read_clip(tmp_path / "song.m4a")


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_of_a_truncated_file_what_decodes_is_used(tmp_path, video, kind):
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    ffmpeg("-i", video, "-c", "copy", "-movflags", "+faststart", whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    with pytest.warns(UserWarning, match=rf"cut\.{kind} is damaged or incomplete: \d+ of 20 frames") as caught:
        clip = read_clip(cut)
    [message] = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert 2 <= len(clip) < 20 and f"{len(clip)} of 20" in message
    intact, sure = read_clip(whole).frames[: len(clip)], len(clip) - 4
    assert np.array_equal(clip.frames[:sure], intact[:sure])
    assert difference(clip.frames, intact) < 3  # the cut goes through a packet, and ffmpeg conceals what that lacks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_clip(cut, max_frames=2)) == 2


def test_sound_that_goes_on_after_the_picture_is_no_damage(tmp_path, video):
    path = tmp_path / "long.mp4"
    ffmpeg("-i", video, "-f", "lavfi", "-i", "sine=d=4", "-map", "0:v", "-map", "1:a", "-c:v", "copy", path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_clip(path)) == 20


# writing


@pytest.mark.parametrize(
    "fps, count", [(1, 2), (8, 1), (7.5, 7), (12.345, 7), (23.976, 2), (30000 / 1001, 7), (60, 7), (1 / 3, 2)]
)
def test_rate_length_and_duration_survive(tmp_path, fps, count):
    clip = moving(count, fps=fps)
    again = read_clip(write_clip(tmp_path / "a.mp4", clip))
    assert len(again) == count and again.fps == pytest.approx(fps, rel=1e-5)
    assert again.duration == pytest.approx(clip.duration, rel=1e-5)
    assert all(difference(one, other) < 3 for one, other in zip(clip.frames, again.frames))


@pytest.mark.parametrize("height, width", [(47, 64), (48, 63), (31, 33), (1, 1)])
def test_an_odd_side_grows_by_its_last_row_or_column(tmp_path, height, width):
    clip = moving(3, height, width) if height > 8 else Clip(np.full((3, height, width, 3), 90, np.uint8))
    again = read_clip(write_clip(tmp_path / "odd.mp4", clip))
    assert again.size == (height + height % 2, width + width % 2) and len(again) == 3
    assert difference(again.frames[:, :height, :width], clip.frames) < 4


def test_it_plays_everywhere_and_colours_stay(tmp_path):
    colours = [(0, 0, 0), (255, 255, 255), (200, 30, 30), (30, 200, 30), (30, 30, 200), (250, 200, 40)]
    colours = np.array(colours, np.uint8)
    clip = Clip(colours[:, None, None].repeat(32, axis=1).repeat(32, axis=2))
    path = write_clip(tmp_path / "colours.mp4", clip)
    seen = read_clip(path).frames.mean(axis=(1, 2))
    assert np.abs(seen - colours).max() <= 3
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    header = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], stderr=subprocess.PIPE, text=True).stderr
    assert "h264" in header and "yuv420p(tv, bt709" in header


def test_sound_is_aligned_and_cut(tmp_path, video):
    assert np.abs(samples(video)[8080:9400]).max() > 0.5 > 0.05 > np.abs(samples(video)[:7800]).max()
    part = read_clip(video, start=0.5, stop=1.5)[2:]
    sound = samples(write_clip(tmp_path / "part.mp4", part, audio_from=video))
    loud = np.flatnonzero(np.abs(sound) > 0.2) / 8000
    assert part.start == pytest.approx(0.7)
    assert loud.min() == pytest.approx(0.3, abs=0.03) and loud.max() == pytest.approx(0.5, abs=0.03)
    assert len(sound) / 8000 == pytest.approx(part.duration, abs=0.05)
    assert len(read_clip(tmp_path / "part.mp4")) == len(part)


def test_without_sound_to_copy_none_is_written_and_nothing_is_said(tmp_path, video, capfd):
    silent = make(tmp_path / "silent.mp4")
    for clip, source in ((moving(), silent), (Clip(moving().frames, start=50.0), video)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = write_clip(tmp_path / "a.mp4", clip, audio_from=source)
        assert len(read_clip(path)) == 6 and samples_or_none(path) is None
    assert capfd.readouterr().err == ""


def samples_or_none(path: Path) -> np.ndarray | None:
    header = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], stderr=subprocess.PIPE, text=True).stderr
    return samples(path) if "Audio:" in header else None


def test_a_gif_has_all_frames(tmp_path):
    again = read_clip(write_clip(tmp_path / "a.gif", moving(fps=10)))
    assert len(again) == 6 and again.fps == pytest.approx(10, rel=0.01) and again.size == (48, 64)
    assert difference(again.frames, moving().frames) < 8


def test_names_that_ffmpeg_would_misread(tmp_path):
    for name in ("-i.mp4", "50%d c:lip.mp4", "ünï 'q'.mp4"):
        assert len(read_clip(write_clip(tmp_path / name, moving(2)))) == 2


def test_folders_are_made_and_the_path_is_returned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_clip("new/folder/a.mp4", moving())
    assert path == Path("new/folder/a.mp4") and os.listdir(path.parent) == ["a.mp4"]


@pytest.mark.parametrize("name", ["a.avi", "a", ""])
def test_suffixes_that_are_not_written(tmp_path, name):
    with pytest.raises(ClipError, match=r"\.mp4 or \.gif"):
        write_clip(tmp_path / name, moving())
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ClipError, match=r"a\.mp4 cannot be written"):
        write_clip(tmp_path / "file" / "a.mp4", moving())
    with pytest.raises(ClipError, match="is a folder"):
        write_clip(tmp_path / "folder.mp4", moving())
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


@pytest.mark.parametrize("content, words", [(None, "audio_from=.*no such file"), (b"text", "not a video that ffmpeg")])
def test_sound_from_what_is_none_costs_only_the_sound(tmp_path, content, words):
    path, source = tmp_path / "a.mp4", tmp_path / "sound.mp3"
    if content:
        source.write_bytes(content)
    with pytest.warns(UserWarning, match=words):
        write_clip(path, moving(), audio_from=source)
    assert len(read_clip(path)) == 6


def test_when_the_encoder_fails_nothing_is_left_and_the_old_file_stays(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", moving(4))
    before = path.read_bytes()
    monkeypatch.setattr("tokenflow_nb.video.write.H264", "no such encoder")
    with pytest.raises(ClipError, match="cannot be written"):
        write_clip(path, moving(6))
    assert os.listdir(tmp_path) == ["a.mp4"] and path.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="no RLIMIT_FSIZE")
def test_a_full_disk_leaves_nothing_and_is_said(tmp_path):
    code = """
        import resource, sys, numpy as np
        from tokenflow_nb.clip import Clip, ClipError, write_clip
        noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            write_clip(sys.argv[1], Clip(noise))
        except ClipError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a.mp4")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "cannot be written" in result.stdout, result.stderr
    assert os.listdir(tmp_path) == []


# looking


def test_side_by_side_puts_clips_beside_each_other():
    one, other = moving(3), moving(3, width=32)
    both = side_by_side(one, other)
    assert both.size == (48, 96) and both.fps == one.fps
    assert np.array_equal(both.frames[:, :, :64], one.frames) and np.array_equal(both.frames[:, :, 64:], other.frames)
    for bad in ((), (one, moving(4)), (one, moving(3, height=40))):
        with pytest.raises(ClipError, match="side_by_side"):
            side_by_side(*bad)


def test_a_sheet_shows_first_and_last_frame_of_each_row():
    one, other = moving(9), Clip(255 - moving(5).frames)
    sheet = np.asarray(contact_sheet(one, other, columns=4))
    for clip, rows in ((one, slice(0, 48)), (other, slice(-48, None))):
        assert np.array_equal(sheet[rows, :64], clip[0]) and np.array_equal(sheet[rows, -64:], clip[-1])
    assert (sheet[:, 64:66] == 255).all()
    labelled = np.asarray(contact_sheet(one, other, columns=4, labels=["a <gold> star", "x" * 300]))
    assert np.array_equal(labelled[:, -sheet.shape[1]:], sheet) and (labelled[:48, :60] < 128).any()


def test_a_sheet_of_one_frame_and_bad_sheets():
    assert contact_sheet(moving(1)).size == (64, 48)
    one = moving()
    for clips, options in (((), {}), ((one, moving(width=32)), {}), ((one,), {"columns": 0}), ((one,), {"labels": []})):
        with pytest.raises(ClipError, match="contact_sheet"):
            contact_sheet(*clips, **options)
