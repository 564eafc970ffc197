"""The doctor of a cluster: every node is checked, and what fails or differs is named by node."""

from dataclasses import replace
from pathlib import Path

import pytest

from patchloom.errors import UserError
from patchloom.pipelines.doctor.cluster import NodeState, _problems, check_nodes, nodes_text
from patchloom.platform.compute.nodes import NodeResult, ask_nodes

STATE = NodeState(dict.fromkeys(("python", "torch", "ray", "mlflow", "patchloom", "code"), "1"), 2, [], 2, 0, 100.0)


@pytest.mark.ray
def test_healthy_cluster_has_no_problem(s3: str) -> None:
    health = check_nodes(store=f"{s3}/doctor")
    assert health.works and len(health.nodes) == 1
    (state,) = health.nodes.values()
    assert state.cpus > 0 and state.ray_cpus > 0 and state.ray_gpus == 0 and len(state.versions["code"]) == 8
    shown = nodes_text(health)
    assert next(iter(health.nodes)) in shown and f"store: {health.store}" in shown and "?" not in str(health.store)


@pytest.mark.ray
def test_services_that_a_node_cannot_use_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        check_nodes(store=str(tmp_path / "file" / "store"))
    health = check_nodes()
    ((problem,),) = health.problems.values()
    assert not health.works and "127.0.0.1:9" in problem


@pytest.mark.ray
def test_node_without_the_function_has_a_problem() -> None:
    def broken(question: str) -> str:
        raise ValueError(f"not {question}")

    (result,) = ask_nodes(broken, "here")
    assert result.answer is None and result.problem and "not here" in result.problem
    (result,) = ask_nodes(str.upper, "here")
    assert result.answer == "HERE" and abs(result.clock_offset_s or 0) < 1


@pytest.mark.parametrize(
    ("changes", "offset", "named"),
    [
        ({"versions": {**STATE.versions, "torch": "2"}}, 0.0, "torch"),
        ({"versions": {**STATE.versions, "code": "2"}}, 0.0, "code"),
        ({"problems": ["store"]}, 0.0, "store"),
        ({}, 9.0, "9.0 s"),
    ],
)
def test_what_differs_from_most_nodes_is_a_problem(changes: dict[str, object], offset: float, named: str) -> None:
    states = {"a": STATE, "b": STATE, "c": replace(STATE, **changes)}  # type: ignore[arg-type]
    assert _problems(NodeResult("a", STATE, None, 0.1), states) == []
    (problem,) = _problems(NodeResult("c", states["c"], None, offset), states)
    assert named in problem
