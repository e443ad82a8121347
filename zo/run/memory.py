"""The memory that one rank of a run allocates, computed before the first step."""

from zo.config.objective import reward_name
from zo.config.schema import Config
from zo.distributed.process_group import Mesh
from zo.method.table import LossTable
from zo.model.generate import cache_bytes
from zo.streaming.budget import Budget
from zo.streaming.replica import Replica


def memory_of(config: Config, mesh: Mesh, replica: Replica, table: LossTable) -> Budget:
    """Return the bytes that this rank allocates, by what they are for.

    Args:
        config: of the run.
        mesh: of the ranks.
        replica: the weights of this rank.
        table: of a step.
    """
    batch, shape = config.batch, mesh.shape
    sequences = table.fold * batch.micro
    folds = len(table.folds(mesh.rank, shape.perturb, shape.data))
    rows = sequences * batch.max_tokens
    cached = 0
    if reward_name(config.objective, config.data.name) is not None:
        # Completions of one fold are generated at a time.
        length = batch.max_tokens + config.generation.max_new_tokens
        cached = cache_bytes(replica.model, sequences * length)
    return replica.budget((folds * rows, rows), cached)
