"""Tests that `launch/gke_jobset.sh` writes a valid JobSet with the right restarts.

The schema is that of the models that the Kubeflow project generates from the OpenAPI
definitions of Kubernetes and JobSet.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from jaxii.distributed.rendezvous import TOKEN

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--config=configs/f2_multitask.py:open_images_v4",
    "--workdir=gs://bucket/run",
    "--data_dir=gs://bucket/data",
)
IMAGE = "registry.example.org/jaxii@sha256:" + "ab" * 32


def launch(*words, **environment):
    return subprocess.run(
        ["bash", "launch/gke_jobset.sh", *words],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "IMAGE": IMAGE} | environment,
        capture_output=True,
        text=True,
    )


def rendered(*flags, **environment):
    yaml = pytest.importorskip("yaml")
    result = launch("my-run", *(flags or FLAGS), "--dry-run", **environment)
    assert result.returncode == 0, result.stderr
    manifest, command = result.stdout.split("\n+ ")
    assert command == "kubectl create -f -\n"
    return yaml.safe_load(manifest)


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def container_of(jobset):
    return job_of(jobset)["template"]["spec"]["containers"][0]


def test_the_manifest_is_a_jobset_of_the_schema_and_nothing_else():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    jobset = rendered()
    # Conversion drops fields that the schema does not know.
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset


def test_the_schema_notices_a_field_that_is_misspelt_and_a_wrong_type():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    misspelt = rendered()
    job_of(misspelt)["podFailurePolicies"] = job_of(misspelt).pop("podFailurePolicy")
    parsed = models.JobsetV1alpha2JobSet.from_dict(misspelt)
    assert parsed.to_dict() != misspelt
    wrong = rendered()
    job_of(wrong)["completions"] = "four"
    with pytest.raises(ValueError, match="completions"):
        models.JobsetV1alpha2JobSet.from_dict(wrong)


def test_the_job_is_one_that_kubernetes_admits():
    # Requirements of its validation beyond the schema.
    job = job_of(rendered())
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # for a podFailurePolicy
    assert job["parallelism"] == job["completions"]  # for all pods at the same time
    names = [container["name"] for container in job["template"]["spec"]["containers"]]
    for rule in job["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            values = rule["onExitCodes"]["values"]
            assert rule["onExitCodes"]["containerName"] in names
            assert values == sorted({*values}) and 0 not in values


def test_the_failure_rules_are_some_that_jobset_admits():
    rules = rendered()["spec"]["failurePolicy"]["rules"]
    names = [rule["name"] for rule in rules]
    assert len({*names}) == len(names)
    for rule in rules:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert {*rule.get("onJobFailureReasons", [])} <= {
            *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes"),
            *("MaxFailedIndexesExceeded", "PodFailurePolicy"),
        }


def action_after(jobset, code=None, condition=None):
    """Returns JobSet's action after this failure: a model of the two controllers."""
    reason, message = (
        "BackoffLimitExceeded",
        "Job has reached the specified backoff limit",
    )
    for index, rule in enumerate(job_of(jobset)["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {}).get("values", [])
        conditions = [given["type"] for given in rule.get("onPodConditions", [])]
        if code in codes or condition in conditions:
            what = f"Container jaxii for pod default/x failed with exit code {code}"
            if code not in codes:
                what = f"Pod default/x has condition {condition}"
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            message = f"{what} matching FailJob rule at index {index}"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", [reason]) and any(
            re.search(pattern, message) for pattern in patterns
        ):
            return rule["action"]
    raise AssertionError("no rule matches")


@pytest.mark.parametrize(
    ("failure", "action"),
    [
        ({"code": 2}, "FailJobSet"),
        ({"code": 75}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"condition": "DisruptionTarget"}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"code": 1}, "RestartJobSet"),
        ({"code": 137}, "RestartJobSet"),
    ],
    ids=str,
)
def test_misuse_stops_and_all_else_starts_again(failure, action):
    assert action_after(rendered(), **failure) == action


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"),
    [("4x4", "4", 4), ("16x16", "4", 64), ("2x2x4", "4", 4), ("2x4", "8", 1)],
)
def test_there_is_one_pod_a_host_of_the_slice(topology, chips, hosts):
    jobset = rendered(TOPOLOGY=topology, CHIPS_PER_HOST=chips)
    assert job_of(jobset)["completions"] == hosts
    selector = job_of(jobset)["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == topology
    assert container_of(jobset)["resources"]["limits"]["google.com/tpu"] == int(chips)


def test_the_run_has_a_node_pool_to_itself():
    annotations = rendered()["metadata"]["annotations"]
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert annotations[key] == "cloud.google.com/gke-nodepool"


def test_the_token_is_the_uid_of_the_job_which_all_its_pods_know():
    jobset = rendered()
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 1
    (token,) = (
        given for given in container_of(jobset)["env"] if given["name"] == TOKEN
    )
    path = token["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.labels['batch.kubernetes.io/controller-uid']"


def test_flags_arrive_as_they_were_given():
    flags = ("--workdir=gs://b/a run", "--config=x: #'\"\\ ${NAME} & *", "$(id)")
    arguments = container_of(rendered(*flags))["args"]
    assert arguments == [*flags, "--start_timeout_seconds=1800"]


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (["--start_timeout_seconds=9"], {}),
        (["--start_timeout_seconds", "9"], {}),
        ([], {"TOPOLOGY": "2x2"}),
    ],
)
def test_a_start_timeout_that_is_given_or_that_one_pod_needs_not_is_left(
    flags, environment
):
    jobset = rendered(*FLAGS, *flags, **environment)
    assert container_of(jobset)["args"] == [*FLAGS, *flags]


