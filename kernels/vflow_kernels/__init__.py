"""JIT log-determinant, solve, coupling and density kernels: pure functions, arrays in, arrays out.

Every kernel works on one event (batching is `jax.vmap`), keeps the dtype of its input, and
survives jit, vmap, grad, `jax.jacfwd` and second derivatives.
"""

from vflow_kernels._coupling import affine_coupling_forward as affine_coupling_forward
from vflow_kernels._coupling import affine_coupling_inverse as affine_coupling_inverse
from vflow_kernels._coupling import affine_coupling_push_score as affine_coupling_push_score
from vflow_kernels._coupling import soft_clamp as soft_clamp
from vflow_kernels._densities import standard_normal_log_density as standard_normal_log_density
from vflow_kernels._densities import student_t_log_density as student_t_log_density
from vflow_kernels._fixed_point import triangular_fixed_point as triangular_fixed_point
from vflow_kernels._fixed_point import triangular_root as triangular_root
from vflow_kernels._householder import householder_matvec as householder_matvec
from vflow_kernels._kernel_expansion import kernel_expansion as kernel_expansion
from vflow_kernels._kernel_expansion import median_lengthscale as median_lengthscale
from vflow_kernels._kernel_expansion import radial_kernel as radial_kernel
from vflow_kernels._low_rank import low_rank_log_det as low_rank_log_det
from vflow_kernels._low_rank import low_rank_matvec as low_rank_matvec
from vflow_kernels._low_rank import low_rank_solve as low_rank_solve
from vflow_kernels._lu import lu_log_det as lu_log_det
from vflow_kernels._lu import lu_matvec as lu_matvec
from vflow_kernels._lu import lu_solve as lu_solve
from vflow_kernels._masked import (
    masked_autoregressive_inverse as masked_autoregressive_inverse,
)
from vflow_kernels._planar import planar_constrain as planar_constrain
from vflow_kernels._planar import planar_forward as planar_forward
from vflow_kernels._planar import planar_inverse as planar_inverse
from vflow_kernels._planar import planar_push_score as planar_push_score
from vflow_kernels._planar import tanh_root as tanh_root
from vflow_kernels._radial import radial_constrain as radial_constrain
from vflow_kernels._radial import radial_forward as radial_forward
from vflow_kernels._radial import radial_inverse as radial_inverse
from vflow_kernels._radial import radial_push_score as radial_push_score
from vflow_kernels._root import monotone_root as monotone_root
from vflow_kernels._spectral import spectral_bound as spectral_bound
from vflow_kernels._spline import spline_forward as spline_forward
from vflow_kernels._spline import spline_inverse as spline_inverse
from vflow_kernels._sylvester import householder_columns as householder_columns
from vflow_kernels._sylvester import sylvester_forward as sylvester_forward
from vflow_kernels._sylvester import sylvester_inverse as sylvester_inverse
from vflow_kernels._sylvester import sylvester_push_score as sylvester_push_score
from vflow_kernels._tails import heavy_tail_forward as heavy_tail_forward
from vflow_kernels._tails import heavy_tail_inverse as heavy_tail_inverse
from vflow_kernels._tails import smooth_tail_forward as smooth_tail_forward
from vflow_kernels._tails import smooth_tail_inverse as smooth_tail_inverse
from vflow_kernels._triangular import triangular_log_det as triangular_log_det
from vflow_kernels._triangular import triangular_matvec as triangular_matvec
from vflow_kernels._triangular import triangular_solve as triangular_solve

__all__ = [
    "affine_coupling_forward",
    "affine_coupling_inverse",
    "affine_coupling_push_score",
    "heavy_tail_forward",
    "heavy_tail_inverse",
    "householder_columns",
    "householder_matvec",
    "kernel_expansion",
    "low_rank_log_det",
    "low_rank_matvec",
    "low_rank_solve",
    "lu_log_det",
    "lu_matvec",
    "lu_solve",
    "masked_autoregressive_inverse",
    "median_lengthscale",
    "monotone_root",
    "planar_constrain",
    "planar_forward",
    "planar_inverse",
    "planar_push_score",
    "radial_constrain",
    "radial_forward",
    "radial_inverse",
    "radial_kernel",
    "radial_push_score",
    "smooth_tail_forward",
    "smooth_tail_inverse",
    "soft_clamp",
    "spectral_bound",
    "spline_forward",
    "spline_inverse",
    "standard_normal_log_density",
    "student_t_log_density",
    "sylvester_forward",
    "sylvester_inverse",
    "sylvester_push_score",
    "tanh_root",
    "triangular_fixed_point",
    "triangular_log_det",
    "triangular_matvec",
    "triangular_root",
    "triangular_solve",
]
