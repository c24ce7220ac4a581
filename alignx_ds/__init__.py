"""AlignX on DeepSpeed. Once imported, transformers' Auto classes load aligned models like any other."""

from alignx_ds.models import registration

registration.register()
