"""What is deployed names metrics, routes and settings that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.http.keys import KEY_VARIABLES
from server.metrics import Metrics
from server.settings import Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.suffix in {".yml", ".yaml", ".json"})


def families() -> list[Any]:
    """All metrics of a server with a text model and an image model."""
    metrics = Metrics()
    metrics.add_model("a", "text", "float32", "cpu", lambda: (0, 0))
    metrics.add_model("b", "images", "float32", "cpu", lambda: (0, 0))
    metrics.http.done("/health", "GET", 200, 0.1)
    return list(metrics.registry.collect())


def test_there_is_something_to_check() -> None:
    assert {"compose.yaml", "prometheus.yml", "alerts.yml", "prime.json", "prime.yaml"} <= {
        path.name for path in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_metric_exists(path: Path) -> None:
    named = set(re.findall(r"\bprime_[a-z0-9_]+\b", path.read_text("utf-8")))
    there = {sample.name for family in families() for sample in family.samples}
    assert named <= there, named - there
    if path.name in {"prime.json", "alerts.yml"}:
        assert len(named) > 3


def test_every_label_of_the_dashboard_is_one_of_its_metric() -> None:
    by_name = {family.name: family for family in families()}
    for panel in json.loads((DEPLOY / "grafana/dashboards/prime.json").read_text("utf-8"))["panels"]:
        for target in panel["targets"]:
            (name, *_) = re.findall(r"\bprime_[a-z0-9_]+\b", target["expr"])
            family = by_name[re.sub(r"_(total|bucket|sum|count)$", "", name)]
            labels = set().union(*(sample.labels for sample in family.samples))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, target


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_setting_exists(path: Path) -> None:
    known = {f"PRIME_{name.upper()}" for name in Settings.model_fields} | {*KEY_VARIABLES, "PRIME_CONFIG"}
    assert set(re.findall(r"\bPRIME_[A-Z_]+\b", path.read_text("utf-8"))) <= known


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_can_be_read(path: Path) -> None:
    text = path.read_text("utf-8")
    documents = [json.loads(text)] if path.suffix == ".json" else list(yaml.safe_load_all(text))
    assert all(isinstance(document, dict) for document in documents)


def test_the_deployment_asks_the_right_routes_and_gives_time_to_drain() -> None:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes/prime.yaml").read_text("utf-8"))
    spec = next(each for each in documents if each["kind"] == "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    probes = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    }
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    drain_s = next(
        float(each["value"]) for each in container["env"] if each["name"] == "PRIME_DRAIN_TIMEOUT_S"
    )
    assert spec["terminationGracePeriodSeconds"] > drain_s


def test_the_service_does_not_set_the_port_of_its_own_pods() -> None:
    """Kubernetes would give them PRIME_PORT=tcp://... for a Service of that name."""
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes/prime.yaml").read_text("utf-8")))
    kinds = {each["kind"]: each for each in documents}
    assert kinds["Service"]["metadata"]["name"] == "prime"
    assert kinds["Deployment"]["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_compose_gives_time_to_drain() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"]["prime"]
    variables = dict(each.split("=") for each in service["environment"] if "=" in each)
    grace_s = re.fullmatch(r"(\d+)s", service["stop_grace_period"])
    assert grace_s is not None and float(grace_s[1]) > float(variables["PRIME_DRAIN_TIMEOUT_S"])


def test_kernels_can_be_compiled_in_a_read_only_container() -> None:
    """Triton writes its kernels, and launchers that are loaded from there; Docker mounts a tmpfs noexec if not told."""
    (cache,) = re.findall(
        r"TRITON_CACHE_DIR=(\S+)", (DEPLOY.parent / "Dockerfile").read_text("utf-8").rpartition("FROM")[2]
    )
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"]["prime"]
    assert service["read_only"] and service["tmpfs"] == [f"{Path(cache).parent}:exec"]
    documents = yaml.safe_load_all((DEPLOY / "kubernetes/prime.yaml").read_text("utf-8"))
    pod = next(each for each in documents if each["kind"] == "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert str(Path(cache).parent) in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_compose_gives_the_gpu_to_the_server_and_asks_it_to_use_it() -> None:
    service = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text("utf-8"))["services"]["prime"]
    assert "PRIME_DEVICE=cuda" in service["environment"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
