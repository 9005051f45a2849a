"""Constructor arguments that are wrong are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vflow.bijections as vb

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vb.Affine(0.0, -1.0), "Affine: scale must be positive"),
        (lambda: vb.Affine(0.0, np.nan), "Affine: scale must be positive"),
        (lambda: vb.TriangularAffine(0), "TriangularAffine: dim must be"),
        (
            lambda: vb.TriangularAffine.from_loc_tril(jnp.zeros(2), jnp.eye(3)),
            "TriangularAffine: loc must have shape",
        ),
        (
            lambda: vb.TriangularAffine.from_loc_tril(jnp.zeros(2), -jnp.eye(2)),
            "the diagonal of tril must be positive",
        ),
        (lambda: vb.LULinear(-1), "LULinear: dim must be"),
        (lambda: vb.LowRankAffine(KEY, 2, 3), "LowRankAffine: rank must be between 1 and dim = 2"),
        (lambda: vb.Permute(jnp.array([0, 0, 1])), "each of 0 to 2 once"),
        (lambda: vb.Permute(jnp.array([0.0, 1.0])), "Permute: permutation must be a vector of int"),
        (lambda: vb.Flip(0), "Flip: dim must be"),
        (lambda: vb.Coupling(KEY, 1), "Coupling: dim = 1 has nothing to split; use Elementwise"),
        (lambda: vb.Coupling(KEY, 3, num_identity=3), "num_identity must be between 1 and"),
        (lambda: vb.Coupling(KEY, 3, transformer="cubic"), "transformer must be one of 'affine'"),
        (lambda: vb.Coupling(KEY, 3, activation="sin"), "activation must be one of"),
        (lambda: vb.Coupling(KEY, 3, hidden=(0,)), "hidden must hold widths"),
        (lambda: vb.Coupling(KEY, 3, condition_dim=0), "condition_dim must be"),
        (lambda: vb.Elementwise(KEY, 0), "Elementwise: dim must be"),
        (lambda: vb.AffineTransformer(0.0, 1.0), "need min_log_scale < 0 < max_log_scale"),
        (lambda: vb.SinhArcsinhTransformer(max_skew=0.0), "max_skew must be positive"),
        (lambda: vb.Chain([]), "Chain: layers is empty"),
        (lambda: vb.Chain([vb.Flip(2), vb.Flip(3)]), r"Chain: layer 1 \(Flip\) has shape"),
        (
            lambda: vb.Chain([vb.Elementwise(KEY, 2, condition_dim=n) for n in (1, 2)]),
            r"Chain: layer 1 \(Elementwise\) has condition_shape",
        ),
        (lambda: vb.Scan.stack([]), "Scan.stack: layers is empty"),
        (
            lambda: vb.Scan.stack([vb.Affine(jnp.zeros(2)), vb.Affine(jnp.zeros(3))]),
            r"Scan.stack: layer 1 \(Affine\) differs in structure",
        ),
        (
            lambda: vb.Scan.stack([vb.LULinear(2), vb.TriangularAffine(2)]),
            r"Scan.stack: layer 1 \(TriangularAffine\) differs in structure",
        ),
        (lambda: vb.Scan(vb.Flip(2)), "Scan: every array leaf of layers needs the same leading"),
        (lambda: vb.Scan(vb.Affine(0.0)), "Scan: every array leaf of layers needs the same"),
    ],
)
def test_constructor_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