@pytest.mark.parametrize(
    ("extras", "installed"),
    [("", ".[tpu,gcs]"), ("wandb,mlflow", ".[tpu,gcs,wandb,mlflow]")],
)
def test_the_image_installs_the_extras_of_its_build_argument(extras, installed):
    dockerfile = (ROOT / "launch" / "Dockerfile").read_text()
    assert "\nARG EXTRAS=''\n" in dockerfile
    (command,) = re.findall(r"^RUN (pip .*)$", dockerfile, re.MULTILINE)
    words = subprocess.run(
        ["sh", "-c", f"echo {command}"],
        env={"PATH": "/usr/bin:/bin", "EXTRAS": extras},
        capture_output=True,
        text=True,
    ).stdout.split()
    assert words[-1] == installed


@pytest.mark.parametrize("name", ["jaxii", "mine"])
def test_a_secret_sets_variables_of_the_run_if_it_exists(name):
    environment = {} if name == "jaxii" else {"SECRET": name}
    (source,) = container_of(rendered(**environment))["envFrom"]
    assert source == {"secretRef": {"name": name, "optional": True}}


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (
            FLAGS,
            {"IMAGE": "registry/jaxii:latest"},
            "use REGISTRY/jaxii@sha256:DIGEST",
        ),
        (["--workdir=runs/x"], {}, "--workdir=runs/x is not in a bucket"),
        (["--config=x"], {}, "--workdir is missing"),
        (FLAGS, {"TOPOLOGY": "3x3"}, "9 chips, not divisible by CHIPS_PER_HOST=4"),
        (
            FLAGS,
            {"TOPOLOGY": "v5e"},
            "TOPOLOGY=v5e is not a topology; use one such as 4x4",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_2(flags, environment, message):
    result = launch("my-run", *flags, "--dry-run", **environment)
    assert result.returncode == 2
    assert message in result.stderr


def test_what_is_printed_is_what_kubectl_gets(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/given\ncat >> {tmp_path}/given\n'
    )
    kubectl.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    result = launch("my-run", *FLAGS, PATH=path)
    assert result.returncode == 0, result.stderr
    manifest, command = result.stdout.split("\n+ kubectl ")
    given = (tmp_path / "given").read_text()
    assert given.splitlines()[0] == command.strip()
    stripped = [line for line in given.splitlines()[1:] if not line.startswith("#")]
    assert stripped == manifest.splitlines()


def test_a_dry_run_prints_exactly_its_golden_text():
    text = launch("my-run", *FLAGS, "--dry-run").stdout
    golden = ROOT / "tests" / "golden" / "launch_gke_jobset.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
