"""Train a drafter with a loss of your own; hellinger_loss.py beside this script defines it.

python examples/train_with_own_loss.py [--smoke] [--folder runs/own_loss]
"""

import argparse

import drafttrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="20 steps through every stage")
    parser.add_argument("--folder", default="runs/own_loss")
    arguments = parser.parse_args()
    changes = {"plugins": ["hellinger_loss"], "loss": {"kind": "hellinger"}, "export.require": {}}
    drafter = drafttrain.train("demo", changes, folder=arguments.folder, smoke=arguments.smoke)
    print(f"exported: {drafter}")


if __name__ == "__main__":
    main()
