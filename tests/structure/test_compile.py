"""Options of the compiler: only those that the installed XLA has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vflow._core import _compile
from vflow._core._keys import fold_in, split
from vflow.distributions import Normal

WAYS = ("jit", "jit_long", "jit_once", "filter_jit", "filter_jit_long", "filter_jit_once")


def test_an_option_that_xla_does_not_have_is_left_out(monkeypatch):
    monkeypatch.setitem(_compile._ONCE, "xla_no_such_option", True)
    assert not _compile._knows("xla_no_such_option", True)
    assert _compile._knows("xla_backend_optimization_level", 0)
    assert float(_compile.jit_once(lambda x: x + 1)(1.0)) == 2.0


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_compiling_gives_the_same_numbers(way):
    function = lambda x: jnp.sum(jnp.tanh(x) ** 2)
    x = jnp.linspace(-3.0, 3.0, 7)
    np.testing.assert_allclose(getattr(_compile, way)(function)(x), function(x), rtol=1e-14)


def test_keys_are_those_of_jax():
    key = jax.random.key(3)
    data = jax.random.key_data
    for num in (3, 300):
        keys = np.stack([data(k) for k in split(key, num)])
        np.testing.assert_array_equal(keys, data(jax.random.split(key, num)))
    np.testing.assert_array_equal(data(fold_in(key, 5)), data(jax.random.fold_in(key, 5)))


@pytest.mark.optimised
def test_a_normal_draw_is_computed_once_for_all_its_readers():
    """Readers that XLA would each fuse the inverse error function into."""

    def readers(key):
        x, log_q = Normal(10).sample_and_log_prob(key)
        return x[:5] * x[5:], jnp.cumsum(x), jnp.exp(x).sum(), log_q

    keys = jax.random.split(jax.random.key(0), 128)
    text = jax.jit(jax.vmap(readers)).lower(keys).compile().as_text()
    products = [
        sum("erf_inv" in line and " multiply(" in line for line in part.splitlines())
        for part in text.split("\n\n")
    ]
    assert sum(count > 5 for count in products) == 1
