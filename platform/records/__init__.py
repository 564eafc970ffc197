"""Records: the typed values that Patchloom writes to files and sends between processes."""
