"What a machine makes of each preset: seconds, memory and quality, in a table."

from .machine import Bench, bench
from .presets import PRESETS, Preset

__all__ = ["PRESETS", "Bench", "Preset", "bench"]
