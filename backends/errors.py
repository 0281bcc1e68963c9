"""Every error lensc raises on purpose, as one tree.

LensError
├── UsageError            a flag, argument or message list that cannot be meant (exit code 2)
├── InputError            a file or value from outside that is not what it should be
│   ├── PictureError      a picture that cannot be opened, or is outside the limits
│   ├── PromptError       a prompt that does not fit: too long, pictures missing or left over
│   ├── TokenizerError    tokenizer.json is missing, damaged or lacks a special token
│   ├── CheckpointError   config.json or safetensors: missing, unexpected, misshapen, damaged
│   └── ManifestError     manifest.json breaks a rule of the bundle format
│       ├── FormatTooNewError   written by a newer lensc
│       └── IntegrityError      a file's size or sha256 is not what the manifest says
├── GraphError            a graph cannot be made, or is not the one the manifest describes
│   └── ParityError       a graph or artifact does not compute what the reference computes
├── BackendError          an engine cannot do what was asked
│   ├── UnavailableError  the engine or the processor is not on this machine (names the install command)
│   ├── UnsupportedError  the engine is here, but not for this graph, scheme or target
│   ├── CompatibilityError  an artifact was built for another engine version, chip or shape
│   └── ExecutionError    the engine failed while it compiled, loaded or ran
├── StorageError          the disk is full, read-only or a path is not writable
└── MemoryLimitError      work needs, or took, more memory than the machine has or --max-memory allows

A message is one line: what was asked, what was found, what is accepted or what to do next.
"""


class LensError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1


class UsageError(LensError):
    exit_code = 2


class InputError(LensError):
    pass


class PictureError(InputError):
    pass


class PromptError(InputError):
    pass


class TokenizerError(InputError):
    pass


class CheckpointError(InputError):
    pass


class ManifestError(InputError):
    pass


class FormatTooNewError(ManifestError):
    pass


class IntegrityError(ManifestError):
    pass


class GraphError(LensError):
    pass


class ParityError(GraphError):
    pass


class BackendError(LensError):
    pass


class UnavailableError(BackendError):
    pass


class UnsupportedError(BackendError):
    pass


class CompatibilityError(BackendError):
    pass


class ExecutionError(BackendError):
    pass


class StorageError(LensError):
    pass


class MemoryLimitError(LensError):
    pass


def listed(items: list[str], separator: str = ", ", limit: int = 20) -> str:
    """The items in one line; beyond `limit` the rest becomes a count."""
    text = separator.join(items[:limit])
    return text if len(items) <= limit else f"{text}{separator}and {len(items) - limit} more"
