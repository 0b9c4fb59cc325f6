"""The same size of tree in every round."""

from dataclasses import dataclass

from drafttrain.core.proposals import Budget, Context
from drafttrain.core.settings import setting
from drafttrain.eval.length import TreeSizeSettings, WholeBudget, length_policies


@dataclass
class TreeSettings(TreeSizeSettings):
    """Draft a tree of the likeliest nodes (EAGLE-2), which are FIXED at every temperature."""

    num_draft_tokens: int = setting(24, help="Nodes of the tree without its root.", ge=1)
    depth: int = setting(5, help="Levels of the tree; a drafter with heads drafts at most one level per head.", ge=1)
    width: int = setting(4, help="Most children of a node.", ge=2)


@length_policies.register("tree", TreeSettings)
class TreeLength(WholeBudget):
    """A fixed number of nodes; the proposer chooses which ones."""

    def __init__(self, settings: TreeSettings | None = None) -> None:
        self.settings = settings or TreeSettings()

    def budget(self, context: Context) -> Budget:
        return Budget(self.settings.num_draft_tokens, self.settings.depth, self.settings.width)
