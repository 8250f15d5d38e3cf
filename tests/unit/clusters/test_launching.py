"""The files of `ray up` with Ray's own code for the clouds, against an emulated EC2 and Compute Engine."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import moto
import pytest
import yaml
from botocore.awsrequest import AWSResponse
from google.auth.credentials import AnonymousCredentials
from googleapiclient import discovery
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.gcp import config as google
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2 import autoscaler
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply, NodeStatus

from bit_ray.cluster import launcher

CLUSTERS = Path(__file__).resolve().parents[3] / "clusters"
Config = dict[str, Any]
HEAD = {"ray-node-type": "head", "ray-node-name": "head", "ray-user-node-type": "head", "ray-node-status": "up-to-date"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("ray"), "disabled", True)


# EC2, as far as moto has it


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with moto.mock_aws():
        yield boto3.client("ec2", region_name="eu-west-1")


def aws_config(ec2: Any) -> Config:
    """The file as `ray up` completes it, in a network of its own."""
    network = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=network, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="bit-ray", Description="x", VpcId=network)["GroupId"]
    image = ec2.register_image(Name="ubuntu")["ImageId"]
    ec2.create_key_pair(KeyName="bit-ray")
    iam = boto3.client("iam")
    for role in ("bit-ray-head", "bit-ray-worker"):  # as the page says; moto's IAM parses the policies
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=(CLUSTERS / "aws/ec2-trust.json").read_text())
        for name in ("head-role", "worker-role"):
            policy = (CLUSTERS / f"aws/{name}.json").read_text()
            iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=policy)
        iam.create_instance_profile(InstanceProfileName=role)
        iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
    text = (CLUSTERS / "aws/cluster.yaml").read_text()
    for unset, value in (("subnet-SET-ME", subnet), ("sg-SET-ME", group), ("ami-SET-ME", image)):
        text = text.replace(unset, value)
    config: Config = bootstrap_aws(prepare_config(yaml.safe_load(text)))
    assert len(ec2.describe_security_groups(Filters=[{"Name": "vpc-id", "Values": [network]}])["SecurityGroups"]) == 2
    return config


def test_ray_launches_labels_and_ends_machines_with_the_heads_role(ec2: Any) -> None:
    """What is launched, and by which actions."""
    config = aws_config(ec2)
    kind = config["available_node_types"]["gpu-spot"]
    called: list[str] = []
    provider = launcher.AWS(config["provider"], "bit-ray")
    for resource in (provider.ec2, provider.ec2_fail_fast):
        resource.meta.client.meta.events.register(
            "before-call.ec2", lambda model, **_: called.append(f"ec2:{model.name}")
        )
    provider.create_node(kind["node_config"], {"ray-node-type": "worker"}, 1)
    nodes = provider.non_terminated_nodes({"ray-node-type": "worker"})
    assert len(nodes) == 1
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    [*machines] = (m for r in ec2.describe_instances(InstanceIds=nodes)["Reservations"] for m in r["Instances"])
    for machine in machines:
        assert machine["InstanceType"] == "g6.12xlarge"
        assert machine["InstanceLifecycle"] == "spot"
        assert machine["IamInstanceProfile"]["Arn"].endswith("/bit-ray-worker")
        assert [machine["SubnetId"]] == kind["node_config"]["SubnetIds"]
        assert [each["GroupId"] for each in machine["SecurityGroups"]] == kind["node_config"]["SecurityGroupIds"]
        assert {"Key": "ray-cluster-name", "Value": "bit-ray"} in machine["Tags"]
        assert "PublicIpAddress" not in machine
    provider.terminate_nodes(nodes)
    states = {
        m["State"]["Name"] for r in ec2.describe_instances(InstanceIds=nodes)["Reservations"] for m in r["Instances"]
    }
    assert states <= {"terminated", "shutting-down"}  # not stopped, with disks that cost
    assert {"ec2:RunInstances", "ec2:TerminateInstances", "ec2:DescribeInstances"} <= set(called)
    statements = json.loads((CLUSTERS / "aws/head-role.json").read_text())["Statement"]
    actions = [[s["Action"]] if isinstance(s["Action"], str) else s["Action"] for s in statements]
    assert set(called) <= {action for some in actions for action in some}


# Compute Engine: what Ray's code asks of it


class Google(BaseHTTPRequestHandler):
    """Has no spot machine, which it says as Google does: by an operation that fails."""

    machines: list[Config]
    asked: list[str]

    def do_GET(self) -> None:
        """Operations and machines."""
        if "/operations/" in self.path:
            failed = self.path.rpartition("/")[2].startswith("spot")
            error = {"error": {"errors": [{"code": "ZONE_RESOURCE_POOL_EXHAUSTED"}]}} if failed else {}
            self.answer({"status": "DONE", **error})
        else:
            self.answer({"items": self.machines})

    def do_POST(self) -> None:
        """A new machine."""
        machine = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = machine.get("scheduling", {}).get("provisioningModel", "")
        if machine["labels"]["ray-node-type"] == "worker":
            self.asked.append({"SPOT": "spot", "STANDARD": "on-demand"}[model])
        if model != "SPOT":
            self.machines.append({**machine, "status": "RUNNING"})
        self.answer({"name": model.lower() or "head"})

    def answer(self, value: Config) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def compute_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Google]]:
    class Handler(Google):
        machines, asked = [], []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    compute = discovery.build(
        "compute",
        "v1",
        credentials=AnonymousCredentials(),
        requestBuilder=google.build_request,
        client_options={"api_endpoint": f"http://127.0.0.1:{server.server_port}/"},
    )
    for name, client in (("_create_crm", None), ("_create_iam", None), ("_create_compute", compute)):
        monkeypatch.setattr(google, name, lambda client=client: client)
    yield Handler
    server.shutdown()
    server.server_close()


# What the autoscaler asks for when spot is refused

AT_ONCE = 5
"""Times that Ray's code for AWS asks before it counts a launch as refused; it is once for Google."""


