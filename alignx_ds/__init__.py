"""AlignX on DeepSpeed. Once imported, transformers' Auto classes load aligned models like any other."""

from alignx_ds.models import registration
from alignx_ds.runtime.versions import version

__version__ = version("alignx-ds")
registration.register()
