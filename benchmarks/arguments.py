"""The arguments of the benchmarks: their own options, and what is left."""

import sys
from collections.abc import Sequence
from typing import Any


def read(arguments: Sequence[str], **own: Any) -> tuple[dict[str, Any], list[str]]:
    """`own` with the values of its NAME=VALUE arguments, and the other arguments.

    An option whose default is a number takes a positive one. The program ends if a value is none.
    """
    chosen, others = dict(own), []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in own:
            others.append(argument)
            continue
        wants_number = isinstance(own[name], int)
        if not value or (wants_number and not (value.isdigit() and int(value) > 0)):
            sys.exit(f"error: {argument}: write {name}=" + ("1 or more" if wants_number else "…"))
        chosen[name] = int(value) if wants_number else value
    return chosen, others


def read_all(arguments: Sequence[str], **own: Any) -> dict[str, Any]:
    """As `read`; the program ends if there is another argument."""
    chosen, others = read(arguments, **own)
    if others:
        sys.exit(f"error: {others[0]}: write {', '.join(f'{name}=…' for name in own)}")
    return chosen
