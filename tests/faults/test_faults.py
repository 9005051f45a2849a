"""Faults in mid-course: nothing is lost, nothing non-finite passes for a result."""

import multiprocessing
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vflow as vf
from tests.faults.killed import TARGET, numbers, posterior
from vflow.fit._checkpoint import Checkpoint
from vflow.fit._dtype import default_dtype, scope
from vflow.fit._loop import Ascent, LoopState
from vflow.fit._save import read_state, write_state

KEY = jax.random.key(0)
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ascent():
    def value_and_grad(key, params):
        noise = 0.1 * jax.random.normal(key, (2,))
        return jax.value_and_grad(lambda x: -jnp.sum((x - 1.0 + noise) ** 2))(params)

    return Ascent(value_and_grad, optax.adam(0.05), chunk=10)


def run(ascent, seed, num_steps=30, **options):
    return ascent.run(jax.random.key(seed), jnp.zeros(2), num_steps, **options)


def test_a_run_killed_after_its_last_step_is_not_trained_further(ascent):
    states = []
    rule = {"converged": lambda values: len(values) >= 20}
    whole = run(ascent, 0, save=states.append, **rule)
    again = run(ascent, 0, resume=states[-1], **rule)
    assert (whole.stopped, again.stopped) == ("converged", "converged")
    np.testing.assert_array_equal(whole.params, again.params)
    np.testing.assert_array_equal(whole.values, again.values)


def test_ctrl_c_from_the_keyboard(ascent):
    """A real SIGINT, not only the exception."""
    # A process that was started in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcome = run(ascent, 1, callback=lambda report: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.stopped == "interrupted" and len(outcome.values) == 10


def test_what_breaks_once_is_skipped_and_what_breaks_for_good_raises():
    """Value and gradient, once in ten steps; then for good from a certain point on."""

    def sometimes(key, params, edge, bad):
        def objective(x):
            broken = (jax.random.uniform(key) < 0.1) | (x[0] > edge)
            return -jnp.where(broken, bad, 1.0) * jnp.sum((x - 1.0) ** 2)

        return jax.value_and_grad(objective)(params)

    training = Ascent(sometimes, optax.adam(0.05), chunk=50)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        outcome = training.run(KEY, jnp.zeros(2), 100, inputs=(jnp.inf, bad))
        assert 1 <= np.isnan(outcome.values).sum() < 30
        assert np.abs(outcome.params - 1.0).max() < 0.5
        with pytest.raises(vf.FitError, match="not finite") as caught:
            training.run(KEY, jnp.zeros(2), 200, inputs=(0.5, bad))
        assert np.isfinite(caught.value.last_good).all()


def test_a_full_disk_leaves_the_old_file_as_it_was(tmp_path):
    """The kernel refuses the bytes (a limit on the size of files), in the middle of writing."""
    path = tmp_path / "steps"
    file = Checkpoint(path, {"dim": 2})
    flow = vf.flows.gaussian(KEY, 2)
    state = LoopState(100, flow, optax.adam(0.1).init(flow), np.zeros(100))
    file.save(flow, state, 0, np.zeros(0), {})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            file.save(flow, state._replace(step=200), 0, np.zeros(0), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["steps"]
    file.save(flow, state._replace(step=200), 0, np.zeros(0), {})
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda whole: whole[: len(whole) // 2], "incomplete"),
        (lambda whole: whole[:-9] + b"x" + whole[-8:], "damaged"),
        (lambda whole: b"PK" + bytes(300), "was not written by vflow"),
        (lambda whole: whole.replace(b"checkpoint 1", b"checkpoint 9", 1), "format 9.*update"),
        (lambda whole: whole.replace(b"checkpoint 1", b"posterior 1", 1), "holds a posterior"),
        (lambda whole: whole, "belongs to another fit"),
    ],
    ids=["truncated", "damaged", "foreign", "newer", "posterior", "another fit"],
)
def test_a_checkpoint_that_is_none_stops_a_fit_before_it_starts(tmp_path, change, match):
    path = tmp_path / "steps"
    write_state(path, {"identity": {"dim": 3}, "settings": {}}, jnp.zeros(50), kind="checkpoint")
    changed = change(path.read_bytes())
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=match) as caught:
        vf.fit(KEY, TARGET, checkpoint=path, progress=False)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == changed  # it is not ours to overwrite


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    path = tmp_path / "state"
    write_state(path, {"step": 1}, jnp.arange(3.0), kind="checkpoint")
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 2
    for length in (*range(first_line), *range(first_line, len(whole), 7)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="incomplete|not written by vflow"):
            read_state(path, jnp.zeros(3), kind="checkpoint")


