"""The manifests for Kubernetes: what KubeRay and Kubernetes accept, with options that we have."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.config import PRESETS, ClusterConfig
from foundation.recipes import RECIPES

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "docs/manifests"
KUBERNETES = "1.34"
SCHEMA = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text())


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((MANIFESTS / "rayjob.yaml").read_text())


def check(rayjob: dict[str, Any]) -> None:
    """Raise jsonschema's ValidationError where KubeRay, or Kubernetes for the pods, would refuse the manifest."""
    jsonschema.validate(rayjob, SCHEMA)
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def parent(tree: Any, path: str) -> tuple[Any, str | int]:
    """Return what holds the last part of a dotted path, and that part."""
    *way, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in way:
        tree = tree[part]
    return tree, last


def test_the_rayjob_is_what_kuberay_and_kubernetes_accept(rayjob):
    check(rayjob)


POD = "spec.rayClusterSpec.workerGroupSpecs.0.template.spec"
FIELDS = (
    "spec.backoffLimit",
    "spec.rayClusterSpec.authOptions",
    "spec.rayClusterSpec.headGroupSpec.rayStartParams",
    "spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas",
    f"{POD}.volumes.0.persistentVolumeClaim",
    f"{POD}.containers.0.resources.limits",
)


@pytest.mark.parametrize("path", FIELDS)
def test_a_misspelt_field_is_refused(rayjob, path):
    holder, name = parent(rayjob, path)
    holder[f"{name}s"] = holder.pop(name)
    with pytest.raises(jsonschema.ValidationError):
        check(rayjob)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backoffLimit", "3"),
        ("spec.shutdownAfterJobFinishes", "yes"),
        ("spec.runtimeEnvYAML", {"env_vars": {}}),
        ("spec.rayClusterSpec.authOptions.mode", "password"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.workerGroupSpecs.0.replicas", 1.5),
        (f"{POD}.containers.0.image", ["a"]),
        (f"{POD}.volumes.1.emptyDir", "Memory"),
        ("metadata.name", "Pretrain"),
    ],
)
def test_a_wrong_type_or_value_is_refused(rayjob, path, value):
    holder, name = parent(rayjob, path)
    assert holder[name] != value
    holder[name] = value
    with pytest.raises(jsonschema.ValidationError):
        check(rayjob)


@pytest.mark.parametrize(
    "path",
    [
        "kind",
        "spec.rayClusterSpec.headGroupSpec",
        "spec.rayClusterSpec.workerGroupSpecs.0.groupName",
        f"{POD}.containers",
        f"{POD}.containers.0.name",
        f"{POD}.containers.0.volumeMounts.0.mountPath",
    ],
)
def test_a_missing_field_is_refused(rayjob, path):
    holder, name = parent(rayjob, path)
    del holder[name]
    with pytest.raises(jsonschema.ValidationError):
        check(rayjob)


def test_the_schema_knows_no_field_that_the_manifest_doesn_t_use(rayjob):
    def unused(schema: dict[str, Any], value: Any, path: str) -> list[str]:
        if schema.get("type") == "array":
            return unused(schema["items"], value[0], path)
        found = []
        for name, inner in schema.get("properties", {}).items():
            found += unused(inner, value[name], f"{path}.{name}") if name in value else [f"{path}.{name}"]
        return found

    assert unused(SCHEMA, rayjob, "") == []


def test_a_pod_asks_for_what_it_may_have_and_workers_for_as_many_gpus_as_there_are_workers(rayjob):
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
    (group,) = cluster["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    options = dict(re.findall(r"--cluster\.([\w-]+) (\S+)", rayjob["spec"]["entrypoint"]))
    per_pod = int(limits["nvidia.com/gpu"]) / PRESETS[options["preset"]].gpus_per_worker
    assert int(options["workers"]) == group["replicas"] * per_pod
    assert float(options["cpus-per-worker"]) * per_pod <= int(limits["cpu"])


def test_every_mount_has_its_volume_and_the_home_is_on_the_shared_one(rayjob):
    home = yaml.safe_load(rayjob["spec"]["runtimeEnvYAML"])["env_vars"]["MANYBRAINS_HOME"]
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        claims = {volume["name"]: "persistentVolumeClaim" in volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert set(mounts.values()) == set(claims)
        assert claims[mounts[home]]
    assert f"--store {home}/" in rayjob["spec"]["entrypoint"]


def as_ray_runs_it(entrypoint: str) -> str:
    """Return the command that reaches the head: KubeRay pastes the entrypoint into bash, `ray job submit` quotes it."""
    submit = f"{sys.executable} -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' {entrypoint} ;"
    return subprocess.run(["bash", "-ce", submit], env={}, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_the_first_try_starts_the_run_and_a_retry_resumes_it(rayjob, tmp_path):
    told = tmp_path / "told"
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >> {told}\nexit 1\n')
    python.chmod(0o755)
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "MANYBRAINS_HOME": str(tmp_path)}
    command = as_ray_runs_it(rayjob["spec"]["entrypoint"])
    for _ in range(3):
        done = subprocess.run(command, shell=True, env=environment, check=False)
        assert done.returncode == 1
    first, *later = told.read_text().splitlines()
    assert first.startswith("-m foundation.pretrain base --store")
    assert later == [f"{first} --resume"] * 2


@pytest.mark.parametrize("name", ["pretrain.sbatch", "rayjob.yaml"])
def test_a_manifest_uses_options_and_presets_that_exist(name):
    text = (MANIFESTS / name).read_text()
    options = {option.replace("-", "_") for option in re.findall(r"--cluster\.([\w-]+)", text)}
    assert options
    assert options <= {field.name for field in dataclasses.fields(ClusterConfig)}
    presets = set(re.findall(r"--cluster\.preset (\S+)", text))
    assert presets
    assert presets <= set(PRESETS)
    assert set(re.findall(r"foundation\.pretrain ([a-z]\S*)", text)) <= set(RECIPES)
