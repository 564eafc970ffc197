"""Files and folders, here or at a remote address, written whole or not at all."""
