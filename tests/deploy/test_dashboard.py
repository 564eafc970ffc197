"""The Grafana dashboard: valid panels, and queries that name only metrics which Patchloom or Ray define."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from patchloom.platform.compute.metrics import METRIC_DEFINITIONS, METRIC_LABELS

BOARD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "deploy/grafana/patchloom.json").read_text())
QUERIES = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", ())]
OWN = {name: metric for metric in METRIC_DEFINITIONS for name in metric.exported_names}


def with_values(query: str) -> str:
    """A query as Grafana sends it."""
    return query.replace("$cluster", ".*").replace("$run", ".*")


def selectors(query: str) -> Iterator[Any]:
    """The selectors of a query."""
    todo = [promql_parser.parse(with_values(query))]
    while todo:
        found = todo.pop()
        if isinstance(found, promql_parser.VectorSelector):
            yield found
        for part in ("expr", "lhs", "rhs", "vector_selector"):
            if (inner := getattr(found, part, None)) is not None:
                todo.append(inner)
        todo += list(getattr(found, "args", ()))


def metrics_of_ray() -> set[str]:
    """The names of the metrics of nodes, as Ray exports them."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    return {f"ray_{name}" for name in METRICS_GAUGES}


def test_dashboard_has_what_grafana_needs() -> None:
    assert BOARD["schemaVersion"] >= 36 and BOARD["uid"] == "patchloom" and BOARD["title"]
    assert [variable["name"] for variable in BOARD["templating"]["list"]] == ["datasource", "cluster", "run"]
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in BOARD["panels"] if panel["type"] != "row")


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in itertools.combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


@pytest.mark.parametrize("query", QUERIES)
def test_queries_name_metrics_that_exist(query: str) -> None:
    found = list(selectors(query))
    assert found
    for selector in found:
        assert selector.name in OWN or selector.name in metrics_of_ray(), selector.name
        if selector.name in OWN:
            labels = {matcher.name for matcher in selector.matchers.matchers} - {"ray_io_cluster"}
            assert labels <= {*METRIC_LABELS, *OWN[selector.name].labels}


def test_every_metric_is_shown() -> None:
    shown = {selector.name for query in QUERIES for selector in selectors(query)}
    assert [metric.name for metric in METRIC_DEFINITIONS if not shown & set(metric.exported_names)] == []


def test_metric_names_say_their_unit_and_belong_to_patchloom() -> None:
    names = [metric.name for metric in METRIC_DEFINITIONS]
    assert len(names) == len(set(names)) and all(
        name.startswith(("patchloom_train_", "patchloom_job_")) for name in names
    )
