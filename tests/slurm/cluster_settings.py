"""The slurm.conf of the private cluster.

What SLURM 22.05 was seen to do here, and scripts and launchers must reckon with:

- A batch script without srun already has SLURM_PROCID=0 and SLURM_NTASKS of the whole job, but no
  SLURM_STEP_*; the shell of salloc has no SLURM_PROCID. Only tasks of srun have SLURM_STEP_ID,
  SLURM_STEP_NUM_TASKS and SLURM_STEP_NODELIST.
- Open MPI's mpirun starts one daemon on each further node by srun: its ranks there have
  SLURM_STEP_NUM_TASKS=1, SLURM_NTASKS=1 and SLURM_PROCID=0, those beside mpirun the batch script's. MPICH's:
  a step of one task a node. So OMPI_COMM_WORLD_* and PMI_RANK count before SLURM_PROCID; `srun --mpi=pmi2`
  sets PMI_RANK too, to the same number.
- srun forwards SIGUSR1 to all tasks. On SIGTERM it kills them at once (SIGKILL), on SIGINT it only asks back.
  Both mpiruns forward SIGUSR1; on SIGTERM MPICH's forwards that, Open MPI's gives each node a second.
- `scancel JOB`, a node set down, `scontrol requeue` and the time limit: SIGCONT and SIGTERM to tasks and
  batch shell, SIGKILL after KillWait. Preemption: the same to the tasks alone, and to all of them again after
  GraceTime.
- `scancel -s` without -b or -f signals the tasks only, `--signal=B:` the batch shell only, up to a minute
  early.
- `mpirun` (Open MPI) and `srun --mpi=pmix` run mpi4py over two nodes as they are; as root mpirun wants
  OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1. Debian's MPICH works as a launcher; its
  library also needs UCX_TLS=tcp,self, as the nodes look like one machine to UCX, and mpi4py's wheel looks for
  it as libmpi.so.12, which Debian calls libmpich.so.12.
- srun returns the highest status of a task, 137 if one was killed; --kill-on-bad-exit ends the others 5 s
  (KillWait) after the first.
"""

from __future__ import annotations

import random
from pathlib import Path

# config_overrides: nodes may claim more cores than the machine has. cred_expire: a requeued job waits that
# long (else two minutes). SlurmdTimeout: how soon a power loss is noticed. MinJobAge: an ended job can be
# asked about for that long.
SETTINGS = """\
ClusterName=private
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
InactiveLimit=0
KillWait=5
MinJobAge=3600
FirstJobId={first_job}
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=5
"""
NODE = (
    "NodeName={name} NodeAddr={address} Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=1000000 State=UNKNOWN\n"
)
# A job in `urgent` preempts those in `main`, which are asked to leave and killed 10 s later, then requeued.
PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def slurm_conf(folder: Path, port: int, nodes: dict[str, str], cpus: int) -> str:
    """For ``nodes`` (name -> address) of ``cpus`` cores; slurmctld listens on ``port``, the nodes on those
    after it.
    """
    # Ports that jobs make of their numbers must differ between clusters, which share one loopback.
    lines = [SETTINGS.format(port=port, folder=folder, first_job=random.randrange(1000, 60000))]
    for number, (name, address) in enumerate(nodes.items(), 1):
        lines.append(NODE.format(name=name, address=address, port=port + number, cpus=cpus))
    return "".join([*lines, PARTITIONS])
