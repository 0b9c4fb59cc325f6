"""DFlash2: the block of DFlash with convolutions over its slots, and a selector that walks over each slot's best tokens."""
