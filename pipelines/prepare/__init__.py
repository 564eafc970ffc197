"""Prepare: images in, Arrow datasets of pixels or latents out."""

from patchloom.pipelines.prepare.preparing import prepare

__all__ = ["prepare"]
