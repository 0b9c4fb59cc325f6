"""Recursive speculative decoding, constant form: every node of a level has the same number of children, drawn without replacement."""

from dataclasses import dataclass

from drafttrain.core.proposals import Budget, Context, DrawMode
from drafttrain.core.settings import setting
from drafttrain.eval.length import WholeBudget, length_policies
from drafttrain.eval.length.static_tree import BranchingSettings, StaticForm, full_shape


@dataclass
class RsdCSettings(BranchingSettings):
    """Draw a tree without replacement, with the same number of children for all nodes of a level."""

    branching: list[int] = setting([3, 2, 1, 1], help="Children of a node, by level; the first is the root's.", ge=1)


@length_policies.register("rsd_c", RsdCSettings)
class RsdC(WholeBudget):
    """Children are the Gumbel-top-k of their parent's distribution (`core.probability.draw_in_order`).

    Source: Jeon et al. 2024, Recursive Speculative Decoding, arXiv 2402.14160, 3.1.
    """

    def __init__(self, settings: RsdCSettings | None = None) -> None:
        self.settings = settings or RsdCSettings()
        self._budget = StaticForm(full_shape(self.settings.branching), DrawMode.WITHOUT_REPLACEMENT).budget()

    def budget(self, context: Context) -> Budget:
        return self._budget
