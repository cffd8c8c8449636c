"""The Debian packages: made, judged by lintian, installed on a Debian 12 that is booted with
systemd, used, upgraded, removed and purged there."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Iterator

import pytest

import machine
from daemon import REPOSITORY, run, wait_until
from machine import Machine
from must import must

pytestmark = pytest.mark.slow

BUILD = REPOSITORY / "build/package"
NAMES = ["einsumd", "libeinsum-client0", "libeinsum-client-dev"]
# What lintian says and is meant so.
LINTIAN_KNOWN = [
    "copyright-without-copyright-notice",  # the source has no licence file, and none is made up
    "initial-upload-closes-no-bugs",  # of Debian's own archive
    "maintscript-calls-ldconfig",  # CPack's script, beside the trigger that replaced it
]


@pytest.fixture(scope="module")
def packages() -> dict[str, Path]:
    """By name. Without CUDA, whose kernels take minutes to compile and change nothing here."""
    must("cmake", "--preset", "package", "-DEINSUMD_CUDA=OFF", cwd=REPOSITORY)
    shutil.rmtree(BUILD / "packages", ignore_errors=True)
    must("cmake", "--build", BUILD, "--target", "package", timeout=900)
    files = {path.name.split("_")[0]: path for path in (BUILD / "packages").glob("*.deb")}
    assert sorted(files) == sorted(NAMES)
    return files


def field(package: Path, name: str) -> str:
    return must("dpkg-deb", "--field", package, name).strip()


def test_lintian(packages: dict[str, Path]) -> None:
    done = run("lintian", "--allow-root", "--fail-on=error,warning",
               "--suppress-tags", ",".join(LINTIAN_KNOWN), *packages.values())  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_control(packages: dict[str, Path]) -> None:
    version = must(BUILD / "einsumd", "--version").split()[1]
    assert {field(package, "Version") for package in packages.values()} == {f"{version}-1"}
    depends = field(packages["einsumd"], "Depends")
    for library in ("libgrpc29", "libuv1", "libjansson4", "libprotobuf-c1", "libsystemd0"):
        assert library in depends  # found by dpkg-shlibdeps
    assert "cuda" not in depends and "-dev" not in depends
    exact = f"libeinsum-client0 (= {version}-1)"
    assert field(packages["libeinsum-client-dev"], "Depends") == exact


# --- on a machine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computer(packages: dict[str, Path]) -> Iterator[Machine]:
    reason = machine.why_not()
    if reason:
        pytest.skip(reason)
    with Machine() as computer:
        for package in packages.values():
            shutil.copy(package, computer.root / "root")
        yield computer


def active(computer: Machine) -> str:
    return computer.try_("systemctl", "is-active", "einsumd").stdout.strip()


def main_pid(computer: Machine) -> int:
    return int(computer.do("systemctl", "show", "--property=MainPID", "--value", "einsumd"))


def test_life_of_an_installation(packages: dict[str, Path], computer: Machine) -> None:
    """In order, since each step starts where the last one ended."""
    # Installing: apt finds what is needed.
    files = [f"/root/{package.name}" for package in packages.values()]
    computer.do("apt-get", "-qq", "install", "--yes", "--no-install-recommends", *files,
                timeout=300)  # fmt: skip
    assert "/libeinsum_client.so.0" in computer.do("ldconfig", "-p")
    assert computer.do("getent", "passwd", "einsumd").endswith(":/usr/sbin/nologin\n")

    # Booting: enabled, ready when systemd says so, as its own user.
    computer.boot()
    assert active(computer) == "active", computer.journal()
    assert computer.do("einsumctl", "health") == "SERVING\n"
    status = computer.do("systemctl", "show", "einsumd", "--property=StatusText,User,NRestarts")
    assert "StatusText=serving on 127.0.0.1:50061,unix:/run/einsumd/einsumd.sock" in status
    assert "User=einsumd" in status and "NRestarts=0" in status
    socket = computer.do("stat", "--format=%a %U %G", "/run/einsumd/einsumd.sock")
    assert socket == "660 einsumd einsumd\n"
    assert computer.do("systemd-analyze", "verify", "--man=no", "einsumd.service") == ""

    check_serves(computer)
    check_watchdog(computer)
    check_configuration(computer)
    check_upgrade(computer, files)
    check_removal(computer)


def check_serves(computer: Machine) -> None:
    """A checkpoint where the packaged configuration looks for it, under the unit's confinement."""
    models = "/var/lib/einsumd/models"
    computer.do("einsumctl", "make-checkpoint", "--layers", "1", f"{models}/made", timeout=120)
    config = {
        "listen": ["127.0.0.1:50061", "unix:/run/einsumd/einsumd.sock"],
        "shared_memory_listen": "unix:/run/einsumd/shared.sock",
        "weights_roots": [models],
        "weights": [{"path": "made"}],
    }
    (computer.root / "etc/einsumd/einsumd.json").write_text(json.dumps(config))
    computer.do("systemctl", "restart", "einsumd")
    for transport in ("grpc", "ring"):
        computer.do("einsumctl", "--endpoint", "unix:/run/einsumd/einsumd.sock", "check",
                    "--checkpoint", f"{models}/made", "--tokens", "1,8", "--transport", transport,
                    timeout=120)  # fmt: skip
    computer.do("einsumctl", "selftest")


