"""The methods that AlignX is compared with: merges of task vectors, and mixtures of whole FFNs."""
