"""Reproduce: the tables and figures of the paper, from data to a page that compares them with it."""

from patchloom.pipelines.reproduce.reproducing import (
    ReproductionOptions,
    reproduce,
    reproduction_plan,
    reproduction_section,
)

__all__ = ["ReproductionOptions", "reproduce", "reproduction_plan", "reproduction_section"]
