"""What the documents show runs as it stands: their Python blocks, in order, in a new process."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_CODE = [path for path in DOCUMENTS if BLOCK.search(path.read_text())]


def relative(path):
    return str(path.relative_to(ROOT))


def test_the_first_documents_show_code():
    assert {"README.md", "docs/index.md"} <= {relative(path) for path in WITH_CODE}


def groups():
    """A process for the pages of a folder: starting one takes as long as most pages."""
    found = {}
    for path in WITH_CODE:
        found.setdefault(relative(path.parent), []).append(path)
    return found


# README and the first page at once; guides and family pages, minutes of compilation, in `make slow`.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "group",
    [
        pytest.param(group, marks=pytest.mark.slow if group.startswith("docs/") else ())
        for group in groups()
    ],
)
def test_blocks_run(group, tmp_path):
    script = tmp_path / "blocks.py"
    pages = {relative(path): "\n".join(BLOCK.findall(path.read_text())) for path in groups()[group]}
    script.write_text(
        f"pages = {pages!r}\n"
        "for name, code in pages.items():\n"
        '    exec(compile(code, name, "exec"), {"__name__": "__main__"})\n'
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # time is compilation
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_between_documents_resolve(path):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
