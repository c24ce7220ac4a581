"""AlignX on DeepSpeed. Once imported, transformers' Auto classes load aligned models like any other."""

from importlib import metadata

from alignx_ds.models import registration

__version__ = metadata.version("alignx-ds")
registration.register()
