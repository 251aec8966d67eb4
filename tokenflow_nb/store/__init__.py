"Results that are expensive to make, kept on the disk under a digest of what they were made from."

from .digest import cache_home, digest
from .drafts import Draft, Writer
from .entries import Entry, StoreError, free_disk, in_bytes
from .store import Store

__all__ = ["Draft", "Entry", "Store", "StoreError", "Writer", "cache_home", "digest", "free_disk", "in_bytes"]
