"""Hugging Face architectures as mcore models."""

from oprd_megatron.models.build import DTYPES, Model, build_model
from oprd_megatron.models.micro_batch import MicroBatch
from oprd_megatron.models.schedule import no_output_loss, run_schedule

__all__ = ["DTYPES", "MicroBatch", "Model", "build_model", "no_output_loss", "run_schedule"]
