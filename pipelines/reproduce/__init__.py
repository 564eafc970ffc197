"""Reproduce: the tables and figures of the paper, from data to a page that compares them with it."""

from patchloom.pipelines.reproduce.reproducing import (
    ReproductionOptions,
    describe_reproduction,
    reproduce,
    reproduction_section,
)

__all__ = ["ReproductionOptions", "describe_reproduction", "reproduce", "reproduction_section"]
