"""What every kernel promises: dtype kept, one compilation, derivatives of both modes and orders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vflow_kernels

DIM, RANK = 3, 2
RADIAL = ("rbf", "matern12", "matern32", "matern52")


def _arguments(dtype, seed=0):
    """Well-conditioned arguments by parameter name."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    matrix = normal(DIM, DIM) * 0.3 + jnp.eye(DIM, dtype=dtype)
    vector = {name: normal(DIM) for name in ("x", "y", "shift", "log_scale", "raw", "score")}
    return {
        **vector,
        "matrix": matrix,
        "factors": matrix,
        "diagonal": jnp.exp(normal(DIM)),
        "left": 0.3 * normal(DIM, RANK),
        "right": 0.3 * normal(DIM, RANK),
        "tail": jnp.exp(0.3 * normal(DIM)),
        "tail_weights": 0.3 * normal(3, DIM),
        "df": jnp.exp(normal(DIM)) + 1,
        "spline": normal(8, DIM),
        "u": normal(DIM),
        "w": normal(DIM),
        "b": normal(),
        "vectors": normal(RANK, DIM),
        "square": 0.5 * normal(RANK, RANK),
        "offsets": normal(RANK),
        "centres": normal(4, DIM),
        "coefficients": normal(4, RANK),
        "log_lengthscale": 0.3 * normal(DIM),
    }


def _triangular(name):
    kernel = getattr(vflow_kernels, name)

    def all_variants(matrix, x):
        return sum(
            kernel(matrix, x, lower=lower, unit_diagonal=unit, transpose=transpose)
            for lower in (True, False)
            for unit in (True, False)
            for transpose in (True, False)
        )

    return all_variants, ("matrix", "x")


def _lu(name):
    kernel = getattr(vflow_kernels, name)
    return lambda factors, x: kernel(factors, x) + kernel(factors, x, transpose=True), (
        "factors",
        "x",
    )


def _planar(name):
    kernel = getattr(vflow_kernels, name)

    def constrained(u, w, b, x, *score):
        return kernel(x, *score, *vflow_kernels.planar_constrain(u, w), w, b)

    return constrained, ("u", "w", "b", "x", "score")[: 5 if "score" in name else 4]


def _radial(name):
    kernel = getattr(vflow_kernels, name)

    def constrained(centre, raw, x, *score):
        return kernel(x, *score, centre, *vflow_kernels.radial_constrain(raw, -raw))

    return constrained, ("w", "b", "x", "score")[: 4 if "score" in name else 3]


def _sylvester(name):
    kernel = getattr(vflow_kernels, name)

    def constrained(vectors, square, b, x, *score):
        q = vflow_kernels.householder_columns(vectors, RANK)
        r = jnp.triu(jnp.tanh(square))
        return kernel(x, *score, q, r, r.T[::-1, ::-1], b)

    names = ("vectors", "square", "offsets", "x", "score")
    return constrained, names[: 5 if "score" in name else 4]


def _shifted(matrix, shift, y):
    """x_i + shift_i * sin(sum of the matrix's entries times the x before i) = y_i, by its kernel.

    And zero, the log-det.
    """
    weight = jnp.triu(matrix, 1)[:, None]
    return vflow_kernels.masked_autoregressive_inverse(
        lambda y, params: (y - jnp.sin(params[0]) * params[1], jnp.zeros_like(y)),
        y,
        jnp.zeros_like(y, shape=(0,)),
        [jnp.concatenate([weight, 0 * weight], 1)],
        [jnp.stack([0 * shift, shift])],
        [],
        jnp.tanh,
    )


def _masked_inverse(matrix, shift, y):
    x, _ = _shifted(matrix, shift, y)
    return x, x + jnp.sin(jnp.tril(matrix.T, -1) @ x) * shift - y  # the second is zero


def _triangular_root(matrix, shift, y):
    def parts(x):
        before = jnp.tril(matrix.T, -1) @ x
        return jnp.sin(before) * shift, jnp.tanh(before)

    def forward(x):
        added, log_slope = parts(x)
        return x * jnp.exp(log_slope) + added, log_slope

    def solve(y):
        x = y
        for _ in y:  # each sweep makes one more coordinate exact
            added, log_slope = parts(x)
            x = (y - added) * jnp.exp(-log_slope)
        return x, jnp.sum(parts(x)[1])

    return vflow_kernels.triangular_root(forward, solve, y)


