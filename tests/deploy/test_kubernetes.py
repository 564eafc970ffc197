"""Kubernetes manifests: the schemas of KubeRay and Kubernetes, and what Ray's autoscaler reads in them."""

import copy
import importlib
import json
import lzma
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "deploy/kubernetes"
CLUSTERS = ("cluster", "train", "nightly-raycronjob", "serve")
GRACE_S = 120


def read(name: str) -> dict[str, Any]:
    """A manifest, as kubectl reads it."""
    return dict(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """Definitions of KubeRay and Kubernetes, and which kind has which."""
    kuberay = yaml.safe_load((HERE / "kuberay_schema.yaml").read_text())
    kubernetes = json.loads(lzma.decompress((HERE / "kubernetes_schema.json.xz").read_bytes()))
    return {"kinds": kuberay["kinds"], "definitions": kuberay["definitions"] | kubernetes["definitions"]}


def check(manifest: dict[str, Any], schema: dict[str, Any]) -> None:
    """Raise ValidationError unless the API server of Kubernetes with KubeRay would accept a manifest."""
    kind = f"{manifest['apiVersion']}/{manifest['kind']}"
    own = {"v1/ConfigMap": "core.v1.ConfigMap", "batch/v1/CronJob": "batch.v1.CronJob"}
    if kind in own:
        root = {"$ref": f"#/definitions/io.k8s.api.{own[kind]}"}
    else:
        properties = {"metadata": {"$ref": "#/definitions/metadata"}, "spec": schema["kinds"][kind]}
        properties |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
        root = {"properties": properties, "required": ["metadata", "spec"], "additionalProperties": False}
    jsonschema.validate(manifest, root | {"definitions": schema["definitions"]})


def cluster_spec(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    spec = spec.get("jobTemplate", spec)
    return dict(spec.get("rayClusterSpec", spec.get("rayClusterConfig", spec)))


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.yaml"))])
def test_manifest_fits_the_schema(name: str, schema: dict[str, Any]) -> None:
    check(read(name), schema)


def test_schema_refuses_unknown_fields_in_jobs_and_pods(schema: dict[str, Any]) -> None:
    misspelt = read("train")
    misspelt["spec"]["backOffLimit"] = 3
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        check(misspelt, schema)
    misspelt = read("train")
    (worker,) = misspelt["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    worker["template"]["spec"]["terminationGraceSeconds"] = 5
    with pytest.raises(jsonschema.ValidationError, match="terminationGraceSeconds"):
        check(misspelt, schema)


def test_deletion_rules_in_the_comment_fit_the_schema(schema: dict[str, Any]) -> None:
    lines = (FOLDER / "train.yaml").read_text().splitlines()
    first = lines.index("  # deletionStrategy:")
    job = read("train")
    job["spec"] |= yaml.safe_load("\n".join(line.removeprefix("  # ") for line in lines[first : first + 6]))
    del job["spec"]["shutdownAfterJobFinishes"], job["spec"]["ttlSecondsAfterFinished"]
    assert len(job["spec"]["deletionStrategy"]["deletionRules"]) == 4
    check(job, schema)


@pytest.mark.parametrize("name", CLUSTERS)
def test_autoscaler_of_ray_starts_gpu_workers_from_zero(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = {"metadata": {"name": "patchloom", "namespace": "default"}, "spec": copy.deepcopy(cluster_spec(name))}
    config = _derive_autoscaling_config_from_ray_cr(resource)
    head, worker = (config["available_node_types"][kind] for kind in (config["head_node_type"], "gpu"))
    assert head["resources"]["CPU"] == 0 and "GPU" not in {key for key, value in head["resources"].items() if value}
    assert (worker["min_workers"], worker["max_workers"]) == (0, 4)
    assert (worker["resources"]["CPU"], worker["resources"]["GPU"]) == (8, 1)
    assert config["idle_timeout_minutes"] == 10


@pytest.mark.parametrize("name", CLUSTERS)
def test_nodes_have_the_token_time_for_a_checkpoint_and_no_secret_in_the_file(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token", "secretName": "patchloom-ray-token"}
    (group,) = spec["workerGroupSpecs"]
    for role, template in {"head": spec["headGroupSpec"]["template"], "worker": group["template"]}.items():
        pod = template["spec"]
        (container,) = pod["containers"]
        script, given_role, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert (script, given_role) == ("drain.sh", role)
        assert int(seconds) < pod["terminationGracePeriodSeconds"] == GRACE_S
        assert pod["securityContext"]["runAsNonRoot"] and pod["restartPolicy"] == "Never"
        assert container["envFrom"] == [{"secretRef": {"name": "patchloom-store", "optional": True}}]
        assert {"RAY_JOB_STOP_WAIT_TIME_S", "MLFLOW_TRACKING_URI"} == {entry["name"] for entry in container["env"]}


def test_all_manifests_describe_the_same_cluster() -> None:
    assert (
        cluster_spec("cluster") == cluster_spec("train") == cluster_spec("nightly-raycronjob") == cluster_spec("serve")
    )
    settings = read("settings")
    (worker,) = cluster_spec("cluster")["workerGroupSpecs"]
    address = worker["template"]["spec"]["containers"][0]["env"][1]["valueFrom"]["configMapKeyRef"]
    assert address == {"name": settings["metadata"]["name"], "key": next(iter(settings["data"]))}


def test_a_failed_training_job_is_tried_again_and_its_cluster_deleted() -> None:
    job = read("train")
    assert job["spec"]["backoffLimit"] == 3 and job["spec"]["entrypoint"].endswith(" --resume")
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # Kueue admits no other jobs
    for name in ("cluster", "train"):
        assert read(name)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


def test_serve_config_fits_the_schema_of_serve_and_the_arguments_of_the_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    from patchloom.pipelines.serve import app
    from patchloom.pipelines.serve.application import ServeArguments

    texts = ((FOLDER.parent / "serve.yaml").read_text(), read("serve")["spec"]["serveConfigV2"])
    own, kubernetes = (ServeDeploySchema.model_validate(yaml.safe_load(text)).applications[0] for text in texts)
    for application in (own, kubernetes):
        module, _, name = application.import_path.partition(":")
        assert getattr(importlib.import_module(module), name) is app
        assert ServeArguments.model_validate(application.args).max_replicas == 4
    assert kubernetes.args == own.args | {"num_cpus": 4, "num_gpus": 1}
