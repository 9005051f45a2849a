"""The audit accepts right bijections and names what is wrong with wrong ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import vflow.bijections as vb
from vflow.diagnostics._bijection import check_bijection


class _Cubic(vb.AbstractBijection):
    """y = x + x^3 without an inverse; `wrong` names the method that is broken."""

    wrong: str = eqx.field(static=True, default="")
    shape: tuple[int, ...] = eqx.field(static=True, default=(2,))
    condition_shape: None = eqx.field(static=True, default=None)

    def forward_and_log_det(self, x, condition=None):
        factor = 2.0 if self.wrong == "log_det" else 1.0
        return x + x**3, factor * jnp.sum(jnp.log(1 + 3 * x**2))

    def inverse_and_log_det(self, y, condition=None):
        raise NotImplementedError("_Cubic has no inverse; use Invert of another map.")

    def push_score(self, x, score, condition=None):
        y, log_det = self.forward_and_log_det(x)
        slope = 0.0 if self.wrong == "score" else 6 * x / (1 + 3 * x**2)
        return y, log_det, (score - slope) / (1 + 3 * x**2)


class _Shift(vb.AbstractBijection):
    """y = 2x + 1 with a broken inverse, and the score rule of the base class."""

    wrong: str = eqx.field(static=True, default="")
    shape: tuple[int, ...] = eqx.field(static=True, default=(2,))
    condition_shape: None = eqx.field(static=True, default=None)

    def forward_and_log_det(self, x, condition=None):
        return 2 * x + 1, jnp.full_like(x, 2 * jnp.log(2.0), shape=())

    def inverse_and_log_det(self, y, condition=None):
        sign = 1.0 if self.wrong == "inverse_log_det" else -1.0
        shift = 0.0 if self.wrong == "round_trip" else 1.0
        return (y - shift) / 2, jnp.full_like(y, sign * 2 * jnp.log(2.0), shape=())


class _Stiff(vb.AbstractBijection):
    """Condition number 1e18: y gives x to 1e-7, and within that the log-determinant changes."""

    shape: tuple[int, ...] = eqx.field(static=True, default=(2,))
    condition_shape: None = eqx.field(static=True, default=None)

    def forward_and_log_det(self, x, condition=None):
        y = jnp.stack([x[0], jnp.sinh(x[1]) + 1e9 * x[0]])
        return y, jnp.log(jnp.cosh(x[1]))

    def inverse_and_log_det(self, y, condition=None):
        rest = y[1] - 1e9 * y[0]
        return jnp.stack([y[0], jnp.arcsinh(rest)]), -0.5 * jnp.log1p(rest**2)

    def push_score(self, x, score, condition=None):
        y, log_det = self.forward_and_log_det(x)
        last = (score[1] - jnp.tanh(x[1])) / jnp.cosh(x[1])
        return y, log_det, jnp.stack([score[0] - 1e9 * last, last])


class _DenseScore(vb.AbstractBijection):
    """A cubic with neither an inverse nor a score rule: the base class solves densely."""

    shape: tuple[int, ...] = eqx.field(static=True, default=(2,))
    condition_shape: None = eqx.field(static=True, default=None)

    def forward_and_log_det(self, x, condition=None):
        return x + x**3, jnp.sum(jnp.log(1 + 3 * x**2))

    def inverse_and_log_det(self, y, condition=None):
        raise NotImplementedError("no inverse")


def test_right_bijections_pass(key):
    errors = check_bijection(vb.Coupling(key, 3, hidden=(4,), condition_dim=2), key)
    assert max(errors) < 1e-12
    assert max(check_bijection(_Shift(), key)) < 1e-12
    for without_inverse in (_Cubic(), _DenseScore()):
        errors = check_bijection(without_inverse, key)
        assert max(errors.log_det, errors.score) < 1e-12
        assert jnp.isnan(errors.round_trip)


def test_a_stiff_map_is_not_called_wrong(key):
    assert max(check_bijection(_Stiff(), key)) < 1e-12


@pytest.mark.parametrize(
    ("bijection", "message"),
    [
        (_Cubic("log_det"), "log_det of forward_and_log_det differs .* relative error [0-9.]+"),
        (_Cubic("score"), "_Cubic is wrong .* push_score differs"),
        (_Shift("round_trip"), "the inverse does not undo the forward map: relative error"),
        (_Shift("inverse_log_det"), "log_det of inverse_and_log_det is not minus"),
        (eqx.tree_at(lambda b: b.loc, vb.Affine(jnp.zeros(2)), jnp.full(2, jnp.nan)), "error nan"),
    ],
)
def test_wrong_bijections_are_named(key, bijection, message):
    with pytest.raises(ValueError, match=message):
        check_bijection(bijection, key)


def test_float32_is_audited_with_its_own_tolerance(key):
    with jax.enable_x64(False):
        errors = check_bijection(vb.Coupling(jax.random.key(0), 3, hidden=(4,)), jax.random.key(1))
        with pytest.raises(ValueError, match="push_score differs"):
            check_bijection(_Cubic("score"), jax.random.key(1))
    assert max(errors) < 1e-4


def test_dense_score_refuses_many_coordinates():
    big = _DenseScore(shape=(65,))
    with pytest.raises(NotImplementedError, match="_DenseScore has neither an inverse nor"):
        big.push_score(jnp.zeros(65), jnp.zeros(65))
