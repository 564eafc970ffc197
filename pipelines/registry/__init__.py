"""Registry: models as versions of registered names, described, compared, promoted, exported."""
