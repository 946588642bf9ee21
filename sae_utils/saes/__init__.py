"""SAE architectures, one a file, and their directories on disk."""
