"""Floor 7: the training loop, the fit and what it returns."""

__all__: list[str] = []
