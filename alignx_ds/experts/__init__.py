"""Stage 1: one prompt-injected fine-tune per axis under ZeRO-3, and what stage 2 needs from it."""
