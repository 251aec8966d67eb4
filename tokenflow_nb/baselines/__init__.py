"What TokenFlow is compared with."
