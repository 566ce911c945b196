"""Recipes for clusters: the Slurm script with stand-ins, the manifest by its parts."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "recipes" / "slurm.sh"
RAYJOB = ROOT / "recipes" / "rayjob.yaml"


@pytest.fixture
def job(tmp_path):
    """Runs the Slurm script on two nodes that are none; gives the commands in order."""
    place = tmp_path / "bin"
    place.mkdir()
    # The head answers once both nodes were told to start, which happens beside the script.
    started = f"$(grep -c 'ray start' {tmp_path}/calls)"
    wait = f'until [ "{started}" = 2 ]; do sleep 0.05; done'
    stand_ins = {
        "scontrol": "printf 'a\\nb\\n'",
        "srun": f'case "$*" in *health-check*) {wait};; esac\n'
        f'echo "$*" >> {tmp_path}/calls',
    }
    for name, body in stand_ins.items():
        (place / name).write_text(f"#!/bin/sh\n{body}\n")
        (place / name).chmod(0o755)

    def submit(*options, **environment):
        subprocess.run(
            ["bash", str(SLURM), *options],
            check=True,
            cwd=tmp_path,
            timeout=60,
            env={
                "PATH": f"{place}:{os.environ['PATH']}",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "[a-b]",
                "SLURM_CPUS_PER_TASK": "3",
                **environment,
            },
        )
        return (tmp_path / "calls").read_text().splitlines()

    return submit


def test_slurm_starts_ray_on_all_nodes_and_the_run_on_the_head(job):
    calls = job("digits", "--set", "data.clients=9")
    heads = [call for call in calls if "--head" in call]
    others = [call for call in calls if "--block --address=a:20007" in call]
    assert len(heads) == len(others) == 1
    assert "--nodelist=a " in heads[0]
    assert "--port=20007 --num-cpus=3" in heads[0]
    assert "--nodelist=b " in others[0]
    assert calls[-1].endswith(
        "fedknow simulate digits --set data.clients=9 --set engine.address=a:20007 "
        "--out runs/slurm"
    )


def test_slurm_resumes_a_job_that_was_requeued_and_runs_in_an_image(
    job, tmp_path
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.toml").touch()
    calls = job(OUT="mine", IMAGE="fedknow.sif")
    assert calls[-1].endswith(
        "fedknow simulate digits --set engine.address=a:20007 --out mine --resume"
    )
    assert all("apptainer exec --bind" in call for call in calls)


def test_slurm_script_says_how_to_start_it():
    completed = subprocess.run(
        ["bash", str(SLURM)],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert completed.returncode != 0
    assert "submit this script with sbatch" in completed.stderr


def test_the_manifest_has_one_ray_one_image_and_a_volume_for_the_run():
    job, claim = yaml.safe_load_all(RAYJOB.read_text())
    cluster = job["spec"]["rayClusterSpec"]
    pinned = re.search(
        r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M
    )[1]
    assert cluster["rayVersion"] == pinned
    head = cluster["headGroupSpec"]["template"]["spec"]
    workers = [group["template"]["spec"] for group in cluster["workerGroupSpecs"]]
    images = {
        container["image"]
        for spec in (head, *workers)
        for container in spec["containers"]
    }
    assert images == {"fedknow-simulate"}
    volume = head["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert volume == claim["metadata"]["name"]
    mount = head["containers"][0]["volumeMounts"][0]["mountPath"]
    assert f"--out {mount}/" in job["spec"]["entrypoint"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("is_begun", [False, True])
def test_the_manifests_command_resumes_what_was_begun(tmp_path, is_begun):
    job = next(yaml.safe_load_all(RAYJOB.read_text()))
    # As Kubernetes' job does it: words, put together for a shell.
    words = shlex.split(job["spec"]["entrypoint"])
    words = [word.replace("/runs", str(tmp_path / "runs")) for word in words]
    stand_in = tmp_path / "fedknow"
    stand_in.write_text('#!/bin/sh\necho "$*"\n')
    stand_in.chmod(0o755)
    if is_begun:
        (tmp_path / "runs" / "digits").mkdir(parents=True)
        (tmp_path / "runs" / "digits" / "config.toml").touch()
    told = subprocess.check_output(
        shlex.join(words),
        shell=True,
        text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert told.startswith("simulate digits --set engine.address=auto --out ")
    assert told.strip().endswith("--resume") is is_begun
