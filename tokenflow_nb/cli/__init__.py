"The command `tokenflow_nb`."

from .command import main

__all__ = ["main"]
