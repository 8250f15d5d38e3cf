import copy
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from kuberay import FILES, cluster_of, groups, problems, templates
from ray_settings import unknown_to_ray

from bit_ray.cli.flags import parse
from bit_ray.cli.main import COMMANDS
from bit_ray.training.config import PretrainConfig

ROOT = FILES.parents[1]
Document = dict[str, Any]


def read(name: str) -> list[Document]:
    return list(yaml.safe_load_all((FILES / f"{name}.yaml").read_text()))


JOB, CLUSTER = read("rayjob")[0], read("raycluster")[0]
ACCESS = {document["kind"]: document for document in read("access")}
OURS = [JOB, CLUSTER]


@pytest.mark.parametrize("name", ["access", "raycluster", "rayjob"])
def test_a_file_is_what_kuberay_and_kubernetes_accept(name: str) -> None:
    assert [problem for document in read(name) for problem in problems(document)] == []


def worker(document: Document) -> Any:
    return cluster_of(document)["workerGroupSpecs"][0]


def container(document: Document) -> Any:
    return worker(document)["template"]["spec"]["containers"][0]


def head(document: Document) -> Any:
    return cluster_of(document)["headGroupSpec"]


BROKEN: dict[str, tuple[Document, Callable[[Document], object]]] = {
    "'ttlSeconds' was unexpected": (JOB, lambda d: d["spec"].update(ttlSeconds=1)),
    "'sidecar' is not one of": (JOB, lambda d: d["spec"].update(submissionMode="sidecar")),
    "'3' is not of type 'integer'": (JOB, lambda d: d["spec"].update(backoffLimit="3")),
    "'rayClusterSpec' is a required property": (JOB, lambda d: d["spec"].pop("rayClusterSpec")),
    "activeDeadlineSeconds: 0 is less": (JOB, lambda d: d["spec"].update(activeDeadlineSeconds=0)),
    "no DNS label of at most 47": (JOB, lambda d: d["metadata"].update(name="a" * 48)),
    "no DNS label of at most 53": (CLUSTER, lambda d: d["metadata"].update(name="Bit_Ray")),
    "'tokens' is not one of": (CLUSTER, lambda d: d["spec"].update(authOptions={"mode": "tokens"})),
    "needs a rayVersion from 2.52.0 on": (CLUSTER, lambda d: d["spec"].update(rayVersion="2.9.0")),
    "2.6 is not of type 'string'": (CLUSTER, lambda d: d["spec"].update(rayVersion=2.60)),
    "'maxReplicas' is a required property": (JOB, lambda d: worker(d).pop("maxReplicas")),
    "minReplicas is above maxReplicas": (JOB, lambda d: worker(d).update(minReplicas=9)),
    "resources are in rayStartParams too": (JOB, lambda d: head(d).update(rayStartParams={"num-cpus": "0"})),
    "0 is not of type 'string'": (JOB, lambda d: head(d).update(resources={"CPU": 0})),
    "labels belong beside": (JOB, lambda d: worker(d).update(rayStartParams={"labels": "a=b"})),
    "the operator sets block": (JOB, lambda d: worker(d).update(rayStartParams={"block": "true"})),
    "restartPolicy must be Never": (CLUSTER, lambda d: head(d)["template"]["spec"].update(restartPolicy="Always")),
    "none with SidecarMode": (JOB, lambda d: d["spec"].update(submitterPodTemplate={})),
    "needed for ttlSecondsAfterFinished": (JOB, lambda d: d["spec"].update(shutdownAfterJobFinishes=False)),
    "is there twice": (JOB, lambda d: container(d)["env"].extend(container(d)["env"])),
    "the operator sets the token": (
        CLUSTER,
        lambda d: container(d)["env"].append({"name": "RAY_AUTH_TOKEN", "value": "a"}),
    ),
    "is autoscalerOptions.version": (
        CLUSTER,
        lambda d: head(d)["template"]["spec"]["containers"][0]["env"].append(
            {"name": "RAY_enable_autoscaler_v2", "value": "1"}
        ),
    ),
    "the operator makes the probes": (JOB, lambda d: container(d).update(livenessProbe={"exec": {"command": ["a"]}})),
    "the operator makes /dev/shm": (
        JOB,
        lambda d: container(d)["volumeMounts"].append({"name": "cache", "mountPath": "/dev/shm"}),
    ),
    "'toleration' was unexpected": (JOB, lambda d: worker(d)["template"]["spec"].update(toleration=[])),
    "120 is not of type": (JOB, lambda d: container(d)["env"].append({"name": "A", "value": 120})),
    "'ingres' was unexpected": (
        ACCESS["NetworkPolicy"],
        lambda d: d["spec"].update(ingres=d["spec"].pop("ingress")),
    ),
    "'podSelecter' was unexpected": (
        ACCESS["NetworkPolicy"],
        lambda d: d["spec"]["ingress"][0]["from"][0].update(podSelecter={}),
    ),
    "'matchLabel' was unexpected": (
        ACCESS["NetworkPolicy"],
        lambda d: d["spec"]["podSelector"].update(matchLabel={}),
    ),
    "'annotation' was unexpected": (ACCESS["ServiceAccount"], lambda d: d["metadata"].update(annotation={})),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_copy_is_refused(problem: str) -> None:
    document, breakage = BROKEN[problem]
    document = copy.deepcopy(document)
    breakage(document)
    assert problem in "\n".join(problems(document))


# What would be accepted, and leave a cluster open, dear, or unable to go on: our own rules.


@pytest.mark.parametrize("document", OURS, ids=["job", "cluster"])
def test_who_has_no_token_is_refused(document: Document) -> None:
    assert cluster_of(document)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("document", OURS, ids=["job", "cluster"])
def test_an_image_is_named_by_its_digest_and_once_for_all_pods(document: Document) -> None:
    images = [c["image"] for pod in templates(document).values() for c in pod["spec"]["containers"]]
    assert len(set(images)) == 1
    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", images[0])
    name = "rayjob" if document is JOB else "raycluster"
    assert (FILES / f"{name}.yaml").read_text().count("@sha256:") == 1


@pytest.mark.parametrize("document", OURS, ids=["job", "cluster"])
def test_the_head_is_never_on_a_spot_node_and_trains_nothing(document: Document) -> None:
    cluster = groups(document)
    assert cluster["head"]["resources"] == {"CPU": "0"}
    assert "spot" not in str(cluster["head"]["template"]["spec"].get("nodeSelector", {}))
    assert "tolerations" not in cluster["head"]["template"]["spec"]


@pytest.mark.parametrize("document", OURS, ids=["job", "cluster"])
def test_spot_nodes_come_first_and_all_of_them_go_again(document: Document) -> None:
    workers = {name: group for name, group in groups(document).items() if name != "head"}
    (spot,) = (group for name, group in workers.items() if "spot" in name)
    assert all(spot["priority"] > group["priority"] for group in workers.values() if group is not spot)
    assert all(group["minReplicas"] == 0 and "replicas" not in group for group in workers.values())
    assert cluster_of(document)["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("document", OURS, ids=["job", "cluster"])
def test_a_pod_lives_longer_than_it_is_drained_and_its_disk_holds_the_cache(document: Document) -> None:
    for name, pod in templates(document).items():
        spec = pod["spec"]
        environment = {variable["name"]: variable["value"] for variable in spec["containers"][0].get("env", [])}
        if name != "head":
            drain = float(environment.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
            assert drain < spec["terminationGracePeriodSeconds"]
        resources = spec["containers"][0]["resources"]
        for volume in spec.get("volumes", []):
            assert gigabytes(volume["emptyDir"]["sizeLimit"]) < gigabytes(resources["requests"]["ephemeral-storage"])
        assert resources["limits"]["memory"] == resources["requests"]["memory"]


def gigabytes(quantity: str) -> float:
    return float(quantity.removesuffix("Gi")) * 1.073741824


@pytest.mark.parametrize("document", OURS, ids=["job", "cluster"])
def test_no_pod_is_root_or_holds_a_key(document: Document) -> None:
    for name, pod in templates(document).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False
        assert spec["serviceAccountName"] == ACCESS["ServiceAccount"]["metadata"]["name"]
        assert name == "head" or spec["automountServiceAccountToken"] is False
    text = yaml.safe_dump(document)
    assert not re.search(r"(?i)secret|password|access_key|credential", text)
    assert document["metadata"]["namespace"] == ACCESS["Namespace"]["metadata"]["name"]


def test_a_job_ends_whatever_happens() -> None:
    spec = JOB["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert spec["ttlSecondsAfterFinished"] <= 3600
    assert spec["backoffLimit"] > 0
    assert spec["submissionMode"] == "SidecarMode"


def test_the_jobs_command_is_one_of_bit_ray_and_fits_its_nodes() -> None:
    program, command, *flags = shlex.split(JOB["spec"]["entrypoint"])
    assert program == "bit-ray"
    config = parse(COMMANDS[command].config, flags, prog=f"bit-ray {command}")
    assert isinstance(config, PretrainConfig)
    workers = [group for name, group in groups(JOB).items() if name != "head"]
    limits = worker(JOB)["template"]["spec"]["containers"][0]["resources"]["limits"]
    per_node = int(limits["nvidia.com/gpu"])
    assert config.runtime.workers == (per_node, per_node * max(group["maxReplicas"] for group in workers))
    volume = worker(JOB)["template"]["spec"]["volumes"][0]
    assert config.runtime.cache.max_gb < gigabytes(volume["emptyDir"]["sizeLimit"])
    mounts = {mount["mountPath"] for mount in container(JOB)["volumeMounts"]}
    assert config.runtime.cache.directory in mounts
    assert config.shuffle.num_lanes >= config.runtime.workers[1]


@pytest.mark.parametrize("document", OURS, ids=["job", "cluster"])
def test_ray_knows_the_variables_and_the_image_has_that_ray(document: Document) -> None:
    names = set(re.findall(r"\bRAY_\w+", yaml.safe_dump(document)))
    assert len(names) >= 3
    assert unknown_to_ray(names) == set()
    lock = (ROOT / "clusters" / "container" / "requirements.lock").read_text()
    assert f"\nray=={cluster_of(document)['rayVersion']} " in lock


def test_only_rays_pods_and_the_operator_reach_ray() -> None:
    policy = ACCESS["NetworkPolicy"]["spec"]
    ours = {"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}
    assert policy["podSelector"] == ours["podSelector"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    inside, operator = policy["ingress"]
    assert inside == {"from": [ours]}
    assert len(operator["from"]) == 1  # both selectors of one peer: this pod of this namespace
    assert operator["from"][0].keys() == {"namespaceSelector", "podSelector"}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    for rule in policy["egress"][1:]:
        assert {port["port"] for port in rule["ports"]} <= {53, 443, 6443}
