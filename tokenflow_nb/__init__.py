import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors on the CPU in large pages; torch asks at its first tensor, which its imports make

__version__ = "0.1.0"
