"What TokenFlow is compared with: each method takes a `Job` and gives a clip."

from .compare import METHODS, Entry, compare, make_methods
from .external import external
from .job import Job, Method

__all__ = ["METHODS", "Entry", "Job", "Method", "compare", "external", "make_methods"]
