"Edit a video by a prompt with an image diffusion model, and look at every value in between."

__version__ = "0.1.0"

_HOME = {  # of each public name; imported when it is first used, for torch and diffusers take seconds
    "edit_video": "edit", "stages": "edit", "Edit": "edit", "EditResult": "result",
    "EditConfig": "config", "Execution": "config",
    "Editor": "editors", "PlugAndPlay": "editors", "SDEdit": "editors",
    "Clip": "clip", "read_clip": "clip", "write_clip": "clip",
    "load_model": "backbones.load", "Store": "store", "plan": "forecast.plan",
    "EditPanel": "panels", "DenoisePanel": "panels", "FeaturePanel": "panels", "ComparePanel": "panels",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    from importlib import import_module

    if name in _HOME:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        return value
    from difflib import get_close_matches

    near = get_close_matches(name, _HOME, n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
