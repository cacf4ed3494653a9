"""The console command: `chargpt TOOL key=value …`; without arguments it lists the tools."""

import sys

from chargpt import cli


def main() -> None:
    sys.exit(cli.run_tool(sys.argv[1:]))


if __name__ == "__main__":
    main()
