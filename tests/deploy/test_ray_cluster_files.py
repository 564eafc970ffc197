"""Cluster files of `ray up`: what Ray makes of them, and that their commands run."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import environment

ROOT = Path(__file__).parents[2]
FILES = {name: ROOT / name for name in ("ray_cluster.yaml", "deploy/gcp.yaml", "deploy/on_premise.yaml")}
CLOUD_FILES = ("ray_cluster.yaml", "deploy/gcp.yaml")
HOME_OF_WORKERS = "~/patchloom"


def prepared(name: str) -> dict[str, Any]:
    """A cluster file as Ray completes and validates it before `ray up` does anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(read(name)))
    validate_config(config)
    return dict(config)


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load(FILES[name].read_text()))


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_cluster_file_and_ignores_nothing(name: str) -> None:
    config = prepared(name)
    assert set(read(name)) <= set(config)  # Ray drops, for example, a min_workers at the top
    assert not {"head_node", "worker_nodes", "min_workers"} & set(read(name))
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", CLOUD_FILES)
def test_head_only_schedules_and_workers_start_from_zero(name: str) -> None:
    types = prepared(name)["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0 and types["head"]["max_workers"] == 0
    workers = {kind: config for kind, config in types.items() if kind != "head"}
    assert {config["min_workers"] for config in workers.values()} == {0}
    assert {config["max_workers"] for config in workers.values()} == {4}
    assert types["spot_worker"]["priority"] > types["on_demand_worker"]["priority"]


@pytest.mark.parametrize("name", FILES)
def test_nodes_get_the_wheel_and_the_token_but_no_data(name: str) -> None:
    mounts = read(name)["file_mounts"]
    assert mounts == {
        f"{HOME_OF_WORKERS}/dist": "dist",
        f"{HOME_OF_WORKERS}/node": "deploy/node",
        "~/.ray/auth_token": "~/.ray/auth_token",
    }
    assert {path.name for path in (ROOT / "deploy/node").iterdir()} == {"setup.sh", "drain.sh", "spot_notice.sh"}


@pytest.mark.parametrize("name", FILES)
def test_commands_use_neither_the_systems_pip_nor_ray_defaults(name: str) -> None:
    config = prepared(name)
    setup = [*config["setup_commands"], *config["head_setup_commands"], *config["worker_setup_commands"]]
    assert setup[0].startswith(f"bash {HOME_OF_WORKERS}/node/setup.sh ")
    assert not [command for command in setup if "pip" in command and "google-api-python-client" not in command]
    (head,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    (worker,) = [command for command in config["worker_start_ray_commands"] if "ray start" in command]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head and "--port=6379" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker


@pytest.fixture
def aws(s3: str, tmp_path: Path) -> Any:
    """The AWS file as `ray up` completes it against EC2 and IAM of the tests' server, with the two profiles made."""
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    with environment(HOME=str(tmp_path)):  # Ray writes an SSH key there
        iam, ec2 = boto3.client("iam"), boto3.client("ec2", region_name="us-west-2")
        for role in ("head", "worker"):
            make_profile(iam, role)
        config = prepared("ray_cluster.yaml")
        config["provider"]["region"] = "us-west-2"
        known = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        for kind in config["available_node_types"].values():
            kind["node_config"]["ImageId"] = known  # the test server does not look names up
        yield bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config)), ec2


def make_profile(iam: Any, role: str) -> None:
    """What docs/clusters.md does with the AWS client: a role with the policies of deploy/aws, and its profile."""
    name, folder = f"patchloom-{role}", ROOT / "deploy/aws"
    if name in {profile["InstanceProfileName"] for profile in iam.list_instance_profiles()["InstanceProfiles"]}:
        return
    iam.create_role(RoleName=name, AssumeRolePolicyDocument=(folder / "trust.json").read_text())
    for policy in {role, "worker"}:  # the head needs the store too
        document = (folder / f"{policy}.json").read_text().replace("BUCKET", "patchloom")
        iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=document)
    iam.create_instance_profile(InstanceProfileName=name)
    iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def test_aws_instances_start_with_profiles_spot_and_detected_gpus(aws: Any) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config, ec2 = aws
    types = config["available_node_types"]
    assert types["spot_worker"]["resources"]["CPU"] == 8 and types["spot_worker"]["resources"]["GPU"] == 1
    assert types["spot_worker"]["resources"]["accelerator_type:A10G"] == 1
    assert types["head"]["resources"]["CPU"] == 0
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind, node in types.items():
        tags = {"ray-node-type": "head" if kind == "head" else "worker", "ray-user-node-type": kind}
        (instance_id,) = provider.create_node(node["node_config"], tags, 1)
        (instance,) = ec2.describe_instances(InstanceIds=[instance_id])["Reservations"][0]["Instances"]
        profile = "patchloom-head" if kind == "head" else "patchloom-worker"
        assert instance["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
        assert instance.get("InstanceLifecycle") == ("spot" if kind == "spot_worker" else None)
        assert instance["InstanceType"] == ("m6i.xlarge" if kind == "head" else "g5.2xlarge")
    groups = {group for node in types.values() for group in node["node_config"]["SecurityGroupIds"]}
    (rules,) = [ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0] for group in groups]
    opened = {rule.get("FromPort") for rule in rules["IpPermissions"] if rule["IpRanges"]}
    assert opened == {22}  # everything else only inside the group


def test_aws_nodes_share_one_image_with_python_3_12() -> None:
    images = {node["node_config"]["ImageId"] for node in read("ray_cluster.yaml")["available_node_types"].values()}
    folder = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04"
    assert images == {f"resolve:ssm:{folder}/latest/ami-id"}


def test_aws_head_may_start_only_workers_with_the_workers_role() -> None:
    statements = json.loads((ROOT / "deploy/aws/head.json").read_text())["Statement"]
    (passed,) = [found["Resource"] for found in statements if found["Action"] == "iam:PassRole"]
    assert passed == "arn:aws:iam::*:role/patchloom-worker"
