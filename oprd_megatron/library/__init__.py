"""OPRD for other people's loops: docs/integrate.md."""

from oprd_megatron.library.attach import Attachment, attach
from oprd_megatron.library.batches import TokenBatch, megatron_batch
from oprd_megatron.library.megatron_lm import representation_step, schedules_with_teacher
from oprd_megatron.library.teacher_service.client import RemoteTeacher, TeacherClient
from oprd_megatron.library.teachers import InProcessTeacher, StatesInBatch

__all__ = [
    "Attachment",
    "InProcessTeacher",
    "RemoteTeacher",
    "StatesInBatch",
    "TeacherClient",
    "TokenBatch",
    "attach",
    "megatron_batch",
    "representation_step",
    "schedules_with_teacher",
]
