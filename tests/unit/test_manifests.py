"""The Kubernetes manifests: their parts fit each other, the container, and vLLM's own parser."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

DEPLOY = Path(__file__).parents[2] / "examples/deploy"
FILES = sorted(DEPLOY.rglob("*.yaml"))
Manifest = dict[str, Any]


class OneOfEach(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key twice: {keys}"
        return super().construct_mapping(node, deep)


def manifests(path: str) -> dict[str, Manifest]:
    """Documents of a file by their kind, of which there is one each."""
    documents = list(yaml.load_all((DEPLOY / path).read_text(), OneOfEach))
    by_kind = {document["kind"]: document for document in documents}
    assert len(by_kind) == len(documents)
    return by_kind


KUBERNETES = manifests("kubernetes/vllm-edlm.yaml")
DEPLOYMENT = KUBERNETES["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(SERVER,) = POD["containers"]
LABELS = DEPLOYMENT["template"]["metadata"]["labels"]
MONITOR = manifests("kubernetes/service-monitor.yaml")["ServiceMonitor"]["spec"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_document_says_what_it_is(path: Path) -> None:
    for kind, document in manifests(str(path.relative_to(DEPLOY))).items():
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}, kind
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])


def test_the_service_and_the_budget_are_those_of_the_pods() -> None:
    service, budget = KUBERNETES["Service"], KUBERNETES["PodDisruptionBudget"]["spec"]
    assert DEPLOYMENT["selector"]["matchLabels"].items() <= LABELS.items()
    assert service["spec"]["selector"].items() <= LABELS.items()
    assert budget["selector"]["matchLabels"].items() <= LABELS.items()
    assert budget["maxUnavailable"] < DEPLOYMENT["replicas"], "one goes on serving"
    assert MONITOR["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (port,), (container_port,), (endpoint,) = (
        service["spec"]["ports"],
        SERVER["ports"],
        MONITOR["endpoints"],
    )
    assert port["targetPort"] == container_port["name"]
    assert endpoint["port"] == port["name"]


def test_vllm_takes_the_arguments() -> None:
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(SERVER["args"])
    assert arguments.model_tag == "nvidia/Efficient-DLM-8B"
    assert arguments.max_num_batched_tokens >= arguments.max_model_len, "a prompt in one step"
    assert arguments.max_num_queued_reqs, "else the queue has no limit"
    (port,) = SERVER["ports"]
    assert arguments.port == port["containerPort"]
    pause = int(SERVER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert arguments.shutdown_timeout > 0, "0 would abort what runs"
    assert pause + arguments.shutdown_timeout < POD["terminationGracePeriodSeconds"]


def test_probes_ask_the_one_route_that_needs_no_key() -> None:
    (port,) = SERVER["ports"]
    probes = [SERVER[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    for probe in probes:
        assert probe["httpGet"] == {"path": "/health", "port": port["name"]}
    startup, _, liveness = probes
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 900, "loads and compiles"
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60, "a busy server lives"


def test_the_key_is_a_secret_and_the_only_one() -> None:
    (variable,) = SERVER["env"]
    assert variable["name"] == "VLLM_API_KEY"
    assert set(variable) == {"name", "valueFrom"}, "no value in the file"
    secret = variable["valueFrom"]["secretKeyRef"]
    (endpoint,) = MONITOR["endpoints"]
    assert endpoint["authorization"]["credentials"] == secret, "/metrics wants it too"
    text = (DEPLOY / "kubernetes/vllm-edlm.yaml").read_text()
    create = f"create secret generic {secret['name']} --from-literal={secret['key']}="
    assert create in text, "how it is made"


def test_the_pod_is_the_container_of_the_gpu_image() -> None:
    dockerfile = (DEPLOY / "Dockerfile.gpu").read_text()
    assert f"-t {SERVER['image']} ." in dockerfile
    assert "command" not in SERVER, "the image's entry point"
    assert f"\nUSER {POD['securityContext']['runAsUser']}\n" in dockerfile
    (home,) = re.findall(r"^ENV HOME=(.*)$", dockerfile, re.MULTILINE)
    mounts = {mount["name"]: mount["mountPath"] for mount in SERVER["volumeMounts"]}
    assert mounts == {"cache": home, "shm": "/dev/shm"}
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]}
    assert SERVER["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert POD["securityContext"]["runAsNonRoot"]
    assert not SERVER["securityContext"]["allowPrivilegeEscalation"]
