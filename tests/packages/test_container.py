"""The image: built by buildah as the Dockerfile says, on a Debian that debootstrap made and that is
given the stock one's name; run with a read-only root, as its own user, without a privilege.

Neither a registry nor a container engine is needed: buildah's chroot isolation builds, and
systemd-nspawn runs what the image's configuration says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Iterator

import pytest

import machine
from checkpoints import write_checkpoint
from conftest import small_weights
from daemon import REPOSITORY, run, wait_until
from machine import NSPAWN
from must import must

pytestmark = pytest.mark.slow

STORE = REPOSITORY / "build/packages/images"
IMAGE = "localhost/einsumd:test"
BASES = ["docker.io/library/debian:bookworm", "docker.io/library/debian:bookworm-slim"]
ADDED_BYTES_MAX = 150_000_000  # to the base


def buildah(*arguments: object, timeout: float = 120) -> str:
    where = ["--root", STORE, "--runroot", "/run/einsumd-test-images"]
    return must("buildah", *where, *arguments, timeout=timeout).strip()


class Image:
    def __init__(self, root: Path, config: dict[str, Any], added_bytes: int):
        self.root = root
        self.config = config
        self.added_bytes = added_bytes


def file_bytes(root: Path) -> int:
    return int(must("du", "--summarize", "--bytes", "--one-file-system", root).split()[0])


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    reason = machine.why_not()
    if reason:
        pytest.skip(reason)
    base = machine.base()
    shutil.rmtree(STORE, ignore_errors=True)
    try:
        scratch = buildah("from", "scratch")
        buildah("add", "--quiet", scratch, base, "/")
        # As the stock ones are; what the image adds is counted from there.
        buildah("run", "--isolation", "chroot", scratch, "--", "sh", "-c",
                "rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin")  # fmt: skip
        base_bytes = file_bytes(Path(buildah("mount", scratch)))
        buildah("umount", scratch)
        for name in BASES:
            buildah("commit", "--quiet", scratch, name)
        buildah("rm", scratch)
        buildah("build", "--isolation", "chroot", "--format", "docker", "--pull-never",
                "--tag", IMAGE, REPOSITORY, timeout=900)  # fmt: skip
        config = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
        container = buildah("from", "--pull-never", IMAGE)
        root = Path(buildah("mount", container))
        yield Image(root, config, file_bytes(root) - base_bytes)
        buildah("umount", container)
    finally:
        buildah("rm", "--all")
        buildah("rmi", "--all", "--force")
        shutil.rmtree(STORE, ignore_errors=True)


def test_image_is_small_and_tells_what_is_in_it(image: Image) -> None:
    print(f"{image.added_bytes / 1e6:.0f} MB beside the base")
    assert 0 < image.added_bytes < ADDED_BYTES_MAX
    listed = (image.root / "usr/share/doc/einsumd/packages.tsv").read_text()
    packages = dict(line.split("\t")[:2] for line in listed.splitlines())
    installed = must("dpkg-query", f"--admindir={image.root}/var/lib/dpkg", "--show",
                     "--showformat", "${Package} ${Version}\\n")  # fmt: skip
    assert packages.items() > dict(line.split() for line in installed.splitlines()).items()
    assert re.fullmatch(r"\d+\.\d+\.\d+", packages["einsumd"])
    assert "libgrpc29" in packages and not any("-dev" in name for name in packages)
    for pattern in ("libcud*", "libcublas*", "libnv*"):
        assert not list((image.root / "usr").rglob(pattern))


def test_image_says_how_it_is_run(image: Image) -> None:
    user = image.config["User"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "Kubernetes' runAsNonRoot needs a number"
    assert image.config["StopSignal"] == "SIGTERM"
    assert "50061/tcp" in image.config["ExposedPorts"]
    assert image.config["Healthcheck"]["Test"][0] == "CMD"


class Container:
    """What an engine does with the image, `--read-only --cap-drop ALL`. Files of the host are
    bound where `binds` says. Use as a context manager."""

    def __init__(self, image: Image, binds: dict[str, Path]):
        self.image = image
        command = image.config["Entrypoint"] + image.config["Cmd"]
        self.nspawn = subprocess.Popen(
            [*NSPAWN, str(image.root), "--read-only", "--private-network", "--user=einsumd",
             "--drop-capability=all", "--no-new-privileges=yes",
             *(f"--bind-ro={source}:{target}" for target, source in binds.items()),
             "--", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        if self.nspawn.poll() is None:
            os.kill(self.pid or self.nspawn.pid, signal.SIGKILL)
        print(self.nspawn.communicate(timeout=30)[0])

    @property
    def pid(self) -> int:
        return machine.first_process(self.nspawn)

    def do(self, *command: object) -> subprocess.CompletedProcess:
        """As `docker exec`."""
        uid, gid = self.image.config["User"].split(":")
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--root"]
        return run(*enter, f"--setuid={uid}", f"--setgid={gid}", "--", *command)

    def healthy(self) -> bool:
        return self.do(*self.image.config["Healthcheck"]["Test"][1:]).returncode == 0


def test_image_serves_and_drains(tmp_path: Path, image: Image) -> None:
    write_checkpoint(tmp_path / "models/made", small_weights())
    config = json.loads((image.root / "etc/einsumd/einsumd.json").read_text())
    config["weights"] = [{"path": "made", "output_dim": 256}]
    config["lame_duck_ms"] = 1000
    (tmp_path / "einsumd.json").write_text(json.dumps(config))
    must("chmod", "--recursive", "a+rX", tmp_path)  # for the container's user
    binds = {"/models": tmp_path / "models", "/etc/einsumd/einsumd.json": tmp_path / "einsumd.json"}
    with Container(image, binds) as container:
        wait_until(container.healthy, timeout=30, what="the image's own health check")
        selftest = container.do("einsumctl", "selftest")
        assert selftest.returncode == 0, selftest.stdout + selftest.stderr
        assert container.do("touch", "/models/x", "/etc/x", "/x").returncode != 0

        status = Path(f"/proc/{container.pid}/status").read_text()
        uid = image.config["User"].split(":")[0]
        assert re.search(rf"^Uid:\t{uid}\t{uid}\t", status, re.M)
        for kind in ("CapPrm", "CapEff", "CapBnd"):
            assert re.search(rf"^{kind}:\t0+$", status, re.M), status

        os.kill(container.pid, signal.SIGTERM)
        wait_until(lambda: not container.healthy(), what="not healthy in the lame duck's time")
        log, _ = container.nspawn.communicate(timeout=30)
        assert container.nspawn.returncode == 0, log
    events = [json.loads(line)["msg"] for line in log.splitlines() if line.startswith("{")]
    assert events.index("ready") < events.index("draining") < events.index("stopped")


def test_image_serves_without_any_file_of_the_host(image: Image) -> None:
    """As shipped: no weights, but it answers."""
    with Container(image, {}) as container:
        wait_until(container.healthy, timeout=30)
        info = container.do("einsumctl", "--json", "weights", "list")
        assert json.loads(info.stdout) == {"weights": []}, info
        os.kill(container.pid, signal.SIGTERM)
        assert container.nspawn.wait(30) == 0


# --- compose --------------------------------------------------------------------------------------

COMPOSE = REPOSITORY / "deploy/compose/compose.yaml"


def test_compose_file_is_valid(tmp_path: Path) -> None:
    environment = {"MODELS": str(tmp_path)}
    done = subprocess.run(
        ["docker-compose", "--file", COMPOSE, "config"],
        capture_output=True, text=True, timeout=60, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said in ("read_only: true", "- gpu", str(tmp_path), "no-new-privileges:true"):
        assert said in done.stdout
    without = run("docker-compose", "--file", COMPOSE, "config")
    assert without.returncode != 0 and "a folder of checkpoints" in without.stderr


def test_compose_configuration_is_valid(image: Image, tmp_path: Path) -> None:
    einsumd = image.root / "usr/sbin/einsumd"
    must(einsumd, "--config", COMPOSE.parent / "einsumd.json", "--check-config")
