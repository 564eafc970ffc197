"""Image names: which files of a source are inputs, by their name."""

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
HIDDEN_NAMES = ("__macosx", "thumbs.db", "desktop.ini")


def is_hidden(name: str) -> bool:
    """Whether a path is hidden, or one of the files that operating systems leave in folders."""
    return any(part.startswith(".") or part.lower() in HIDDEN_NAMES for part in name.split("/") if part != ".")


def is_image(name: str) -> bool:
    """Whether a file name is that of an image that can be read."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def name_ending(name: str) -> str:
    """The ending of a file name in lower case, with its dot, or `no ending`."""
    base, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot and base else "no ending"
