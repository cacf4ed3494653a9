"""chargpt: character-level GPTs with six interchangeable attention types, in JAX and Equinox.

Importing the package switches on the runtime shape checker for the modules that handle arrays: every jaxtyping annotation
in them is verified by beartype when a function is traced, so that a compiled training step pays nothing for it. The others
stay free of it, and of JAX, so that a mistyped option is answered at once.
"""

from jaxtyping import install_import_hook

CHECKED = ("attention", "checkpoint", "corpus", "generate", "model", "optimizer", "train")

install_import_hook([f"chargpt.{name}" for name in CHECKED], "beartype.beartype")
