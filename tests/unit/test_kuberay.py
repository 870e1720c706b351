"""The RayService: it is `examples.ray_serve`'s application, and replicas fit the workers."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec
from ray.serve.schema import ServeDeploySchema

from examples.ray_serve import Options, llm_config

DEPLOY = Path(__file__).parents[2] / "examples/deploy"
TEXT = (DEPLOY / "kuberay/rayservice.yaml").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile.gpu").read_text()
SPEC = yaml.safe_load(TEXT)["spec"]
CLUSTER = SPEC["rayClusterConfig"]
(APPLICATION,) = yaml.safe_load(SPEC["serveConfigV2"])["applications"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
PODS = [CLUSTER["headGroupSpec"]["template"]["spec"], WORKERS["template"]["spec"]]
OPTIONS = Options.model_validate(APPLICATION["args"])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray's description of a replica's engine, made without a key in the environment."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return llm_config(OPTIONS).get_engine_config()


def server(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return container


def environment(pod: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in server(pod)["env"]}


def test_ray_takes_the_application(engine: Any) -> None:
    """Whose own options are the arguments, which vLLM's engine knows."""
    ServeDeploySchema.model_validate(yaml.safe_load(SPEC["serveConfigV2"]))
    assert APPLICATION["import_path"] == "examples.ray_serve:app"
    assert engine.model_id == "Efficient-DLM-8B"
    arguments = engine.engine_kwargs
    assert arguments["max_num_batched_tokens"] >= arguments["max_model_len"], "a prompt in one step"
    assert arguments.get("max_num_queued_reqs"), "else the queue has no limit"


def test_the_application_is_found() -> None:
    """By every process of Ray: the image's own folder is on their path."""
    (folder,) = re.findall(r"^WORKDIR (.*)$", DOCKERFILE, re.MULTILINE)
    assert "\nCOPY examples examples\n" in DOCKERFILE
    for pod in PODS:
        assert environment(pod)["PYTHONPATH"] == folder


def test_a_killed_replica_s_engine_goes_with_it() -> None:
    for pod in PODS:
        assert environment(pod)["RAY_process_group_cleanup_enabled"] == "1"


def test_replicas_fit_the_workers(engine: Any) -> None:
    """By what KubeRay's autoscaler knows of a group that has no pod yet."""
    worker = _get_ray_resources_from_group_spec(WORKERS, is_head=False)
    (replica,) = engine.placement_bundles
    assert replica.keys() <= worker.keys()
    assert all(amount <= worker[name] for name, amount in replica.items())
    assert worker["GPU"] == replica["GPU"], "a replica a worker"
    assert WORKERS["minReplicas"] >= OPTIONS.min_replicas
    assert WORKERS["maxReplicas"] == OPTIONS.max_replicas
    assert CLUSTER["enableInTreeAutoscaling"]
    head = _get_ray_resources_from_group_spec(CLUSTER["headGroupSpec"], is_head=True)
    assert (head["CPU"], head.get("GPU")) == (0, None), "no replica runs there"


def test_a_worker_outlives_its_replicas_last_requests() -> None:
    assert PODS[1]["terminationGracePeriodSeconds"] > OPTIONS.drain_seconds


def test_pods_are_of_the_gpu_image_with_this_ray() -> None:
    assert re.findall(r"ray==([\d.]+)", DOCKERFILE) == [CLUSTER["rayVersion"]]
    assert {server(pod)["image"] for pod in PODS} == {"vllm-edlm:ray"}
    (build,) = re.findall(r"EXTRAS=gpu,\w+", TEXT)
    assert f"--build-arg {build}" in DOCKERFILE
    assert f"\nUSER {PODS[1]['securityContext']['runAsUser']}\n" in DOCKERFILE
    assert f"\nENV HOME={server(PODS[1])['volumeMounts'][0]['mountPath']}\n" in DOCKERFILE
