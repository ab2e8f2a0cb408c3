"""What a run would look like, before anything is downloaded or started: `oprd plan`.

`collect` makes the `figures`, `text` and `heat_map` show them; `step_time` says about how long a step takes on the machines
of `rates`, `room` whether it fits into their GPUs. Needs each model's config.json only; no process group, no mcore, no GPU.
"""

from oprd_megatron.planning.collect import plan_run
from oprd_megatron.planning.figures import RunPlan
from oprd_megatron.planning.rates import Cluster
from oprd_megatron.planning.room import check_room
from oprd_megatron.planning.step_time import step_times
from oprd_megatron.planning.text import plan_text

__all__ = ["Cluster", "RunPlan", "check_room", "plan_run", "plan_text", "step_times"]
