"""The place of a mixture where no expert changes the FFN: the backbone's FFN is a mixture of experts already."""

from __future__ import annotations

from torch import Tensor, nn

from alignx_ds.mocae.experts import Factors


class UnchangedFfn(nn.Module):
    """y = FFN(x), whatever the gates are: the experts of such a model change projections of its attention alone.

    The FFN's own router picks the FFN's own experts, token by token, as in the backbone by itself.
    """

    def __init__(self, ffn: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self._ffn = [ffn]  # a list hides the shared module from nn.Module's registration

    def factors(self) -> list[Factors]:
        """By global id: none."""
        return [Factors({}, {}) for _ in range(self.num_experts)]

    def forward(self, x: Tensor, gates: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """x [B, T, d] -> [B, T, d] in the dtype of x."""
        y: Tensor = self._ffn[0](x)
        return y
