"""The rules of the house that a reader relies on, checked on the tree itself."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import vflow

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("vflow/**/*.py"), *ROOT.glob("kernels/**/*.py")])
EVERYTHING = sorted(
    [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/**/*.py"), ROOT / "conftest.py"]
)
PACKAGES = [path for path in SOURCES if path.name == "__init__.py" and path.parent.name != "vflow"]


def name_of(path):
    """The import name of a file below vflow/ or kernels/."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative(path):
    return str(path.relative_to(ROOT))


def exported(tree):
    """The list assigned to `__all__`, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def is_namespace(name):
    return not any(part.startswith("_") for part in name.split("."))


@pytest.mark.parametrize("path", EVERYTHING, ids=relative)
def test_no_file_is_longer_than_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_implementation_files_are_private_and_assert_nothing(path):
    assert path.name.startswith("_")
    asserts = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
    assert asserts == [], "raise ValueError, TypeError, ProgramError or FitError instead"


@pytest.mark.parametrize("path", PACKAGES, ids=relative)
def test_a_package_is_re_exports_and_a_sorted_all(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    names = exported(tree)
    assert names is not None
    assert names == sorted(names, key=lambda name: (not name.isupper(), name))  # ruff's order
    imported = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(imported) == sorted(names)
    kinds = {type(node) for node in tree.body[1:]}
    assert kinds <= {ast.ImportFrom, ast.Assign}


def test_each_public_name_has_one_home():
    homes = {}
    for path in PACKAGES:
        name = name_of(path)
        for public in exported(ast.parse(path.read_text())) or ():
            homes.setdefault(public, []).append(name)
    # A package may show what its own private part holds; siblings may not share a name.
    shared = {
        public: names
        for public, names in homes.items()
        if len({n for n in names if not any(n.startswith(m + ".") for m in names)}) > 1
    }
    assert shared == {}


def has_docstring(thing):
    text = getattr(thing, "__doc__", None)
    # A dataclass without a docstring is given its signature.
    generated = text is not None and text.startswith(f"{getattr(thing, '__name__', '')}(")
    return bool(text) and not generated


def test_top_level_is_sorted_and_documented():
    assert vflow.__all__ == sorted(vflow.__all__)
    assert [name for name in vflow.__all__ if not has_docstring(getattr(vflow, name))] == []


def test_every_namespace_is_reachable_from_the_top():
    names = {
        name_of(path).split(".")[1]
        for path in PACKAGES
        if is_namespace(name_of(path))
        and name_of(path).startswith("vflow.")
        and name_of(path).count(".") == 1
    }
    hidden = {"fit"}  # vf.fit is the function
    assert names - hidden <= set(vflow.__all__)


@pytest.mark.parametrize(
    "path", [path for path in PACKAGES if is_namespace(name_of(path))], ids=relative
)
def test_every_public_name_is_documented(path):
    package = importlib.import_module(name_of(path))
    assert has_docstring(package)
    bare = [name for name in package.__all__ if not has_docstring(getattr(package, name))]
    assert bare == []


def test_import_creates_no_array_and_loads_no_optional_package():
    code = """
import sys
import vflow
import jax
heavy = ("distrax", "tensorflow_probability", "blackjax", "arviz", "matplotlib")
print([m for m in sys.modules if m.split("_")[0].split(".")[0] in heavy or m.startswith(heavy)])
print(len(jax.live_arrays()))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert out.split("\n")[:2] == ["[]", "0"]


def test_import_starts_no_backend():
    """Which devices there are may still be settled after the import: `jax.distributed`, XLA_FLAGS."""
    code = "import jax; jax.config.update('jax_platforms', 'no_such_platform'); import vflow"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_private_jax_and_unchecked_shard_map_are_not_used():
    private, unchecked = "jax." + "_src", "check_vma" + "=False"
    texts = {relative(path): path.read_text() for path in EVERYTHING}
    assert [name for name, text in texts.items() if private in text] == []
    # Without the check, gradients through a replicated value are silently wrong.
    assert [name for name, text in texts.items() if unchecked in text] == []


def test_jax_extend_is_used_in_one_module_at_most():
    users = [relative(path) for path in SOURCES if "jax." + "extend" in path.read_text()]
    assert len(users) <= 1, users
