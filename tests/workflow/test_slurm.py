"""The toy pipeline on a real Slurm of two nodes: `make test-cluster`."""

import os
import re
import time
from collections.abc import Iterator

import psutil
import pytest
from slurm_cluster import Cluster, missing
from toy_project import ROOT, Project

pytest.importorskip("snakemake_executor_plugin_slurm")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
]
PROFILE = ("--workflow-profile", "profiles/slurm", "--slurm-no-account")
QUICK = (  # without a database of accounts sacct knows nothing; a test does not wait 40 seconds
    *("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"),
    *("--seconds-between-status-checks", "2", "--latency-wait", "10"),
    *("--default-resources", "mem_mb=500", "runtime=5", "gpu=1"),
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Return a running cluster, for all tests of this file."""
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def on_cluster(project: Project, cluster: Cluster) -> Iterator[Project]:
    """Return the finished toy project with the real profile, one of its runs changed."""
    target = project.folder / "profiles/slurm"
    target.mkdir()
    (target / "config.yaml").write_bytes((ROOT / "profiles/slurm/config.yaml").read_bytes())
    project.edit('"plain"', '"better"', file="toy/methods/plain/method.py")
    yield project
    cluster.run("scancel", "--user", str(os.getuid()))


def path(cluster: Cluster, project: Project) -> dict[str, str]:
    """Return the environment in which Slurm's commands find this cluster."""
    return {"PATH": f"{cluster.folder / 'bin'}:{project.environment()['PATH']}"}


def submit(cluster: Cluster, project: Project, status: int = 0, **extra: str) -> str:
    """Run the pipeline on the cluster to its end."""
    environment = path(cluster, project) | extra
    return project.run("snakemake", *PROFILE, *QUICK, status=status, **environment)


def hang(cluster: Cluster, project: Project, stage: str) -> tuple[object, str]:
    """Start the pipeline; return it, and the number of the Slurm job that hangs in a stage."""
    pid = project.folder.parent / "pid"
    extra = {"TOY_HANG": stage, "TOY_PID": str(pid)}
    process = project.start("snakemake", *PROFILE, *QUICK, **path(cluster, project), **extra)
    cluster.wait_until(lambda: pid.exists() and pid.read_text() != "", seconds=90)
    return process, cluster.run("squeue", "-h", "-t", "R", "-o", "%i").split()[0]


def test_the_pipeline_runs_on_slurm_and_makes_the_same(
    on_cluster: Project, cluster: Cluster
) -> None:
    here = on_cluster.clone("here")
    here.edit('"plain"', '"better"', file="toy/methods/plain/method.py")
    here.snakemake()
    here.ran()
    submit(cluster, on_cluster)
    assert on_cluster.ran() == ["compress@x", "evaluate@x", "report"]
    for name in ("data/compressed/x/content.txt", "results/report.html", "dvc.lock"):
        assert (on_cluster.folder / name).read_bytes() == (here.folder / name).read_bytes()
    log = on_cluster.folder / "logs/compress/x.log"
    assert "compress@x is at work" in log.read_text(encoding="utf-8")
    assert (on_cluster.folder / "logs/benchmarks/compress/x.tsv").is_file()
    jobs = cluster.run("scontrol", "show", "job", "--oneliner").splitlines()
    gpus = {rule: [j for j in jobs if f"rule_{rule}" in j] for rule in ("compress", "report")}
    assert [re.findall("gres.gpu[=:]1", *gpus["compress"]) != []] == [True], gpus
    assert re.findall("gres.gpu[=:]1", *gpus["report"]) == [], gpus


def test_a_cancelled_job_is_reported_and_the_next_run_continues(
    on_cluster: Project, cluster: Cluster
) -> None:
    process, job = hang(cluster, on_cluster, "compress@x")
    cluster.run("scancel", job)
    printed, _ = process.communicate(timeout=90)  # type: ignore[attr-defined]
    assert process.returncode == 1  # type: ignore[attr-defined]
    assert f"SLURM-job '{job}' failed" in printed
    assert "Error in rule compress" in printed
    on_cluster.ran()
    submit(cluster, on_cluster)
    assert on_cluster.ran() == ["compress@x", "evaluate@x", "report"]


def test_a_job_without_memory_is_reported_and_the_next_run_continues(
    on_cluster: Project, cluster: Cluster
) -> None:
    printed = submit(cluster, on_cluster, status=1, TOY_FILL="compress@x")
    assert "Error in rule compress" in printed
    on_cluster.ran()
    submit(cluster, on_cluster)
    assert on_cluster.ran() == ["compress@x", "evaluate@x", "report"]


def test_a_preempted_job_runs_again(on_cluster: Project, cluster: Cluster) -> None:
    process, job = hang(cluster, on_cluster, "compress@x")
    (on_cluster.folder.parent / "pid").unlink()
    every = ("--nodes=2", "--exclusive", "--partition=urgent", "--wrap=sleep 3")
    cluster.run("sbatch", *every, f"--output={cluster.folder}/urgent.log")
    cluster.wait_until(lambda: f"JobId={job}" in restarted(cluster), seconds=60)
    cluster.wait_until((on_cluster.folder.parent / "pid").exists, seconds=150)
    process.kill()  # type: ignore[attr-defined]
    process.communicate()  # type: ignore[attr-defined]
    cluster.run("scancel", job)
    cluster.wait_until(lambda: cluster.run("squeue", "-h") == "")
    on_cluster.snakemake("--unlock")
    on_cluster.ran()
    submit(cluster, on_cluster)
    assert on_cluster.ran() == ["compress@x", "evaluate@x", "report"]


def restarted(cluster: Cluster) -> str:
    """Return what Slurm says of jobs that it put back into the queue."""
    lines = cluster.run("scontrol", "show", "job", "--oneliner").splitlines()
    return "\n".join(line for line in lines if re.search(r"Restarts=[1-9]", line))


def test_a_lost_node_is_reported_and_the_next_run_continues(
    on_cluster: Project, cluster: Cluster
) -> None:
    process, job = hang(cluster, on_cluster, "compress@x")
    node = cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    hanging = psutil.Process(int((on_cluster.folder.parent / "pid").read_text()))
    cluster.lose(node)
    hanging.kill()
    try:
        cluster.wait_until(lambda: node in cluster.run("sinfo", "-h", "-t", "down", "-o", "%N"))
        process.kill()  # type: ignore[attr-defined]
        process.communicate()  # type: ignore[attr-defined]
    finally:
        cluster.start_node(node)
    cluster.run("scancel", job)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    cluster.wait_until(lambda: cluster.run("squeue", "-h") == "")
    time.sleep(1)
    on_cluster.snakemake("--unlock")
    on_cluster.ran()
    submit(cluster, on_cluster)
    assert on_cluster.ran() == ["compress@x", "evaluate@x", "report"]
