"""Errors a user can cause.

Raise one of these, with one line that says what is wrong, where, and what to do. Entry points print the line and exit
with code 2 (`oprd_megatron.cli`); anything else is a defect of this project and keeps its traceback.
"""


class UserError(ValueError):
    """Something the user can mend: a bad config, path, layout, model, prompt file or checkpoint."""


class ConfigError(UserError):
    """The run's YAML or an override on the command line is wrong; the message names the key."""


class LayoutError(UserError):
    """A parallel layout that cannot work; the message names the product or the divisor that failed."""


class DataError(UserError):
    """A prompt file, tokenizer or recorded rollout that cannot be used; the message names file and line."""


class CheckpointError(UserError):
    """A checkpoint or model directory that is missing, torn or does not fit; the message names the file."""


class TrainingDiverged(UserError):
    """A loss or gradient that is not finite; the message names step, rank and layer."""


class TeacherWeightsError(UserError):
    """A teacher that waited in host memory came back with other weights; the message names teacher and tensor."""


class StoppedEarly(UserError):
    """The run ended with a checkpoint before its last step, because it was asked to or had no time left; starting it again goes
    on."""


class WeightSyncError(UserError):
    """The rollout engine's weights are not the trainer's; the message gives the measured difference."""


class MismatchError(UserError):
    """The text is not of the policy that is trained; the message names the sample and the difference."""
