"""What KubeRay 1.7 accepts: the fields that our files use, the operator's own rules, and Kubernetes' schema of pods.

Strict: a field that is not here is refused, and is added when a file needs it. The published definitions say the same;
`python tests/kuberay.py --crds FOLDER` checks the files against them, with FOLDER from KubeRay's repository
(``ray-operator/config/crd/bases``).
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.34"
FILES = Path(__file__).resolve().parents[1] / "clusters" / "kuberay"


def record(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": {name.rstrip("_"): schema for name, schema in properties.items()},
    }


TEXT = {"type": "string"}
NUMBER = {"type": "integer"}
FLAG = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object"}  # checked as a PodTemplate of Kubernetes
METADATA = record("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
CLUSTER = record(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=record(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=record(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=NUMBER,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources={"type": "object"},
        env={"type": "array"},
    ),
    headGroupSpec=record("template", template=POD, resources=TEXTS, labels=TEXTS, rayStartParams=TEXTS),
    workerGroupSpecs={
        "type": "array",
        "items": record(
            "groupName minReplicas maxReplicas template",
            groupName=TEXT,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            priority=NUMBER,
            idleTimeoutSeconds=NUMBER,
            numOfHosts=NUMBER,
            resources=TEXTS,
            labels=TEXTS,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)
JOB = record(
    "rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit={"type": "integer", "minimum": 0},
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
    suspend=FLAG,
    entrypointNumCpus={"type": "number"},
    runtimeEnvYAML=TEXT,
    submitterPodTemplate=POD,
    rayClusterSpec=CLUSTER,
)
KINDS = {
    kind: record(
        "apiVersion kind metadata spec", apiVersion={"const": "ray.io/v1"}, kind=TEXT, metadata=METADATA, spec=spec
    )
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB))
}
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47}


def problems(document: dict[str, Any]) -> Iterator[str]:
    """Say what is wrong with one document, of KubeRay or of Kubernetes."""
    kind = document.get("kind")
    if kind not in KINDS:
        yield from _kubernetes(document, "")
        return
    errors = list(jsonschema.Draft202012Validator(KINDS[kind]).iter_errors(document))
    yield from (f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors)
    if not errors:
        yield from _operator_rules(document)
        for place, template in templates(document).items():
            yield from _kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "template": template}, f"{place}: ")
            yield from _repeated(place, template)


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """Return the cluster's part of a RayJob or RayCluster."""
    spec: dict[str, Any] = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def groups(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the head's and the workers' groups by name."""
    cluster = cluster_of(document)
    workers = {group["groupName"]: group for group in cluster.get("workerGroupSpecs", [])}
    return {"head": cluster["headGroupSpec"], **workers}


def templates(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pods of each group."""
    return {name: group["template"] for name, group in groups(document).items()}


def _kubernetes(document: dict[str, Any], place: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{place}{'.'.join(map(str, error.path))}: {error.message}"


def _repeated(place: str, template: dict[str, Any]) -> Iterator[str]:
    """Names in lists that Kubernetes takes as keys."""
    lists = [template["spec"].get("containers", []), template["spec"].get("volumes", [])]
    lists += [container.get("env", []) for container in template["spec"].get("containers", [])]
    for items in lists:
        names = [item.get("name") for item in items]
        yield from (f"{place}: {name} is there twice" for name in sorted(set(names)) if names.count(name) > 1)


def _operator_rules(document: dict[str, Any]) -> Iterator[str]:
    """What the operator refuses, and what it does not say: `validation.go` and `pod.go` of KubeRay 1.7."""
    kind, name, spec, cluster = document["kind"], document["metadata"]["name"], document["spec"], cluster_of(document)
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST_NAME[kind]:
        yield f"metadata.name: {name} is no DNS label of at most {LONGEST_NAME[kind]} characters"
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = re.fullmatch(r"(\d+)\.(\d+)\.\d+", cluster.get("rayVersion", ""))
        if not version or (int(version[1]), int(version[2])) < (2, 52):
            yield "authOptions.mode: token needs a rayVersion from 2.52.0 on"
    scaling, version_2 = (
        cluster.get("enableInTreeAutoscaling"),
        cluster.get("autoscalerOptions", {}).get("version") == "v2",
    )
    for place, group in groups(document).items():
        params = group.get("rayStartParams", {})
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & params.keys():
            yield f"{place}: resources are in rayStartParams too"
        if "labels" in params:
            yield f"{place}: labels belong beside rayStartParams"
        if "block" in params:
            yield f"{place}: the operator sets block"
        pod = group["template"]["spec"]
        if (version_2 or spec.get("submissionMode") == "SidecarMode") and pod.get("restartPolicy", "Never") != "Never":
            yield f"{place}: restartPolicy must be Never"
        if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
            yield f"{place}: minReplicas is above maxReplicas"
        for container in pod.get("containers", []):
            set_ = {variable["name"] for variable in container.get("env", [])}
            if scaling and "RAY_enable_autoscaler_v2" in set_:
                yield f"{place}: RAY_enable_autoscaler_v2 is autoscalerOptions.version"
            if set_ & {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ADDRESS"}:
                yield f"{place}: the operator sets the token and the address"
            if {"livenessProbe", "readinessProbe"} & container.keys():
                yield f"{place}: the operator makes the probes"
        if any(
            mount["mountPath"] == "/dev/shm" for c in pod.get("containers", []) for mount in c.get("volumeMounts", [])
        ):
            yield f"{place}: the operator makes /dev/shm"
    if kind == "RayJob":
        if spec.get("submissionMode") == "SidecarMode" and "submitterPodTemplate" in spec:
            yield "submitterPodTemplate: none with SidecarMode"
        ends = spec.get("shutdownAfterJobFinishes")
        if not ends and (spec.get("ttlSecondsAfterFinished") or spec.get("suspend")):
            yield "shutdownAfterJobFinishes: needed for ttlSecondsAfterFinished, suspend and Kueue"


def check_published(files: list[Path], folder: Path) -> int:
    """Check files against KubeRay's published definitions, print what is wrong, and return the number of problems."""
    number = 0
    for path in files:
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] not in KINDS:
                continue
            definition = yaml.load(
                (folder / f"ray.io_{document['kind'].lower()}s.yaml").read_text(), Loader=yaml.CSafeLoader
            )
            (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = METADATA
            errors = list(jsonschema.Draft202012Validator(schema).iter_errors(document))
            for error in errors:
                print(f"{path.name}: {'.'.join(map(str, error.absolute_path))}: {error.message}")
            print(f"{path.name}: {document['kind']}, {len(errors)} problems")
            number += len(errors)
    return number


def _strict(node: dict[str, Any]) -> dict[str, Any]:
    """Turn a structural schema of Kubernetes into a JSON Schema that refuses fields it does not name."""
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {key: node[key] for key in ("type", "enum", "required", "pattern", "minimum", "maximum") if key in node}
    if "properties" in node:
        kept["properties"] = {name: _strict(child) for name, child in node["properties"].items()}
        if "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            kept[key] = _strict(node[key])
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crds", type=Path, required=True, help="Folder with ray.io_rayjobs.yaml and others.")
    parser.add_argument("files", nargs="*", type=Path, default=sorted(FILES.glob("*.yaml")))
    arguments = parser.parse_args()
    sys.exit(check_published(arguments.files, arguments.crds) > 0)
