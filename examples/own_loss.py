"""Train a drafter with a loss of your own, defined in this script.

    python examples/own_loss.py [--smoke] [--folder runs/own_loss]

The loss is the squared Hellinger distance between the distributions p of the target and q of the drafter.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

import drafttrain
from drafttrain.core.loss_rows import LossRows
from drafttrain.core.settings import setting
from drafttrain.losses import Loss, losses


@dataclass
class HellingerSettings:
    """Squared Hellinger distance."""

    scale: float = setting(1.0, help="Factor on the loss.", gt=0)


@losses.register("hellinger", HellingerSettings)
class Hellinger(Loss):
    """scale * (1 - sum sqrt(p q)), by row."""

    def __init__(self, settings: HellingerSettings) -> None:
        super().__init__()
        self.scale = settings.scale

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the distance of each row."""
        affinity_N = (0.5 * (rows.log_p_NV + rows.log_q_NV)).exp().sum(dim=-1)
        return {"loss": self.scale * (1 - affinity_N)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="20 steps through every stage")
    parser.add_argument("--folder", default="runs/own_loss")
    arguments = parser.parse_args()
    drafter = drafttrain.train(
        "demo", {"loss": "{kind: hellinger}", "export.require": {}}, folder=arguments.folder, smoke=arguments.smoke
    )
    print(f"exported: {drafter}")


if __name__ == "__main__":
    main()
