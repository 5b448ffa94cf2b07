"""cluster.yaml as Ray reads it: its own validation, and its set-up on an EC2 that runs on loopback."""

import re
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.loader import load_function_or_class
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND

import uap_dist

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()
CONFIG = yaml.safe_load(TEXT)
LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """The configuration as `ray up` completes it: instance types, keys, networks, the security group; and a client of that EC2."""
    import boto3
    from moto.server import ThreadedMotoServer
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    server = ThreadedMotoServer(ip_address=LOOPBACK, port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes an SSH key there
        config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(CONFIG))
        yield AWSNodeProvider.bootstrap_config(config), boto3.client("ec2", region_name=CONFIG["provider"]["region"])
    server.stop()


def test_ray_takes_it_and_refuses_a_broken_one():
    validate_config(prepare_config(CONFIG))
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(prepare_config(CONFIG | {"idle_minutes": 5}))


def test_the_head_solves_nothing_and_nodes_come_as_they_are_asked_for(aws):
    types = aws[0]["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0 and types["head"]["max_workers"] == 0
    for name in ("gpu_spot", "gpu_on_demand"):
        assert types[name]["min_workers"] == 0 and types[name]["resources"]["GPU"] == 1
    assert 0 < CONFIG["idle_timeout_minutes"] <= 10


def test_nothing_but_ssh_is_open_to_the_world(aws):
    config, ec2 = aws
    groups = {
        group for type_ in config["available_node_types"].values() for group in type_["node_config"]["SecurityGroupIds"]
    }
    (group,) = ec2.describe_security_groups(GroupIds=list(groups))["SecurityGroups"]
    assert group["GroupName"] == CONFIG["provider"]["security_group"]["GroupName"]
    open_ports = [
        (rule["FromPort"], rule["ToPort"]) for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]
    ]
    assert open_ports == [(22, 22)]
    hosts = re.findall(r"--(?:dashboard-)?host[ =](\S+)", " ".join(CONFIG["head_start_ray_commands"]))
    assert hosts == [LOOPBACK, LOOPBACK] and "0.0.0.0" not in TEXT


def test_launched_nodes_are_what_their_types_say(aws):
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config, ec2 = aws
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])

    def launch(name):
        tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_LAUNCH_CONFIG: name}
        (node,) = provider.create_node(config["available_node_types"][name]["node_config"], tags, 1)
        return ec2.describe_instances(InstanceIds=[node])["Reservations"][0]["Instances"][0]

    with pytest.raises(NodeLaunchException, match="profile uap-dist-worker not found"):
        launch("gpu_spot")
    for profile in ("uap-dist-head", "uap-dist-worker"):
        boto3.client("iam", region_name="us-east-1").create_instance_profile(InstanceProfileName=profile)
    for name, market in (("gpu_spot", "spot"), ("gpu_on_demand", None), ("head", None)):
        instance = launch(name)
        assert instance.get("InstanceLifecycle") == market
        assert instance["InstanceType"] == config["available_node_types"][name]["node_config"]["InstanceType"]


def test_spot_nodes_come_first_and_on_demand_ones_while_there_are_none(aws):
    types, now = aws[0]["available_node_types"], time.time()
    tracker = NodeProviderAvailabilityTracker(timer=lambda: now)
    (name,) = re.findall(r"RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+)", TEXT)

    def launched(scorer):
        scorer = partial(scorer, node_availability_summary=tracker.summary())
        nodes, missing = get_nodes_for(types, {"head": 1}, "head", 4, [{"CPU": 1, "GPU": 1}] * 4, scorer)
        assert not missing
        return dict(nodes)

    assert launched(load_function_or_class(name)) == {"gpu_spot": 4}
    failure = NodeLaunchException("InsufficientInstanceCapacity", "no spot capacity", None)
    tracker.update_node_availability("gpu_spot", int(now), failure)
    assert launched(load_function_or_class(name)) == {"gpu_on_demand": 4}
    assert launched(_default_utilization_scorer) == {"gpu_spot": 4}, (
        "Ray now does this itself: uap_dist/fleet/spot.py can go"
    )
    now += 31 * 60
    assert launched(load_function_or_class(name)) == {"gpu_spot": 4}


def test_every_start_is_with_token_authentication_and_every_node_runs_the_built_version():
    starts = [
        command
        for key in ("head", "worker")
        for command in CONFIG[f"{key}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command.split("ray start")[0] for command in starts)
    wheel = f"uap_dist-{uap_dist.__version__}-py3-none-any.whl"
    assert CONFIG["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token", f"~/{wheel}": f"dist/{wheel}"}
    assert any(wheel in command for command in CONFIG["setup_commands"])
    assert set(re.findall(r"uap_dist-[\d.]+-py3", TEXT)) == {wheel.removesuffix("-none-any.whl")}


def test_the_documentation_lists_what_is_to_be_edited():
    (listed,) = re.findall(r"lines marked EDIT: (.*?)\.\n", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    marked = [line.split("#")[0] for line in TEXT.splitlines() if "# EDIT" in line]
    values = re.findall(r"`(\S+)`", listed)
    assert len(values) == len(marked) and all(value in line for value, line in zip(values, marked, strict=True))
