"""AlignX on DeepSpeed. Once imported, transformers' Auto classes load aligned models like any other."""

from alignx_ds import registration

registration.install()
