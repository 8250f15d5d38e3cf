"""The files of `ray up`: what Ray, EC2 and Compute Engine accept, and what we want of any cluster. No cloud is asked.

Every rule is tried on a file that breaks it.
"""

import copy
import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTERS = Path(__file__).resolve().parents[3] / "clusters"
Config = dict[str, Any]


def config_of(cloud: str) -> Config:
    return yaml.safe_load((CLUSTERS / cloud / "cluster.yaml").read_text())


def problems(config: Config) -> list[str]:
    """Return what is wrong with a launcher file."""
    try:
        full = prepare_config(copy.deepcopy(config))
        validate_config(full)
    except (ValueError, jsonschema.ValidationError) as error:
        return [f"Ray: {str(error).splitlines()[0]}"]
    check = {"AWS": aws_problems, "GCP": gcp_problems}[full["provider"]["module"].rpartition(".")[2]]
    found = [
        f"{name}: {problem}"
        for name, kind in full["available_node_types"].items()
        for problem in check(kind["node_config"])
    ]
    return found + our_problems(full)


def our_problems(full: Config) -> list[str]:
    """Return what Ray and the cloud would accept, and we do not."""
    kinds, provider = full["available_node_types"], full["provider"]
    head = kinds[full["head_node_type"]]
    spot = [k for k in kinds.values() if "SPOT" in json.dumps(k["node_config"]).upper()]
    others = [k for k in kinds.values() if k not in spot and k is not head]
    commands = full["head_start_ray_commands"] + full["worker_start_ray_commands"]
    environment = "\n".join(full["initialization_commands"])
    rules = {
        "stopped machines are kept, and paid for": provider.get("cache_stopped_nodes") is False,
        "machines have addresses outside": provider.get("use_internal_ips") is True,
        "the token is not brought": "~/.ray/auth_token" in full["file_mounts"].values(),
        "the token is not asked for": "RAY_AUTH_MODE=token" in environment,
        "others can read the token": any("chmod 600 ~/.ray/auth_token" in c for c in full["setup_commands"]),
        "the dashboard listens on all interfaces": "--dashboard-host=127.0.0.1" in " ".join(commands),
        "packages are not checked": any("--require-hashes" in c for c in full["setup_commands"]),
        "GPU machines stay when nothing runs": all(
            k["min_workers"] == 0 and k.get("idle_timeout_s") for k in spot + others
        ),
        "spot is not first": bool(spot and others)
        and min(k.get("priority", 0) for k in spot) > max(k.get("priority", 0) for k in others),
        "the head may be taken away": head not in spot,
        "tasks run on the head": head["resources"].get("CPU") == 0,
        "nobody listens for spot notices": any(
            "nohup python ~/bit_ray/spot_notifier.py" in c for c in full["worker_start_ray_commands"]
        ),
        "no core is left to Ray": all(k["resources"]["CPU"] < 48 for k in spot + others),
    }
    return [problem for problem, kept in rules.items() if not kept]


@cache
def shape_of(operation: str) -> Any:
    """What EC2's API accepts, from botocore."""
    return botocore.session.get_session().get_service_model("ec2").operation_model(operation).input_shape


def aws_problems(node: Config) -> list[str]:
    launch = {k: v for k, v in node.items() if k != "SubnetIds"}  # which Ray makes a SubnetId of
    report = ParamValidator().validate(launch | {"MinCount": 1, "MaxCount": 1}, shape_of("RunInstances"))
    disks = [disk["Ebs"] for disk in node.get("BlockDeviceMappings", [])]
    rules = {
        report.generate_report(): not report.has_errors(),
        "metadata without a token": node.get("MetadataOptions", {}).get("HttpTokens") == "required",
        "Ray would make a role that may do anything": "IamInstanceProfile" in node,
        "Ray would make a security group that is open for ssh": "SecurityGroupIds" in node,
        "a public subnet may be taken": "SubnetIds" in node,
        "disks are left behind, or not encrypted": all(d["DeleteOnTermination"] and d["Encrypted"] for d in disks),
    }
    return [problem for problem, kept in rules.items() if not kept]


@cache
def google_schema(service: str) -> Config:
    """What a Google API accepts, as a strict JSON schema, from the documents of its client."""
    spec = find_spec("googleapiclient")
    assert spec is not None
    assert spec.origin is not None
    document = json.loads((Path(spec.origin).parent / f"discovery_cache/documents/{service}.json").read_text())
    return {"definitions": {name: strict(schema) for name, schema in document["schemas"].items()}}


def strict(schema: Config) -> Config:
    if "$ref" in schema:
        return {"$ref": f"#/definitions/{schema['$ref']}"}
    result: Config = {"type": schema["type"]} if schema.get("type") != "any" else {}
    if "format" in schema and "int" in schema["format"]:
        result["type"] = ["string", "integer"]  # int64 is a string in JSON; numbers are taken as well
    if "enum" in schema:
        result["enum"] = schema["enum"]
    if "items" in schema:
        result["items"] = strict(schema["items"])
    if schema.get("type") == "object":
        result["properties"] = {name: strict(each) for name, each in schema.get("properties", {}).items()}
        extra = schema.get("additionalProperties")
        result["additionalProperties"] = strict(extra) if extra else False
    return result


