"""What each of several processes does; run by a launcher: `python -m torch.distributed.run ... distilled.py OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import tpvprune as tp
from tests.recovery.test_processes import SETTINGS, losses_and_model


def main() -> None:
    """Distil, and leave losses and weights of this process in the folder."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in SETTINGS:
        losses, model = losses_and_model(name, folder / name)
        rank = torch.distributed.get_rank()
        assert torch.distributed.get_world_size() == 2
        weights = {key: value.double().flatten().tolist() for key, value in model.state_dict().items()}
        (folder / f"{name}-{rank}.json").write_text(json.dumps([losses, weights]))
    losses_and_model("plain", folder / "first alone" if rank == 0 else None)
    assert tp.__version__
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
