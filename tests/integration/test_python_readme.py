"""The examples of client/python/README.md run as they stand there, one after another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Iterator

import pytest

import python_package
from conftest import Site, serving, small_weights

README = python_package.PACKAGE / "README.md"
BLOCK = re.compile(r"^```(python[^\n]*)\n(.*?)^```$", re.M | re.S)
ENDPOINT = "unix:/run/einsumd/einsumd.sock"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("readme")
    with serving(
        folder, small_weights(), 256,
        listen=[f"unix:{folder}/einsumd.sock"],
        shared_memory_listen=f"unix:{folder}/shared.sock",
    ) as site:  # fmt: skip
        yield site


def test_examples(site: Site, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    einsumd = python_package.einsumd()
    blocks = BLOCK.findall(README.read_text())
    assert len(blocks) >= 6 and any(kind == "python torch" for kind, _ in blocks)
    names: dict[str, Any] = {}
    skipped = 0
    try:
        for i, (kind, text) in enumerate(blocks):
            if kind == "python torch" and python_package.torch() is None:
                skipped += 1
                continue
            assert ENDPOINT in text or "client" in text
            # In a file of its own: torch.compile reads the source.
            file = tmp_path / f"example{i}.py"
            file.write_text(text.replace(ENDPOINT, site.daemon.address))
            exec(compile(file.read_text(), file, "exec"), names)
    finally:
        for each in names.values():
            if isinstance(each, einsumd.Client):
                each.close()
        einsumd.set_default_client(None)
    said = capsys.readouterr().out
    assert "us of it queued" in said and "by strides" in said and "NOT_FOUND" in said
    assert "ring" in said
    if skipped:
        pytest.skip(
            "no torch (deploy/install-dependencies.sh --torch); the other examples are right"
        )
    assert "torch.Size([5, 4, 256])" in said