def accepted_by_google(service: str, name: str, value: Any) -> list[str]:
    validator = jsonschema.Draft7Validator(google_schema(service) | {"$ref": f"#/definitions/{name}"})
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(value)]


def gcp_problems(node: Config) -> list[str]:
    interfaces = node.get("networkInterfaces", [])
    accounts = [account["email"] for account in node.get("serviceAccounts", [])]
    rules = {
        "Ray would choose a network, and give an address outside": bool(interfaces)
        and not any("accessConfigs" in interface for interface in interfaces),
        "Ray would make an account that may do anything": bool(accounts)
        and not any("compute@developer" in account for account in accounts),
        "a disk is left behind": all(disk.get("autoDelete") for disk in node.get("disks", [])),
        "no firewall rule names it": node.get("tags", {}).get("items") == ["bit-ray"],
    }
    return accepted_by_google("compute.v1", "Instance", node) + [p for p, kept in rules.items() if not kept]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_launcher_file_is_one_that_ray_the_cloud_and_we_accept(cloud: str) -> None:
    assert problems(config_of(cloud)) == []


def at(*path: Any, value: Any = None, drop: bool = False) -> Callable[[Config], None]:
    """Return what changes one place of a file."""

    def change(config: Config) -> None:
        inner: Any = config
        for key in path[:-1]:
            inner = inner[key]
        if drop:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value

    return change


SPOT, NODE = ("available_node_types", "gpu-spot"), ("available_node_types", "gpu-on-demand", "node_config")
BROKEN = [
    ("aws", at("max_worker", value=3), "Ray: Additional properties are not allowed"),
    ("aws", at(*SPOT, "max_worker", value=3), "Ray: Additional properties are not allowed"),
    ("aws", at(*SPOT, "resources", value={"CPU": 1.5, "GPU": 4}), "Ray: 1.5 is not "),
    ("aws", at("provider", "cache_stopped_nodes", value=True), "stopped machines are kept"),
    ("gcp", at("provider", "cache_stopped_nodes", drop=True), "stopped machines are kept"),
    ("aws", at("provider", "use_internal_ips", value=False), "machines have addresses outside"),
    ("aws", at("file_mounts", value={}), "the token is not brought"),
    ("gcp", at("initialization_commands", value=[]), "the token is not asked for"),
    ("gcp", at("setup_commands", value=[]), "others can read the token"),
    ("aws", at("head_start_ray_commands", value=["ray start --head"]), "the dashboard listens"),
    ("aws", at(*SPOT, "min_workers", value=1), "GPU machines stay"),
    ("aws", at(*SPOT, "idle_timeout_s", drop=True), "GPU machines stay"),
    ("gcp", at(*SPOT, "priority", value=0), "spot is not first"),
    ("aws", at("available_node_types", "head", "resources", value={"CPU": 4}), "tasks run on the head"),
    ("gcp", at("worker_start_ray_commands", value=["ray start"]), "nobody listens for spot notices"),
    ("aws", at(*SPOT, "resources", value={"CPU": 48, "GPU": 4}), "no core is left"),
    ("aws", at(*SPOT, "node_config", "InstanceMarketOptions", value={"MarketTyp": "spot"}), '"MarketTyp"'),
    ("aws", at(*NODE, "InstanceTyp", value="g6.xlarge"), 'in input: "InstanceTyp"'),
    ("aws", at(*NODE, "MetadataOptions", value={"HttpTokens": "optional"}), "metadata without a token"),
    ("aws", at(*NODE, "IamInstanceProfile", drop=True), "Ray would make a role"),
    ("aws", at(*NODE, "SecurityGroupIds", drop=True), "Ray would make a security group"),
    ("gcp", at(*NODE, "machineTyp", value="n2"), "'machineTyp' was unexpected"),
    ("gcp", at(*NODE, "scheduling", value=[{"preemptible": True}]), "is not of type 'object'"),
    ("gcp", at(*NODE, "scheduling", value={"provisioningModel": "CHEAP"}), "'CHEAP' is not one of"),
    ("gcp", at(*NODE, "networkInterfaces", 0, "accessConfigs", value=[{"name": "NAT"}]), "give an address outside"),
    ("gcp", at(*NODE, "serviceAccounts", drop=True), "Ray would make an account"),
]  # fmt: skip


@pytest.mark.parametrize(("cloud", "change", "problem"), BROKEN)
def test_a_launcher_file_with_a_mistake_is_found_out(
    cloud: str, change: Callable[[Config], None], problem: str
) -> None:
    config = copy.deepcopy(config_of(cloud))
    change(config)
    assert any(problem in found for found in problems(config)), problems(config)


# Roles and security groups


def statements(name: str) -> list[Config]:
    return json.loads((CLUSTERS / "aws" / name).read_text())["Statement"]


def listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


@cache
def actions_of_ec2() -> frozenset[str]:
    return frozenset(f"ec2:{name}" for name in botocore.session.get_session().get_service_model("ec2").operation_names)


