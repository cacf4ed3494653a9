"""The arguments of the benchmarks: their own options, and what is left."""

import sys
from collections.abc import Sequence
from typing import Any


def read(arguments: Sequence[str], **own: Any) -> tuple[dict[str, Any], list[str]]:
    """`own` with the values of its NAME=VALUE arguments, and the other arguments.

    An option whose default is a number takes a positive one; else the program ends.
    """
    chosen, others = dict(own), []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in own:
            others.append(argument)
        elif not isinstance(own[name], int):
            chosen[name] = value
        elif value.isdigit() and int(value) > 0:
            chosen[name] = int(value)
        else:
            sys.exit(f"error: {argument}: write {name}= and a positive number")
    return chosen, others


def read_all(arguments: Sequence[str], **own: Any) -> dict[str, Any]:
    """As `read`; the program ends if there is another argument."""
    chosen, others = read(arguments, **own)
    if others:
        sys.exit(f"error: {others[0]}: write {', '.join(f'{name}=…' for name in own)}")
    return chosen
