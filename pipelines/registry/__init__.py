"""Registry: register, list, describe, compare, promote, import and export models."""
