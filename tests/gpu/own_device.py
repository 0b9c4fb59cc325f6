"""What a process of several sees of its device: joins the others, adds ones up on its own device, writes what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from drafttrain.distributed.collectives import together
from drafttrain.distributed.world import world
from drafttrain.target_model.device import pick_device

if __name__ == "__main__":
    with together(timeout_seconds=120):
        device = pick_device("auto")
        sum_1 = torch.ones(1, device=device)
        torch.distributed.all_reduce(sum_1)
        found = {"sum": float(sum_1), "device": str(device), "visible": torch.cuda.device_count()}
        if device.type == "cuda":
            found |= {"device": str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)}
        Path(sys.argv[1], f"{world().rank}.json").write_text(json.dumps(found))
