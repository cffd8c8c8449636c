"""`cmake --install`: the tree, the library as a stranger's project finds it, the man pages, the
completions and the unit.

EINSUMD_BUILD_DIR is the build that is installed; by default build/release.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
import pytest

from conftest import Site, serving, small_weights
from daemon import BUILD_DIR, EINSUMCTL, EINSUMD, REPOSITORY, run
from must import must

EXAMPLE = REPOSITORY / "client/example"
PAGES = ["einsumd.8.gz", "einsumctl.1.gz", "einsumd.json.5.gz"]
EXPOSURE_MAX = 1.4  # of `systemd-analyze security`: "OK"; devices and the network are what is left


@dataclass
class Tree:
    """What `cmake --install` has put under one prefix."""

    prefix: Path

    def find(self, pattern: str) -> Path:
        """The one file of that name."""
        found = sorted(self.prefix.rglob(pattern))
        assert len(found) == 1, f"{pattern}: {found}"
        return found[0]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    prefix = tmp_path_factory.mktemp("installed") / "prefix"
    must("cmake", "--install", BUILD_DIR, "--prefix", prefix)
    return Tree(prefix)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("site"), small_weights(), 256) as site:
        yield site


# --- the tree -------------------------------------------------------------------------------------


def test_programs_run_from_where_they_are(installed: Tree) -> None:
    for name in ("einsumd", "einsumctl"):
        program = next(path for path in installed.prefix.glob(f"*bin/{name}"))
        assert must(program, "--version").startswith(f"{name} ")
        needed = must("ldd", program)
        assert "not found" not in needed
        # A driver is asked for at run time, and nothing else of CUDA's.
        assert not re.search(r"cuda|nvrtc|cublas|libnv", needed), needed


def test_an_edited_configuration_is_kept(installed: Tree) -> None:
    config = installed.find("einsumd.json")
    must(EINSUMD, "--config", config, "--check-config")
    edited = json.loads(config.read_text()) | {"log_level": "debug"}
    config.write_text(json.dumps(edited))
    must("cmake", "--install", BUILD_DIR, "--prefix", installed.prefix)
    assert json.loads(config.read_text()) == edited


# --- the client library ---------------------------------------------------------------------------


def symbols(*arguments: object) -> set[str]:
    lines = must("nm", "--defined-only", *arguments).splitlines()
    return {line.split()[-1] for line in lines if len(line.split()) == 3}


def test_library_shows_its_api_and_nothing_else(installed: Tree) -> None:
    header = installed.find("einsum_client.h").read_text()
    api = set(re.findall(r"EINSUM_CLIENT_API[^;]*?\b(einsum_client_\w+)\(", header))
    assert len(api) > 20
    library = installed.find("libeinsum_client.so.*.*.*")
    assert symbols("--dynamic", library) == api
    assert symbols("--extern-only", installed.find("libeinsum_client.a")) == api

    dynamic = must("readelf", "--dynamic", library)
    soname = re.search(r"SONAME.*\[(.+)\]", dynamic)[1]
    assert re.fullmatch(r"libeinsum_client\.so\.\d+", soname)
    assert (library.parent / soname).resolve() == library
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic
    assert installed.find("libeinsum_client.so").is_symlink()


def check_answer(site: Site, program: Path, library_path: Path | None = None) -> None:
    """The example's program asks for ones times the first weight; the oracle knows the answer."""
    environment = os.environ | ({"LD_LIBRARY_PATH": str(library_path)} if library_path else {})
    done = subprocess.run(
        [program, site.daemon.address], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    name, weight = next(iter(sorted(site.weights.items())))
    label, values = done.stdout.strip().split(": ")
    assert label == f"{name} {weight.groups} {weight.output_dim}"
    rows = weight.exact[0, :8]
    bound = np.abs(rows).sum(axis=1) * weight.reduced_dim * 2.0**-24  # of any FP32 summation
    got = np.array([float(value) for value in values.split()])
    assert got.shape == (8,)
    assert np.all(np.abs(got - rows.sum(axis=1)) <= bound), (got, rows.sum(axis=1))


@pytest.mark.parametrize(
    "compiler, source, arguments",
    [
        ("cc", "ask.c", ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]),
        ("c++", "ask.cc", ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]),
    ],
)
@pytest.mark.parametrize("static", [False, True], ids=["shared", "static"])
def test_pkg_config(
    tmp_path: Path,
    installed: Tree,
    site: Site,
    compiler: str,
    source: str,
    arguments: list[str],
    static: bool,
) -> None:
    pc = installed.find("einsumd_client.pc")
    environment = os.environ | {"PKG_CONFIG_PATH": str(pc.parent)}

    def pkg_config(*options: str) -> list[str]:
        command = ["pkg-config", *options, "einsumd_client"]
        return subprocess.check_output(command, text=True, env=environment).split()

    assert pkg_config("--modversion")[0] == must(EINSUMD, "--version").split()[1]
    libraries = pkg_config("--libs", *(["--static"] if static else []))
    if static:  # the archive, and all else as it comes
        libraries = ["-l:libeinsum_client.a" if "leinsum" in word else word for word in libraries]
    program = tmp_path / "ask"
    must(compiler, *arguments, *pkg_config("--cflags"), EXAMPLE / source, *libraries, "-o", program)
    linked = must("readelf", "--dynamic", program)
    assert ("libeinsum_client.so." in linked) != static
    check_answer(site, program, installed.find("libeinsum_client.so").parent)


