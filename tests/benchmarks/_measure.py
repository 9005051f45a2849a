"""What the benchmarks share: the clock that knows compilation, and a description of the machine."""

import contextlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator

import jax

PACKAGES = ("jax", "jaxlib", "numpyro", "flowjax", "equinox", "optax", "numpy")


class Clock:
    """Seconds of a block: on the wall, of the CPU, and spent in tracing, lowering and compiling.

    JAX reports how long each of its compile phases took, when it ends. Phases nest (a jitted
    function is traced while another is), so the length of the union of their intervals counts.
    """

    def __init__(self):
        self.wall = self.cpu = self.compile = 0.0
        self._phases: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            self._phases.append((end - duration, end))

    @contextlib.contextmanager
    def measure(self) -> Iterator["Clock"]:
        """Afterwards `wall`, `cpu` and `compile` are those of the block."""
        self._phases.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield self
        finally:
            self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu
            self.compile, until = 0.0, -float("inf")
            for start, end in sorted(self._phases):
                self.compile += max(0.0, end - max(start, until))
                until = max(until, end)


def machine() -> str:
    """Cores, versions and load, in two lines."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    cores = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    return f"{cores}, {versions}\nload averages over 1, 5 and 15 minutes: {load}"


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """A markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
