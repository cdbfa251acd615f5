"""The files in cluster/ as far as they can be checked without AWS, Kubernetes, Slurm or Docker."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def ray_clusters() -> Iterator[dict[str, Any]]:
    yield load("kuberay-raycluster.yaml")["spec"]
    yield load("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements/cpu.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {str(canonicalize_name(name)): pinned for name, pinned in pins}


def test_ray_up_file_fits_the_schema_of_the_installed_ray() -> None:
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    schema = json.loads(Path(ray.origin).with_name("autoscaler").joinpath("ray-schema.json").read_text())
    config = load("ray-up.yaml")
    jsonschema.validate(config, schema)
    # The schema allows any name here.
    assert config["head_node_type"] in config["available_node_types"]
    assert all(kind["max_workers"] <= config["max_workers"] for kind in _worker_types(config))


def _worker_types(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]


@pytest.mark.parametrize("name", ["kuberay-raycluster.yaml", "kuberay-rayjob.yaml"])
def test_kuberay_files_are_of_the_kind_their_name_says(name: str) -> None:
    resource = load(name)
    assert resource["apiVersion"] == "ray.io/v1"
    assert f"kuberay-{resource['kind'].lower()}.yaml" == name


def test_kuberay_pods_mount_what_they_declare_and_run_the_locked_ray() -> None:
    for spec in ray_clusters():
        assert spec["rayVersion"] == lock()["ray"]
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            pod = group["template"]["spec"]
            declared = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
                assert set(mounts) == declared
                assert mounts["shared"] == "/mnt/shared"
                assert container["resources"]["requests"] == container["resources"]["limits"]
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_dockerfile_copies_only_what_exists() -> None:
    copies = re.findall(r"^COPY (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE)
    sources = [source for copy in copies for source in copy.split()]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_readme_names_only_files_that_exist_and_leaves_none_out() -> None:
    text = (CLUSTER / "README.md").read_text()
    linked = set(re.findall(r"\]\(([^)#]+)\)", text))
    assert [link for link in linked if not link.startswith("http") and not (CLUSTER / link).exists()] == []
    files = {path.name for path in CLUSTER.iterdir() if path.is_file()} - {"README.md", "__init__.py"}
    assert files <= linked


def test_paths_in_comments_and_commands_exist() -> None:
    for path in CLUSTER.iterdir():
        if path.is_file():
            named = re.findall(r"\b(?:cluster|requirements)/[\w.-]+\.\w+", path.read_text())
            assert [name for name in named if not (ROOT / name).exists()] == [], path.name


@pytest.mark.parametrize("script", ["cluster/slurm.sbatch", ".ci/run"])
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_ci_script_can_be_executed() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_lock_is_sorted_and_holds_nothing_that_breaks_beside_the_cpu_build_of_torch() -> None:
    pins = lock()
    assert list(pins) == sorted(pins)
    assert pins["torch"].endswith("+cpu")
    broken = ("nvidia-", "cuda-", "torchvision", "torchaudio", "torchcodec")
    assert [name for name in pins if name.startswith(broken)] == []


def test_lock_satisfies_the_constraints() -> None:
    pins = lock()
    for name in ("constraints.in", "constraints-cpu.in"):
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            if line and not line.startswith("#"):
                requirement = Requirement(line)
                assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_the_installed_ray_is_the_locked_one() -> None:
    assert version("ray") == lock()["ray"]