def in_threads(tasks):
    """What each task returns, all started together."""
    results, barrier = [None] * len(tasks), threading.Barrier(len(tasks))

    def work(i):
        barrier.wait()
        try:
            results[i] = tasks[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tasks))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return results


def test_runs_in_threads_do_not_meet(ascent, tmp_path):
    together = in_threads([lambda seed=seed: run(ascent, seed).params for seed in range(4)])
    for seed, params in enumerate(together):
        np.testing.assert_array_equal(params, run(ascent, seed).params)

    def dtypes(dtype):
        with jax.enable_x64(False), scope(dtype):
            return {default_dtype() for _ in range(200)}

    types = in_threads([lambda d=d: dtypes(d) for d in ("float32", "float64")])
    assert types == [{"float32"}, {"float64"}]
    path = tmp_path / "one"
    tasks = [lambda i=i: write_state(path, {}, jnp.full(100, i), kind="x") for i in range(4)]
    assert in_threads(tasks) == [None] * 4  # the last one wins, whole
    assert len(set(np.asarray(read_state(path, jnp.zeros(100, int), kind="x")[1]))) == 1
    assert os.listdir(tmp_path) == ["one"]


@pytest.mark.slow
def test_a_fit_uses_each_key_once(no_key_reuse):
    fitted = posterior(num_steps=2)
    fitted.sample(jax.random.key(1), 3)
    fitted.resample(jax.random.key(2), 3)
    again = jax.random.key(3)
    fitted.sample(again, 3)
    with pytest.raises(jax.errors.KeyReuseError):
        fitted.sample(again, 3)


def python(script, *arguments):
    """Another Python, with this one's settings and nothing on its screen but what it prints."""
    command = [sys.executable, "-m", f"tests.faults.{script}", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("which", ["whole", "minibatches"])
def test_killed_at_any_moment_a_fit_goes_on_bit_for_bit(tmp_path, which):
    """kill -9 after random times, again and again, until a run comes through."""
    process = python("killed", tmp_path / "a", tmp_path / "whole.npy", which)
    _, said = process.communicate()
    assert process.returncode == 0, said
    began = time.monotonic()
    rng, kills, seen = np.random.default_rng(0), 0, set()
    while True:
        process = python("killed", tmp_path / "b", tmp_path / "rest.npy", which)
        # The file is the clock: some kills come before there is one, others some writes later.
        writes = int(rng.integers(0, 6)) if kills < 8 else 1000
        now = stamp(tmp_path / "b")
        while process.poll() is None and writes > 0:
            time.sleep(0.002)
            writes, now = writes - (stamp(tmp_path / "b") != now), stamp(tmp_path / "b")
        if process.poll() is None:
            time.sleep(float(rng.uniform(0.0, 0.05)))
            process.kill()
        _, said = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
        kills += 1
        seen.add(now)
        assert time.monotonic() - began < 2400
    sys.stdout.write(f"{kills} kills, {len(seen)} of them at different checkpoints\n")
    assert kills >= 3 and len(seen) >= 2
    np.testing.assert_array_equal(np.load(tmp_path / "rest.npy"), np.load(tmp_path / "whole.npy"))


def stamp(path):
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.slow
def test_ctrl_c_in_another_process_leaves_a_fit_that_can_be_used(tmp_path):
    process = python("killed", tmp_path / "steps", tmp_path / "found.npy", "whole")
    while stamp(tmp_path / "steps") == 0 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert b"interrupted after" in out or b"the bound is tight" in out
    assert np.load(tmp_path / "found.npy").size


@pytest.mark.slow
def test_whole_fits_in_threads_are_those_of_one_thread():
    run = {"num_steps": 200, "num_samples": 16}
    alone = [numbers(posterior(**run)), numbers(posterior(**run, gradient="total"))]
    together = in_threads(
        [
            lambda: numbers(posterior(**run)),
            lambda: numbers(posterior(**run, gradient="total")),
        ]
    )
    for mine, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_a_fork_after_a_fit_is_told_and_a_spawned_process_works():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(status) == "suspect"  # a Gaussian fitted to a banana
    posterior(num_steps=2)
    with pytest.warns(RuntimeWarning, match="fork"):
        child = os.fork()
    if child == 0:
        try:
            posterior(num_steps=2)
        except RuntimeError as error:
            os._exit(7 if "spawn" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def status():
    return posterior(num_steps=200).status
