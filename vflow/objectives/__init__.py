"""Floor 5: objectives as programs; each is maximised."""

from vflow.objectives._elbo import elbo as elbo

__all__ = ["elbo"]