def policy_problems(policy: list[Config]) -> list[str]:
    """Return where a role may more than it needs; RunInstances on other things than instances needs no tag."""
    found = []
    for statement in policy:
        resources, actions = listed(statement["Resource"]), listed(statement["Action"])
        for action in actions:
            reads = action.startswith("ec2:Describe")
            if set(statement) - {"Sid", "Effect", "Action", "Resource", "Condition"} or statement["Effect"] != "Allow":
                found.append(f"not understood: {statement}")
            if "*" in action or not action.startswith(("ec2:", "s3:", "iam:PassRole")):
                found.append(f"{action}: not one action")
            elif action.startswith("ec2:") and action not in actions_of_ec2():
                found.append(f"{action}: no action of EC2")
            if not reads and any(
                not resource.startswith("arn:aws:") or resource.endswith(":*") for resource in resources
            ):
                found.append(f"{action}: on everything")
            instances = any(":instance/" in resource for resource in resources)
            condition = json.dumps(statement.get("Condition", {}))
            if instances and "ray-cluster-name" not in condition and "ec2:CreateAction" not in condition:
                found.append(f"{action}: on machines that are not the cluster's")
            if action == "iam:PassRole" and ("PassedToService" not in condition or "*" in resources[0]):
                found.append(f"{action}: of any role, or to anything")
    return found


@pytest.mark.parametrize("name", ["head-role.json", "worker-role.json"])
def test_a_role_may_only_what_it_needs(name: str) -> None:
    policy = statements(name)
    assert policy_problems(policy) == []
    assert "*" not in json.dumps(statements("ec2-trust.json"))
    trust = statements("ec2-trust.json")[0]
    assert (trust["Principal"], trust["Action"]) == ({"Service": "ec2.amazonaws.com"}, "sts:AssumeRole")


@pytest.mark.parametrize(
    ("number", "change", "problem"),
    [
        (1, {"Action": "ec2:*"}, "not one action"),
        (1, {"Action": "ec2:RunInstance"}, "no action of EC2"),
        (1, {"Resource": "*"}, "on everything"),
        (1, {"Condition": {}}, "on machines that are not the cluster's"),
        (4, {"Condition": {}}, "ec2:TerminateInstances: on machines"),
        (5, {"Condition": {}}, "iam:PassRole: of any role"),
        (5, {"Resource": "arn:aws:iam::1:role/*"}, "iam:PassRole: of any role"),
        (0, {"NotAction": "x"}, "not understood"),
    ],
)
def test_a_role_that_may_more_is_found_out(number: int, change: Config, problem: str) -> None:
    policy = statements("head-role.json")
    policy[number] |= change
    assert any(problem in found for found in policy_problems(policy)), policy_problems(policy)


def ingress_problems(rules: list[Config]) -> list[str]:
    report = ParamValidator().validate({"IpPermissions": rules}, shape_of("AuthorizeSecurityGroupIngress"))
    found = [report.generate_report()] if report.has_errors() else []
    return found + [
        f"open: {key}" for rule in rules for key in ("IpRanges", "Ipv6Ranges", "PrefixListIds") if key in rule
    ]


def test_the_security_group_admits_the_cluster_alone() -> None:
    rules = json.loads((CLUSTERS / "aws/security-group.json").read_text())
    assert ingress_problems(rules) == []
    groups = {pair["GroupId"] for rule in rules for pair in rule["UserIdGroupPairs"]}
    nodes = [kind["node_config"] for kind in config_of("aws")["available_node_types"].values()]
    assert all(set(node["SecurityGroupIds"]) == groups for node in nodes)
    assert ingress_problems([rules[0] | {"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]) == ["open: IpRanges"]
    assert "UserIdGroupPair" in ingress_problems([{"IpProtocol": "-1", "UserIdGroupPair": []}])[0]


def test_googles_role_is_one_that_its_iam_accepts() -> None:
    role = yaml.safe_load((CLUSTERS / "gcp/head-role.yaml").read_text())
    assert accepted_by_google("iam.v1", "Role", role) == []
    assert accepted_by_google("iam.v1", "Role", role | {"permissions": []}) != []
    allowed = role["includedPermissions"]
    assert all(permission.startswith("compute.") for permission in allowed)
    assert not any(
        word in permission for permission in allowed for word in ("*", "setIamPolicy", "firewalls", "projects.")
    )
    assert {"compute.instances.create", "compute.instances.delete", "compute.subnetworks.use"} <= set(allowed)


def test_the_firewall_rules_of_the_page_admit_the_cluster_and_googles_proxy() -> None:
    page = (CLUSTERS / "gcp/README.md").read_text().replace("\\\n", " ")
    rules = [line for line in page.splitlines() if "firewall-rules create" in line]
    assert len(rules) == 2
    assert all("--target-tags bit-ray" in rule for rule in rules)
    assert "--source-tags bit-ray" in rules[0]
    assert "--source-ranges 35.235.240.0/20" in rules[1]
    assert "--rules tcp:22" in rules[1]
    assert "0.0.0.0/0" not in page
