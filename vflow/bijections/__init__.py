"""Floor 2: bijections, one file per family; the contract is `AbstractBijection`."""

from vflow.bijections._act_norm import ActNorm as ActNorm
from vflow.bijections._affine import Affine as Affine
from vflow.bijections._bijection import AbstractBijection as AbstractBijection
from vflow.bijections._block_autoregressive import BlockAutoregressive as BlockAutoregressive
from vflow.bijections._block_lu import BlockLU as BlockLU
from vflow.bijections._chain import Chain as Chain
from vflow.bijections._chain import Scan as Scan
from vflow.bijections._continuous import Continuous as Continuous
from vflow.bijections._coupling import Coupling as Coupling
from vflow.bijections._elementwise import Elementwise as Elementwise
from vflow.bijections._heavy_tail import HeavyTail as HeavyTail
from vflow.bijections._householder import Householder as Householder
from vflow.bijections._identity import Identity as Identity
from vflow.bijections._kernelised_coupling import KernelisedCoupling as KernelisedCoupling
from vflow.bijections._loft import LOFT as LOFT
from vflow.bijections._low_rank_affine import LowRankAffine as LowRankAffine
from vflow.bijections._lu_linear import LULinear as LULinear
from vflow.bijections._masked_autoregressive import MaskedAutoregressive as MaskedAutoregressive
from vflow.bijections._permute import Flip as Flip
from vflow.bijections._permute import Permute as Permute
from vflow.bijections._planar import Planar as Planar
from vflow.bijections._radial import Radial as Radial
from vflow.bijections._residual import Residual as Residual
from vflow.bijections._shared_coupling import SharedCoupling as SharedCoupling
from vflow.bijections._sinh_arcsinh import SinhArcsinhTransformer as SinhArcsinhTransformer
from vflow.bijections._smooth_heavy_tail import SmoothHeavyTail as SmoothHeavyTail
from vflow.bijections._spline import Spline as Spline
from vflow.bijections._sylvester import Sylvester as Sylvester
from vflow.bijections._tail_coupling import TailCoupling as TailCoupling
from vflow.bijections._tanh_mixture import TanhMixture as TanhMixture
from vflow.bijections._transformer import AbstractTransformer as AbstractTransformer
from vflow.bijections._transformer import AffineTransformer as AffineTransformer
from vflow.bijections._triangular_affine import TriangularAffine as TriangularAffine
from vflow.bijections._wrappers import Freeze as Freeze
from vflow.bijections._wrappers import Invert as Invert

__all__ = [
    "LOFT",
    "AbstractBijection",
    "AbstractTransformer",
    "ActNorm",
    "Affine",
    "AffineTransformer",
    "BlockAutoregressive",
    "BlockLU",
    "Chain",
    "Continuous",
    "Coupling",
    "Elementwise",
    "Flip",
    "Freeze",
    "HeavyTail",
    "Householder",
    "Identity",
    "Invert",
    "KernelisedCoupling",
    "LULinear",
    "LowRankAffine",
    "MaskedAutoregressive",
    "Permute",
    "Planar",
    "Radial",
    "Residual",
    "Scan",
    "SharedCoupling",
    "SinhArcsinhTransformer",
    "SmoothHeavyTail",
    "Spline",
    "Sylvester",
    "TailCoupling",
    "TanhMixture",
    "TriangularAffine",
]
