"""`chargpt TOOL key=value …`: everything but training. `chargpt` alone lists the tools and their options."""

import sys

from chargpt import cli


def main() -> None:
    """The console command."""
    sys.exit(cli.run_tool(sys.argv[1:]))


if __name__ == "__main__":
    main()
