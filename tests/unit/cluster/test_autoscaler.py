"""What an autoscaler may bring, read from the settings that it has itself."""

import pytest
import yaml

from bit_ray.cluster import autoscaler

SETTINGS = yaml.safe_load("""
max_workers: 10
head_node_type: head
available_node_types:
  head: {resources: {CPU: 4}}
  cpu: {resources: {CPU: 16}, max_workers: 100}
  gpu: {resources: {CPU: 8, GPU: 4}, max_workers: 6}
""")


def test_the_largest_size_of_each_resource_is_of_the_types_with_most_of_it():
    assert autoscaler.size(SETTINGS) == {"CPU": 4 + 10 * 16, "GPU": 6 * 4}


def test_types_of_nodes_are_those_that_may_come():
    assert autoscaler.node_types(SETTINGS) == [{"CPU": 16}, {"CPU": 8, "GPU": 4}]
    kinds = {"head": {"resources": {"CPU": 4}, "max_workers": 1}, "off": {"resources": {"CPU": 1}, "max_workers": 0}}
    assert autoscaler.node_types({**SETTINGS, "available_node_types": kinds}) == [{"CPU": 4}]
    assert autoscaler.node_types({}) == []


def test_a_type_without_a_limit_has_that_of_the_cluster():
    kinds = {"gpu": {"resources": {"GPU": 4}}}
    assert autoscaler.size({**SETTINGS, "available_node_types": kinds}) == {"GPU": 40}
    assert autoscaler.size({"available_node_types": kinds}) == {"GPU": 8}
    assert autoscaler.size({}) == {}


RAY_CLUSTER = yaml.safe_load("""
metadata: {name: bit, namespace: there}
spec:
  enableInTreeAutoscaling: true
  headGroupSpec:
    rayStartParams: {num-cpus: "0"}
    template: {spec: {containers: [{resources: {limits: {cpu: 4, memory: 16Gi}}}]}}
  workerGroupSpecs:
  - groupName: spot
    minReplicas: 0
    maxReplicas: 8
    rayStartParams: {}
    template: {spec: {containers: [{resources: {limits: {cpu: 30, memory: 200Gi, nvidia.com/gpu: 4}}}]}}
  - groupName: on-demand
    minReplicas: 0
    maxReplicas: 2
    rayStartParams: {}
    template: {spec: {containers: [{resources: {limits: {cpu: 30, memory: 200Gi, nvidia.com/gpu: 4}}}]}}
""")


@pytest.mark.parametrize(("grows", "gpus"), [(True, 40), (False, None)])
def test_kuberay_is_asked_for_its_ray_cluster(grows, gpus, monkeypatch, tmp_path):
    """Ray's own reading of the object; the answer of Kubernetes is made up."""
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    def get(self, path):
        assert (self._namespace, path) == ("there", "rayclusters/bit")
        return {**RAY_CLUSTER, "spec": {**RAY_CLUSTER["spec"], "enableInTreeAutoscaling": grows}}

    namespace = tmp_path / "namespace"
    namespace.write_text("there\n")
    monkeypatch.setattr(autoscaler, "_NAMESPACE", namespace)
    monkeypatch.setattr(KubernetesHttpApiClient, "get", get)
    monkeypatch.setenv("RAY_CLUSTER_NAME", "bit")
    found = autoscaler.size(autoscaler._settings("10.0.0.1:6379"))
    assert found.get("GPU") == gpus
    assert found.get("CPU") == (300 if grows else None)
