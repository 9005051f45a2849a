"""What every bijection promises. A new family joins by one line in `CASES`."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow.bijections as vb
from vflow._core import partition


class Case(NamedTuple):
    """A family: `make(key, dim)`, the length of its condition, its least dim.

    `stiff`: condition numbers explode with the parameters; only parameters of order one are tried.
    `traceable`: it can be built under jit.
    `dear`: its laws take long to compile; fewer than five coordinates wait for `make slow`.
    """

    make: Callable
    condition_dim: int | None = None
    min_dim: int = 1
    stiff: bool = False
    traceable: bool = True
    dear: bool = False


def _scan(key, dim, condition_dim=None):
    def layer(key):
        coupling = vb.Coupling(key, dim, hidden=(4,), condition_dim=condition_dim)
        return vb.Chain([coupling, vb.Permute(jax.random.permutation(key, dim))])

    return vb.Scan(eqx.filter_vmap(layer)(jax.random.split(key, 3)))


def _chain(key, dim):
    conditional = vb.Elementwise(key, dim, hidden=(4,), condition_dim=2)
    return vb.Chain([vb.LULinear(dim, key=key), conditional, vb.Affine(jnp.zeros(dim), 2.0)])


def _mixed_df(dim):
    """Light and heavy coordinates, the last one heavy."""
    return jnp.where(jnp.arange(dim) % 2 == (dim - 1) % 2, 2.0, jnp.inf)


CASES = {
    "ActNorm": Case(lambda key, dim: vb.ActNorm(dim)),
    "Affine": Case(lambda key, dim: vb.Affine(jnp.arange(1.0, dim + 1), 2.0)),
    "BlockLU": Case(lambda key, dim: vb.BlockLU((dim // 2, dim - dim // 2), key=key), stiff=True),
    "BlockAutoregressive": Case(
        lambda key, dim: vb.BlockAutoregressive(key, dim, hidden=(3, 2)), stiff=True, dear=True
    ),
    "BlockAutoregressive conditional": Case(
        lambda key, dim: vb.BlockAutoregressive(key, dim, hidden=(3,), condition_dim=2),
        condition_dim=2,
        stiff=True,
        dear=True,
    ),
    "Chain": Case(_chain, condition_dim=2, stiff=True),
    "Coupling": Case(lambda key, dim: vb.Coupling(key, dim, hidden=(4,)), min_dim=2),
    "Coupling conditional": Case(
        lambda key, dim: vb.Coupling(key, dim, hidden=(4,), condition_dim=2, num_identity=1),
        condition_dim=2,
        min_dim=2,
    ),
    "Coupling sinh-arcsinh": Case(
        lambda key, dim: vb.Coupling(
            key, dim, transformer=vb.SinhArcsinhTransformer(), hidden=(4,)
        ),
        min_dim=2,
        stiff=True,
    ),
    "Coupling spline": Case(
        lambda key, dim: vb.Coupling(key, dim, transformer=vb.Spline(3, 4.0), hidden=(4,)),
        min_dim=2,
        stiff=True,
    ),
    "Coupling spline conditional": Case(
        lambda key, dim: vb.Coupling(key, dim, transformer="spline", hidden=(4,), condition_dim=2),
        condition_dim=2,
        min_dim=2,
        stiff=True,
    ),
    "Coupling tanh mixture": Case(
        lambda key, dim: vb.Coupling(key, dim, transformer=vb.TanhMixture(2), hidden=(4,)),
        min_dim=2,
        stiff=True,
    ),
    "Elementwise": Case(lambda key, dim: vb.Elementwise(key, dim)),
    "Elementwise conditional": Case(
        lambda key, dim: vb.Elementwise(key, dim, hidden=(4,), condition_dim=2), condition_dim=2
    ),
    "Elementwise sinh-arcsinh": Case(
        lambda key, dim: vb.Elementwise(key, dim, transformer=vb.SinhArcsinhTransformer()),
        stiff=True,
    ),
    "Flip": Case(lambda key, dim: vb.Flip(dim)),
    "Freeze": Case(lambda key, dim: vb.Freeze(vb.Affine(jnp.ones(dim), 0.5))),
    "HeavyTail": Case(lambda key, dim: vb.HeavyTail(dim), dear=True),
    "HeavyTail mixed": Case(
        lambda key, dim: vb.HeavyTail(dim, df=_mixed_df(dim)), traceable=False, dear=True
    ),
    "Householder": Case(lambda key, dim: vb.Householder(key, dim, num_reflections=4)),
    "Identity": Case(lambda key, dim: vb.Identity((dim,))),
    "Invert": Case(
        lambda key, dim: vb.Invert(vb.Coupling(key, dim, hidden=(4,), condition_dim=2)),
        condition_dim=2,
        min_dim=2,
    ),
    "KernelisedCoupling": Case(
        lambda key, dim: vb.KernelisedCoupling(key, dim, num_centres=4, linear_mean=True), min_dim=2
    ),
    "KernelisedCoupling conditional": Case(
        lambda key, dim: vb.KernelisedCoupling(
            key, dim, num_centres=4, kernel="matern52", condition_dim=2
        ),
        condition_dim=2,
    ),
    "LOFT": Case(lambda key, dim: vb.LOFT(dim, threshold=0.5)),
    "LULinear": Case(lambda key, dim: vb.LULinear(dim, key=key), stiff=True),
    "LowRankAffine": Case(lambda key, dim: vb.LowRankAffine(key, dim, min(dim, 2)), stiff=True),
    "MaskedAutoregressive": Case(
        lambda key, dim: vb.MaskedAutoregressive(key, dim, hidden=(5, 4)), stiff=True
    ),
    "MaskedAutoregressive conditional": Case(
        lambda key, dim: vb.MaskedAutoregressive(
            key, dim, hidden=(4,), condition_dim=2, order=jnp.arange(dim)[::-1]
        ),
        condition_dim=2,
        stiff=True,
    ),
    "MaskedAutoregressive inverted": Case(
        lambda key, dim: vb.Invert(vb.MaskedAutoregressive(key, dim, hidden=(4,))), stiff=True
    ),
    "Permute": Case(lambda key, dim: vb.Permute(jax.random.permutation(key, dim))),
    "Planar": Case(lambda key, dim: vb.Planar(key, dim)),
    "Planar conditional": Case(
        lambda key, dim: vb.Planar(key, dim, hidden=(4,), condition_dim=2), condition_dim=2
    ),
    "Radial": Case(lambda key, dim: vb.Radial(key, dim)),
    "Residual": Case(lambda key, dim: vb.Residual(key, dim, hidden=(4,)), stiff=True),
    "Residual conditional": Case(
        lambda key, dim: vb.Residual(
            key, dim, hidden=(4,), activation="tanh", condition_dim=2, lipschitz=0.7
        ),
        condition_dim=2,
        stiff=True,
        dear=True,
    ),
    "Scan": Case(_scan, min_dim=2),
    "Scan conditional": Case(lambda key, dim: _scan(key, dim, 2), condition_dim=2, min_dim=2),
    "Sylvester": Case(lambda key, dim: vb.Sylvester(key, dim, min(dim, 2))),
    "Sylvester householder": Case(
        lambda key, dim: vb.Sylvester(key, dim, dim, variant="householder", num_reflections=3)
    ),
    "SmoothHeavyTail": Case(lambda key, dim: vb.SmoothHeavyTail(dim), dear=True),
    "TailCoupling": Case(
        lambda key, dim: vb.TailCoupling(key, dim // 2, dim - dim // 2, hidden=(4,))
    ),
    "TailCoupling conditional": Case(
        lambda key, dim: vb.TailCoupling(
            key, dim - dim // 2, dim // 2, hidden=(4,), condition_dim=2
        ),
        condition_dim=2,
    ),
    "SharedCoupling": Case(
        lambda key, dim: vb.SharedCoupling(
            key, dim, jnp.stack([jnp.arange(dim)[::-1]] * 3), hidden=(4,), condition_dim=2
        ),
        condition_dim=2,
        min_dim=2,
        stiff=True,
    ),
    "TriangularAffine": Case(lambda key, dim: vb.TriangularAffine(dim), stiff=True),
}
# Exact only to a tolerance, with laws in files of their own.
OTHERS = {"Continuous": "test_continuous.py"}
BATCH = 4
DIMS = (1, 2, 5)
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}


def _marks(case, dim):
    """Compilation is dear: where one and five coordinates are tried, two wait for `make slow`."""
    waits = (case.dear and dim < max(DIMS)) or (dim == 2 and case.min_dim == 1)
    return pytest.mark.slow if waits else ()


cases = pytest.mark.parametrize(
    ("name", "dim"),
    [
        pytest.param(name, dim, marks=_marks(case, dim))
        for name, case in CASES.items()
        for dim in DIMS
        if dim >= case.min_dim
    ],
)


def test_every_exported_bijection_has_a_case():
    """And every exported transformer is in one of them."""
    exported = {name for name in vb.__all__ if not name.startswith("Abstract")}
    built = [case.make(jax.random.key(0), 2) for case in CASES.values()]
    transformers = [getattr(b, "transformer", b) for b in built]
    assert {type(b).__name__ for b in built + transformers} | set(OTHERS) == exported
    assert all((pathlib.Path(__file__).parent / path).is_file() for path in OTHERS.values())


def _perturbed(bijection, seed, scale):
    """Random parameters of the given size, frozen ones too."""
    arrays, static = eqx.partition(bijection, eqx.is_inexact_array)
    rng = np.random.default_rng(seed)
    arrays = jax.tree.map(
        lambda a: a + jnp.asarray(scale * rng.normal(size=a.shape), a.dtype), arrays
    )
    return eqx.combine(arrays, static)


def _points(case, dim, seed, dtype):
    rng = np.random.default_rng(seed)
    x, score = (jnp.asarray(rng.normal(size=(BATCH, dim)), dtype) for _ in range(2))
    if case.condition_dim is None:
        return x, score, None
    return x, score, jnp.asarray(rng.normal(size=(BATCH, case.condition_dim)), dtype)


def _quantities(bijection, x, score, condition):
    y, log_det = bijection.forward_and_log_det(x, condition)
    jacobian, slope = jax.jacfwd(lambda x: bijection.forward_and_log_det(x, condition))(x)
    back, inverse_log_det = bijection.inverse_and_log_det(y, condition)
    return {
        "y": y,
        "log_det": log_det,
        "jacobian": jacobian,
        "slope": slope,
        "back": back,
        "inverse_log_det": inverse_log_det,
        "again": bijection.forward_and_log_det(back, condition)[0],
        "push": bijection.push_score(x, score, condition),
        "joint": bijection.forward_with_score(x, score, condition),
    }


def _everything(bijection, x, score, condition):
    """All quantities of the laws in one compilation."""

    def loss(bijection, x, condition):
        y, log_det = bijection.forward_and_log_det(x, condition)
        back, inverse_log_det = bijection.inverse_and_log_det(jnp.sin(y), condition)
        return jnp.sum(jnp.cos(y)) + log_det + jnp.sum(jnp.sin(back)) + inverse_log_det

    batched = jax.vmap(lambda *args: _quantities(bijection, *args))(x, score, condition)
    first = (x[0], None if condition is None else condition[0])
    single = bijection.forward_and_log_det(*first)
    trained, rest = partition(bijection)
    gradient = jax.grad(lambda p, x, c: loss(eqx.combine(p, rest), x, c), (0, 1))(trained, *first)
    return batched, single, gradient


@cases
def test_laws(name, dim):
    """Round trip, log-det, score rule, batching, gradients, float32; parameters of three sizes."""
    case = CASES[name]
    start = case.make(jax.random.key(1), dim)
    assert start.shape == (dim,)
    assert start.condition_shape == (None if case.condition_dim is None else (case.condition_dim,))
    traces = []

    @eqx.filter_jit
    def compiled(*args):
        traces.append(None)
        return _everything(*args)

    for seed, scale in enumerate((0.1, 1.0) if case.stiff else (0.1, 1.0, 5.0)):
        bijection = _perturbed(start, seed, scale)
        x, score, condition = _points(case, dim, seed, jnp.float64)
        q, single, gradient = compiled(bijection, x, score, condition)
        size = 1 + np.abs(q["y"]).max(axis=-1, keepdims=True)
        np.testing.assert_allclose((q["again"] - q["y"]) / size, 0, atol=1e-10)
        log_det = np.linalg.slogdet(q["jacobian"])[1]
        np.testing.assert_allclose(q["log_det"], log_det, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(q["inverse_log_det"], -q["log_det"], rtol=1e-9, atol=1e-9)
        pushed_y, pushed_log_det, score_y = q["push"]
        np.testing.assert_allclose(pushed_y, q["y"], rtol=1e-12)
        np.testing.assert_allclose(pushed_log_det, q["log_det"], rtol=1e-12, atol=1e-12)
        # the definition, J^T s_y = s - grad log_det, without a solve of its own
        expected = score - q["slope"]
        residual = np.einsum("bij,bi->bj", q["jacobian"], score_y) - expected
        scale_of = np.einsum("bij,bi->bj", np.abs(q["jacobian"]), np.abs(score_y)) + 1
        np.testing.assert_allclose(residual / scale_of, 0, atol=1e-10)
        if scale <= 1:
            dense = np.linalg.solve(np.swapaxes(q["jacobian"], -1, -2), expected[..., None])[..., 0]
            np.testing.assert_allclose(score_y, dense, rtol=1e-10, atol=1e-10)
        for joint, separate in zip(q["joint"], q["push"], strict=True):
            np.testing.assert_allclose(joint, separate, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(single[0], q["y"][0], rtol=1e-12)
        np.testing.assert_allclose(single[1], q["log_det"][0], rtol=1e-12, atol=1e-12)
        for leaf in jax.tree.leaves(gradient):
            assert np.isfinite(leaf).all()
    if dim == max(DIMS):
        bijection, points = _perturbed(start, 0, 0.3), _points(case, dim, 0, jnp.float64)
        _check_float32(bijection, points, compiled(bijection, *points)[0])
    assert len(traces) == 1


def _check_float32(bijection, points, expected):
    """The same parameters give the same in float32; far out everything stays finite."""

    @eqx.filter_jit
    def run(bijection, x, y, score, condition):
        def one(x, y, score, condition):
            forward = bijection.forward_and_log_det(x, condition)
            inverse = bijection.inverse_and_log_det(y, condition)
            return forward, inverse, bijection.push_score(x, score, condition)

        return jax.vmap(one)(x, y, score, condition)

    x, score, condition = points
    with jax.enable_x64(False):
        low, x, y, score, condition = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), jnp.float32) if eqx.is_inexact_array(a) else a,
            (bijection, x, expected["y"], score, condition),
        )
        out = run(low, x, y, score, condition)
        far = run(low, 1e6 * x, 1e6 * x, score, condition)
    for leaf in jax.tree.leaves(far):
        assert np.isfinite(leaf).all()
    names = ("y", "log_det"), ("back", "inverse_log_det")
    expected = [expected[name] for pair in names for name in pair] + list(expected["push"])
    for value, target in zip(jax.tree.leaves(out), expected, strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, target, rtol=1e-4, atol=1e-4)


def test_outputs_take_the_dtype_of_the_point_in_mixed_stacks():
    """A float64 preconditioner around a float32 stack, as a fit builds it."""
    with jax.enable_x64(False):
        inner = _scan(jax.random.key(0), 3)
    outer = vb.Freeze(vb.TriangularAffine.from_loc_tril(np.zeros(3), 2 * np.eye(3)))
    chain = vb.Chain([inner, outer])
    for dtype in (jnp.float32, jnp.float64):
        x = jnp.ones(3, dtype)
        outs = (*chain.forward_and_log_det(x), *chain.inverse_and_log_det(x))
        assert {out.dtype for out in (*outs, *chain.forward_with_score(x, x))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", CASES)
def test_default_dtype_and_serialisable_leaves(name):
    """Constructors follow JAX's default type; leaves are arrays only, so a file can hold them."""
    build = lambda: CASES[name].make(jax.random.key(0), 3)
    if CASES[name].traceable:  # the same without computing anything
        build = lambda: eqx.filter_eval_shape(
            lambda key: CASES[name].make(key, 3), jax.random.key(0)
        )
    with jax.enable_x64(False):
        low = build()
    high = build()
    for tree, dtype in ((low, "float32"), (high, "float64")):
        leaves = jax.tree.leaves(tree)
        assert all(isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) for leaf in leaves)
        floats = {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert floats <= {jnp.dtype(dtype)}
    assert hash(jax.tree.structure(high)) == hash(jax.tree.structure(high))


@pytest.mark.parametrize("name", CASES)
def test_wrong_shapes_are_named(name):
    case, dim = CASES[name], 3
    bijection = case.make(jax.random.key(0), dim)
    owner = type(bijection).__name__
    x, score, condition = (None if a is None else a[0] for a in _points(case, dim, 0, jnp.float64))
    for method, arguments in (
        ("forward_and_log_det", (x,)),
        ("inverse_and_log_det", (x,)),
        ("push_score", (x, score)),
        ("forward_with_score", (x, score)),
    ):
        call = getattr(bijection, method)
        for position, argument in enumerate(("y" if method.startswith("inv") else "x", "score")):
            if position < len(arguments):
                wrong = list(arguments)
                wrong[position] = jnp.zeros((dim, 1))
                with pytest.raises(ValueError, match=rf"{owner}\.{method}: {argument} has shape"):
                    call(*wrong, condition)
        if condition is None:
            with pytest.raises(ValueError, match=rf"{owner}\.{method}: got a condition"):
                call(*arguments, jnp.zeros(2))
        else:
            with pytest.raises(ValueError, match=rf"{owner}\.{method}: condition is missing"):
                call(*arguments)
            with pytest.raises(ValueError, match=rf"{owner}\.{method}: condition has shape"):
                call(*arguments, jnp.zeros(3))
