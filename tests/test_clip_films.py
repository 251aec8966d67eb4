"""Films of many kinds, made by a ffmpeg of its own and read by ours: the value of a pixel says which frame it is.
What is tried is a kind, not a case: containers, codecs, orders of frames, starts, rates, colours, streams, damage, sources, sounds."""

import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tokenflow_nb.clip import Clip, ClipError, as_clip, fit_clip, read_clip, write_clip

COUNT = 40
RAMP = np.stack([np.full((64, 64, 3), 40 + 4 * number, np.uint8) for number in range(COUNT)])
RAW = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x64", "-r", "24", "-i", "-"]
X264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "4"]


def ffmpeg(*arguments: object, frames: np.ndarray | None = None) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=None if frames is None else frames.tobytes(), check=True, capture_output=True).stdout


def ramp(path: Path, *options: object, frames: np.ndarray = RAMP) -> Path:
    ffmpeg(*RAW, *options, path, frames=frames)
    return path


def numbers(clip: Clip) -> np.ndarray:
    "Which frames of the ramp these are."
    return (clip.frames[:, clip.size[0] // 2, clip.size[1] // 2].astype(float).mean(axis=-1) - 40) / 4


def quietly(*arguments, **options) -> Clip:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_clip(*arguments, **options)


# every container, every order of frames, every start


def kinds() -> dict[str, list]:
    found = {}
    for suffix in ("mp4", "mov", "mkv", "avi", "ts", "m2ts", "flv", "3gp", "m4v", "h264", "nut", "mxf", "asf"):
        for between, apart in ((0, 12), (3, 250), (2, 1)) if suffix in ("mp4", "mkv", "avi", "ts") else ((2, 12),):
            found[f"h264-{between}-{apart}.{suffix}"] = [*X264, "-bf", between, "-g", apart]
    for suffix in ("mp4", "mkv", "ts"):
        found[f"open-gop.{suffix}"] = [*X264, "-bf", 3, "-g", 12, "-x264-params", "open-gop=1"]
    for suffix in ("mpg", "vob", "ts", "mkv", "mxf", "mp4", "m2v", "avi"):
        found[f"mpeg2.{suffix}"] = ["-c:v", "mpeg2video", "-bf", 2, "-g", 12, "-q:v", 1]
    for suffix in ("avi", "mp4", "mkv", "mov"):
        found[f"mpeg4.{suffix}"] = ["-c:v", "mpeg4", "-bf", 2, "-q:v", 1]
    return found | {
        "hevc.mp4": ["-c:v", "libx265", "-crf", 5, "-x265-params", "log-level=0", "-pix_fmt", "yuv420p10le"],
        "hevc.ts": ["-c:v", "libx265", "-crf", 5, "-x265-params", "log-level=0", "-pix_fmt", "yuv420p"],
        "vp8.webm": ["-c:v", "libvpx", "-crf", 4, "-b:v", "2M", "-auto-alt-ref", 1, "-lag-in-frames", 16],
        "vp9.webm": ["-c:v", "libvpx-vp9", "-crf", 4, "-b:v", 0],
        "av1.webm": ["-c:v", "libsvtav1", "-crf", 5],
        "av1.mp4": ["-c:v", "libsvtav1", "-crf", 5],
        "theora.ogv": ["-c:v", "libtheora", "-q:v", 10],
        "wmv2.wmv": ["-c:v", "wmv2", "-q:v", 1],
        "flash.flv": ["-c:v", "flv", "-q:v", 1],
        "motion.avi": ["-c:v", "mjpeg", "-q:v", 1, "-pix_fmt", "yuvj420p"],
        "prores.mov": ["-c:v", "prores_ks", "-pix_fmt", "yuv422p10le"],
        "opaque.mov": ["-c:v", "prores_ks", "-profile:v", 4, "-pix_fmt", "yuva444p10le"],
        "ffv1.mkv": ["-c:v", "ffv1"],
        "animation.mov": ["-c:v", "qtrle"],
        "raw.avi": ["-c:v", "rawvideo", "-pix_fmt", "bgr24"],
        "raw.y4m": ["-pix_fmt", "yuv444p"],
        "moving.apng": ["-plays", 0],
        "moving.png": ["-f", "apng", "-plays", 0],
        "moving.webp": ["-c:v", "libwebp_anim", "-lossless", 1, "-loop", 0],
        "fragments.mp4": [*X264, "-g", 12, "-movflags", "frag_keyframe+empty_moov"],
    }


@pytest.mark.parametrize("name", kinds())
def test_frame_n_is_frame_n_in_every_container(tmp_path, name):
    path = ramp(tmp_path / name, *kinds()[name])
    whole = quietly(path)
    at = numbers(whole)
    shown = np.arange(len(whole)) * 24 / whole.fps  # a webp has whole milliseconds
    assert abs(len(whole) - COUNT * whole.fps / 24) <= 1 and whole.fps == pytest.approx(24, rel=0.03), (len(whole), whole.fps)
    assert at[0] < 0.4 and np.abs(at - shown).max() < 0.8, "frame n"
    for index in (1, 2, 13, 25, 30):
        part = quietly(path, start=index / whole.fps, max_frames=3)
        assert np.array_equal(part.frames, whole.frames[index:index + 3]), (index, numbers(part))
        assert part.start == pytest.approx(index / whole.fps, abs=2e-3)
    assert np.array_equal(quietly(path, fps=whole.fps / 3).frames, whole.frames[::3])
    assert np.array_equal(quietly(path, start=4 / whole.fps, fps=whole.fps / 2).frames, whole.frames[4::2])


def test_a_film_that_was_cut_out_of_another_has_its_first_frames(tmp_path):
    whole = ramp(tmp_path / "whole.mp4", *X264)
    for suffix in ("avi", "mkv", "mp4", "ts"):
        short = tmp_path / f"short.{suffix}"
        ffmpeg("-i", whole, "-frames:v", 25, "-c:v", "libx264", "-g", 10, short)
        clip = quietly(short)
        assert len(clip) == 25 and np.abs(numbers(clip) - np.arange(25)).max() < 0.8
    ffmpeg("-ss", 0.5, "-i", whole, "-c", "copy", tmp_path / "edit.mp4")  # from a key frame before, which an edit list hides
    assert numbers(quietly(tmp_path / "edit.mp4"))[0] == pytest.approx(12, abs=0.5)


def test_a_gif_has_its_first_frame_and_its_rate(tmp_path):
    grey = [Image.fromarray(frame) for frame in RAMP[:20]]
    path = tmp_path / "held.gif"
    grey[0].save(path, save_all=True, append_images=grey[1:], duration=[100] * 19 + [3000], loop=0)
    clip = quietly(path)
    assert clip.fps == 10 and [*numbers(clip)] == [*range(19)] + [19] * 30
    assert [*numbers(quietly(path, start=1.05, stop=1.25))] == [10, 11] and numbers(quietly(path, start=3))[0] == 19
    for kind, options in (("webp", dict(lossless=True)), ("png", {})):
        grey[0].save(tmp_path / f"held.{kind}", save_all=True, append_images=grey[1:], duration=[100] * 19 + [3000], loop=0, **options)
        assert np.array_equal(quietly(tmp_path / f"held.{kind}").frames, clip.frames), kind


# rates


@pytest.mark.parametrize("rate", ["24000/1001", "30000/1001", "25", "50", "60000/1001", "12.5", "1000"])
@pytest.mark.parametrize("suffix", ["mkv", "mp4", "avi"])
def test_rates_are_exact(tmp_path, rate, suffix):
    path = tmp_path / f"film.{suffix}"
    ffmpeg(*[rate if each == "24" else each for each in RAW], *X264, path, frames=RAMP)
    clip = quietly(path)
    assert clip.fps == float(Fraction(rate)) and np.abs(numbers(clip) - np.arange(COUNT)).max() < 0.8


def test_what_a_title_says_is_no_rate(tmp_path):
    ramp(tmp_path / "v.mp4", *X264)
    lies = "x frame_rate: 5/1 Duration: 00:00:01.00 Video: h264, 5 fps, 5 tbr pts_time:3 s:8x8 "
    ffmpeg("-i", tmp_path / "v.mp4", "-c", "copy", "-metadata", f"comment={lies}", "-metadata", f"title={lies}", tmp_path / "v.mkv")
    clip = quietly(tmp_path / "v.mkv")
    assert (clip.fps, len(clip), clip.size) == (24.0, COUNT, (64, 64))


@pytest.mark.parametrize("durations", [[100, 200, 50, 50, 300], [40] * 10 + [1000] + [40] * 5, [33, 34, 67, 33, 33, 100, 34]])
def test_a_variable_rate_loses_no_picture_and_keeps_the_times(tmp_path, durations):
    path = tmp_path / "variable.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=1000)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 64, "bgr0", Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        starts = np.cumsum([0, *durations[:-1]])
        for number, start in enumerate(starts):
            frame = av.VideoFrame.from_ndarray(RAMP[number], "rgb24")
            frame.pts, frame.time_base = int(start), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = quietly(path)
    at = numbers(clip).round().astype(int)
    assert {*at} == {*range(len(durations))}, clip.fps
    for number, start in enumerate(starts):
        assert abs([*at].index(number) / clip.fps - start / 1000) <= 0.55 / clip.fps, (clip.fps, number)
    assert clip.fps <= 31


def test_fps_is_a_slice_of_a_file_and_of_a_clip(tmp_path):
    path = ramp(tmp_path / "v.mp4", *X264)
    whole = quietly(path)
    assert [*numbers(quietly(path, fps=8)).round()] == [*range(0, COUNT, 3)]
    assert [*numbers(quietly(path, fps=48)).round()[:6]] == [0, 0, 1, 1, 2, 2] and len(quietly(path, fps=48)) == 2 * COUNT
    assert [*numbers(quietly(path, fps=8, start=5 / 24)).round()] == [*range(5, COUNT, 3)]
    for fps in (8, 10, 24, 48, Fraction(24000, 1001), np.float32(12)):
        assert np.array_equal(as_clip(whole, fps=fps).frames, quietly(path, fps=fps).frames), fps
        assert as_clip(whole, fps=fps).fps == pytest.approx(float(fps), rel=1e-6)
    assert as_clip(whole) is whole
    for fps in (0, "8", True, float("nan")):
        with pytest.raises(ClipError, match="fps="):
            as_clip(whole, fps=fps)


# colours


def pq(path: Path, colours: np.ndarray, transfer: str, *options: str) -> Path:
    "A film of ordinary colours, brought to HDR with white at 203 cd/m² by another program."
    ordinary = "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p16le,setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
    way = f"{ordinary},zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt2020:t={transfer}:m=bt2020nc:r=tv:npl=203,format=yuv420p10le"
    ffmpeg(*RAW, "-vf", way, "-c:v", "libx265", "-crf", 4, "-x265-params", "log-level=0", *options, path, frames=colours[:, None, None].repeat(64, 1).repeat(64, 2))
    return path


@pytest.mark.parametrize("transfer", ["smpte2084", "bt2020-10"])
def test_wide_and_bright_colours_look_as_on_a_screen(tmp_path, transfer):
    colours = np.array([(230, 230, 230), (200, 40, 40), (40, 160, 60), (30, 60, 200), (16, 16, 16)], np.uint8)
    path = pq(tmp_path / "hdr.mkv", colours, transfer)
    if transfer == "bt2020-10":
        clip = quietly(path)
    else:
        with pytest.warns(UserWarning, match=r"PQ \(HDR10\).*tone-mapped") as caught:
            clip = read_clip(path)
        assert len(caught) == 1
    assert np.abs(clip.frames[:, 32, 32].astype(int) - colours).max() <= 10, clip.frames[:, 32, 32]


def test_hlg_is_brought_to_a_screen(tmp_path):
    colours = np.array([(230, 230, 230), (128, 128, 128), (200, 40, 40)], np.uint8)
    path = pq(tmp_path / "hlg.mp4", colours, "arib-std-b67")
    with pytest.warns(UserWarning, match="HLG.*tone-mapped"):
        seen = read_clip(path).frames[:, 32, 32].astype(int)
    assert np.abs(seen - colours).max() <= 30 and np.ptp(seen[0]) <= 4, seen


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt2020nc"])
@pytest.mark.parametrize("reach", ["tv", "pc"])
def test_matrix_and_range_are_obeyed(tmp_path, matrix, reach):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 40, 40), (230, 230, 230), (0, 0, 0), (255, 255, 255)], np.uint8)
    way = f"scale=out_color_matrix={matrix.removesuffix('nc')}:out_range={reach},format=yuv420p,setparams=colorspace={matrix}:range={reach}"
    frames = colours[:, None, None].repeat(64, 1).repeat(64, 2)
    clip = quietly(ramp(tmp_path / "c.mkv", "-vf", way, "-c:v", "libx264", "-crf", 4, frames=frames))
    assert np.abs(clip.frames[:, 32, 32].astype(int) - colours).max() <= 4


