"""Train a character-level GPT: `python main.py model.mha_type=selective`.

Every option is a Hydra override; configs/default.yaml names them all.
"""

import sys

from chargpt.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
