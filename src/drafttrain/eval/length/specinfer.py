"""SpecInfer: a tree of a given expansion, whose siblings are drawn independently, so that a token may be drawn twice."""

from dataclasses import dataclass

from drafttrain.core.proposals import Budget, Context, DrawMode
from drafttrain.core.settings import setting
from drafttrain.eval.length import WholeBudget, length_policies
from drafttrain.eval.length.static_tree import BranchingSettings, StaticForm, full_shape


@dataclass
class SpecInferSettings(BranchingSettings):
    """Draw a tree with replacement, with the same number of children for all nodes of a level."""

    branching: list[int] = setting([1, 1, 3, 1, 1], help="Children of a node, by level; the first is the root's.", ge=1)


@length_policies.register("specinfer", SpecInferSettings)
class SpecInfer(WholeBudget):
    """The baseline of the other sampled trees: a token drawn twice is a node that is verified for nothing.

    Source: Miao et al. 2023, SpecInfer, arXiv 2305.09781, 3 and 4.
    """

    def __init__(self, settings: SpecInferSettings | None = None) -> None:
        self.settings = settings or SpecInferSettings()
        self._budget = StaticForm(full_shape(self.settings.branching), DrawMode.IID).budget()

    def budget(self, context: Context) -> Budget:
        return self._budget
