"""Films that were damaged: 200, seeded, of many containers. Reading happens in processes of their own, because what could go wrong is a crash or a hang.
Each film gives the frames of the whole one, a warning, or one line of refusal. Bits of a picture that no checksum covers may change unseen, but a frame
that is missing is always said."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

SEED, EACH = 11, 20
X264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "6"]
FILMS = {
    "a.mp4": [*X264, "-movflags", "+faststart"], "b.mkv": X264, "c.ts": X264, "d.flv": X264, "e.avi": X264, "f.gif": [], "g.webm": ["-c:v", "libvpx-vp9"],
    "h.mkv": ["-c:v", "ffv1", "-slicecrc", "1"], "i.apng": ["-plays", "0"], "j.mov": [*X264, "-movflags", "frag_keyframe+empty_moov"],
}
WORKER = """
    import json, sys, warnings
    from pathlib import Path
    import numpy as np
    from tokenflow_nb.clip import ClipError, read_clip

    whole = {path.name: read_clip(path).frames for path in Path(sys.argv[1]).iterdir()}
    for path in map(Path, sys.argv[2:]):
        print(json.dumps([path.name]), flush=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                frames = read_clip(path).frames
                found = ["read", bool(np.array_equal(frames, whole[path.parent.name])), len(frames) - len(whole[path.parent.name]), [str(each.message) for each in caught]]
            except ClipError as error:
                found = ["refused", str(error)]
        print(json.dumps([path.name, *found]), flush=True)
"""


def mutate(content: bytes, way: int, rng: np.random.Generator) -> bytes:
    "The same film with bits flipped, cut off, with another header, with a hole, with bytes left out."
    content, at = bytearray(content), int(rng.integers(len(content)))
    if way == 0:
        for place in rng.integers(0, len(content), int(rng.integers(1, 8))):
            content[place] ^= 1 << int(rng.integers(8))
    elif way == 1:
        del content[max(1, at):]
    elif way == 2:
        for place in rng.integers(0, min(300, len(content)), 3):
            content[place] = int(rng.integers(256))
    elif way == 3:
        content[at:at + 20] = bytes(len(content[at:at + 20]))
    else:
        del content[at:at + int(rng.integers(1, 60))]
    return bytes(content)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> tuple[Path, list[Path]]:
    "A folder of whole films, and the damaged ones."
    rng, (rows, columns) = np.random.default_rng(SEED), np.mgrid[:48, :64]
    scene = np.stack([np.stack([(columns * 4 + n * 5) % 256, (rows * 5) % 256, (columns + rows + n * 9) % 256], -1) for n in range(16)]).astype(np.uint8)
    home, damaged = tmp_path_factory.mktemp("mutated"), []
    (home / "whole").mkdir()
    for name, options in FILMS.items():
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x48", "-r", "24", "-i", "-", *options, str(home / "whole" / name)]
        subprocess.run(command, input=scene.tobytes(), check=True)
        (home / name).mkdir()
        for number in range(EACH):
            path = home / name / f"{number}-{name}"
            path.write_bytes(mutate((home / "whole" / name).read_bytes(), number % 5, rng))
            damaged.append(path)
    return home / "whole", damaged


def test_damaged_films_are_read_warned_of_or_refused(films, tmp_path):
    whole, damaged = films
    before = {path: path.read_bytes() for path in damaged}
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(WORKER), str(whole), *map(str, damaged)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"{lines[-1][0]} ended the process: {result.stderr[-2000:]}"
    found = {line[0]: line[1:] for line in lines if len(line) > 1}
    assert len(found) == len(damaged) == 200
    unseen = {}
    for name, (outcome, *what) in found.items():
        if outcome == "refused":
            assert "\n" not in what[0] and name in what[0]
        elif not what[0] and not what[2]:
            unseen[name] = what[1]
        else:
            assert len(what[2]) <= 1 and all("damaged or incomplete" in words for words in what[2])
    assert not any(unseen.values()), f"frames are missing, or there are more, and nothing is said: {unseen}"
    assert len(unseen) <= 30, "what no checksum covers"
    assert sum(outcome == "read" for outcome, *_ in found.values()) > 100
    assert os.listdir(tmp_path) == [] and all(path.read_bytes() == content for path, content in before.items())
    assert all(len(os.listdir(path.parent)) == EACH for path in damaged)
