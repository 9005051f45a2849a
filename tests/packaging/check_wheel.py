"""Build the sdist, the wheel from the sdist, and use the wheel away from the tree.

In a clean environment with the declared dependencies only; then beside an installed package that
owns the import name `kernels`, in both orders of installation.
"""

import pathlib
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

SMOKE = """
import pathlib, sys
import vflow as vf, vflow_kernels
for module in (vf, vflow_kernels):
    folder = pathlib.Path(module.__file__).parent
    assert folder.is_relative_to(sys.prefix), folder
    assert (folder / "py.typed").is_file(), folder
assert vf.__version__ == sys.argv[1], vf.__version__
import jax
posterior = vf.fit(
    jax.random.key(0),
    vf.Target(lambda x: -0.5 * (x**2).sum(), 2),
    num_steps=50,
    progress=False,
)
assert abs(float(posterior.elbo) - 1.8379) < 0.1, posterior.elbo
print("smoke test: vflow", vf.__version__, posterior.status)
"""

BESIDE = """
import kernels, vflow, vflow_kernels
assert kernels.OWNER == "somebody else", kernels.__file__
print("beside another package named kernels: ok")
"""


def run(*command, cwd):
    print("+", *(str(part) if "\n" not in str(part) else "..." for part in command), flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def other_kernels(folder):
    """A wheel of a package that owns the import name `kernels`."""
    wheel = folder / "somebodys_kernels-1.0-py3-none-any.whl"
    info = "somebodys_kernels-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("kernels/__init__.py", 'OWNER = "somebody else"\n')
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: somebodys-kernels\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        files = ("kernels/__init__.py", f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD")
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in files))
    return wheel


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        dist = folder / "dist"
        run(sys.executable, "-m", "build", "--outdir", dist, ROOT, cwd=folder)
        (wheel,) = dist.glob("*.whl")
        version = wheel.name.split("-")[1]
        # The tool finds its settings from the working directory.
        run(pathlib.Path(sys.executable).parent / "check-wheel-contents", wheel, cwd=ROOT)

        run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
        python = folder / "env" / "bin" / "python"
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(*pip, "install", wheel, cwd=folder)
        run(*pip, "check", cwd=folder)
        run(python, "-I", "-c", SMOKE, version, cwd=folder)

        other = other_kernels(folder)
        run(*pip, "install", "--no-deps", other, cwd=folder)
        run(python, "-I", "-c", BESIDE, cwd=folder)
        run(*pip, "uninstall", "-y", "vflow-jax", cwd=folder)
        run(*pip, "install", "--no-deps", wheel, cwd=folder)
        run(python, "-I", "-c", BESIDE, cwd=folder)
        run(*pip, "uninstall", "-y", "vflow-jax", cwd=folder)
        run(python, "-I", "-c", "import kernels; kernels.OWNER", cwd=folder)
    print("wheel: ok")


if __name__ == "__main__":
    main()
