"Films that tests compare."

import numpy as np

from tokenflow_nb.clip import read_clip


def same_film(path, frames: np.ndarray) -> bool:
    """Whether a film shows these frames. Not bit by bit: x264 has encoded the very same frames to other bytes, up to 15
    levels away, from one call to the next in one process (AVX512, with `threads=1`, too). Latents are compared exactly."""
    found = read_clip(path).frames.astype(int)
    return found.shape == frames.shape and np.abs(found - frames).mean() < 3