def test_find_package(tmp_path: Path, installed: Tree, site: Site) -> None:
    # Moved first: nothing in it may know where it was installed.
    moved = tmp_path / "moved"
    shutil.copytree(installed.prefix, moved, symlinks=True)
    must("cmake", "-G", "Ninja", "-S", EXAMPLE, "-B", tmp_path / "build",
         f"-DCMAKE_PREFIX_PATH={moved}")  # fmt: skip
    must("cmake", "--build", tmp_path / "build")
    for name in ("ask", "ask_static", "ask_cxx"):
        check_answer(site, tmp_path / "build" / name)


def test_find_package_refuses_another_version(tmp_path: Path, installed: Tree) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(old LANGUAGES C)\n"
        "find_package(einsumd_client 99 REQUIRED)\n"
    )
    done = run(
        "cmake", "-G", "Ninja", "-S", tmp_path, "-B", tmp_path / "b",
        f"-DCMAKE_PREFIX_PATH={installed.prefix}",
    )
    assert done.returncode != 0 and "99" in done.stderr


# --- man pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_man_page_is_clean(installed: Tree, name: str) -> None:
    page = installed.find(name)
    shown = run("mandoc", "-T", "lint", "-W", "warning", page)
    assert (shown.returncode, shown.stdout) == (0, ""), shown.stdout
    done = run("man", "--warnings", "--encoding=UTF-8", "--ditroff", "--local-file", page)
    assert (done.returncode, done.stderr) == (0, "")


def test_man_pages_say_what_the_programs_say(installed: Tree) -> None:
    keys = re.findall(r"^  ([a-z][\w.\[\]]*) ", must(EINSUMD, "--help-config"), re.M)[1:]
    assert len(keys) > 50
    page = gzip.decompress(installed.find("einsumd.json.5.gz").read_bytes()).decode()
    assert re.findall(r"^\.TP\n\.B (.+)$", page, re.M) == keys

    overview = must(EINSUMCTL, "--help")
    commands = re.findall(r"^  ([a-z-]+) +\S", overview.split("options")[0], re.M)
    page = gzip.decompress(installed.find("einsumctl.1.gz").read_bytes()).decode()
    page = page.replace("\\-", "-")
    assert re.findall(r"^\.SS (.+)$", page, re.M) == commands
    for command in ["", *commands]:
        text = must(EINSUMCTL, *([command] if command else []), "--help")
        for option in re.findall(r"^  (--[a-z0-9-]+)", text, re.M):
            assert re.search(rf"^\.B {option}( |$)", page, re.M), option


# --- completion -----------------------------------------------------------------------------------

COMPLETE = """
. /usr/share/bash-completion/bash_completion
. "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
_"${1##*/}" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    "line, expected",
    [
        ("einsumd --", {"--config", "--check-config", "--help-config", "--version", "--help"}),
        ("einsumd --config deploy/package/", {"deploy/package/einsumd.json"}),
        ("einsumctl ", {"info", "health", "weights", "make-checkpoint"}),
        ("einsumctl he", {"health"}),
        ("einsumctl --endpoint localhost:1 se", {"selftest"}),
        ("einsumctl --json be", {"bench"}),
        ("einsumctl bench --tra", {"--transport"}),
        ("einsumctl bench --en", {"--endpoint"}),
        ("einsumctl weights ", {"list", "get", "load", "unload"}),
        ("einsumctl weights load --rope-cache-t", {"--rope-cache-tensor"}),
        ("einsumctl run --scales deploy/einsumd.ex", {"deploy/einsumd.example.json"}),
        ("einsumctl check --checkpoint deplo", {"deploy"}),
    ],
)
def test_completion(installed: Tree, line: str, expected: set[str]) -> None:
    words = line.split(" ")
    words[0] = str(BUILD_DIR / words[0])
    script = installed.find(f"completions/{Path(words[0]).name}")
    done = run("bash", "-c", COMPLETE, "bash", script, *words, cwd=REPOSITORY)
    assert done.stderr == ""
    offered = set(done.stdout.split())
    assert expected <= offered
    prefix = words[-1]
    assert all(word.startswith(prefix) for word in offered), offered
    if prefix and not prefix.endswith(("-", "/")):
        assert offered == expected


# --- the unit -------------------------------------------------------------------------------------


@pytest.fixture
def unit(tmp_path: Path, installed: Tree) -> Path:
    """The installed unit, with the programs where they are here."""
    text = installed.find("einsumd.service").read_text()
    text, n = re.subn(r"ExecStart=\S+", f"ExecStart={EINSUMD}", text)
    assert n == 1
    path = tmp_path / "einsumd.service"
    path.write_text(text)
    return path


def test_systemd_finds_no_fault_with_the_unit(unit: Path) -> None:
    done = run("systemd-analyze", "verify", "--man=no", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_exposure(unit: Path) -> None:
    done = run("systemd-analyze", "security", "--offline=yes", "--no-pager", unit)
    score = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert score, done.stdout + done.stderr
    print(f"exposure {score[1]}")
    assert float(score[1]) <= EXPOSURE_MAX, done.stdout
