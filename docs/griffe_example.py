"""The reference shows an `Example:` section as code: griffe knows only the plural."""

import re

import griffe


class ExampleSection(griffe.Extension):
    """Reads `Example:` as `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite the heading in the docstring of each object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
