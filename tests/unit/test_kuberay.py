"""The RayService: Ray's own schemas take it, vLLM's engine its options, and the workers fit."""

import re
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from ray.serve.llm import LLMServingArgs
from ray.serve.schema import ServeDeploySchema
from vllm.engine.arg_utils import AsyncEngineArgs

DEPLOY = Path(__file__).parents[2] / "examples/deploy"
TEXT = (DEPLOY / "kuberay/rayservice.yaml").read_text()
SPEC = yaml.safe_load(TEXT)["spec"]
CLUSTER = SPEC["rayClusterConfig"]
(APPLICATION,) = yaml.safe_load(SPEC["serveConfigV2"])["applications"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
PODS = [CLUSTER["headGroupSpec"]["template"]["spec"], WORKERS["template"]["spec"]]
(DEPLOYMENT,) = APPLICATION["args"]["llm_configs"]


def server(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return container


def test_ray_takes_the_application() -> None:
    ServeDeploySchema.model_validate(yaml.safe_load(SPEC["serveConfigV2"]))
    module, _, name = APPLICATION["import_path"].partition(":")
    assert callable(getattr(import_module(module), name))
    (config,) = LLMServingArgs.model_validate(APPLICATION["args"]).llm_configs
    assert config.model_id == "Efficient-DLM-8B"
    options = config.engine_kwargs
    assert options.keys() <= {field.name for field in fields(AsyncEngineArgs)}
    assert options["max_num_batched_tokens"] >= options["max_model_len"], "a prompt in one step"


def test_replicas_fit_the_workers() -> None:
    scaling = DEPLOYMENT["deployment_config"]["autoscaling_config"]
    gpus = server(PODS[1])["resources"]["limits"]["nvidia.com/gpu"]
    assert WORKERS["minReplicas"] * gpus >= scaling["min_replicas"]
    assert WORKERS["maxReplicas"] * gpus == scaling["max_replicas"]
    assert CLUSTER["enableInTreeAutoscaling"]
    assert "nvidia.com/gpu" not in server(PODS[0])["resources"]["limits"]


def test_a_worker_outlives_its_replicas_last_requests() -> None:
    drain = DEPLOYMENT["deployment_config"]["graceful_shutdown_timeout_s"]
    assert PODS[1]["terminationGracePeriodSeconds"] > drain


def test_pods_are_of_the_gpu_image_with_this_ray() -> None:
    assert CLUSTER["rayVersion"] == version("ray")
    assert {server(pod)["image"] for pod in PODS} == {"vllm-edlm:ray"}
    dockerfile = (DEPLOY / "Dockerfile.gpu").read_text()
    (build,) = re.findall(r"EXTRAS=gpu,\w+", TEXT)
    assert f"--build-arg {build}" in dockerfile
    assert f"\nUSER {PODS[1]['securityContext']['runAsUser']}\n" in dockerfile
    assert f"\nENV HOME={server(PODS[1])['volumeMounts'][0]['mountPath']}\n" in dockerfile