@pytest.mark.parametrize("mark", ["colorspace=ycgco", "colorspace=ictcp", "color_trc=log100", "color_trc=smpte428"])
def test_colours_that_nobody_here_can_convert_are_refused(tmp_path, mark):
    path = ramp(tmp_path / "odd.mkv", "-vf", f"format=yuv420p,setparams={mark}", "-c:v", "libx264")
    with pytest.raises(ClipError, match=r"odd\.mkv stores colours that are not converted here.*BT\.709"):
        read_clip(path)


@pytest.mark.parametrize("kind, options", [
    ("mkv", ["-f", "lavfi", "-i", "sine=d=3", "-c:v", "copy"]), ("mp4", ["-f", "lavfi", "-i", "sine=d=1", "-c:v", "copy"]), ("mov", ["-c", "copy", "-timecode", "01:00:00:00"]),
    ("avi", ["-f", "lavfi", "-i", "sine=d=1", "-c:v", "copy", "-c:a", "mp2"]), ("ts", ["-f", "lavfi", "-i", "sine=d=1", "-c:v", "copy", "-c:a", "mp2"]),
    ("flv", ["-f", "lavfi", "-i", "sine=d=3", "-c:v", "copy", "-c:a", "aac"]), ("wmv", ["-f", "lavfi", "-i", "sine=d=3", "-c:v", "wmv2", "-q:v", "1"]),
    ("mkv", ["-i", "words.srt", "-c:v", "copy"]), ("mp4", ["-i", "words.srt", "-c:v", "copy", "-c:s", "mov_text"]), ("mkv", ["-c", "copy", "-live", "1"]),
    ("vob", ["-f", "lavfi", "-i", "sine=d=3", "-target", "pal-dvd", "-r", "25"]),
])
def test_a_clean_film_never_warns(tmp_path, kind, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words.srt").write_text("1\n00:00:00,200 --> 00:00:09,000\nhello\n")
    ramp(tmp_path / "ramp.mp4", *X264)
    ffmpeg("-i", "ramp.mp4", *options, f"film.{kind}")
    clip = quietly(f"film.{kind}")
    assert abs(len(clip) - COUNT) <= 2 and numbers(clip)[0] < 0.8 and numbers(clip)[-1] == pytest.approx(39, abs=0.8)


def transparent(path: Path) -> Path:
    "Red under a mask of which half is clear."
    if path.suffix in (".gif", ".png", ".webp"):
        picture = np.full((64, 64, 4), (200, 30, 30, 255), np.uint8)
        picture[:, 32:, 3] = 0
        frames = [Image.fromarray(np.roll(picture, shift, axis=0)) for shift in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, disposal=2) if path.suffix == ".gif" else frames[0].save(
            path, save_all=True, append_images=[Image.fromarray(np.roll(picture, 1, axis=1))], duration=100, lossless=True)
        return path
    codec = {".webm": ["libvpx-vp9", "-pix_fmt", "yuva420p"], ".mkv": ["libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", 0], ".mov": ["qtrle"]}[path.suffix]
    ffmpeg("-f", "lavfi", "-i", "color=0xc81e1e:s=64x64:r=10:d=0.5,format=rgba,geq=r=200:g=30:b=30:a='255*lt(X,32)'", "-c:v", *codec, path)
    return path


@pytest.mark.parametrize("suffix", ["gif", "webm", "mkv", "mov", "png", "webp"])
def test_transparency_is_refused_or_laid_on_a_background(tmp_path, suffix):
    path = transparent(tmp_path / f"clear.{suffix}")
    with pytest.raises(ClipError, match=r"clear\..*partly transparent.*background='white'"):
        read_clip(path)
    for colour, expected in (("white", 255), ("#0000ff", (0, 0, 255)), ((0, 255, 0), (0, 255, 0))):
        frame = as_clip(str(path), background=colour).frames[0].astype(int)
        assert np.abs(frame[:, 40:] - expected).max() <= 12 and np.abs(frame[:, :24] - (200, 30, 30)).max() <= 14
    with pytest.raises(ClipError, match="background='wite'"):
        read_clip(path, background="wite")


def test_transparency_of_an_array_is_laid_on_a_background():
    array = np.zeros((2, 8, 8, 4), np.uint8)
    with pytest.raises(ClipError, match="background='white'"):
        as_clip(array)
    assert (as_clip(array, background="white").frames == 255).all() and (as_clip(array / 255.0, background="red").frames[0, 0, 0] == (255, 0, 0)).all()


# streams, turns, fields


@pytest.mark.parametrize("turn, mirrored", [(0, "h"), (90, "h"), (180, ""), (-90, ""), (90, "v"), (0, "v")])
def test_turned_and_mirrored_films_are_upright(tmp_path, turn, mirrored):
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=0.3", *X264, tmp_path / "a.mp4")
    flip = [f"-display_{mirrored}flip"] if mirrored else []
    ffmpeg("-display_rotation", turn, *flip, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mp4")
    clip = quietly(tmp_path / "b.mp4")
    height, width = clip.size
    upright = np.frombuffer(ffmpeg("-i", tmp_path / "b.mp4", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"), np.uint8).reshape(-1, height, width, 3)
    assert clip.frames.shape == upright.shape and np.abs(clip.frames.astype(int) - upright).mean() < 3


def test_the_default_streams_are_taken_and_covers_are_not(tmp_path):
    ramp(tmp_path / "ramp.mp4", *X264)
    ffmpeg("-f", "lavfi", "-i", "color=white:s=32x32:r=24:d=1", "-frames:v", 1, tmp_path / "cover.png")
    ffmpeg("-f", "lavfi", "-i", "color=black:s=32x32:r=24:d=1.6", *X264, tmp_path / "black.mp4")
    ffmpeg("-i", tmp_path / "black.mp4", "-i", tmp_path / "ramp.mp4", "-map", "0:v", "-map", "1:v", "-c", "copy",
           "-disposition:v:0", 0, "-disposition:v:1", "default", tmp_path / "two.mkv")
    assert quietly(tmp_path / "two.mkv").size == (64, 64)
    ffmpeg("-i", tmp_path / "cover.png", "-i", tmp_path / "ramp.mp4", "-map", "0:v", "-map", "1:v", "-c", "copy",
           "-disposition:v:0", "attached_pic", tmp_path / "covered.mp4")
    assert quietly(tmp_path / "covered.mp4").size == (64, 64)


def test_the_sound_with_the_default_flag_is_taken(tmp_path):
    ramp(tmp_path / "ramp.mp4", *X264)
    ffmpeg("-i", tmp_path / "ramp.mp4", "-f", "lavfi", "-i", "anullsrc=d=1.6", "-f", "lavfi", "-i", "sine=d=1.6", "-map", "0:v", "-map", "1:a",
           "-map", "2:a", "-disposition:a:0", 0, "-disposition:a:1", "default", "-c:v", "copy", tmp_path / "two.mkv")
    path = write_clip(tmp_path / "out.mp4", quietly(tmp_path / "two.mkv"), audio_from=tmp_path / "two.mkv")
    assert np.abs(sound(path)).max() > 0.05


@pytest.mark.parametrize("suffix, codec", [("ts", ["libx264", "-flags", "+ilme+ildct"]), ("mpg", ["mpeg2video", "-q:v", 1, "-flags", "+ilme+ildct"])])
def test_interlaced_films_are_not_combed(tmp_path, suffix, codec):
    ffmpeg("-f", "lavfi", "-i", "color=black:s=128x64:r=50:d=1,drawbox=x=0:y=0:w=20:h=64:c=white:t=fill", "-vf",
           "scroll=horizontal=-0.05,interlace=scan=tff,setfield=tff", "-c:v", *codec, "-pix_fmt", "yuv420p", tmp_path / f"film.{suffix}")
    clip = quietly(tmp_path / f"film.{suffix}")
    rows = clip.frames[5:-2, 4:-4, :, 0].astype(int)
    assert len(clip) == 25 and np.abs(rows[:, 1:] - rows[:, :-1]).mean() < 1, "two lines that follow each other differ where it is combed"


def test_a_change_of_the_format_in_the_middle_loses_no_frame(tmp_path):
    for number, kind in enumerate(["yuv420p", "yuv444p"]):
        ramp(tmp_path / f"{number}.h264", "-c:v", "libx264", "-pix_fmt", kind, "-crf", 4, frames=RAMP[20 * number:20 * (number + 1)])
    (tmp_path / "both.h264").write_bytes(b"".join((tmp_path / f"{number}.h264").read_bytes() for number in (0, 1)))
    clip = read_clip(tmp_path / "both.h264")
    assert len(clip) == COUNT and np.abs(numbers(clip) - np.arange(COUNT)).max() < 0.8


@pytest.mark.filterwarnings("ignore:.*is damaged")  # where the parts meet
def test_a_change_of_the_size_is_scaled_or_refused(tmp_path):
    parts = {}
    for size in ("64x64", "32x32", "64x32"):
        ffmpeg("-f", "lavfi", "-i", f"testsrc2=s={size}:r=10:d=1", *X264, tmp_path / f"{size}.ts")
        parts[size] = (tmp_path / f"{size}.ts").read_bytes()
    (tmp_path / "scaled.ts").write_bytes(parts["64x64"] + parts["32x32"])
    (tmp_path / "squashed.ts").write_bytes(parts["64x64"] + parts["64x32"])
    assert read_clip(tmp_path / "scaled.ts").frames.shape == (20, 64, 64, 3)
    with pytest.raises(ClipError, match="changes its shape.*64×64.*32×64.*stop="):
        read_clip(tmp_path / "squashed.ts")
    assert len(read_clip(tmp_path / "squashed.ts", stop=0.9)) == 9


# what must not be read


@pytest.mark.parametrize("text, kind", [
    ("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.ts\n#EXT-X-ENDLIST\n", "playlist"),
    ("ffconcat version 1.0\nfile secret.ts\n", "concat|list"),
    ('<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>', "DASH"),
    ("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n", "sdp"),
    ("[playlist]\nFile1=secret.ts\n", "playlist"),
], ids=["hls", "concat", "dash", "sdp", "pls"])
@pytest.mark.parametrize("suffix", ["mp4", "m3u8"])
def test_lists_of_other_files_are_refused_by_name(tmp_path, text, kind, suffix):
    ramp(tmp_path / "secret.ts", *X264)
    path = tmp_path / f"list.{suffix}"
    path.write_text(text)
    with pytest.raises(ClipError, match=rf"list\.{suffix}.*(«.*({kind})|not a video)") as caught:
        read_clip(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [
    "https://example.org/a.mp4", "http://example.org/a.mp4?x=1", "rtsp://camera/1", "s3://bucket/a.mp4", "gs://bucket/a.mp4", "ftp://host/a.mp4",
    "https://www.youtube.com/watch?v=abc", "youtu.be/abc", "concat:a.mp4|b.mp4", "subfile,,start,0,end,9,,:a.mp4", "data:video/mp4;base64,AAAA", "pipe:0", "cache:a.mp4",
])
def test_addresses_and_protocols_are_refused_in_one_line(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (given, f" '{given}' "):
        with pytest.raises(ClipError) as caught:
            read_clip(source)
        assert "\n" not in str(caught.value)
        if "://" in given or given.startswith("you"):
            assert any(tool in str(caught.value) for tool in ("curl", "yt-dlp", "aws s3", "gcloud", "ffmpeg -i")), caught.value


def test_what_is_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    side = (16000).to_bytes(2, "little")
    (tmp_path / "bomb.gif").write_bytes(b"GIF89a" + side * 2 + b"\x80\0\0\0\0\0\xff\xff\xff," + b"\0" * 4 + side * 2 + b"\0\x02\x02D\x01\0;")
    with pytest.raises(ClipError, match=r"bomb\.gif"):
        read_clip(tmp_path / "bomb.gif")
    path = ramp(tmp_path / "v.mp4", *X264)
    for size in ((64, 10**6), (10**6, 64), (16000, 16000)):
        with pytest.raises(ClipError, match="size="):
            read_clip(path, size=size)
        with pytest.raises(ClipError, match="size="):
            fit_clip(Clip(RAMP), size)
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=5 << 20))
    with pytest.raises(ClipError, match=r"40 frames of 512×512 .*max_frames=.*TMPDIR"):
        read_clip(path, size=(512, 512))
    assert len(read_clip(path, size=(512, 512), max_frames=4)) == 4


def test_a_gap_of_hours_is_refused_with_what_helps(tmp_path):
    path = ramp(tmp_path / "gap.mkv", "-vf", "setpts='PTS+gte(N,20)*36000/TB'", "-fps_mode", "passthrough", *X264)
    with pytest.raises(ClipError, match=r"holds 40 pictures for 3600\d s.*max_frames="):
        read_clip(path)
    assert [*numbers(read_clip(path, max_frames=30)).round()] == [*range(20)] + [19] * 10
    assert len(read_clip(path, stop=1.0)) == 24


# damage


def damaged(tmp_path: Path, name: str, *options: object, keep: float = 0.6, frames: np.ndarray = RAMP) -> tuple[Clip, Path]:
    whole = ramp(tmp_path / f"whole-{name}", *options, frames=frames)
    content = whole.read_bytes()
    (tmp_path / name).write_bytes(content[:int(len(content) * keep)])
    return quietly(whole), tmp_path / name


NOISY = np.random.default_rng(0).integers(0, 255, (COUNT, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("keep", [0.4, 0.9])
@pytest.mark.parametrize("name, options", {
    "cut.gif": [], "cut.mkv": X264, "cut.webm": ["-c:v", "libvpx-vp9"], "cut.ts": X264, "cut.mp4": [*X264, "-movflags", "+faststart"],
    "cut.flv": X264, "cut.avi": X264, "cut.mov": ["-c:v", "qtrle", "-movflags", "+faststart"], "cut.mpg": ["-c:v", "mpeg2video", "-q:v", "1", "-r", "25"],
}.items())
def test_a_film_that_is_cut_off_is_warned_of_once(tmp_path, name, options, keep):
    whole, path = damaged(tmp_path, name, *options, keep=keep, frames=NOISY)
    says_how_many = name.endswith((".webm", ".mp4", ".flv", ".avi", ".mov"))  # the others cannot be told from shorter films by their count
    found = r"\d+ of \d+ frames" if says_how_many else r"\d+ frames"
    with pytest.warns(UserWarning, match=rf"{name} is damaged or incomplete: {found} could be read, and are used \(.+\)") as caught:
        clip = read_clip(path)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert 1 <= len(clip) < len(whole) and np.abs(clip.frames[:-3].astype(int) - whole.frames[:len(clip) - 3]).mean() < 12


def test_the_log_of_the_process_is_as_it_was(tmp_path):
    _, path = damaged(tmp_path, "cut.mkv", *X264)
    for level in (None, av.logging.ERROR):
        av.logging.set_level(level)
        with pytest.warns(UserWarning, match="damaged"):
            read_clip(path)
        assert av.logging.get_level() == level and av.logging.get_skip_repeated()
    av.logging.set_level(None)


def test_threads_hear_of_their_own_film_only(tmp_path):
    _, bad = damaged(tmp_path, "cut.mkv", *X264)
    good, said = tmp_path / "whole-cut.mkv", []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=lambda path=path: said.append(len(read_clip(path)))) for path in [bad, good] * 4]
        [thread.start() for thread in threads], [thread.join(60) for thread in threads]
    assert not any(thread.is_alive() for thread in threads) and sorted(said)[4:] == [COUNT] * 4
    assert all("cut.mkv is damaged" in str(each.message) and "whole" not in Path(str(each.message).split(" is ")[0]).name for each in caught)
    assert av.logging.get_level() is None


# sources


def pictures(folder: Path, count: int = 12, suffix: str = ".png") -> Path:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(RAMP[number]).save(folder / f"frame{number}{suffix}")
    return folder


def test_a_folder_a_pattern_and_a_list_of_pictures(tmp_path):
    folder = pictures(tmp_path / "frames")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".DS_Store").write_bytes(b"\0")
    inside = [folder / f"frame{number}.png" for number in range(12)]
    for source in (folder, str(folder), str(folder / "frame*.png"), inside, [str(path) for path in inside], [Image.open(path) for path in inside]):
        clip = as_clip(source)
        assert [*numbers(clip)] == [*range(12)] and clip.fps == 8, source
    assert read_clip(folder, fps=12).fps == 12 and [*numbers(read_clip(folder, start=0.5, max_frames=3))] == [4, 5, 6]
    assert [*numbers(as_clip(inside[::-1]))] == [*range(11, -1, -1)], "a list is taken in its order"
    assert read_clip(folder, size=(32, 32)).size == (32, 32) and len(as_clip(inside[0])) == 1


def test_pictures_that_do_not_fit_are_named(tmp_path):
    folder = pictures(tmp_path / "frames", 3)
    Image.new("RGB", (8, 8)).save(folder / "frame10.png")
    with pytest.raises(ClipError, match=r"frame10\.png has 8×8 pixels.*64×64"):
        read_clip(folder)
    (folder / "frame10.png").write_text("no picture")
    with pytest.raises(ClipError, match=r"frame10\.png is no picture"):
        read_clip(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipError, match="folder without pictures"):
        read_clip(tmp_path / "empty")
    with pytest.raises(ClipError, match="no file matches"):
        read_clip(tmp_path / "*.jpg")
    with pytest.raises(ClipError, match=r"frame\*\.png"):
        read_clip(folder / "frame%02d.png")


def test_pictures_of_many_kinds(tmp_path):
    deep = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.abs(read_clip(tmp_path / "deep.png").frames[0, ..., 0].astype(float) - deep / 257).max() <= 0.51
    side = Image.fromarray(np.arange(32 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 64, 3))
    exif = side.getexif()
    exif[0x0112] = 6
    side.save(tmp_path / "turned.png", exif=exif)
    assert read_clip(tmp_path / "turned.png").size == (64, 32)
    for mode in ("L", "1", "P", "CMYK", "YCbCr"):
        path = tmp_path / f"{mode}.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}"
        Image.fromarray(RAMP[20]).convert(mode).save(path)
        assert read_clip(path).frames.shape == (1, 64, 64, 3)
    with pytest.raises(ClipError, match="background="):
        Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "clear.png")
        read_clip(tmp_path / "clear.png")
    assert (read_clip(tmp_path / "clear.png", background="white").frames == 255).all()


def test_a_picture_whose_name_is_a_pattern_is_one_picture(tmp_path):
    pictures(tmp_path / "frames", 3)
    for name in ("frame%d.png", "frame[0-9].png", "frame*.png"):
        Image.fromarray(RAMP[30]).save(tmp_path / "frames" / name)
        assert [*numbers(read_clip(tmp_path / "frames" / name))] == [30]


def test_pasted_paths(tmp_path, monkeypatch):
    film = ramp(tmp_path / "my film (1).mp4", *X264)
    pasted = [f'"{film}"', f"'{film}'", f"  {film}\n", f"\u202a{film}\u202c", film.as_uri(), str(film).replace(" ", "\\ ").replace("(", "\\(").replace(")", "\\)"), f"“{film}”", os.fsencode(film)]
    for given in pasted:
        assert len(read_clip(given, max_frames=2)) == 2, given
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read_clip("~/my film (1).mp4", max_frames=2)) == 2
    odd = film.rename(tmp_path / "'quoted'.mp4")
    assert len(read_clip(odd, max_frames=2)) == 2, "a name that is there is taken as it is"
    for given in ("", "  ", '""', "a\0b.mp4"):
        with pytest.raises(ClipError, match="names no file"):
            read_clip(given)


