"""How a method of vLLM's is replaced where vLLM offers no hook."""

from collections.abc import Callable
from functools import wraps
from typing import Any

_MARK = "_edlm_original"


def replace_method(cls: type, name: str, method: Callable[..., Any]) -> None:
    """Replace `cls.name` in this process, once.

    Args:
        method: called as `method(original, self, ...)`; it behaves like the original for
            whatever is not a block-diffusion model.
    """
    original = getattr(cls, name)
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(original, self, *args, **kwargs)

    setattr(replacement, _MARK, original)
    setattr(cls, name, replacement)
