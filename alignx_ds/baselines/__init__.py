"""What AlignX is compared with: the same parts with other settings."""