def test_open_files_are_read_and_bytes_are_refused_with_the_way(tmp_path):
    import io

    film = ramp(tmp_path / "film.mp4", *X264)
    with film.open("rb") as file:
        assert len(as_clip(file)) == COUNT
    for source in (film.read_bytes(), io.BytesIO(film.read_bytes())):
        with pytest.raises(ClipError, match=r"write it to a file first.*write_bytes"):
            as_clip(source)


def test_special_files_do_not_hang(tmp_path):
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.mp4")
        with pytest.raises(ClipError, match="pipe"):
            read_clip(tmp_path / "pipe.mp4")


@pytest.mark.parametrize("dtype, most, remedy", [
    (np.uint16, 65535, "array / 65535"), (np.uint16, 1020, "array / 1023"), (np.uint16, 4080, "array / 4095"), (np.int64, 255, r"array.astype('uint8')"),
    (np.uint16, 255, r"array.astype('uint8')"), (np.int32, 255, r"array.astype('uint8')"), (bool, 1, "array.astype('uint8') * 255"),
])
def test_the_remedy_for_an_array_is_executed_and_does_not_ruin_it(dtype, most, remedy):
    array = (np.linspace(0, 1, 384).reshape(2, 8, 8, 3) * most).astype(dtype)
    with pytest.raises(ClipError, match="dtype") as caught:
        as_clip(array)
    assert remedy in str(caught.value)
    clip = as_clip(eval(remedy, {"array": array}))
    assert np.abs(clip.frames / 255 - array.astype(float) / most).max() < 0.01


