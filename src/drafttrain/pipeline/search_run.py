"""The run of a drafter that has no weights to train: what it is made of is searched on training texts."""

from __future__ import annotations

from dataclasses import asdict

from drafttrain.core.files import folder_beside, write_json
from drafttrain.data_gen.training_data import TrainingData
from drafttrain.distributed.collectives import first_before_others
from drafttrain.distributed.world import is_first
from drafttrain.drafters import Drafter
from drafttrain.pipeline.data import encoded_data
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.training.result import TrainResult


class SearchRun(DrafterRun):
    """A run that searches: `train.batch_size` texts score the candidates of up to `train.max_steps` steps."""

    def _distil(self, data: TrainingData) -> None:
        drafter = self.start(data)
        with first_before_others("it searches"):
            if is_first():
                done = self._searched(drafter, data, num_steps=self.recipe.train.max_steps)
                write_json(self.folder.train_done, asdict(done))
                self.folder.remove_results()

    def _searched(self, drafter: Drafter, data: TrainingData, *, num_steps: int) -> TrainResult:
        """Search, and write the drafter as `last/`."""
        steps = drafter.search(
            self.target,
            data.first_records(self.recipe.train.batch_size),
            num_steps=num_steps,
            seed=self.recipe.seed,
            log=self.folder.search,
        )
        with folder_beside(self.folder.train / "last") as temporary:
            drafter.save(temporary)
        return TrainResult("last", steps, steps)

    def weights_so_far(self) -> TrainResult:
        """Write the best candidate of a search that has not ended."""
        data = encoded_data(self)
        with self.folder.search.open(encoding="utf-8") as log:
            scored = sum(line.endswith("\n") for line in log)
        return self._searched(self.start(data), data, num_steps=max(1, scored))
