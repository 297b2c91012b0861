"""Every error the library raises on purpose.

Each class derives from the built-in class that torch raises in the same situation, so that code (and tests) written for
torch keeps catching it, and from `TritonConvError`, so that ours can be told apart.
"""


class TritonConvError(Exception):
    """Base of all errors raised by triton_conv."""


class ArgumentError(TritonConvError, RuntimeError):
    """An argument's shape, size or value does not fit the others (torch: `RuntimeError`)."""


class ArgumentTypeError(TritonConvError, TypeError):
    """An argument is of the wrong Python type (torch: `TypeError`)."""


class ArgumentValueError(TritonConvError, ValueError):
    """An option is not one of the known ones, for instance an unknown padding mode (torch: `ValueError`)."""


class DeviceError(TritonConvError, RuntimeError):
    """The tensors are on a device where our kernels cannot run, or on several devices."""


class DtypeError(TritonConvError, RuntimeError):
    """The tensors' dtypes differ, or no kernel exists for the dtype."""


class PlanError(TritonConvError, RuntimeError):
    """No kernel, or no tile, can run this problem: the message lists what was ruled out and why."""


class CaptureError(TritonConvError, RuntimeError):
    """A call that would have to be planned or compiled was made while a CUDA graph was captured."""


class ConfigError(TritonConvError, ValueError):
    """A tile configuration, or a file of them, is malformed."""


class StaleConfigError(ConfigError):
    """A file of tile configurations was measured with other kernel code."""


class TrialsError(TritonConvError, ValueError):
    """A journal of trials is missing or malformed."""


class StoreError(TritonConvError, OSError):
    """A store of tile configurations cannot be written, or another tuner is writing it."""


class WorkloadError(TritonConvError, ValueError):
    """A workload, kernel or target name is not known."""


class ConfigWarning(UserWarning):
    """A configuration file was skipped: broken, of another schema, or written for another device."""


class FormWarning(UserWarning):
    """A kernel gave a wrong result where it was used for the first time, and a plainer one serves instead."""


class BackendWarning(UserWarning):
    """A layer that was meant for our kernels runs on torch's, and why."""