# One line for every public kernel: a function of arrays and the names of its arguments above.
KERNELS = {
    "affine_coupling_forward": (
        vflow_kernels.affine_coupling_forward,
        ("x", "shift", "log_scale"),
    ),
    "affine_coupling_inverse": (
        vflow_kernels.affine_coupling_inverse,
        ("y", "shift", "log_scale"),
    ),
    "affine_coupling_push_score": (
        vflow_kernels.affine_coupling_push_score,
        ("x", "score", "log_scale"),
    ),
    "kernel_expansion": (
        lambda *args: tuple(vflow_kernels.kernel_expansion(*args, kernel) for kernel in RADIAL),
        ("x", "centres", "log_lengthscale", "coefficients"),
    ),
    "heavy_tail_forward": (vflow_kernels.heavy_tail_forward, ("x", "tail", "df")),
    "heavy_tail_inverse": (vflow_kernels.heavy_tail_inverse, ("x", "tail", "df")),
    "low_rank_log_det": (vflow_kernels.low_rank_log_det, ("diagonal", "left", "right")),
    "low_rank_matvec": (vflow_kernels.low_rank_matvec, ("diagonal", "left", "right", "x")),
    "low_rank_solve": (vflow_kernels.low_rank_solve, ("diagonal", "left", "right", "y")),
    "lu_log_det": (vflow_kernels.lu_log_det, ("factors",)),
    "lu_matvec": _lu("lu_matvec"),
    "lu_solve": _lu("lu_solve"),
    "masked_autoregressive_inverse": (_masked_inverse, ("matrix", "x", "y")),
    "median_lengthscale": (vflow_kernels.median_lengthscale, ("centres",)),
    "radial_kernel": (
        lambda q: tuple(vflow_kernels.radial_kernel(q, kernel) for kernel in RADIAL),
        ("diagonal",),
    ),
    "monotone_root": (
        lambda y, scale: vflow_kernels.monotone_root(
            lambda x, scale: x + scale * jnp.tanh(x), scale, y
        ),
        ("y", "diagonal"),
    ),
    "householder_columns": (
        lambda vectors: vflow_kernels.householder_columns(vectors, RANK),
        ("vectors",),
    ),
    "householder_matvec": (
        lambda vectors, x, y: (
            vflow_kernels.householder_matvec(vectors, x),
            vflow_kernels.householder_matvec(vectors, y, transpose=True),
        ),
        ("vectors", "x", "y"),
    ),
    "planar_constrain": (vflow_kernels.planar_constrain, ("u", "w")),
    "planar_forward": _planar("planar_forward"),
    "planar_inverse": _planar("planar_inverse"),
    "planar_push_score": _planar("planar_push_score"),
    "radial_constrain": (vflow_kernels.radial_constrain, ("b", "b")),
    "radial_forward": _radial("radial_forward"),
    "radial_inverse": _radial("radial_inverse"),
    "radial_push_score": _radial("radial_push_score"),
    "sylvester_forward": _sylvester("sylvester_forward"),
    "sylvester_inverse": _sylvester("sylvester_inverse"),
    "sylvester_push_score": _sylvester("sylvester_push_score"),
    "tanh_root": (vflow_kernels.tanh_root, ("diagonal", "y")),
    "smooth_tail_forward": (
        vflow_kernels.smooth_tail_forward,
        ("x", "tail", "df", "tail_weights"),
    ),
    "smooth_tail_inverse": (
        vflow_kernels.smooth_tail_inverse,
        ("x", "tail", "df", "tail_weights"),
    ),
    "soft_clamp": (lambda raw: vflow_kernels.soft_clamp(raw, -2.0, 0.1), ("raw",)),
    "spline_forward": (
        lambda x, spline: vflow_kernels.spline_forward(x, spline, 3.0),
        ("x", "spline"),
    ),
    "spline_inverse": (
        lambda y, spline: vflow_kernels.spline_inverse(y, spline, 3.0),
        ("y", "spline"),
    ),
    "spectral_bound": (vflow_kernels.spectral_bound, ("matrix",)),
    "standard_normal_log_density": (vflow_kernels.standard_normal_log_density, ("x",)),
    "student_t_log_density": (vflow_kernels.student_t_log_density, ("x", "df")),
    "triangular_fixed_point": (
        lambda matrix, x: vflow_kernels.triangular_fixed_point(
            lambda v: jnp.sin(jnp.tril(matrix, -1) @ v) + x, x
        ),
        ("matrix", "x"),
    ),
    "triangular_log_det": (vflow_kernels.triangular_log_det, ("matrix",)),
    "triangular_matvec": _triangular("triangular_matvec"),
    "triangular_root": (_triangular_root, ("matrix", "x", "y")),
    "triangular_solve": _triangular("triangular_solve"),
}


def test_every_public_kernel_is_registered():
    assert sorted(KERNELS) == vflow_kernels.__all__


@pytest.mark.parametrize("name", KERNELS)
def test_laws(name):
    kernel, names = KERNELS[name]
    traces = []

    def scalar(*args):
        """A curved function of every output."""
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(kernel(*args)))

    def everything(*args):
        traces.append(None)
        direction = tuple(jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in args)
        gradient = jax.grad(scalar, argnums=tuple(range(len(args))))

        def slope(t):
            return scalar(*(a + t * v for a, v in zip(args, direction, strict=True)))

        zero = jnp.zeros_like(args[0], shape=())
        first, second = jax.jvp(jax.jacfwd(slope), (zero,), (zero + 1,))
        along = sum(jnp.sum(g * v) for g, v in zip(gradient(*args), direction, strict=True))
        values = [slope(h) for h in (-1e-3, 0.0, 1e-3)]
        return kernel(*args), first, second, along, jnp.stack(values)

    compiled = jax.jit(everything)
    for seed in (0, 1):
        arguments = _arguments(jnp.float64, seed)
        out, first, second, along, values = compiled(*(arguments[n] for n in names))
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(out))
        # forward mode, reverse mode, and forward over forward against central differences
        np.testing.assert_allclose(first, along, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(first, (values[2] - values[0]) / 2e-3, rtol=1e-3, atol=1e-4)
        curvature = (values[2] - 2 * values[1] + values[0]) / 1e-6
        np.testing.assert_allclose(second, curvature, rtol=1e-3, atol=1e-3)
    assert len(traces) == 1

    arguments = _arguments(jnp.float32, 1)
    low = jax.jit(kernel)(*(arguments[n] for n in names))
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(out), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
