"""Training-free proposers, one file each."""

from drafttrain.core.registry import Registry

proposers = Registry("proposer", "drafttrain.eval.proposers")
