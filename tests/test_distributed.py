"""Where processes meet is read off flags and environment; what is incomplete is refused."""

import dataclasses

import pytest

from jointseg_jax import distributed
from jointseg_jax.distributed import Flags, Settings, first_host, settings
from jointseg_jax.types import UserError

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-10],login",
    "SLURM_STEP_NUM_NODES": "4",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
FLAGS = Flags(coordinator="node7:1234", num_processes=8, process_id=3)


def without(mapping, *names):
    return {k: v for k, v in mapping.items() if k not in names}


@pytest.mark.parametrize("environment", [{}, {"HOME": "/root"}, {"KUBERNETES_SERVICE_HOST": "x"}])
def test_a_laptop_starts_nothing(environment):
    assert settings(environment, Flags()) is None


def test_flags_come_first():
    expected = Settings(origin="flags", coordinator="node7:1234", processes=8, process=3)
    for environment in ({}, GKE, SLURM):
        assert settings(environment, FLAGS, chips=True) == expected


@pytest.mark.parametrize("environment", [{}, SLURM, GKE, without(SLURM, "SLURM_LOCALID")])
def test_one_process_is_alone_wherever_it_runs(environment):
    assert settings(environment, Flags(num_processes=1), chips=True) is None


@pytest.mark.parametrize("missing", ["coordinator", "num_processes", "process_id"])
def test_half_given_flags_name_what_is_missing(missing):
    with pytest.raises(UserError, match=f"--{missing} missing"):
        settings({}, dataclasses.replace(FLAGS, **{missing: None}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"process_id": 8}, "count from 0"),
        ({"process_id": -1}, "count from 0"),
        ({"num_processes": 0}, "count from 0"),
        ({"coordinator": "node7"}, "HOST:PORT"),
        ({"coordinator": ":1234"}, "HOST:PORT"),
        ({"coordinator": "node7:99999"}, "HOST:PORT"),
    ],
)
def test_flags_that_cannot_be(change, said):
    with pytest.raises(UserError, match=said):
        settings({}, dataclasses.replace(FLAGS, **change))


@pytest.mark.parametrize("change", [{"process_id": 0}, {"num_processes": 4}])
def test_flags_that_contradict_slurm(change):
    with pytest.raises(UserError, match=r"task 3 of 8 of a SLURM step.*contradict"):
        settings(SLURM, dataclasses.replace(FLAGS, **change))


def test_a_slurm_step():
    found = settings(SLURM, Flags())
    assert found == Settings(
        origin="SLURM",
        coordinator="gpu07:61445",  # 61440 + (job 4100 + step 1) mod 4096
        processes=8,
        process=3,
        local_devices=(1,),
    )
    assert settings(SLURM | {"JAX_COORDINATOR_PORT": "77"}, Flags()).coordinator == "gpu07:77"


def test_a_slurm_task_alone_on_its_node_or_with_one_gpu_has_all_it_sees():
    alone = SLURM | {"SLURM_STEP_NUM_NODES": "8"}
    masked = SLURM | {"CUDA_VISIBLE_DEVICES": "0"}
    shared = SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}
    found = [settings(e, Flags()).local_devices for e in (alone, masked, shared)]
    assert found == [None, None, (1,)]


def test_the_count_is_the_steps_where_the_job_has_more_tasks():
    assert settings(SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, Flags()).processes == 4
    assert settings(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Flags()) is None


def test_a_batch_script_without_srun_is_told_of_it():
    with pytest.raises(UserError, match="not started by srun"):
        settings(without(SLURM, "SLURM_STEP_NODELIST"), Flags())


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_LOCALID"])
def test_half_a_slurm_environment_names_what_is_missing(name):
    with pytest.raises(UserError, match=f"{name} is not set"):
        settings(without(SLURM, name), Flags())


@pytest.mark.parametrize(("name", "value"), [("SLURM_NTASKS", "all"), ("SLURM_PROCID", "8")])
def test_a_slurm_environment_that_cannot_be(name, value):
    with pytest.raises(UserError, match=name):
        settings(SLURM | {name: value}, Flags())


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("node[7]-ib,b", "node7-ib"),
        ("r[1-2]n[3-4],b", "r1n3"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_gke_needs_chips_and_more_than_one_host():
    assert settings(GKE, Flags(), chips=True) == Settings(origin="GKE")
    # the variables alone are also set to describe a pod to the compiler on a machine without chips
    assert settings(GKE, Flags()) is None
    alone = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    assert settings(alone, Flags(), chips=True) is None
    slices = alone | {"MEGASCALE_NUM_SLICES": "2"}
    assert settings(slices, Flags(), chips=True) == Settings(origin="GKE")


@pytest.mark.parametrize("change", [{"TPU_WORKER_ID": "4"}, {"TPU_WORKER_ID": ""}])
def test_a_gke_environment_that_cannot_be(change):
    with pytest.raises(UserError, match="TPU_WORKER_ID"):
        settings(GKE | change, Flags(), chips=True)


def test_cloud_tpu_is_left_to_jax():
    assert settings({}, Flags(), chips=True) == Settings(origin="Cloud TPU")
    assert settings({"TPU_SKIP_MDS_QUERY": "1"}, Flags(), chips=True) is None


def test_an_indexed_kubernetes_job_is_left_to_jax():
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    assert settings(environment, Flags()) == Settings(origin="Kubernetes")


def test_no_chips_where_jax_is_told_to_use_the_cpu(monkeypatch):
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    for platforms, expected in (("cpu", False), ("", True), ("tpu,cpu", True)):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert distributed.tpu_chips() is expected


def test_a_lone_process_talks_to_itself():
    assert not distributed.several() and distributed.is_first()
    assert distributed.gather("a") == ["a"] and distributed.share("b") == "b"
    assert distributed.from_first(lambda: "c") == "c"
    assert distributed.first_to_report("d") and distributed.first_to_report("d")
    assert not distributed.lost_peer(RuntimeError("Gloo AllGather failed"))
    distributed.leave(3)  # does not end the tests
