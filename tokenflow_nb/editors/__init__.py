"Image editors that an edit is made with: one file each. `register` adds another, from a file or from a cell."

from .base import Editor, Step, editors, identity, make_editor, options_of, register, short_names
from .controlnet import ControlNet
from .pnp import PlugAndPlay
from .sdedit import SDEdit

for _kind in (PlugAndPlay, SDEdit, ControlNet):
    register(_kind)

__all__ = [
    "ControlNet", "Editor", "PlugAndPlay", "SDEdit", "Step",
    "editors", "identity", "make_editor", "options_of", "register", "short_names",
]
