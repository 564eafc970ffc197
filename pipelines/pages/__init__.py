"""Pages: the HTML and the pictures that people look at."""