def test_numpy_numbers_are_numbers(tmp_path):
    path = ramp(tmp_path / "v.mp4", *X264)
    clip = read_clip(path, start=np.float32(0.5), stop=np.float64(1), fps=np.int64(12), size=(np.int64(32), np.int32(32)), max_frames=np.int64(4))
    assert (len(clip), clip.fps, clip.size) == (4, 12.0, (32, 32))
    assert type(Clip(RAMP, np.float32(8)).fps) is float and Clip(RAMP, Fraction(25, 2)).fps == 12.5


# sound


def sound(path: Path) -> np.ndarray:
    return np.frombuffer(ffmpeg("-i", path, "-vn", "-f", "f32le", "-ac", 1, "-ar", 8000, "-"), np.float32)


@pytest.mark.parametrize("options, name", [
    (["-ac", 1], "a.wav"), (["-ac", 6], "a.wav"), (["-ac", 8], "a.wav"), (["-ac", 16], "a.wav"), (["-ac", 3], "a.flac"), (["-ar", 5512], "a.wav"),
    (["-ar", 192000], "a.wav"), ([], "a.mp3"), ([], "a.ogg"), ([], "a.m4a"), (["-c:a", "pcm_u8"], "a.wav"), (["-c:a", "libopus"], "a.mkv"), (["-c:a", "ac3"], "a.ac3"),
    (["-c:a", "pcm_f64le"], "a.mov"),
])
def test_sound_of_any_kind_goes_with_the_picture(tmp_path, options, name):
    beep = "aevalsrc='if(between(t,0.5,0.8),0.6*sin(2*PI*440*t),0)':s=44100:d=1.6"
    ffmpeg("-f", "lavfi", "-i", beep, *options, tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_clip(tmp_path / "out.mp4", Clip(RAMP, 24.0), audio_from=tmp_path / name)
    loud = np.flatnonzero(np.abs(sound(path)) > 0.15) / 8000
    assert loud.min() == pytest.approx(0.5, abs=0.04) and loud.max() == pytest.approx(0.8, abs=0.04)
    assert len(quietly(path)) == COUNT


def test_the_picture_is_written_when_the_sound_cannot_be(tmp_path):
    (tmp_path / "text.mp3").write_text("no sound")
    tone = tmp_path / "tone.mp3"
    ffmpeg("-f", "lavfi", "-i", "sine=d=2", tone)
    (tmp_path / "list.mp3").write_text("#EXTM3U\ntone.mp3\n")
    for source in (tmp_path / "gone.mp4", tmp_path / "text.mp3", tmp_path / "list.mp3", tmp_path, "https://example.org/a.mp4"):
        with pytest.warns(UserWarning, match="sound") as caught:
            path = write_clip(tmp_path / "out" / "a.mp4", Clip(RAMP, 24.0), audio_from=source)
        assert len(caught) == 1 and len(quietly(path)) == COUNT and os.listdir(path.parent) == ["a.mp4"]
        path.unlink()


def test_an_encoder_of_sound_that_fails_costs_only_the_sound(tmp_path, monkeypatch):
    ffmpeg("-f", "lavfi", "-i", "sine=d=2", tmp_path / "tone.wav")

    def fails(*arguments):
        yield from ()
        raise av.error.InvalidDataError(1094995529, "no such sound")

    monkeypatch.setattr("tokenflow_nb.video.write.sound_frames", fails)
    with pytest.warns(UserWarning, match="sound of .*tone.wav cannot be written, the picture is without it .*no such sound"):
        path = write_clip(tmp_path / "a.mp4", Clip(RAMP, 24.0), audio_from=tmp_path / "tone.wav")
    assert len(quietly(path)) == COUNT


# writing and showing


def test_a_killed_write_is_cleaned_up_by_the_next(tmp_path):
    program = """
        import sys, numpy as np
        from tokenflow_nb.clip import Clip, write_clip
        noise = np.random.default_rng(0).integers(0, 255, (4000, 128, 128, 3), np.uint8)
        print("begins", flush=True)
        write_clip(sys.argv[1], Clip(noise))
    """
    path = tmp_path / "a.mp4"
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while not [*tmp_path.glob(".*")] and process.poll() is None:
            time.sleep(0.01)
        [part] = tmp_path.glob(".*")
        write_clip(tmp_path / "b.mp4", Clip(RAMP))
        assert part.exists(), "its writer lives"
        process.kill()
    assert not path.exists()
    write_clip(tmp_path / "c.mp4", Clip(RAMP))
    assert sorted(os.listdir(tmp_path)) == ["b.mp4", "c.mp4"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    class Interrupted(np.ndarray):
        def __iter__(self):
            yield np.asarray(self[0])
            raise KeyboardInterrupt

    clip = Clip(RAMP)
    object.__setattr__(clip, "frames", RAMP.view(Interrupted))
    for name in ("a.mp4", "a.gif"):
        with pytest.raises(KeyboardInterrupt):
            write_clip(tmp_path / name, clip)
        assert os.listdir(tmp_path) == []


def test_showing_a_clip_holds_a_few_frames(tmp_path):
    program = """
        import resource, numpy as np
        from tokenflow_nb.clip import Clip
        frames = np.broadcast_to(np.arange(1920, dtype=np.uint8)[:, None], (60, 1080, 1920, 3))
        Clip(frames[:1], 30.0)._repr_html_()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        html = Clip(frames, 30.0)._repr_html_()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, 'aspect-ratio:569/392' in html)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300)
    megabytes, is_small = result.stdout.split()
    assert int(megabytes) < 120 and is_small == "True", result.stdout + result.stderr


def test_reading_a_long_film_holds_a_few_frames(tmp_path):
    path = tmp_path / "long.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=640x480:r=30:d=10", "-c:v", "libx264", "-preset", "ultrafast", path)
    program = """
        import resource, sys
        from tokenflow_nb.clip import read_clip
        read_clip(sys.argv[1], max_frames=30)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        clip = read_clip(sys.argv[1], size=(64, 64))
        print(len(clip), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
    """
    count, megabytes = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(path)], capture_output=True, text=True, timeout=300).stdout.split()
    assert count == "300" and int(megabytes) < 60
