"""Pools of actors: every item gets its result, in this process or on Ray, also after an actor died."""

import os
import time
from pathlib import Path

import pytest
from squares import Number, Squares

from patchloom.platform.compute.actors import map_on_actors

NUMBERS = [Number(value) for value in range(6)]


def test_items_are_processed_here_without_ray_in_their_order() -> None:
    totals: list[int] = []
    pairs = list(map_on_actors(Squares, None, NUMBERS, 0, watch=totals.append))
    assert [item for item, _ in pairs] == NUMBERS
    assert [square.value for _, square in pairs] == [0, 1, 4, 9, 16, 25]
    assert {square.process for _, square in pairs} == {os.getpid()}
    assert totals == [0, 1, 3, 6, 10, 15]


def test_no_items_need_no_actors() -> None:
    assert list(map_on_actors(Squares, None, [], None)) == []


@pytest.mark.ray
def test_an_actor_that_dies_is_restarted_and_its_item_processed_again(tmp_path: Path) -> None:
    totals: list[int] = []
    squares = {}
    for item, square in map_on_actors(Squares, tmp_path / "died", NUMBERS, 2, watch=totals.append):
        squares[item.value] = square
        if len(squares) == len(NUMBERS):
            time.sleep(2.5)  # the total is read once per second
    assert (tmp_path / "died").exists()
    assert {value: square.value for value, square in squares.items()} == {n: n * n for n in range(6)}
    assert os.getpid() not in {square.process for square in squares.values()}
    assert totals[-1] == 15
