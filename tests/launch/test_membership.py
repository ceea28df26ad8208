"""Which rank a process is: every launcher's way of saying it, and what contradicts."""

from __future__ import annotations

import pytest

from lsmoe_ds.errors import UserError
from lsmoe_ds.launch.membership import PORTS, Membership, find, first_host, tasks_of
from lsmoe_ds.notices import guess_rank

# As they were seen in processes that these launchers had started.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-4]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[2-3]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MASTER = {"MASTER_ADDR": "node2", "MASTER_PORT": "29500"}
NAMED = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MASTER}
TORCHRUN = {**NAMED, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "2"}
DEEPSPEED = {**NAMED, "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "2"}
DAEMON = {
    **SRUN,
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Membership()),
        (BATCH, Membership()),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Membership()),
        (SRUN, Membership("srun", 3, 4, 1, 2, "node2", PORTS[217])),
        (SRUN | MASTER, Membership("srun", 3, 4, 1, 2, "node2", 29500)),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, Membership("srun", 3, 4, 1, 2, "node2", PORTS[217])),
        (SRUN | {"RANK": "3", "WORLD_SIZE": "4"}, Membership("srun", 3, 4, 1, 2, "node2", PORTS[217])),
        (OPEN_MPI, Membership("mpirun", 1, 4, 1, 2, None, None)),
        (MPICH, Membership("mpirun", 1, 4, 1, 2, None, None)),
        (OPEN_MPI | DAEMON, Membership("mpirun", 1, 4, 1, 2, None, None)),
        (MPICH | NAMED, Membership("mpirun", 1, 4, 1, 2, "node2", 29500)),
        (TORCHRUN, Membership("torchrun", 1, 4, 1, 2, "node2", 29500)),
        (TORCHRUN | DAEMON, Membership("torchrun", 1, 4, 1, 2, "node2", 29500)),
        (DEEPSPEED, Membership("deepspeed", 1, 4, 1, 2, "node2", 29500)),
        (DEEPSPEED | BATCH, Membership("deepspeed", 1, 4, 1, 2, "node2", 29500)),
        (NAMED, Membership("the environment", 1, 4, 1, 4, "node2", 29500)),
    ],
)
def test_each_launcher_is_understood(environment, expected):
    assert find(environment) == expected


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
        (NAMED | {"RANK": "one"}, "RANK is 'one': it should be a whole number"),
        (NAMED | {"RANK": "-1"}, "RANK is '-1'"),
        (NAMED | {"RANK": "4"}, "rank 4 of 4: ranks go from 0 to 3"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        (OPEN_MPI | {"MASTER_ADDR": "node2"}, "MASTER_PORT is not set"),
        (SRUN | {"WORLD_SIZE": "8"}, "srun says that this is rank 3 of 4, but WORLD_SIZE is 8"),
        (
            SRUN | NAMED,
            (
                "the environment says that this is rank 1 of 4, but srun has started it as rank 3 of 4: unset"
                " RANK and WORLD_SIZE"
            ),
        ),
        (OPEN_MPI | NAMED | {"RANK": "0"}, "but mpirun has started it as rank 1 of 4"),
        (TORCHRUN | SRUN, "srun has started torchrun 4 times, but torchrun knows of 2"),
        (
            DEEPSPEED | DAEMON | {"CROSS_SIZE": "1"},
            "srun has started deepspeed 2 times, but deepspeed knows of 1",
        ),
        ({k: v for k, v in SRUN.items() if "NODELIST" not in k}, "set MASTER_ADDR to the host of rank 0"),
    ],
)
def test_what_contradicts_is_refused(environment, sentence):
    with pytest.raises(UserError) as error:
        find(environment)
    assert sentence in str(error.value)


def test_the_environment_of_a_membership_says_the_same():
    found = find(SRUN)
    again = find(found.environment())
    assert again == Membership("the environment", 3, 4, 1, 2, "node2", found.port)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node[2-3]", "node2"),
        ("gpu[03-07,9],login", "gpu03"),
        ("a,b", "a"),
        ("r[1-2]n[4,8]x", "r1n4x"),
        ("n[7]", "n7"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("node", "counts", "tasks"),
    [(0, "2(x2),1", 2), (1, "2(x2),1", 2), (2, "2(x2),1", 1), (3, "2(x2),1", None), (0, "", None)],
)
def test_tasks_of_a_node(node, counts, tasks):
    assert tasks_of(node, counts) == tasks


def test_errors_are_told_by_the_first_rank_of_any_launcher():
    assert [guess_rank(environment) for environment in ({}, BATCH, SRUN, OPEN_MPI, MPICH, NAMED)] == [
        0,
        0,
        3,
        1,
        1,
        1,
    ]
