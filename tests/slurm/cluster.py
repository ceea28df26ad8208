"""A private SLURM cluster on this machine, for the tests and by hand: munged, slurmctld and one slurmd a
node, on loopback.

Each node has namespaces of its own (hostname, mounts, processes): `node1` on 127.0.0.11, and so on. Its /tmp,
/dev/shm and /etc/hosts are private; the folders to share are mounted into its /tmp and stand for the shared
file system. To kill such a namespace is a power loss: the slurmd and every task die at once. Nothing of the
machine is changed, there is no systemd and there are no cgroups, and all processes are known by number and
start time, so that only our own are ever ended.

    python tests/slurm/cluster.py up [--nodes N] [--cpus N] [--folder DIR]
    python tests/slurm/cluster.py down [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from cluster_settings import slurm_conf
from processes import children, free_ports, start_time, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPORARY = Path("/tmp")
PACKAGES = "slurmctld slurmd slurm-client munge"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare", "setpriv", "mount")
NAMESPACES = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
UNFINISHED = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "REQUEUED",
    "RESIZING",
}
STARTED = "processes"  # a file for each process of the cluster: its number and its start time


def missing() -> str | None:
    """Why no cluster can be started on this machine, in one line; None where it can."""
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install --no-install-recommends {PACKAGES})"
    if os.geteuid() != 0:
        return "it needs root, for namespaces and mounts"
    trial = subprocess.run(
        [*NAMESPACES, "mount", "-t", "tmpfs", "none", "/dev/shm"], capture_output=True, text=True
    )
    if trial.returncode:
        return f"namespaces are not permitted here ({trial.stderr.strip().splitlines()[-1]})"
    return None


class Cluster:
    """``nodes`` nodes (`node1` ...) of ``cpus`` cores each. All state is in ``folder``; the repository, the
    running Python and ``shared`` are seen by all nodes, the rest of /tmp is not. The processes die with the
    one that started them, unless ``lasting``.
    """

    def __init__(
        self, folder: Path, nodes: int = 2, cpus: int = 4, shared: Iterable[Path] = (), lasting: bool = False
    ) -> None:
        self.folder = folder.resolve()
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.cpus = cpus
        self.shared = sorted(
            {path.resolve() for path in (REPOSITORY, Path(sys.prefix), self.folder, *shared)}
        )
        self.lasting = lasting
        self.settings = self.folder / "slurm.conf"
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment["SLURM_CONF"] = str(self.settings)
        self._children: dict[str, subprocess.Popen] = {}

    # --- start and stop

    def up(self) -> None:
        """Start the cluster and wait until all nodes are usable.

        A folder that a killed cluster left is cleaned. Raises FileExistsError if a cluster runs in it, or
        if it contains something else.
        """
        if self.folder.exists() and any(self.folder.iterdir()):
            if not (self.folder / STARTED).is_dir():
                raise FileExistsError(f"{self.folder} is not empty and holds no cluster")
            if self.running("slurmctld") and self.running("munged"):
                raise FileExistsError(f"a cluster runs already: SLURM_CONF={self.settings}")
            self.down()
        try:
            self._configure()
            munge = self.folder / "munge"
            files = {name: f"--{name}-file={munge / name}" for name in ("key", "seed", "pid", "log")}
            self._start("munged", "munged", "--foreground", f"--socket={munge}/socket", *files.values())
            wait_until((munge / "socket").exists, 10, "munged's socket")
            self._start(
                "slurmctld",
                *NAMESPACES,
                "sh",
                "-c",
                f"hostname controller && exec slurmctld -D -f {shlex.quote(str(self.settings))}",
            )
            for name in self.nodes:
                self._start_node(name)
            self._wait_usable(self.nodes)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End every process of the cluster, its jobs included, and remove the folder."""
        started = self.folder / STARTED
        for name in sorted(
            (path.name for path in started.glob("*")), reverse=True
        ):  # slurmctld, nodes, munged
            self._kill(name)
        if started.is_dir():
            shutil.rmtree(self.folder)

    def _configure(self) -> None:
        for name in (STARTED, "munge", "state", "spool", "log"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munged asks for it
        key = self.folder / "munge/key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        nodes = {name: f"127.0.0.{10 + number}" for number, name in enumerate(self.nodes, 1)}
        self.settings.write_text(slurm_conf(self.folder, free_ports(len(nodes) + 1), nodes, self.cpus))
        hosts = [f"{address} {name}\n" for name, address in nodes.items()]
        (self.folder / "hosts").write_text("127.0.0.1 localhost controller\n" + "".join(hosts))

    def _start_node(self, name: str) -> None:
        private, quote = self.folder / name, shlex.quote
        (private / "tmp").mkdir(parents=True, exist_ok=True)
        lines = [
            f"hostname {name}",
            f"mount --bind {quote(str(self.folder / 'hosts'))} /etc/hosts",
            "mount -t tmpfs none /dev/shm",
        ]
        for path in self.shared:
            if path.is_relative_to(TEMPORARY):
                inside = private / "tmp" / path.relative_to(TEMPORARY)
                lines += [
                    f"mkdir -p {quote(str(inside))}",
                    f"mount --rbind {quote(str(path))} {quote(str(inside))}",
                ]
        lines = [
            "set -e",
            *lines,
            f"mount --rbind {quote(str(private / 'tmp'))} /tmp",
            "chmod 1777 /tmp",
            "cd /",
        ]
        # The shell stays, as the namespace's first process, to reap what loses its parent; slurmd would leave
        # zombies.
        slurmd = f"slurmd -D -N {name} -f {quote(str(self.settings))} & wait $!"
        self._start(name, *NAMESPACES, "sh", "-c", "\n".join([*lines, slurmd]))

    def _start(self, name: str, *command: str) -> None:
        tied = [] if self.lasting else ["setpriv", "--pdeathsig", "KILL"]
        with (self.folder / f"log/{name}.out").open("ab") as log:
            child = subprocess.Popen(
                [*tied, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        (self.folder / STARTED / name).write_text(f"{child.pid} {start_time(child.pid)}")
        self._children[name] = child

    def _process(self, name: str) -> int | None:
        """Its number, if it runs and is ours."""
        try:
            process, start = (self.folder / STARTED / name).read_text().split()
        except (OSError, ValueError):
            return None
        return int(process) if start_time(int(process)) == start else None

    def running(self, name: str) -> bool:
        """Whether "munged", "slurmctld" or a node runs."""
        return self._process(name) is not None

    def _kill(self, name: str) -> None:
        process = self._process(name)
        if process is not None:
            # The first process of the namespace, if it has one: it is gone only when all others in there are,
            # and unshare then ends.
            os.kill(next(iter(children(process)), process), signal.SIGKILL)
            wait_until(lambda: not self.running(name), 20, f"the end of {name}")
        if name in self._children:
            self._children.pop(name).wait()
        (self.folder / STARTED / name).unlink(missing_ok=True)

    # --- nodes

    def node_states(self) -> dict[str, str]:
        """Of each node what `sinfo` calls it: "idle", "mixed", "allocated", "down", "completing" ..., with a
        `*` if it does not answer.
        """
        listed = self.run(
            "sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False
        )  # fails while slurmctld starts
        return dict(line.split() for line in listed.stdout.splitlines())

    def node_down(self, name: str) -> None:
        """Set the node down until :meth:`resume`, as an administrator does.

        Its jobs are requeued or fail at once.
        """
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def power_off(self, name: str) -> None:
        """Power loss: slurmd and all tasks are gone, and nobody says so to slurmctld."""
        self._kill(name)

    def power_on(self, name: str) -> None:
        """Start a node again after :meth:`power_off`, and wait until it is usable.

        The node is first set down. A real boot takes so long that slurmctld notices the loss; here the node
        is back at once, and slurmctld would keep jobs whose tasks on it are gone.
        """
        self.node_down(name)
        self._start_node(name)
        self.resume(name)

    def resume(self, name: str) -> None:
        """Bring a node back after :meth:`node_down`, and wait until it is usable."""
        self.run("scontrol", "update", f"nodename={name}", "state=resume")
        self._wait_usable([name])

    def _wait_usable(self, names: Iterable[str]) -> None:
        def usable() -> bool:
            for name in ("munged", "slurmctld", *names):
                if not self.running(name):
                    raise RuntimeError(f"{name} ended: {self.daemon_log(name)[-2000:]}")
            states = self.node_states()
            return all(states.get(name) in ("idle", "planned", "mixed", "allocated") for name in names)

        wait_until(usable, 60, f"usable {', '.join(names)}")

    def daemon_log(self, name: str) -> str:
        """Return what "munged", "slurmctld" or a node's slurmd wrote."""
        return "".join(
            path.read_text(errors="replace") for path in sorted((self.folder / "log").glob(f"*{name}.*"))
        )

    def _end_orphans(self, name: str) -> None:
        """Kill the processes that jobs left behind on a node.

        Without cgroups, SLURM loses track of processes whose parent ended before the job did.
        """
        for first in children(self._process(name) or 0):
            for process in children(first):
                try:
                    if (
                        not Path(f"/proc/{process}/comm").read_text().startswith("slurm")
                    ):  # slurmd, slurmstepd
                        os.kill(process, signal.SIGKILL)
                except OSError:
                    continue

    # --- jobs

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 60, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command (`srun`, `scontrol` ...) of this cluster; ``options`` go to `subprocess.run`.
        Raises RuntimeError with what it said where it fails and ``check``.

        A busy slurmctld may close a connection before it has read the request. SIGPIPE then ends the client,
        and nothing was done: it is run again.
        """
        options = {"env": self.environment, **options}
        words, end = [str(word) for word in command], time.monotonic() + timeout
        while True:
            done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, **options)  # type: ignore[call-overload]
            if done.returncode != -signal.SIGPIPE or time.monotonic() > end:
                break
            time.sleep(0.2)
        if check and done.returncode:
            raise RuntimeError(
                f"{shlex.join(done.args)} returned {done.returncode}: {done.stderr.strip()} "
                f"{done.stdout.strip()}"
            )
        return done

    def submit(self, script: Path | None, *arguments: str | Path, **options: object) -> int:
        """`sbatch --option=value ... SCRIPT ARGUMENT ...`; returns the job's number. ``ntasks_per_node=2`` is
        `--ntasks-per-node=2`, ``requeue=True`` is `--requeue`; without a script give ``wrap="command"``."""
        words = [
            "--" + name.replace("_", "-") + ("" if value is True else f"={value}")
            for name, value in options.items()
        ]
        words += [str(script)] if script else []
        return int(self.run("sbatch", "--parsable", *words, *arguments).stdout.split(";")[0])

    def show(self, job: int) -> list[dict[str, str]]:
        """Return the fields of `scontrol show job`: one record, or for an array one record for each task."""
        lines = self.run("scontrol", "--oneliner", "show", "job", str(job)).stdout.splitlines()
        return [dict(re.findall(r"(?:^| )([A-Z]\w*(?::\w+)?)=(\S*)", line)) for line in lines if line]

    def state(self, job: int) -> str:
        """`PENDING`, `RUNNING`, `COMPLETED`, `FAILED` ...; of an array that of an unfinished task, else of
        one that is not COMPLETED.
        """
        states = [record["JobState"] for record in self.show(job)]
        return min(states, key=lambda state: (state not in UNFINISHED, state == "COMPLETED"))

    def wait(self, job: int, timeout: float = 60) -> str:
        """Wait until the job ends, and return its final state.

        Raises TimeoutError, with the end of the job's log, if it has not ended after ``timeout`` seconds.
        """
        end = time.monotonic() + timeout
        while (state := self.state(job)) in UNFINISHED:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"job {job} is still {state} after {timeout:.0f} s: {self.log(job)[-2000:]}"
                )
            time.sleep(0.2)
        return state

    def requeues(self, job: int) -> int:
        """How often the job was put back into the queue."""
        return int(self.show(job)[0]["Restarts"])

    def log(self, job: int) -> str:
        """Return the output so far of the job's script and tasks; for an array, of all its tasks."""
        paths = sorted({Path(record["StdOut"]) for record in self.show(job) if "StdOut" in record})
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def cancel_all(self) -> None:
        """Kill all jobs at once (SIGKILL), and wait until they are gone."""
        asked: set[str] = set()

        def gone() -> bool:
            queued = set(self.run("squeue", "--noheader", "--format=%A %T").stdout.splitlines())
            if jobs := [
                line.split()[0] for line in queued - asked
            ]:  # asked again in another state, as a requeued job may be
                self.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
                self.run("scancel", *jobs, check=False)
                asked.update(queued)
            return not queued

        wait_until(gone, 60, "the end of all jobs")

    def tidy(self) -> None:
        """No jobs, and every node idle again, whatever was done to it."""
        for name in self.nodes:
            if not self.running(name):
                self._start_node(name)
        self.cancel_all()
        for name, state in self.node_states().items():
            if state.startswith(("down", "drain")):
                self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
            self._end_orphans(name)
        self._wait_usable(self.nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description="A private SLURM cluster on this machine.")
    parser.add_argument("do", choices=["up", "down"])
    parser.add_argument("--nodes", type=int, choices=range(1, 5), default=2)
    parser.add_argument("--cpus", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=TEMPORARY / "lsmoe-slurm")
    arguments = parser.parse_args()
    cluster = Cluster(arguments.folder, arguments.nodes, arguments.cpus, lasting=True)
    if arguments.do == "down":
        cluster.down()
        return
    if reason := missing():
        sys.exit(reason)
    try:
        cluster.up()
    except FileExistsError as error:
        sys.exit(str(error))
    stop = f"python {sys.argv[0]} down --folder {cluster.folder}"
    print(
        f"export SLURM_CONF={shlex.quote(str(cluster.settings))}  # {len(cluster.nodes)} nodes are idle; to "
        f"stop them: {stop}"
    )


if __name__ == "__main__":
    main()