def check_watchdog(computer: Machine) -> None:
    """One that hangs is killed and started again."""
    drop_in = computer.root / "run/systemd/system/einsumd.service.d"
    computer.do("mkdir", "-p", "/run/systemd/system/einsumd.service.d")
    computer.do("sh", "-c", "printf '[Service]\\nWatchdogSec=2\\n' > "
                "/run/systemd/system/einsumd.service.d/watchdog.conf")  # fmt: skip
    computer.do("systemctl", "daemon-reload")
    computer.do("systemctl", "restart", "einsumd")
    hung = main_pid(computer)
    time.sleep(5)
    assert main_pid(computer) == hung, f"killed though alive:\n{computer.journal()}"
    computer.do("sh", "-c", f"kill -STOP {hung}")
    wait_until(lambda: main_pid(computer) not in (0, hung) and active(computer) == "active",
               timeout=30, what="started again")  # fmt: skip
    assert "watchdog" in computer.journal().lower()
    computer.do("rm", "-r", f"/{drop_in.relative_to(computer.root)}")
    computer.do("systemctl", "daemon-reload")


def check_configuration(computer: Machine) -> None:
    """A wrong one is said once, not tried for ever; SIGTERM ends in 0."""
    config = computer.root / "etc/einsumd/einsumd.json"
    good = config.read_text()
    config.write_text('{"lissten": []}')
    assert computer.try_("systemctl", "restart", "einsumd").returncode != 0
    time.sleep(2)  # RestartSec is 1
    assert active(computer) == "failed"
    assert 'did you mean "listen"?' in computer.journal()
    shown = computer.do("systemctl", "show", "einsumd", "--property=ExecMainStatus,Result")
    assert "ExecMainStatus=2" in shown

    config.write_text(good)
    computer.do("systemctl", "restart", "einsumd")
    computer.do("systemctl", "stop", "einsumd")
    shown = computer.do("systemctl", "show", "einsumd", "--property=ExecMainStatus,Result")
    assert "ExecMainStatus=0" in shown and "Result=success" in shown
    computer.do("systemctl", "start", "einsumd")


def check_upgrade(computer: Machine, files: list[str]) -> None:
    """The same again stands for a newer one: the service restarts, the configuration stays."""
    config = computer.root / "etc/einsumd/einsumd.json"
    before, pid = config.read_text(), main_pid(computer)
    computer.do("dpkg", "--install", *files)
    assert config.read_text() == before
    assert active(computer) == "active" and main_pid(computer) != pid


def check_removal(computer: Machine) -> None:
    computer.do("dpkg", "--remove", *NAMES)
    assert active(computer) != "active"
    assert not computer.try_("pgrep", "-x", "einsumd").stdout
    left = computer.do("find", "/etc/einsumd", "/usr", "-xdev", "-name", "*einsum*")
    assert left.split() == ["/etc/einsumd", "/etc/einsumd/einsumd.json"]

    computer.do("rm", "-r", "/var/lib/einsumd/models/made")  # the administrator's, not ours
    computer.do("dpkg", "--purge", *NAMES)
    found = computer.do("find", "/", "-xdev", "-name", "*einsum*", "-not", "-path", "/root/*")
    assert found == ""
    assert not re.search("einsum", computer.do("dpkg", "--get-selections"))
    assert computer.do("systemctl", "list-units", "--all", "--no-legend", "einsumd*") == ""
