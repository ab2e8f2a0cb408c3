"""What a run would look like, before anything is downloaded or started: `oprd plan`.

`collect` makes the `figures`, `text` and `heat_map` show them. Needs each model's config.json only; no process group, no
mcore, no GPU.
"""

from oprd_megatron.planning.collect import plan_run
from oprd_megatron.planning.figures import RunPlan
from oprd_megatron.planning.text import plan_text

__all__ = ["RunPlan", "plan_run", "plan_text"]
