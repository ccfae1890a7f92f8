"""Settings and launchers, from environments written down as dictionaries."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import pytest

from aiocomm._control.address import UnixAddress, parse
from aiocomm._world import World, detect, first_host
from aiocomm.config import Settings, environment_world, resolve_world, variable
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
OMPI_LOCAL = {**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-host-12@1"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "991",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def found(env: dict[str, str], parent: int = 7) -> World:
    return detect(env, uid=1000, parent=parent)


# Launchers


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World(rank=0, size=1)),
        ({"AIOCOMM_ADDRESS": "tcp://h:1"}, World(address="tcp://h:1")),
        (
            {"AIOCOMM_ADDRESS": "unix://@x", "AIOCOMM_RANK": "1", "AIOCOMM_SIZE": "2"},
            World(address="unix://@x", rank=1, size=2),
        ),
        ({"AIOCOMM_ADDRESS": "unix://@x", "AIOCOMM_RANK": "0"}, World(address="unix://@x", rank=0)),
        (
            {"AIOCOMM_ADDRESS": "unix://@x", "AIOCOMM_RANK": "0", "AIOCOMM_SIZE": ""},
            World(address="unix://@x", rank=0),
        ),
        ({"AIOCOMM_ADDRESS": " unix://@x\n", "AIOCOMM_RANK": ""}, World(address="unix://@x")),
        ({**TORCHRUN, "AIOCOMM_RANK": "", "AIOCOMM_PORT": ""}, World("tcp://node0:29501", 3, 8)),
        (TORCHRUN, World(address="tcp://node0:29501", rank=3, size=8)),
        ({**TORCHRUN, "AIOCOMM_ADDRESS": "env://"}, World(address="tcp://node0:29501", rank=3, size=8)),
        ({"AIOCOMM_ADDRESS": "env://"}, World(rank=0, size=1)),
        ({**TORCHRUN, "MASTER_PORT": "65535"}, World(address="tcp://node0:65534", rank=3, size=8)),
        ({**TORCHRUN, "MASTER_ADDR": "fd00::1"}, World(address="tcp://[fd00::1]:29501", rank=3, size=8)),
        ({**TORCHRUN, "MASTER_ADDR": "[fd00::1]"}, World(address="tcp://[fd00::1]:29501", rank=3, size=8)),
        ({**TORCHRUN, "AIOCOMM_PORT": "7000"}, World(address="tcp://node0:7000", rank=3, size=8)),
        ({**TORCHRUN, "AIOCOMM_ADDRESS": "file:///x"}, World(address="file:///x", rank=3, size=8)),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, World(rank=0, size=1)),
        ({**OMPI, "AIOCOMM_ADDRESS": "tcp://h:1"}, World(address="tcp://h:1", rank=1, size=4)),
        ({**HYDRA, "AIOCOMM_ADDRESS": "tcp://h:1"}, World(address="tcp://h:1", rank=1, size=2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, World(rank=0, size=1)),
        ({**SLURM, "AIOCOMM_PORT": "7000"}, World(address="tcp://gpu07:7000", rank=5, size=8)),
        (  # srun --mpi=pmi2
            {**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8", "AIOCOMM_PORT": "7000"},
            World(address="tcp://gpu07:7000", rank=5, size=8),
        ),
        (  # mpiexec, which has had Slurm start its own processes
            {**SLURM, **HYDRA, "AIOCOMM_ADDRESS": "tcp://h:1"},
            World(address="tcp://h:1", rank=1, size=2),
        ),
    ],
)
def test_launchers(env: dict[str, str], world: World) -> None:
    assert found(env) == world


@pytest.mark.parametrize(
    "env",
    [
        {**TORCHRUN, "LOCAL_WORLD_SIZE": "8"},
        OMPI_LOCAL,
        {**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_MCA_ess_base_jobid": "77"},
        HYDRA,
        {**SLURM, "SLURM_STEP_NUM_NODES": "1"},
    ],
    ids=["torchrun", "Open MPI 5", "Open MPI 4", "Hydra", "Slurm"],
)
def test_processes_on_one_host_meet_without_a_token(env: dict[str, str]) -> None:
    world = found(env)
    assert world.address is not None
    address = parse(world.address)
    assert isinstance(address, UnixAddress)
    assert address.is_abstract
    assert found(env) == world
    assert found({**env, "PATH": "/bin"}).address == world.address


@pytest.mark.parametrize(
    ("env", "change"),
    [
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, {"MASTER_PORT": "29600"}),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, {"TORCHELASTIC_RESTART_COUNT": "1"}),
        (OMPI_LOCAL, {"PMIX_NAMESPACE": "prterun-host-13@1"}),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "1"}, {"SLURM_STEP_ID": "3"}),
        (SLURM, {"SLURM_JOB_ID": "992"}),
    ],
)
def test_another_job_meets_elsewhere(env: dict[str, str], change: dict[str, str]) -> None:
    assert found({**env, **change}).address != found(env).address


def test_two_users_and_two_hydra_runs_meet_elsewhere() -> None:
    assert detect(HYDRA, uid=1, parent=7).address != detect(HYDRA, uid=2, parent=7).address
    assert found(HYDRA, parent=7).address != found(HYDRA, parent=8).address


def test_the_port_of_a_slurm_job_is_below_the_ephemeral_ones() -> None:
    for job in range(200):
        address = found({**SLURM, "SLURM_JOB_ID": str(job)}).address
        assert address is not None
        assert 20000 <= int(address.rpartition(":")[2]) < 32000


def test_our_own_launcher_goes_first_then_torchrun() -> None:
    own = {"AIOCOMM_ADDRESS": "unix://@x", "AIOCOMM_RANK": "0", "AIOCOMM_SIZE": "2"}
    assert found({**SLURM, **OMPI, **TORCHRUN, **own}).address == "unix://@x"
    assert found({**SLURM, **OMPI, **TORCHRUN}).size == 8
    assert found({**SLURM, **OMPI_LOCAL}).size == 4


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        (OMPI, "Open MPI does not say where rank 0 is; set AIOCOMM_ADDRESS"),
        ({**HYDRA, "MPI_LOCALNRANKS": "1"}, "Hydra does not say"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "Slurm does not say"),
        ({**TORCHRUN, "RANK": "three"}, "RANK must be a whole number, not 'three'"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 is not within a world of 8"),
        ({**TORCHRUN, "RANK": "-1"}, "rank -1 is not within"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, r"MASTER_PORT must be a port \(1 to 65535\), not 0"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, r"MASTER_PORT must be a port \(1 to 65535\), not 99999"),
        ({**TORCHRUN, "AIOCOMM_PORT": "-1"}, r"AIOCOMM_PORT must be a port \(1 to 65535\), not -1"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "no member"),
        ({"AIOCOMM_ADDRESS": "unix://@x", "AIOCOMM_RANK": "1"}, "rank=0 only to host it"),
        (
            {"AIOCOMM_ADDRESS": "unix://@x", "AIOCOMM_SIZE": "2"},
            "AIOCOMM_SIZE is set, but AIOCOMM_RANK is not",
        ),
    ],
)
def test_environments_that_make_no_sense(env: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        found(env)


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        ({"AIOCOMM_RANK": "1", "AIOCOMM_SIZE": "2"}, "AIOCOMM_SIZE are set, but AIOCOMM_ADDRESS is not"),
        (
            {"AIOCOMM_RANK": "1", "AIOCOMM_SIZE": "2", "AIOCOMM_ADDRESS": "env://"},
            "AIOCOMM_SIZE are set, but AIOCOMM_ADDRESS is not",
        ),
        ({"AIOCOMM_RANK": "0"}, "AIOCOMM_RANK is set, but AIOCOMM_SIZE and AIOCOMM_ADDRESS are not"),
        ({"AIOCOMM_RANK": "a"}, "AIOCOMM_RANK must be a whole number"),
        ({"AIOCOMM_SIZE": "2"}, "AIOCOMM_SIZE is set, but AIOCOMM_RANK and AIOCOMM_ADDRESS are not"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT are not"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "but MASTER_PORT is not"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "but OMPI_COMM_WORLD_SIZE is not"),
        ({"PMI_RANK": "1"}, "but PMI_SIZE is not"),
        ({"PMI_SIZE": "2"}, "but PMI_RANK is not"),
        ({"PMI_SIZE": "2", "PMI_RANK": ""}, "but PMI_RANK is not"),
    ],
)
def test_half_a_launcher_is_no_world_of_one(env: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        found(env)
    assert found({**env, **SLURM}).size == 8  # beside a whole launcher it does not matter


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "", "MASTER_PORT": ""},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": ""},
        {"OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": ""},
        {"PMI_RANK": "", "PMI_SIZE": " "},
        {"AIOCOMM_RANK": "", "AIOCOMM_SIZE": "", "AIOCOMM_ADDRESS": " "},
        {"MASTER_ADDR": "h", "MASTER_PORT": "1"},
        {"AIOCOMM_RANK": "0", "AIOCOMM_SIZE": "1"},
        {"AIOCOMM_RANK": "", "AIOCOMM_SIZE": ""},
    ],
)
def test_what_is_not_half_a_launcher_is_a_world_of_one(env: dict[str, str]) -> None:
    assert found(env) == World(rank=0, size=1)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[3,1]", "gpu3"),
        ("rack[2-3]node[10-11]", "rack2node10"),
        ("a[1-2]-ib,b", "a1-ib"),
        ("login,gpu[1-2]", "login"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["gpu[", "gpu[1-2", "gpu[]"])
def test_broken_node_lists(nodes: str) -> None:
    with pytest.raises(UsageError, match="set AIOCOMM_ADDRESS"):
        first_host(nodes)


# connect's arguments and the environment


def test_an_explicit_address_does_not_mix_with_the_launcher() -> None:
    world = resolve_world("tcp://h:1", name="decode", token="t", env=TORCHRUN)
    assert world == World(address="tcp://h:1", name="decode", token="t")
    world = resolve_world("tcp://h:1", rank=1, size=2, env=TORCHRUN)
    assert (world.rank, world.size) == (1, 2)


@pytest.mark.parametrize("address", [None, "env://"])
def test_without_an_address_the_launcher_decides(address: str | None) -> None:
    env = {
        **TORCHRUN,
        "AIOCOMM_TOKEN": "t",
        "AIOCOMM_NAME": "n",
        "AIOCOMM_LINKS": "tcp, shm",
        "AIOCOMM_TIMEOUT_S": "3",
    }
    world = resolve_world(address, env=env)
    assert world.address == "tcp://node0:29501"
    assert (world.token, world.name, world.links, world.timeout_s) == ("t", "n", ("tcp", "shm"), 3.0)
    assert resolve_world(address, token="u", links=("shm",), timeout_s=1.0, env=env).token == "u"


def test_a_world_of_one_ignores_the_launcher() -> None:
    assert resolve_world(size=1, env=TORCHRUN).address is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"rank": 0, "size": 2}, "needs an address"),
        ({"address": "tcp://h:1", "size": 2}, "needs rank= too"),
        ({"address": "tcp://h:1", "rank": 3}, "deals out the ranks"),
        ({"address": "tcp://h:1", "rank": 2, "size": 2}, "not within a world of 2"),
        ({"address": "tcp://h:1", "timeout_s": 0.0}, "timeout_s must be positive"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        resolve_world(**arguments, env={})


def test_a_token_file_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("secret\n")
    path.chmod(0o600)
    env = {"AIOCOMM_TOKEN_FILE": str(path)}
    assert resolve_world("tcp://h:1", env=env).token == "secret"
    assert resolve_world("tcp://h:1", env={**env, "AIOCOMM_TOKEN": "other"}).token == "other"
    path.chmod(0o640)
    with pytest.raises(UsageError, match="open to other users"):
        resolve_world("tcp://h:1", env=env)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        resolve_world("tcp://h:1", env=env)
    with pytest.raises(UsageError, match="cannot read"):
        resolve_world("tcp://h:1", env={"AIOCOMM_TOKEN_FILE": str(tmp_path / "absent")})


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("AIOCOMM_", "SLURM_", "OMPI_", "PMI_", "PMIX_")) or name in TORCHRUN:
            monkeypatch.delenv(name)
    assert environment_world() == World(rank=0, size=1)
    monkeypatch.setenv("AIOCOMM_ADDRESS", "unix://@x")
    assert environment_world().address == "unix://@x"


# Settings


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("eager_max", "4096", 4096),
        ("eager_max", "64KiB", 65536),
        ("eager_max", "64k", 65536),
        ("ring_bytes", "2 MiB", 2 << 20),
        ("unexpected_bytes", "1G", 1 << 30),
        ("preempt_s", "50us", 50e-6),
        ("preempt_s", "1.5ms", 1.5e-3),
        ("heartbeat_s", "2", 2.0),
        ("heartbeat_s", "2s", 2.0),
        ("engine_spin_s", "0", 0.0),
        ("engine_spin_s", "1e-5", 1e-5),
        ("min_share", "0.1", 0.1),
        ("tcp_streams", "4", 4),
        ("cma", "off", "off"),
        ("links", "shm,tcp", ("shm", "tcp")),
        ("rdma_devices", "a,b:1,c,d,", "a,b:1,c,d,"),
        ("host", "10.0.0.7", "10.0.0.7"),
        ("host", " 10.0.0.7\n", "10.0.0.7"),
        ("host", "[fd77::2]", "fd77::2"),
        ("host", "fe80::1%eth0", "fe80::1%eth0"),
        ("host", "gpu-07.cluster_a.example", "gpu-07.cluster_a.example"),
        ("drain_timeout_s", "1e9", 1e9),
        ("log_level", "debug", "DEBUG"),
    ],
)
def test_settings_from_the_environment(name: str, text: str, value: object) -> None:
    read = getattr(Settings.from_environment({variable(name): text}), name)
    assert read == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("eager_max", "many", "must be a number of bytes, not 'many'"),
        ("eager_max", "-1", "must be a number of bytes"),
        ("eager_max", "64 furlongs", "must be a number of bytes"),
        ("queue_depth", "3.5", "must be a number of operations"),
        ("queue_depth", "1", "at least 16 operations"),
        ("preempt_s", "fast", "must be a number of seconds"),
        ("preempt_s", "0", "at least 1e-06 seconds"),
        ("heartbeat_s", "5000", "at most 3600"),
        ("min_share", "nan", "at least 0"),
        ("min_share", "5%", "must be a fraction, such as 0.05, not '5%'"),
        ("rdma_devices", "a,b:1,c,d,e", "AIOCOMM_RDMA_DEVICES names 5, and no more than 4 are used"),
        ("rdma_gid_index", "first", "must be a whole number, not 'first'"),
        ("min_share", "0.9", r"at most 0\.5, not 0\.9"),
        ("cma", "maybe", "one of auto, allow, off, not 'maybe'"),
        ("log_level", "loud", "one of DEBUG"),
        ("drain_timeout_s", "1e12", "at most 1000000000.0 seconds"),
        ("pair_idle_s", "1e12", "at most"),
        ("timeout_s", "1e12", "at most"),
        *(
            ("host", host, "AIOCOMM_HOST must be one name or address of this host")
            for host in (
                "10.0.0.7:7000",
                "tcp://10.0.0.7",
                "[10.0.0.7",
                "10.0.0.300",
                "0.0.0.0",
                "::",
                "*",
                "a" * 64,
            )
        ),
        *(
            ("host", host, "without a port")
            for host in ("gpu 1", "gpu1,gpu2", "-gpu", "gpu1/", "10.0.0", " ")
        ),
        ("tls_cert", "/c.pem", "both AIOCOMM_TLS_CERT and AIOCOMM_TLS_CA"),
        ("tls_key", "/k.pem", "without AIOCOMM_TLS_CERT"),
    ],
)
def test_settings_that_are_refused(name: str, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        Settings.from_environment({variable(name): text})
    assert "AIOCOMM_" in str(caught.value)


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert Settings.from_environment({"AIOCOMM_EAGER_MAX": ""}) == Settings()


def test_copy_threads_never_exceed_the_cores() -> None:
    assert Settings(copy_threads=64).copy_threads == min(64, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (3, 2), (8, 2), (12, 3), (16, 4), (128, 4)])
def test_a_quarter_of_many_cores_copies(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert Settings().copy_threads == threads
    assert Settings().native()["cores"] == cores


def test_what_the_engine_gets() -> None:
    native = Settings(eager_max=1, cma="off").native()
    assert native["eager_max"] == 1
    assert native["cma"] == "off"
    assert all(isinstance(value, (int, float, str)) for value in native.values())
    assert not {"tls_key", "log_level", "links"} & set(native)


def test_every_setting_is_documented() -> None:
    rows = Settings.reference()
    assert [row[0] for row in rows] == [variable(item.name) for item in dataclasses.fields(Settings)]
    assert all(text.endswith(".") for *_, text in rows)


@pytest.mark.parametrize("text", ["0", "15", "0,0,3,4", " 1, 2 ,3,4 "])
def test_service_levels_are_one_for_all_or_one_per_class(text: str) -> None:
    settings = Settings.from_environment({"AIOCOMM_RDMA_SERVICE_LEVEL": text})
    assert settings.native()["rdma_service_level"] == text


@pytest.mark.parametrize("text", ["16", "-1", "1,2", "0,0,3,16", "0,0,3,4,5", "urgent", "1,,2,3", "²"])
def test_what_is_no_service_level_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="RDMA_SERVICE_LEVEL must be a number from 0 to 15, or four"):
        Settings.from_environment({"AIOCOMM_RDMA_SERVICE_LEVEL": text})
