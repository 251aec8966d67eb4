"What TokenFlow is compared with: each method takes a `Job` and gives a clip."

from .external import external
from .job import Job, Method
from .methods import METHODS, Entry, compare, make_methods

__all__ = ["METHODS", "Entry", "Job", "Method", "compare", "external", "make_methods"]