class OneGpuWanted:
    """What the head says: it runs, and somewhere a GPU is asked for."""

    address = "127.0.0.1:1"

    def __init__(self) -> None:
        self.head = ""
        self._asked = 0

    def get_cluster_resource_state(self) -> bytes:
        reply, self._asked = GetClusterResourceStateReply(), self._asked + 1
        state = reply.cluster_resource_state
        state.cluster_resource_state_version = self._asked
        if self._asked > 1:  # the cloud has named the head by then
            state.node_states.add(
                node_id=b"1", instance_id=self.head, ray_node_type_name="head", status=NodeStatus.RUNNING
            )
        state.pending_resource_requests.add(count=1).request.resources_bundle["GPU"] = 1
        return reply.SerializeToString()


def autoscale(config: Config, folder: Path, asked: list[str], prepare: Callable[[Any], None] = lambda _: None) -> None:
    """Let Ray's autoscaler work by a cluster file until it has asked for a machine on demand, or again for spot."""
    config["provider"]["disable_node_updaters"] = True  # which would wait for ssh
    (folder / "key").touch()
    config["auth"]["ssh_private_key"] = str(folder / "key")
    file = folder / "cluster.json"
    file.write_text(json.dumps(config))
    wanted = OneGpuWanted()
    scaler = autoscaler.Autoscaler("test", FileConfigReader(str(file), skip_content_hash=True), wanted)
    provider = scaler._cloud_instance_provider.v1_provider
    provider.create_node(config["available_node_types"]["head"]["node_config"], HEAD, 1)
    [wanted.head] = provider.non_terminated_nodes({})
    prepare(provider)
    deadline = time.monotonic() + 60
    while "on-demand" not in asked and asked.count("spot") <= AT_ONCE and time.monotonic() < deadline:
        scaler.update_autoscaling_state()
        time.sleep(0.1)


def test_where_ec2_has_no_spot_machine_one_on_demand_is_asked_for(ec2: Any, tmp_path: Path) -> None:
    asked: list[str] = []

    def refuse_spot(params: Config, **_: Any) -> Any:
        spot = "InstanceMarketOptions" in json.dumps(params["body"])
        asked.append("spot" if spot else "on-demand")
        if not spot:
            return None
        answer = {"Error": {"Code": "InsufficientInstanceCapacity", "Message": "none"}}
        return AWSResponse("", 500, {}, None), answer | {"ResponseMetadata": {"HTTPStatusCode": 500}}

    def prepare(provider: Any) -> None:
        events = provider.ec2_fail_fast.meta.client.meta.events
        events.register("before-call.ec2.RunInstances", refuse_spot)

    autoscale(aws_config(ec2), tmp_path, asked, prepare)
    assert asked == ["spot"] * AT_ONCE + ["on-demand"]


def test_where_google_has_no_spot_machine_one_on_demand_is_asked_for(
    compute_engine: type[Google], tmp_path: Path
) -> None:
    config = prepare_config(yaml.safe_load((CLUSTERS / "gcp/cluster.yaml").read_text().replace("SET-ME", "set-me")))
    autoscale(config, tmp_path, compute_engine.asked)
    assert compute_engine.asked == ["spot", "on-demand"]
