"""One run over two "hosts": network namespaces with their own addresses, which share only a folder.

Needs root and iproute2, and is skipped elsewhere.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from programs import DEBUG, metrics

HOSTS = {f"chargpt-{os.getpid()}-{number}": f"10.213.77.{number}" for number in (1, 2)}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """{namespace: its address}, connected by a virtual cable; each believes to be this machine."""
    first, second = HOSTS
    ends = [f"veth{os.getpid() % 10_000}{end}" for end in "ab"]
    folders = [Path("/etc/netns") / name for name in HOSTS]
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", first, "type", "veth", "peer", ends[1], "netns", second)
        for (name, address), end, folder in zip(HOSTS.items(), ends, folders, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
            # Collectives on a CPU listen where the machine's own name leads
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(
                f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
            )
    except (OSError, subprocess.CalledProcessError) as error:
        remove(folders)
        pytest.skip(f"no network namespaces here ({error})")
    yield HOSTS
    remove(folders)


def remove(folders: list[Path]) -> None:
    for name, folder in zip(HOSTS, folders, strict=True):
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        (folder / "hosts").unlink(missing_ok=True)
        if folder.is_dir():
            folder.rmdir()


def test_two_hosts_that_share_a_folder_train_one_model(hosts: dict[str, str], tmp_path: Path):
    coordinator = next(iter(hosts.values()))
    processes = []
    for number, name in enumerate(hosts):
        home = tmp_path / name
        home.mkdir()
        where = [f"distributed.coordinator={coordinator}:29500", "distributed.num_processes=2"]
        where += [f"distributed.process_id={number}", "distributed.initialization_timeout=60"]
        command = [sys.executable, str(ROOT / "main.py"), *DEBUG, *where, "parallel.fsdp=true"]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command, f"hydra.run.dir={tmp_path / 'shared'}"],
                cwd=home,
                env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "HOME": str(home)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    summary = json.loads((tmp_path / "shared" / "summary.json").read_text())
    assert summary["num_devices"] == 2 and len(metrics(tmp_path / "shared")) == 4
    assert not any((tmp_path / name / "outputs").exists() for name in hosts)
