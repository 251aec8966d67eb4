"Results that are expensive to make, kept on the disk under a digest of what they were made from."

from .store import Draft, Entry, Store, StoreError, Writer, cache_home, digest, free_disk, in_bytes

__all__ = ["Draft", "Entry", "Store", "StoreError", "Writer", "cache_home", "digest", "free_disk", "in_bytes"]
