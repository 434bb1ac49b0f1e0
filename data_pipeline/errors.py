"""The errors of `data_pipeline` meant for its user: one line that names the thing, the value and the next step.

DataError
├── ShardMissingError   a file that the manifest lists is not there
├── ShardDamagedError   bytes differ from what the index or the manifest promises
├── SchemaError         a document or its JSON does not follow the schema
├── SourceError         a corpus, or an option of its source, cannot be used
├── FetchError          a corpus cannot be had
├── BuildError          the build cannot start or continue here
├── RepairError         damaged shards cannot be repaired from what is given
├── MediaError          the bytes of a media item are damaged, too large, or of a kind that is not read
│   └── BlockedMediaError  a blocklist names them
├── PromptError         a prompt or the file that holds prompts does not have the shape of one
├── ExportError         shards cannot be written where or as asked
├── StorageError        an object store cannot be reached, refuses, or is not what it was asked for
├── TokenizerError      a tokenizer cannot be trained or used as asked
├── ConfigError         the data config asks for something that does not exist or cannot be
├── StateError          a saved stream state cannot be continued with this config
├── LabelError          a document label has a value that an objective cannot learn
├── WindowError         batch sizes and ranks do not fit together, or a plan has no rows
└── CorruptionBudgetError  more samples are damaged than `data.corrupt_budget` allows
"""


class DataError(Exception):
    """Base of every user-facing error of this folder; the console script prints it and exits with 2."""


class ShardMissingError(DataError):
    """A file that the manifest lists is not there."""


class ShardDamagedError(DataError):
    """The bytes of a shard differ from what its index or the manifest promises."""


class SchemaError(DataError):
    """A document or its JSON does not follow the schema."""


class SourceError(DataError):
    """A corpus, or an option of its source, cannot be used."""


class FetchError(DataError):
    """A corpus cannot be had."""


class BuildError(DataError):
    """The build cannot start or continue here."""


class RepairError(DataError):
    """Damaged shards cannot be repaired from the source and options that are given."""


class MediaError(DataError):
    """The bytes of a media item are damaged, too large, or of a kind that is not read."""


class BlockedMediaError(MediaError):
    """A blocklist names the medium."""


class PromptError(DataError):
    """A prompt, or the file that holds prompts, does not have the shape of one."""


class ExportError(DataError):
    """Shards cannot be written in the layout or to the place asked for."""


class StorageError(DataError):
    """An object store cannot be reached, refuses, or a URL or setting of one cannot be used."""


class TokenizerError(DataError):
    """A tokenizer cannot be trained or used as asked."""


class ConfigError(DataError):
    """The data config asks for something that does not exist or cannot be."""


class StateError(DataError):
    """A saved stream state cannot be continued with this config."""


class LabelError(DataError):
    """A document label has a value that an objective cannot learn."""


class WindowError(DataError):
    """Batch sizes and ranks do not fit together, or a plan has no rows."""


class CorruptionBudgetError(DataError):
    """More samples are damaged than `data.corrupt_budget` allows."""
