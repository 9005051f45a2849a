"""The recommendation: the exact strategy where there is one, and why others do not apply."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest

import vflow as vf


def objective(t):
    b = vf.sample("b", dist.Bernoulli(probs=t), vf.reinforce())
    x = vf.sample("x", dist.Normal(b * t, 1.0))
    return x**2 + 3.0 * b


def test_winners_table_and_refusals(key):
    found = vf.strategies.recommend(objective, key, jnp.array(0.4), num_draws=2000)
    assert repr(found.winners["x"]) in ("reparam()", "implicit()", "measure_valued()")
    assert repr(found.winners["b"]) == "enum()"
    by = {(row.site, repr(row.strategy)): row for row in found.table}
    assert by["b", "enum()"].variance < by["b", "measure_valued()"].variance
    assert by["b", "measure_valued()"].variance < by["b", "reinforce()"].variance
    assert by["x", "reparam()"].variance < by["x", "reinforce()"].variance
    assert all(row.cost >= 1.0 and row.score == row.variance * row.cost for row in found.table)
    assert "no reparameterised sampler" in found.refused["b", "reparam()"]
    assert "Bernoulli" in found.refused["x", "disarm()"]
    shown = str(found)
    assert "enum()" in shown
    assert shown.count("<-") == 2


def test_a_name_that_is_none(key):
    with pytest.raises(vf.ProgramError, match=r"\['c'\].*\['b', 'x'\]"):
        vf.strategies.recommend(objective, key, jnp.array(0.4), sites=["c"])
    # nothing is left behind
    assert jnp.isfinite(vf.expect(objective)(jax.random.key(0), 0.4))
