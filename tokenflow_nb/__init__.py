import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks once, when it is imported: large tensors on the CPU lie in large pages

__version__ = "0.1.0"
