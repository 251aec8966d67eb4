"Panels for a notebook: look at features, step through a denoising, edit a clip, compare clips."

from .compare import ComparePanel
from .denoise import DenoisePanel
from .edit import EditPanel
from .features import FeaturePanel
from .linked import link

__all__ = ["ComparePanel", "DenoisePanel", "EditPanel", "FeaturePanel", "link"]
